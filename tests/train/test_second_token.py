"""Training also by the token after the next: the gradient, the schedule, and runs with it."""

import math

import pytest
import torch
import torch.nn.functional as F

from gpt2.config.model import IGNORE, GPT2Config
from gpt2.distributed import runtime
from gpt2.kernels import head_loss as head_loss_module
from gpt2.kernels.head_loss import head_loss, head_loss_reference
from gpt2.kernels.logits_loss import Later, second_targets
from gpt2.kernels.sampled_softmax import sample_ids
from gpt2.model.gpt import GPT
from gpt2.train import loop, second_token, setup
from gpt2.train.step import train_step

from ..conftest import error
from .test_loop import config, metrics

V, T, N, S = 1000, 16, 64, 384
SHARE = torch.tensor(0.4)


def targets(seed=0):
    made = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(seed))
    made[3::9] = IGNORE
    return made


def test_the_second_token_is_the_target_after_the_next_of_the_sequence():
    given = torch.tensor([5, 6, IGNORE, 8, 1, 2, 3, 4])
    assert second_targets(given, 4).tolist() == [6, IGNORE, 8, IGNORE, 2, 3, 4, IGNORE]


def in_full(logits, given, later, cap=0.0, raised=0.0):
    """(loss of the next token, that plus the share of the token after it), by the formula."""
    logits = (cap * torch.tanh(logits / cap) if cap else logits) + raised
    log_p = logits.log_softmax(-1)
    first = second = torch.zeros((), dtype=logits.dtype)
    for row, (a, b) in enumerate(zip(given.tolist(), later.tolist(), strict=True)):
        if a != IGNORE:
            first = first - log_p[row, a]
            second = second - (log_p[row, b] if b != IGNORE else 0.0)
    return first, first + SHARE * second


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("function", ["plain", "ours", "compiled"])
def test_loss_and_gradients_equal_the_formula(cap, function, reduction):
    x = torch.randn(N, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 16, dtype=torch.float64, requires_grad=True)
    given = targets()
    first, both = in_full(x @ weight.t(), given, second_targets(given, T), cap)
    counts = (given != IGNORE).sum() if reduction == "mean" else 1
    options = {"softcap": cap, "second": SHARE, "length": T}
    functions = {
        "plain": head_loss_reference,
        "ours": head_loss,
        "compiled": torch.compile(head_loss, backend="aot_eager"),
    }
    loss = functions[function](x, weight, given, 1024, reduction, **options)
    torch.testing.assert_close(loss, first / counts)
    found = torch.autograd.grad(loss, (x, weight))
    for ours, theirs in zip(found, torch.autograd.grad(both / counts, (x, weight)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_sampled_softmax_has_the_second_tokens_among_its_ids():
    x = torch.randn(N, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 16, dtype=torch.float64, requires_grad=True)
    given = targets()
    ids, columns, raised = sample_ids(given, V, S)
    later = second_targets(columns, T)
    known = later != IGNORE
    assert torch.equal(ids[later[known]], second_targets(given, T)[known])
    first, both = in_full(x @ weight[ids].t(), columns, later, raised=raised)
    loss = head_loss(x, weight, given, 1024, "sum", sampled=torch.tensor(S), second=SHARE, length=T)
    torch.testing.assert_close(loss, first)
    found = torch.autograd.grad(loss, (x, weight))
    for ours, theirs in zip(found, torch.autograd.grad(both, (x, weight)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_the_fp8_head_takes_second_tokens(cap):
    torch.manual_seed(0)
    x, weight = torch.randn(N + 6, 32), torch.randn(128, 32) * 0.2
    given = torch.randint(0, 128, (N + 6,))
    later = second_targets(given, 10)
    inputs = [t.double().requires_grad_() for t in (x, weight)]
    first, both = in_full(inputs[0] @ inputs[1].t(), given, later, cap)
    head = (x.bfloat16(), weight.bfloat16(), given, 128, cap, None, Later(later, SHARE))
    loss, *grads = head_loss_module._head_in_fp8(*head)
    assert loss.item() == pytest.approx(first.item(), rel=1e-2)
    for found, wanted in zip(grads, torch.autograd.grad(both, inputs), strict=True):
        assert 0.01 < error(found, wanted) < 0.1  # e5m2 keeps two bits of the mantissa


@pytest.mark.gpu
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_kernels_against_float64(cap, fp8, sampled):
    """Also where positions predict nothing, with a share that a recorded graph reads anew."""
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    torch.manual_seed(0)
    x = torch.randn(5000, 768, device="cuda", requires_grad=True)
    weight = (torch.randn(50257, 768, device="cuda") * 0.02).requires_grad_()
    given = torch.randint(0, 50257, (5000,), device="cuda")
    given[::7] = IGNORE
    ids, columns, raised = sample_ids(given, 50257, 16768) if sampled else (None, given, 0.0)
    logits = x.double() @ (weight.double()[ids] if sampled else weight.double()).t()
    logits = (cap * torch.tanh(logits / cap) if cap else logits) + raised
    later = second_targets(columns, 100).masked_fill(columns == IGNORE, IGNORE)
    first, second = (
        F.cross_entropy(logits, t, ignore_index=IGNORE, reduction="sum") for t in (columns, later)
    )
    share = torch.zeros((), device="cuda")
    size = torch.tensor(16768) if sampled else None
    operator = torch.ops.gpt2.head_loss_and_gradients
    arguments = x.detach().bfloat16(), weight.detach(), given, 50304, 2, fp8, cap, size, share, 100
    operator(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, *grads = operator(*arguments)
    for value in (0.0, 0.4):
        share.fill_(value)
        graph.replay()
        exact = torch.autograd.grad(first + value * second, (x, weight), retain_graph=True)
        assert error(loss, first) < 1e-4
        for found, wanted in zip(grads, exact, strict=True):
            assert error(found, wanted) < (0.1 if fp8 else 1e-2)
        assert not grads[0][::7].any()


def test_the_share_falls_to_nothing():
    given = config("data", "out", "--max_steps=100")
    shares = [second_token.share_at(step, given.optim) for step in (0, 30, 60, 99)]
    assert shares == pytest.approx([0.5, 0.25, 0.0, 0.0])


def test_only_training_looks_at_it():
    model = GPT(GPT2Config(n_layer=1, n_head=1, n_embd=16, vocab_size=V, block_size=T))
    idx, given = targets(1).clamp(min=0).view(4, T), targets().view(4, T)

    def gradient():
        loss = model(idx, given)
        return loss, torch.autograd.grad(loss, model.transformer.wpe.weight)[0]

    plain = gradient()
    model.second_share = SHARE
    torch.testing.assert_close(model.eval() and gradient(), plain)
    loss, with_second = model.train() and gradient()
    torch.testing.assert_close(loss, plain[0])
    assert error(with_second, plain[1]) > 0.1


RUN = ["--max_steps=10", "--vocab_size=512", "--learning_rate=1e-2"]


@pytest.mark.parametrize("loss", ["cross_entropy", "sampled_softmax"])
def test_a_run_learns_by_it_as_of_the_next_token_alone(data_dir, tmp_path, loss):
    found = []
    for name in (loss, f"{loss}+second"):
        loop.run(config(data_dir, tmp_path / name, *RUN, f"--loss={name}"))
        found.append((metrics(tmp_path / name), metrics(tmp_path / name, "val_loss")))
    (plain, val), (second, val_second) = found
    assert second[1] == pytest.approx(plain[1], abs=1e-5)  # the first loss is of fresh weights
    assert second[2] != plain[2]
    assert val_second[10] < math.log(512) - 0.3
    assert val_second[10] == pytest.approx(val[10], abs=0.5)


def test_each_step_has_its_share(data_dir, tmp_path):
    given = config(data_dir, tmp_path, *RUN, "--loss=cross_entropy+second")
    shares = []
    with runtime.start(given.system) as rt:
        state = setup.build(given, rt, None)
        try:
            for step in (0, 3, 7):
                state.step = step
                train_step(state, given, rt)
                shares.append(state.model.second_share.item())
        finally:
            state.loader.close()
    assert shares == pytest.approx([0.5, 0.25, 0.0])
