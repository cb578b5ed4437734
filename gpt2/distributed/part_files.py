"""Files of FSDP parts, written and read without PyTorch's Distributed Checkpoint (DCP).

The plain form of `dcp.HuggingFaceStorageWriter` and its reader, which `fsdp` uses where PyTorch has
them; each form reads the files of the other. A rank's file has its rows of every tensor. Its header
says at which row of the whole tensor they begin.
"""

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError, first_line
from ..untrusted.parsing import load_json

OFFSETS = "DCP_SHARDING_INFO"  # the key under which DCP stores them


class Rows(NamedTuple):
    """This rank's rows of a tensor."""

    own: Tensor  # shares the memory of the tensor
    first: int  # row of the whole tensor
    shape: tuple[int, ...]  # of the whole tensor


def write(folder: Path, tensors: dict[str, Rows]) -> None:
    """Writes this rank's rows of all tensors; all ranks must call it.

    Raises:
        UserError: on all ranks, when one could not write.
    """
    rank, failures = dist.get_rank(), [""] * dist.get_world_size()
    # A rank without rows of a tensor leaves it out.
    present = {name: rows for name, rows in tensors.items() if rows.own.numel()}
    offsets = {
        name: {"saved_offsets": [rows.first] + [0] * (rows.own.dim() - 1)}
        for name, rows in present.items()
    }
    parts = {name: rows.own.detach().cpu().contiguous() for name, rows in present.items()}
    path = folder / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
    header = {"format": "pt", "DCP_VERSION": "1.0", OFFSETS: json.dumps(offsets)}
    try:
        save_file(parts, path, header)
        failure = ""
    except (OSError, safetensors.SafetensorError) as error:
        failure = first_line(error)
    dist.all_gather_object(failures, failure)
    if found := next(filter(None, failures), ""):
        raise UserError(f"checkpoint {folder} not written: {found}")


def read(folder: Path, tensors: dict[str, Rows]) -> None:
    """Fills this rank's rows of all tensors from the files of any number of ranks.

    Raises:
        UserError: tensors that are not there, or of another shape.
    """
    try:
        with contextlib.ExitStack() as stack:
            files = [
                stack.enter_context(safetensors.safe_open(path, "pt"))
                for path in sorted(folder.glob("shard-*.safetensors"))
            ]
            offsets = [load_json(file.metadata()[OFFSETS].encode(), folder, dict) for file in files]
            for name, rows in tensors.items():
                parts = [
                    (file.get_slice(name), of_file[name]["saved_offsets"][0])
                    for file, of_file in zip(files, offsets, strict=True)
                    if name in of_file
                ]
                _fill(name, rows, parts)
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder} does not fit the model: {first_line(error)}") from None


def _fill(name: str, rows: Rows, parts: list[tuple[Any, int]]) -> None:
    """Copies from (slice of a file, its first row) to this rank's rows of a tensor.

    Raises:
        ValueError: another shape, or rows that no file has.
    """
    shapes = [part.get_shape() for part, _ in parts]
    if sum(shape[0] for shape in shapes) != rows.shape[0] or any(
        tuple(shape[1:]) != tuple(rows.shape[1:]) for shape in shapes
    ):
        raise ValueError(f"{name} is missing, or not of shape {tuple(rows.shape)}")
    own, first = rows.own.detach(), rows.first
    for (part, start), shape in zip(parts, shapes, strict=True):
        begin, end = max(first, start), min(first + own.shape[0], start + shape[0])
        if begin < end:
            own[begin - first : end - first].copy_(part[begin - start : end - start])
