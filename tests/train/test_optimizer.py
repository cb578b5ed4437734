"""Schedule and parameter groups."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from gpt2.config.model import GPT2Config
from gpt2.config.train import OptimOptions
from gpt2.distributed.fsdp import gradient_norm
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.train.optimizer import build_optimizer, clip_gradients
from gpt2.train.optimizer_state import check_groups
from gpt2.train.schedules import learning_rate_at


def test_schedule_against_the_formula():
    o = OptimOptions(max_steps=100, warmup_steps=10, learning_rate=1.0, min_lr_ratio=0.1)
    rates = [learning_rate_at(step, o) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)  # half way down from 1 to 0.1
    assert rates[100] == pytest.approx(0.1)
    expected = 0.1 + 0.45 * (1 + math.cos(math.pi * 30 / 90))
    assert rates[40] == pytest.approx(expected)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_no_warmup():
    o = OptimOptions(max_steps=10, warmup_steps=0, learning_rate=2.0)
    assert learning_rate_at(0, o) == 2.0


def test_only_matrices_decay():
    model = GPT(GPT2Config(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100))
    optimizer = build_optimizer(model, OptimOptions())
    decay, plain = optimizer.param_groups
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decay["params"])
    assert all(p.ndim == 1 for p in plain["params"])
    grouped = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert grouped == {id(p) for p in model.parameters()}
    assert decay["fused"]
    assert decay["betas"] == (0.9, 0.95)


def test_fused_update_equals_the_paper():
    """One step by hand: Loshchilov & Hutter 2019, algorithm 2."""
    model = torch.nn.Linear(3, 2)
    o = OptimOptions(learning_rate=0.1, weight_decay=0.5)
    optimizer = build_optimizer(model, o)
    w, b = model.weight.detach().clone(), model.bias.detach().clone()
    model.weight.grad, model.bias.grad = torch.randn(2, 3), torch.randn(2)
    optimizer.step()
    # bias-corrected moments after one step are g and g², so the update is the sign of g
    torch.testing.assert_close(model.weight, w * (1 - 0.05) - 0.1 * model.weight.grad.sign())
    torch.testing.assert_close(model.bias, b - 0.1 * model.bias.grad.sign())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["adamw", "muon", "normuon"])
@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_clipping_inside_of_the_optimizer_is_clipping_before(name, limit, device):
    """Whether the norm is above the limit or below, up to the rounding of a division.

    Muon's momentum is in bf16 on a GPU, where that may be a step of 2^-9 in an update of 0.02.
    """
    found = []
    for inside in (False, True):
        torch.manual_seed(0)
        shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 64, "block_size": 16}
        model = GPT(GPT2Config(**shape)).to(device)
        optimizer = build_optimizer(model, OptimOptions(optimizer=name, learning_rate=0.1))
        for step in range(3):  # growing, as a factor common to all steps would change nothing
            for p in model.parameters():
                p.grad = torch.randn_like(p) * 10**step
            norm = gradient_norm(model.parameters())
            clip_gradients(optimizer, norm, limit, inside)
            if not inside and limit < 1:
                clipped = gradient_norm(model.parameters()).item()
                assert clipped == pytest.approx(limit, rel=1e-4)
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    for before, within in zip(*found, strict=True):
        atol = 1e-3 if device == "cuda" and name != "adamw" else 1e-5
        torch.testing.assert_close(within, before, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("kind", ["step", "exp_avg"])
def test_stored_tensors_have_the_size_of_their_kind(kind):
    """A count of steps is one number, even for a bias, whose other tensors have its shape."""
    model = GPT(GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=9))
    optimizer = build_optimizer(model, OptimOptions())
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    check_groups(optimizer, optimizer.state_dict(), Path("here"))
    for size in ((8,), (1, 8), (2,)):
        stored = optimizer.state_dict()
        last = max(stored["state"])  # the bias of the last norm
        if (kind, size) != ("exp_avg", (8,)):
            stored["state"][last] |= {kind: torch.ones(size)}
            with pytest.raises(UserError, match=f"here: {kind} of transformer.ln_f.bias is "):
                check_groups(optimizer, stored, Path("here"))


def test_stored_parameters_are_in_order():
    """By another order torch would give a parameter the moments of another, of another size."""
    model = GPT(GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=9))
    optimizer = build_optimizer(model, OptimOptions())
    stored = optimizer.state_dict()
    first = stored["param_groups"][0]["params"]
    for wrong in ([*first[1:], first[0]], [first[0], *first[:-1]]):
        stored["param_groups"][0]["params"] = wrong
        with pytest.raises(UserError, match="here: the parameters of the optimizer are not in ord"):
            check_groups(optimizer, stored, Path("here"))
