"""Muon against a plain reference."""

from dataclasses import replace

import pytest
import torch

from gpt2.config.train import BatchPlan, OptimOptions
from gpt2.errors import UserError
from gpt2.train import schedules
from gpt2.train.muon import POLYNOMIALS, normalise_rows, orthogonalise, row_factors
from gpt2.train.optimizer import build_optimizer
from gpt2.train.schedules import (
    attention_window_at,
    check_plan,
    learning_rate_at,
    micro_batches_at,
    momentum_at,
    sequences_left,
    set_rates,
)


def test_singular_values_come_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 16, 48)))
    assert values.min() > 0.85 and values.max() < 1.15  # noqa: PT018


def test_polynomials_take_all_but_the_smallest_to_one():
    """What is said beside them; and no value up to 1 runs away."""
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    y = x.clone()
    for a, b, c in POLYNOMIALS:
        y = a * y + b * y**3 + c * y**5
    assert y[x >= 0.001].min() > 0.85
    assert y.max() < 1.15
    assert y.min() == y[0] == 0


def reference(w, mean, grad, rate, momentum, squares=None):
    """One matrix, one step; Jordan et al. 2024, Amsel et al. 2025, with squares Li et al. 2025."""
    mean = momentum * mean + (1 - momentum) * grad
    x = momentum * mean + (1 - momentum) * grad
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    u, values, v = torch.linalg.svd(x, full_matrices=False)
    values = values / values.norm() / 1.02
    for a, b, c in POLYNOMIALS:
        values = a * values + b * values**3 + c * values**5
    x = u * values @ v
    x = x.T if tall else x
    if squares is not None:
        length = x.norm()
        for row in range(len(x)):
            squares[row] = 0.95 * squares[row] + 0.05 * (x[row] ** 2).mean()
        x = torch.stack([x[row] / squares[row] ** 0.5 for row in range(len(x))])
        x = x / x.norm() * length
    return w - rate * max(1, w.shape[0] / w.shape[1]) ** 0.5 * x, mean


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        sizes = {"c_attn": (8, 24), "c_fc": (8, 32), "c_proj": (32, 8)}
        block = torch.nn.ModuleDict({name: torch.nn.Linear(*size) for name, size in sizes.items()})
        self.transformer = torch.nn.ModuleDict({"h": torch.nn.ModuleList([block])})


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_three_steps_equal_the_reference(name):
    torch.manual_seed(0)
    net = Net()
    o = OptimOptions(optimizer=name, muon_lr=0.05, weight_decay=0.0, warmup_steps=0, max_steps=9)
    optimizer = build_optimizer(net, o)
    named = {n: p for n, p in net.named_parameters() if p.ndim == 2}
    wanted = {n: list(p.detach().clone().split(8 if "attn" in n else 99)) for n, p in named.items()}
    squares = {n: [[0.0] * len(m) if name == "normuon" else None for m in parts]
               for n, parts in wanted.items()}  # fmt: skip
    means = {n: [torch.zeros_like(m) for m in parts] for n, parts in wanted.items()}
    for step in range(3):
        set_rates(optimizer, step, o)
        rate = o.muon_lr * learning_rate_at(step, o) / o.learning_rate
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        for n, p in named.items():
            grads = p.grad.split(8 if "attn" in n else 99)
            for i, grad in enumerate(grads):
                wanted[n][i], means[n][i] = reference(
                    wanted[n][i], means[n][i], grad, rate, 0.95, squares[n][i]
                )
        optimizer.step()
    for n, p in named.items():
        torch.testing.assert_close(p.detach(), torch.cat(wanted[n]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_a_bad_gradient_changes_nothing(name):
    net = Net()
    optimizer = build_optimizer(net, OptimOptions(optimizer=name))
    for p in net.parameters():
        p.grad = torch.full_like(p, torch.nan)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert not any(t.any() for state in optimizer.state.values()
                   for kind, t in state.items() if kind in {"momentum", "squares"})  # fmt: skip


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_loss_scaling_of_float16(name):
    """A scaled gradient is the plain one; one that overflows changes nothing, and is counted."""
    torch.manual_seed(0)
    scaled, plain = Net(), Net()
    plain.load_state_dict(scaled.state_dict())
    optimizers = [build_optimizer(net, OptimOptions(optimizer=name)) for net in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for overflows in (False, True, False):
        for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
            q.grad = torch.randn_like(q)
            p.grad = scaler.scale(torch.tensor(1.0)) * q.grad
        if overflows:
            next(iter(scaled.parameters())).grad[0] = torch.inf
        else:
            optimizers[1].step()
        scaler.unscale_(optimizers[0])
        scaler.step(optimizers[0])
        scaler.update()
    assert scaler.get_scale() == 512.0
    for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_factors_of_rows_equal_the_plain_form():
    """Over three updates, the second of which is skipped; a matrix of zeros stays one."""
    torch.manual_seed(0)
    plain, factors = torch.zeros(2, 4, 1), torch.zeros(2, 4, 1)
    for skip in (0.0, 1.0, 0.0):
        update = torch.randn(2, 4, 6) * torch.tensor([1.0, 0.0])[:, None, None]
        wanted = normalise_rows(update, plain, torch.tensor(skip))
        found = update * row_factors(update, factors, torch.tensor(skip))
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(factors, plain)
    assert plain[0].all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 768, 3072), (3, 64, 64)])
