"""`torch.load` for untrusted files: it executes no code, and damage becomes a one-line error."""

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, first_line
from . import other_formats


def torch_load(path: Path) -> Any:
    """Reads a file of `torch.save` onto the CPU without executing code.

    Raises:
        UserError: the file is missing or damaged, or holds more than tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals([*_stand_ins(path)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, it is damaged or holds more than tensors and plain values "
            f"({first_line(error)})"
        ) from None
    except Exception as error:  # noqa: BLE001 - on damaged bytes the unpickler raises anything
        raise UserError(f"{path}: not a readable checkpoint ({first_line(error)})") from None


def _stand_ins(path: Path) -> list[tuple[type, str]]:
    """Maps every class GPTConfig in a pickle, such as build-nanogpt's, to our empty class."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001 - on damaged bytes the unpickler raises anything
        return []  # torch.load reports the damage
    return [(other_formats.GPTConfig, name) for name in named if name.endswith(".GPTConfig")]


def check_sums(path: Path) -> None:
    """Verifies the CRC-32 checksums of a file of `torch.save`. `torch.load` ignores them.

    Raises:
        UserError: a checksum differs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        damaged = first_line(error)
    if damaged:
        raise UserError(f"{path}: damaged ({damaged}); use another checkpoint")
