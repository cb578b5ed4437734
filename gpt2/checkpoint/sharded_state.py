"""States of runs whose ranks hold parts (`--parallel=fsdp`): written by all, committed by one.

Model and moments are one safetensors file per rank, written and read by Distributed Checkpoint
(see `parallel.write_parts`), under the names `model.<parameter>` and `optimizer.<number>.<moment>`;
the rest is as in other states. Any number of ranks reads them, and so does a run without FSDP: a
tensor is put together from the parts that overlap what a rank holds.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.model import GPT2Config
from ..distributed import fsdp
from ..distributed.runtime import Runtime
from ..errors import UserError
from .training_state import Resumed, new_state, write_rest


def write(
    out_dir: Path,
    step: int,
    config: GPT2Config,
    tensors: dict[str, dict],
    rest: dict[str, Any],
    *,
    keep_last: int,
    rt: Runtime,
):
    """Commits a state; all ranks together, on a file system that all of them see.

    Args:
        out_dir: the run's folder.
        step: optimizer steps done.
        config: of the network.
        tensors: state dicts of `model` and `optimizer`.
        rest: everything else, tensors and plain values only, as rank 0 knows it.
        keep_last: how many states stay.
        rt: this process.

    Raises:
        UserError: on all ranks, if one could not write; older states are still there.
    """
    parts, optimizer = _apart(tensors["model"], tensors["optimizer"])
    commit = contextlib.ExitStack()  # closed on rank 0, where it holds the folder in the making

    def finish():
        write_rest(folder, step, config, rest | {"optimizer": optimizer})
        commit.close()

    try:
        folder = rt.on_main(lambda: commit.enter_context(new_state(out_dir, step, keep_last)))
        with rt.alone():
            fsdp.write_parts(folder, parts)
        rt.on_main(finish)
    except BaseException:
        with contextlib.suppress(UserError):
            commit.__exit__(*sys.exc_info())
        raise


def _apart(model: dict[str, Tensor], optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict]:
    """(tensors in parts by name, the optimizer's state dict with None in their place)."""
    parts = {f"model.{name}": tensor for name, tensor in model.items()}
    state: dict[int, dict] = {}
    for number, values in optimizer["state"].items():
        moments = {key: value for key, value in values.items() if fsdp.is_part(value)}
        parts |= {f"optimizer.{number}.{key}": value for key, value in moments.items()}
        state[number] = values | dict.fromkeys(moments)
    return parts, optimizer | {"state": state}


def read(model: torch.nn.Module, optimizer: torch.optim.Optimizer, resumed: Resumed) -> dict:
    """Fills a model from parts; the optimizer's state dict, its moments cut as the model is.

    Raises:
        UserError: the parts do not fit the model.
    """
    parts = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    stored = resumed.state["optimizer"]
    parameters = _parameters(optimizer, stored, resumed.path)
    state = {}
    for number, values in stored["state"].items():
        moments = {
            key: torch.zeros_like(parameters[number], requires_grad=False)
            for key, value in values.items()
            if value is None
        }
        parts |= {f"optimizer.{number}.{key}": tensor for key, tensor in moments.items()}
        state[number] = values | moments
    fsdp.read_parts(resumed.path, parts)
    return stored | {"state": state}


def cut(optimizer: torch.optim.Optimizer, resumed: Resumed) -> dict:
    """The optimizer's state dict of a state that is not in parts, cut as the optimizer's are."""
    stored = resumed.state["optimizer"]
    parameters = _parameters(optimizer, stored, resumed.path)
    state = {
        number: {
            key: fsdp.like(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for key, value in values.items()
        }
        for number, values in stored["state"].items()
    }
    return stored | {"state": state}


def _parameters(optimizer: torch.optim.Optimizer, stored: dict, path: Path) -> list[Tensor]:
    """By the numbers that state dicts of optimizers know them by."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(number >= len(parameters) for number in stored["state"]):
        raise UserError(f"{path} is of another optimizer, or of other weights that are trained")
    return parameters
