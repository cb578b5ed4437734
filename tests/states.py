"""Writes the training state of a model without a run around it."""

from pathlib import Path
from typing import Any

from torch import nn

from gpt2.checkpoint.training_state import write_state


def save_state(
    out_dir: Path, step: int, model: nn.Module, state: dict[str, Any], keep_last: int
) -> Path:
    """The folder of the new state."""
    tensors = model.state_dict()
    return write_state(out_dir, step, model.config, tensors, state, keep_last=keep_last)
