"""`torch.load` for untrusted files: it executes no code, and damage becomes a one-line error.

Memory stays in proportion to the file. The zip archive and its pickle are checked before they are
unpickled, and tensors are mapped from the file, so that a refused file is never read whole.
"""

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line
from ..untrusted.display import shown
from . import other_formats

MAX_ENTRIES = 50_000  # of the zip archive; GPT-2 XL with AdamW's moments has 1,747
# torch unpickles in Python: 1.5 µs for a byte that is an operation, 6 µs for one that makes an
# object. The pickle of XL's training state, of 580 parameters, takes 316 kB with 1,024 ranks.
MAX_PICKLE_BYTES = 3 * 2**18
ZIP_END_BYTES, ZIP64_END_BYTES = 22, 98  # of the last record; with the two records of 64-bit form
# One-byte opcodes that make an object: marks, empty containers, tuples, calls. The largest object,
# an empty set, takes 240 bytes.
ALLOCATING = (b"(", b"]", b"}", b")", b"\x8f", b"\x85", b"\x86", b"\x87", b"t", b"l", b"d", b"R")
MAX_ALLOCATING = 80_000
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def torch_load(path: Path) -> Any:
    """Reads a file of `torch.save` without executing code.

    Tensors are mapped from the file; `in_memory` copies them. They are dense, and together no
    larger than the file.

    Raises:
        UserError: the file is missing or damaged, or holds more than tensors and plain values.
    """
    try:
        _check_archive(path)
        with torch.serialization.safe_globals([*_stand_ins(path)]):
            content = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
        _check_content(content, path.stat().st_size)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError as error:
        if names := _classes(path):
            listed = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
            raise UserError(
                f"{path}: refused, it holds more than tensors and plain values: {shown(listed)}; "
                "save numbers by float() or .item(), and of a module its state_dict()"
            ) from None
        reason = first_line(error)
        if reason.startswith("Weights only load failed"):  # torch's advice is to trust the file
            reason = "its pickle is damaged"
        raise UserError(
            f"{path}: refused, it is damaged or holds more than tensors and plain values "
            f"({shown(reason)})"
        ) from None
    except Exception as error:  # noqa: BLE001 - on damaged bytes the unpickler raises anything
        raise UserError(f"{path}: not a readable checkpoint ({shown(first_line(error))})") from None
    return content


def in_memory(tree: Any) -> Any:
    """Copies the tensors in dicts, lists and tuples, so that the file may change or vanish.

    Tensors that share their values, such as a tied head, share one copy.
    """
    return _copied(tree, {})


def _copied(tree: Any, copies: dict[Any, Any]) -> Any:
    key = _values_of(tree) if isinstance(tree, Tensor) else id(tree)
    if key not in copies:
        if isinstance(tree, Tensor):
            copies[key] = tree.detach().clone()
        elif isinstance(tree, dict):
            copies[key] = {name: _copied(value, copies) for name, value in tree.items()}
        elif isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
            copies[key] = type(tree)(_copied(value, copies) for value in tree)
        else:
            return tree
    return copies[key]


def _values_of(tensor: Tensor) -> tuple:
    """Equal for tensors that show the same numbers of one memory."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


# ---- before unpickling --------------------------------------------------------------------------


def _check_archive(path: Path) -> None:
    """Compares what a zip archive claims with what it holds.

    Raises:
        pickle.UnpicklingError: compressed or overlapping entries, or too many objects.
        zipfile.BadZipFile: not an archive of `torch.save`.
        OSError: the file is missing or unreadable.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise zipfile.BadZipFile("not a file")
    if _entries(path) > MAX_ENTRIES:
        raise pickle.UnpicklingError(f"more than {MAX_ENTRIES:,} entries")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise pickle.UnpicklingError("an entry is compressed; torch.save compresses none")
        if sum(max(entry.file_size, entry.compress_size) for entry in entries) > size:
            raise pickle.UnpicklingError("its entries are larger than the file")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                if entry.file_size > MAX_PICKLE_BYTES:
                    raise pickle.UnpicklingError(f"a pickle of over {MAX_PICKLE_BYTES:,} bytes")
                data = archive.read(entry)
                if sum(data.count(opcode) for opcode in ALLOCATING) > MAX_ALLOCATING:
                    raise pickle.UnpicklingError(f"more than {MAX_ALLOCATING:,} objects")


