"""Environment variables, among them those by which torchrun numbers its processes. No torch.

The command line asks here before torch is imported: help and typos are answered at once.
"""

import os
import sys
from typing import NamedTuple


class Ranks(NamedTuple):
    """This process among those that torchrun started; alone without torchrun."""

    rank: int
    local_rank: int  # on this machine
    world_size: int
    on_this_machine: int  # how many of them


def ranks() -> Ranks:
    """RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE."""
    given = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1"))
    return Ranks(*(int(os.environ.get(name, default)) for name, default in given))


def variable(name: str) -> str:
    """A variable of the environment; empty where there is none."""
    return os.environ.get(name, "")


def is_first_rank() -> bool:
    """Whether this process is rank 0 under torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def leave(code: int, at_once: bool = False) -> int:
    """The exit code of a run that is over; a process with others beside it ends here.

    So does a run that ends `at_once`, while a thread is still writing. During Python's shutdown a
    gloo thread that wants the GIL makes the process abort (seen once in hundreds of runs), and a
    finished run would be reported as failed.
    """
    if at_once or ranks().world_size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
