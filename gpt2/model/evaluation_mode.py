"""Evaluation: no dropout and no compiled code for a while, and logits that must be finite."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..errors import UserError
from .gpt import LanguageModel


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; after it each module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_logits(logits: Tensor) -> None:
    """Looks whether a choice among logits means anything; finite weights may still be too large.

    Raises:
        UserError: one is NaN or +inf: the choice among such would be the first token. A plugin may
            rule tokens out by -inf.
    """
    if (logits.isnan() | (logits == math.inf)).any():
        raise UserError(
            "the network's logits are not finite: its training has diverged, or its numbers are "
            "too large for this dtype; use an earlier checkpoint, or float32"
        )


def without_compiled_code(model: LanguageModel) -> AbstractContextManager[object]:
    """For texts of many lengths: compiled blocks would be compiled anew for them.

    A network that is compiled as a whole is compiled in `forward` alone, which neither scoring nor
    generation calls.
    """
    return torch.compiler.set_stance("force_eager") if model.compiled_apart else nullcontext()
