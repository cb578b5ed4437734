"""The exponential moving average (EMA) of the weights, for validation and the model for use.

With `--ema_steps=n`, both take the mean of the weights and of their EMA, whose past fades by 1/e in
n steps (Polyak & Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407). Training goes on with the
weights themselves: its losses and its resumed bits are those of a run without. The EMA is part of
the optimizer's state, so checkpoints hold it, and FSDP shards it like the parameters.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..distributed.fsdp import free_gathered, local

EVERY = 5  # steps between updates, which read and write the EMA once
SHARE = 0.5  # of the EMA in the mean. Of the EMA alone the loss was higher: it lags behind
NAME = "ema"  # in the optimizer's state of a parameter


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, step: int, horizon: int) -> None:
    """Moves the EMA towards the weights, every `EVERY` steps; the first time it copies them.

    Args:
        optimizer: of the parameters, after its update.
        step: optimizer steps done.
        horizon: steps in which the past fades by 1/e; 0: no EMA.
    """
    if not horizon or step % EVERY:
        return
    for p, state in _trained(optimizer):
        if NAME in state:
            local(state[NAME]).lerp_(local(p), 1 - math.exp(-EVERY / horizon))
        else:
            state[NAME] = p.detach().clone()


@contextlib.contextmanager
def averaged(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While it lasts, the parameters are the mean of weights and EMA, if there is one."""
    pairs = [(local(p.detach()), local(s[NAME])) for p, s in _trained(optimizer) if NAME in s]
    weights = [p.clone() for p, _ in pairs]
    try:
        for p, mean in pairs:
            p.lerp_(mean, SHARE)
        if pairs:
            free_gathered(model)
        yield
    finally:
        for (p, _), own in zip(pairs, weights, strict=True):
            p.copy_(own)
        if pairs:
            free_gathered(model)


def forget_average(optimizer: torch.optim.Optimizer) -> None:
    """Drops the EMA that a checkpoint brought, where a run goes on without one."""
    for _, state in _trained(optimizer):
        state.pop(NAME, None)


def _trained(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, dict]]:
    """Each parameter that the optimizer has updated, with its state."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if optimizer.state.get(p):
                yield p, optimizer.state[p]