def test_the_form_for_gpus_is_as_orthogonal(shape):
    x = torch.randn(shape, device="cuda")
    torch.testing.assert_close(orthogonalise(x).cpu(), orthogonalise(x.cpu()), atol=1e-3, rtol=1e-2)
    values = torch.linalg.svdvals(orthogonalise(x.bfloat16()).float())
    assert values.median() > 0.85
    assert values.max() < 1.2


def test_a_batch_that_no_longer_grows_may_have_one_micro_batch():
    """Else a run could not go on with more ranks."""
    o, one = OptimOptions(max_steps=10, batch_warmup=0.2), BatchPlan(2, 8, 1, 2)
    check_plan(2, o, one)
    with pytest.raises(UserError, match="smaller --batch_size"):
        check_plan(1, o, one)


def test_wsd_schedule():
    o = OptimOptions(schedule="wsd", cooldown=0.5, min_lr_ratio=0.0, max_steps=10, warmup_steps=2,
                     learning_rate=1.0)  # fmt: skip
    rates = [learning_rate_at(step, o) for step in range(11)]
    assert rates[:6] == [0.5, 1, 1, 1, 1, 1]
    torch.testing.assert_close(torch.tensor(rates[6:]), torch.tensor([0.8, 0.6, 0.4, 0.2, 0.0]))


@pytest.mark.parametrize(("schedule", "after"), [("wsd", 0.5), ("cosine", 0.28549664)])
def test_each_schedule_has_a_floor_of_its_own(schedule, after):
    """By default wsd falls to zero over the last 60 % of the steps, the cosine to a tenth."""
    o = OptimOptions(schedule=schedule, max_steps=100, warmup_steps=0, learning_rate=1.0)
    end = {"wsd": 0.0, "cosine": 0.1}[schedule]
    assert [learning_rate_at(step, o) for step in (70, 100)] == pytest.approx([after, end])
    assert learning_rate_at(100, replace(o, min_lr_ratio=0.3)) == pytest.approx(0.3)


def test_a_schedule_of_a_plugin_gets_a_floor_too(monkeypatch):
    """Its default is -1, which as a share would be a negative rate."""
    monkeypatch.setattr(schedules, "registered", lambda kind, name: lambda step, o: o.min_lr_ratio)
    o = OptimOptions(schedule="cosine", learning_rate=2.0)
    assert learning_rate_at(5, o) == 0.2
    assert learning_rate_at(5, replace(o, min_lr_ratio=0.5)) == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, "0.5", None, [1.0]])
def test_a_schedule_that_gives_no_share_is_refused(value, monkeypatch):
    """A NaN as learning rate would ruin the weights, and the checkpoints after it."""
    monkeypatch.setattr(schedules, "registered", lambda kind, name: lambda step, o: value)
    with pytest.raises(
        UserError, match=r"schedule=cosine gives .* at step 5; it must give a share"
    ):
        learning_rate_at(5, OptimOptions())


def test_schedules_by_eighths_and_the_momentum():
    o = OptimOptions(max_steps=80, batch_warmup=0.5, window_warmup=0.5, optimizer="muon",
                     muon_momentum_warmup=10)  # fmt: skip
    plan = BatchPlan(2, 32, 8, 1)
    batches = [micro_batches_at(step, o, plan) for step in range(80)]
    assert batches[0] == 1
    assert batches[39] == 7
    assert batches[40:] == [8] * 40
    assert batches == sorted(batches)
    assert [attention_window_at(step, o, 1024) for step in (0, 6, 39, 40)] == [128, 256, 896, 1024]
    twice = BatchPlan(2, 32, 16, 1)
    assert [micro_batches_at(s, o, twice) for s in range(80)] == [2 * n for n in batches]
    assert sequences_left(0, o, plan) == 2 * sum(batches)
    assert sequences_left(70, o, plan) == 2 * 8 * 10
    assert [momentum_at(s, o) for s in (0, 5, 10, 99)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert momentum_at(0, OptimOptions(optimizer="muon")) == 0.95


def test_decay_of_muon_alone():
    net = Net()
    o = OptimOptions(optimizer="muon", muon_weight_decay=0.5, weight_decay=0.1)
    decays = {n: g["weight_decay"] for g in build_optimizer(net, o).param_groups
              for n in g["names"]}  # fmt: skip
    assert {v for n, v in decays.items() if n.endswith("weight")} == {0.5}
    assert {v for n, v in decays.items() if n.endswith("bias")} == {0.0}


def test_the_work_split_over_ranks_is_the_same_update():
    """Each rank of three orthogonalises its share of four matrices; the sum has all of them."""
    torch.manual_seed(0)
    net, o = Net(), OptimOptions(optimizer="muon")
    alone = build_optimizer(net, o)
    stack = torch.randn(4, 8, 12)
    wanted, parts = alone._share(stack), []
    for rank in range(3):
        alone.rank, alone.world_size = rank, 3
        alone.all_sum = lambda part: parts.append(part) or part
        alone._share(stack)
    assert [sum(bool(m.any()) for m in part) for part in parts] == [2, 2, 0]
    torch.testing.assert_close(sum(parts), wanted)
