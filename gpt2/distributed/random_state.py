"""The random generators of a process: seeds, and their state for checkpoints."""

import random
from typing import Any

import torch


def seed(number: int) -> None:
    """Seeds every generator alike, so that all ranks make the same weights."""
    random.seed(number)
    torch.manual_seed(number)


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of the random generators of this rank, as plain values and tensors.

    The 625 words of Python's generator are a tensor: as numbers of a pickle, those of a thousand
    ranks would take a second to read.
    """
    version, words, normal = random.getstate()
    python = (version, torch.tensor(words), normal)
    state = {"python": python, "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores what `rng_state` gave; the words may be a tuple, as older checkpoints have them."""
    version, words, normal = state["python"]
    words = words.tolist() if isinstance(words, torch.Tensor) else words
    random.setstate((version, tuple(words), normal))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
