"""A warning about a torch that is newer than those the tests passed with."""

import functools
import re

import torch

from ..distributed.environment import is_first_rank
from .console import warn

NEWEST_TORCH = (2, 15)  # with which all tests passed


@functools.cache
def warn_of_newer_torch() -> None:
    """One warning in a process, on rank 0; newer versions are not refused."""
    text = newer_torch(torch.__version__)
    if text and is_first_rank():
        warn(text)


def newer_torch(version: str) -> str:
    """What is said of a version of torch, as "2.13.0+cpu"; empty if the tests passed with it."""
    release = re.match(r"(\d+)\.(\d+)", version)
    if not release or (int(release[1]), int(release[2])) <= NEWEST_TORCH:
        return ""
    major, minor = NEWEST_TORCH
    return (
        f"torch {version} is newer than {major}.{minor}, the newest that was tested; if something "
        f'fails, try: pip install "torch<{major}.{minor + 1}"'
    )
