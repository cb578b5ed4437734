"""The random generators of a process: seeds, and their state for checkpoints."""

import random
from typing import Any

import torch


def seed(number: int) -> None:
    """Seeds every generator alike, so that all ranks make the same weights."""
    random.seed(number)
    torch.manual_seed(number)


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of the random generators of this rank, as plain values and tensors."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores what `rng_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
