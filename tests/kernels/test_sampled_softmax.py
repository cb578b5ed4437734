"""The sampled softmax: which ids it takes, its estimate, its gradients, and runs with it."""

import math

import pytest
import torch
import torch.nn.functional as F

import gpt2
from gpt2.config.model import IGNORE, GPT2Config
from gpt2.distributed import runtime
from gpt2.errors import UserError
from gpt2.kernels import head_loss as head_loss_module
from gpt2.kernels.head_loss import head_loss, head_loss_reference
from gpt2.kernels.sampled_softmax import sample_ids, sampled_size
from gpt2.model.gpt import GPT
from gpt2.train import loop, setup, time_budget
from gpt2.train.step import train_step

from ..conftest import error
from ..train.test_loop import config, metrics

V, S, N = 1000, 384, 64


def targets(seed=0, n=N, vocab=V):
    made = torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed))
    made[3::9] = IGNORE
    return made


def test_a_third_of_the_vocabulary_in_tiles():
    assert sampled_size(50257) == 16768 == 131 * 128
    assert sampled_size(512) == 128


def test_the_targets_are_among_the_ids_and_others_stand_for_more():
    given = targets()
    ids, columns, raised = sample_ids(given, V, S)
    assert len(ids.unique()) == S
    predicted = given != IGNORE
    assert torch.equal(ids[columns[predicted]], given[predicted])
    assert (columns[~predicted] == IGNORE).all()
    different = len(given[predicted].unique())
    is_target = torch.isin(ids, given)
    assert int(is_target.sum()) == different
    assert (raised[is_target] == 0).all()
    k = torch.tensor((V - different) / (S - different))
    torch.testing.assert_close(raised[~is_target], k.log().expand(S - different))


def test_equal_targets_draw_equal_ids_and_others_draw_others():
    first, again, other = (sample_ids(targets(seed), V, S)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first.sort().values, other.sort().values)


def test_every_other_id_is_drawn_as_often():
    """Ids that are never targets, over 2,000 draws: six standard deviations of a fair draw."""
    counts, share = torch.zeros(V), 0.0
    for seed in range(2000):
        given = targets(seed, vocab=100)
        ids = sample_ids(given, V, S)[0]
        counts[ids] += 1
        different = len(given.unique()) - 1
        share += (S - different) / (V - different) / 2000
    deviation = (2000 * share * (1 - share)) ** 0.5
    assert (counts[100:] - 2000 * share).abs().max() < 6 * deviation


