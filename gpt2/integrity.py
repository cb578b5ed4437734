"""Whether the files of a checkpoint are those that were written."""

import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from .commit import fingerprint, first_line
from .options import UserError


def check_files(path: Path, files: dict[str, Any], names: list[str], verify: bool):
    """Compares a folder with its manifest, whose names cannot point elsewhere.

    Args:
        path: the folder.
        files: name -> `fingerprint`, by the manifest.
        names: those that there must be, fixed or of a fixed form.
        verify: whether the files are read.

    Raises:
        UserError: one is damaged, or there is one more.
        KeyError: one is not in the manifest.
        OSError: one is not there.
    """
    # Parts are found by looking into the folder, where nothing else must lie
    odd = {p.name for p in path.glob("*.safetensors")} - set(names)
    if odd:
        raise UserError(f"{path}: {min(odd)} is not in its manifest")
    with ThreadPoolExecutor() as pool:  # hashing lets go of Python's lock
        prints = pool.map(lambda n: fingerprint(path / n) if verify else files[n], names)
        for name, found in zip(names, prints, strict=True):
            if found != files[name]:
                raise UserError(f"{path}: {name} is damaged (its sha256 differs)")


def size_of(tree: Any) -> int:
    """Bytes of the tensors in nested dicts and lists."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        tree = list(tree.values())
    return sum(map(size_of, tree)) if isinstance(tree, list | tuple) else 0


def check_sums(path: Path):
    """Compares the check sums that are in a file of torch.save, which torch.load does not.

    Raises:
        UserError: a part that differs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        damaged = first_line(error)
    if damaged:
        raise UserError(f"{path}: damaged ({damaged}); use another checkpoint")
