"""Training states under FSDP (`--parallel=fsdp`): all ranks write, then rank 0 renames the folder.

Distributed Checkpoint (`fsdp.write_parts`) writes one safetensors file per rank with the rank's
parts of weights and optimizer state. Tensors are named `model.<parameter>` and
`optimizer.<number>.<buffer>`. The other files are those of `training_state.py`.

Any number of ranks can read the state, with or without FSDP. Each rank assembles its tensors from
the overlapping parts.
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
from .state_schema import not_whole
from .training_state import Resumed, folder_of, new_state, write_rest
from .write_errors import bytes_of, write_errors


def write(
    out_dir: Path,
    step: int,
    config: GPT2Config,
    tensors: dict[str, dict],
    rest: dict[str, Any],
    *,
    keep_last: int,
    rt: Runtime,
) -> None:
    """Writes a state. All ranks call this together, with `out_dir` on a shared file system.

    Args:
        out_dir: the run's folder.
        step: optimizer steps done.
        config: the network's config.
        tensors: state dicts of `model` and `optimizer`.
        rest: other tensors and plain values; those of rank 0 are written.
        keep_last: number of newest states to keep.
        rt: this process.

    Raises:
        UserError: on all ranks, if one rank could not write; older states stay.
    """
    parts, optimizer = _split(tensors["model"], tensors["optimizer"])
    unfinished = contextlib.ExitStack()  # holds the temporary folder, on rank 0

    def finish() -> None:
        whole = rest | {"optimizer": optimizer}
        with write_errors(folder_of(out_dir, step), bytes_of(whole)):
            write_rest(folder, step, config, whole)
        unfinished.close()  # renames the folder

    try:
        folder = rt.on_main(lambda: unfinished.enter_context(new_state(out_dir, step, keep_last)))
        with rt.alone():
            fsdp.write_parts(folder, parts)
        rt.on_main(finish)
    except BaseException:
        with contextlib.suppress(UserError):
            unfinished.__exit__(*sys.exc_info())
        raise


def _split(model: dict[str, Tensor], optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict]:
    """(FSDP parts by name, optimizer state dict with None in place of each part)."""
    parts = {f"model.{name}": tensor for name, tensor in model.items()}
    state: dict[int, dict] = {}
    for number, values in optimizer["state"].items():
        buffers = {key: value for key, value in values.items() if fsdp.is_part(value)}
        parts |= {f"optimizer.{number}.{key}": value for key, value in buffers.items()}
        state[number] = values | dict.fromkeys(buffers)
    return parts, optimizer | {"state": state}


def read(model: torch.nn.Module, optimizer: torch.optim.Optimizer, resumed: Resumed) -> dict:
    """Loads FSDP parts into a model; returns the optimizer's state dict, sharded like the model.

    Raises:
        UserError: the parts do not fit the model.
    """
    parts = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    stored = resumed.state["optimizer"]
    parameters = _parameters(optimizer, stored, resumed.path)
    state = {}
    for number, values in stored["state"].items():
        buffers = {
            key: torch.zeros_like(parameters[number], requires_grad=False)
            for key, value in values.items()
            if value is None
        }
        parts |= {f"optimizer.{number}.{key}": tensor for key, tensor in buffers.items()}
        state[number] = values | buffers
    fsdp.read_parts(resumed.path, parts)
    return stored | {"state": state}


def shard_optimizer(optimizer: torch.optim.Optimizer, resumed: Resumed) -> dict:
    """Shards an unsharded optimizer state dict like the parameters. Without FSDP it stays whole."""
    stored = resumed.state["optimizer"]
    parameters = _parameters(optimizer, stored, resumed.path)
    if any(value is None for values in stored["state"].values() for value in values.values()):
        raise UserError(not_whole(resumed.path, "tensors of the optimizer are missing"))
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
    """The optimizer's parameters in the order of their numbers in an optimizer's state dict.

    Raises:
        UserError: the stored state has more parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(number >= len(parameters) for number in stored["state"]):
        raise UserError(f"{path} is of another optimizer, or of other weights that are trained")
    return parameters