def test_the_estimate_of_the_sum_has_no_bias():
    logits = 2 * torch.randn(V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = []
    for seed in range(2000):
        ids, _, raised = sample_ids(targets(seed), V, S)
        sums.append((logits[ids] + raised).exp().sum())
    found, exact = torch.stack(sums), logits.exp().sum()
    assert abs(found.mean() - exact) < 4 * found.std() / 2000**0.5
    assert 0.01 < found.std() / exact < 0.2


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_gradients_equal_the_formula(cap, compiled):
    x = torch.randn(N, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 16, dtype=torch.float64, requires_grad=True)
    given = targets()
    function = torch.compile(head_loss, backend="aot_eager") if compiled else head_loss
    loss = function(x, weight, given, 1024, "mean", softcap=cap, sampled=torch.tensor(S))
    found = torch.autograd.grad(loss, (x, weight))
    ids, columns, raised = sample_ids(given, V, S)
    logits = x @ weight[ids].t()
    logits = (cap * torch.tanh(logits / cap) if cap else logits) + raised
    exact = F.cross_entropy(logits, columns, ignore_index=IGNORE)
    torch.testing.assert_close(loss, exact)
    for ours, theirs in zip(found, torch.autograd.grad(exact, (x, weight)), strict=True):
        torch.testing.assert_close(ours, theirs)
    others = torch.ones(V, dtype=torch.bool).index_fill_(0, ids, False)
    assert not found[1][others].any()


def test_all_ids_are_the_whole_softmax():
    x, weight, given = torch.randn(N, 16), torch.randn(V, 16), targets()
    found = head_loss(x, weight, given, 1024, "sum", sampled=torch.tensor(V))
    torch.testing.assert_close(found, head_loss_reference(x, weight, given, 1024, "sum"))


def test_targets_beyond_the_ids_do_not_train():
    x, weight = torch.randn(N, 16, requires_grad=True), torch.randn(V, 16)
    given = torch.arange(N)
    loss = head_loss(x, weight, given, 1024, "sum", sampled=torch.tensor(40))
    (gradient,) = torch.autograd.grad(loss, x)
    assert int((gradient.abs().sum(1) > 0).sum()) == 40


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_the_fp8_head_takes_raised_logits(cap):
    torch.manual_seed(0)
    x, weight = torch.randn(70, 32), torch.randn(128, 32) * 0.2
    given, raised = torch.randint(0, 128, (70,)), torch.where(torch.arange(128) < 64, 0.0, 1.7)
    inputs = [t.double().requires_grad_() for t in (x, weight)]
    logits = inputs[0] @ inputs[1].t()
    logits = (cap * torch.tanh(logits / cap) if cap else logits) + raised
    exact = F.cross_entropy(logits, given, reduction="sum")
    head = (x.bfloat16(), weight.bfloat16(), given, 128, cap, raised)
    loss, *grads = head_loss_module._head_in_fp8(*head)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    for found, wanted in zip(grads, torch.autograd.grad(exact, inputs), strict=True):
        assert 0.01 < error(found, wanted) < 0.1  # e5m2 keeps two bits of the mantissa


RUN = ["--loss=sampled_softmax", "--max_steps=20", "--vocab_size=512"]


def test_only_training_samples():
    model = GPT(GPT2Config(n_layer=1, n_head=1, n_embd=16, vocab_size=V, block_size=N))
    idx, given = targets(1).clamp(min=0)[None], targets()[None]
    whole = model.eval()(idx, given)
    model.sampled_ids = torch.tensor(S)
    torch.testing.assert_close(model(idx, given), whole)
    hidden, weight = model.hidden(idx).flatten(0, 1), model.head_weight
    expected = head_loss(hidden, weight, given.flatten(), 1024, "mean", sampled=torch.tensor(S))
    sampled = model.train()(idx, given)
    torch.testing.assert_close(sampled, expected)
    assert 1e-6 < abs(sampled - whole) < 0.1  # fresh weights: both near ln V


def test_a_run_learns_by_it(data_dir, tmp_path, capsys):
    loop.run(config(data_dir, tmp_path, *RUN, "--learning_rate=1e-2"))
    assert "softmax over 128 of 512 ids (" in capsys.readouterr().out
    assert metrics(tmp_path)[1] == pytest.approx(math.log(512), abs=0.2)
    assert metrics(tmp_path, "val_loss")[20] < 6


def test_a_vocabulary_too_small_for_a_micro_batch_is_refused(data_dir, tmp_path):
    """512 ids, of which 128 would be taken."""
    for loss, other in (("sampled_softmax", ""), ("sampled_softmax+second", r"\+second")):
        given = config(data_dir, tmp_path, f"--loss={loss}", "--batch_size=32")
        said = rf"takes 128 of the 512 ids, .* has \d+ different .*use --loss=cross_entropy{other},"
        with pytest.raises(UserError, match=said):
            loop.run(given)


def test_a_loss_of_a_plugin_is_not_taken_for_it(data_dir, tmp_path, capsys):
    gpt2.register("loss", "sampled_softmax_2")(lambda x, y: F.cross_entropy(x, y, reduction="none"))
    loop.run(config(data_dir, tmp_path, "--loss=sampled_softmax_2", "--max_steps=1"))
    assert "softmax over" not in capsys.readouterr().out


def test_the_last_tenth_takes_the_whole_softmax(data_dir, tmp_path, monkeypatch):
    sizes = []
    given = config(data_dir, tmp_path, *RUN)
    with runtime.start(given.system) as rt:
        state = setup.build(given, rt, None)
        try:
            monkeypatch.setattr(state.graph, "forget", lambda: sizes.append("forget"))
            for step in (0, 17, 18, 19, 3):
                state.step = step
                train_step(state, given, rt)
                sizes.append(int(state.model.sampled_ids))
        finally:
            state.loader.close()
    assert sizes == [128, 128, "forget", 0, 0, "forget", 128]


def test_equal_seconds_count_both_speeds(data_dir, tmp_path, monkeypatch):
    """A whole softmax that takes twice as long makes a tenth of the steps cost twice as much."""
    given = config(data_dir, tmp_path, *RUN)
    with runtime.start(given.system) as rt:
        state = setup.build(given, rt, None)
        times = {True: 1e-4, False: 2e-4}

        def seconds(state, config, rt, stretch):
            train_step(state, config, rt)
            return times[int(state.model.sampled_ids) > 0]

        monkeypatch.setattr(time_budget, "seconds_per_token", seconds)
        try:
            found, begin = time_budget.calibrate(state, given, rt, 10.0)
        finally:
            state.loader.close()
    tokens = state.plan.tokens_per_step
    assert begin == 1e-4
    assert found.optim.max_steps == int(10 * (1 - time_budget.SLOWER) / 1.1e-4 / tokens)
