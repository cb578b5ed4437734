"""`torch.load` for files that nobody vouches for: no code is run, and damage becomes one line."""

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, first_line
from . import other_formats


def torch_load(path: Path) -> Any:
    """The content of a file of `torch.save`, tensors on the CPU, without running code.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors and plain values.
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
    """Maps every class GPTConfig that a pickle names, such as build-nanogpt's, to our empty one."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001 - on damaged bytes the unpickler raises anything
        return []  # torch.load will say what is wrong
    return [(other_formats.GPTConfig, name) for name in named if name.endswith(".GPTConfig")]


def check_sums(path: Path) -> None:
    """Verifies the CRC-32 sums in a file of `torch.save`, which `torch.load` does not do.

    Raises:
        UserError: a sum differs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        damaged = first_line(error)
    if damaged:
        raise UserError(f"{path}: damaged ({damaged}); use another checkpoint")