def _entries(path: Path) -> int:
    """Number of entries of a zip archive, from its last bytes.

    Raises:
        zipfile.BadZipFile: the file does not end like an archive of `torch.save`.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"GGUF":
            raise zipfile.BadZipFile(
                "a file for llama.cpp and Ollama; give the checkpoint that it was made from"
            )
        file.seek(max(0, path.stat().st_size - ZIP64_END_BYTES))
        end = file.read()
    if not end.startswith(b"PK\x05\x06", max(0, len(end) - ZIP_END_BYTES)):
        raise zipfile.BadZipFile("cut short, or not written by torch 1.6 or newer")
    (number,) = struct.unpack_from("<H", end, len(end) - ZIP_END_BYTES + 10)
    if number == 0xFFFF:  # the number is in the record of the 64-bit form
        if not end.startswith(b"PK\x06\x06"):
            raise zipfile.BadZipFile("its number of entries is missing")
        (number,) = struct.unpack_from("<Q", end, 32)
    return number


def _classes(path: Path) -> list[str]:
    """Classes and functions that a pickle names, and that are not loaded."""
    try:
        _check_archive(path)
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # noqa: BLE001 - on damaged bytes the unpickler raises anything
        return []


def _stand_ins(path: Path) -> list[tuple[type, str]]:
    """Maps every class GPTConfig in a pickle, such as build-nanogpt's, to our empty class."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001 - on damaged bytes the unpickler raises anything
        return []  # torch.load reports the damage
    return [(other_formats.GPTConfig, name) for name in named if name.endswith(".GPTConfig")]


# ---- after unpickling ---------------------------------------------------------------------------


def _check_content(content: Any, file_bytes: int) -> None:
    """Raises UnpicklingError unless all is plain values and dense tensors that fit into the file.

    Containers may refer to one another in circles; each is visited once.
    """
    seen: set[int] = set()
    held: dict[tuple, int] = {}  # bytes of tensors; those that share their values count once
    stack = [content]
    while stack:
        value = stack.pop()
        if type(value) in PLAIN or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            stack += value
        elif isinstance(value, other_formats.GPTConfig):
            stack += vars(value).values()
        elif type(value) in (Tensor, nn.Parameter):
            held[_check_tensor(value)] = value.nbytes
        else:
            raise pickle.UnpicklingError(f"a value of type {type(value).__name__}")
    if sum(held.values()) > file_bytes:
        raise pickle.UnpicklingError("its tensors are larger than the file")


def _check_tensor(tensor: Tensor) -> tuple:
    """Raises UnpicklingError for a tensor that is not dense; returns `_values_of` it.

    A tensor with a stride of 0 claims more numbers than its memory holds.
    """
    odd = tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested
    if odd or tensor.dtype not in DTYPES:
        raise pickle.UnpicklingError(
            f"a tensor of type {tensor.dtype}, {tensor.layout}, on {tensor.device}"
        )
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != step and tensor.numel():
            raise pickle.UnpicklingError(f"a tensor of shape {tuple(tensor.shape)} is not dense")
        step *= size
    return _values_of(tensor)


def check_sums(path: Path) -> None:
    """Verifies the CRC-32 checksums of a file of `torch.save`. `torch.load` ignores them.

    Raises:
        UserError: a checksum differs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # noqa: BLE001 - on damaged bytes zipfile raises anything
        damaged = first_line(error)
    if damaged:
        raise UserError(f"{path}: damaged ({shown(damaged)}); use another checkpoint")
