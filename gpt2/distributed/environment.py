"""Environment variables, among them those by which torchrun numbers its processes. No torch.

The command line asks here before torch is imported: help and typos are answered at once.
"""

import os
import sys
from typing import NamedTuple

from ..errors import UserError
from ..untrusted.display import shown


class Ranks(NamedTuple):
    """This process among those that torchrun started; alone without torchrun."""

    rank: int
    local_rank: int  # on this machine
    world_size: int
    on_this_machine: int  # how many of them


def ranks() -> Ranks:
    """RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE.

    Raises:
        UserError: they are not as torchrun sets them, such as left over from another program.
    """
    given = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1"))
    texts = {name: os.environ.get(name, default) for name, default in given}
    wrong = [f"{name}={shown(text)}" for name, text in texts.items() if not text.isdecimal()]
    if not wrong and int(texts["RANK"]) >= int(texts["WORLD_SIZE"]):
        wrong = [f"RANK={texts['RANK']}, WORLD_SIZE={texts['WORLD_SIZE']}"]
    if wrong:
        raise _not_of_torchrun(", ".join(wrong))
    return Ranks(*map(int, texts.values()))


def check_meeting_place() -> None:
    """Raises UserError where there are other ranks, and nothing says where to meet them."""
    if lacking := " and ".join(n for n in ("MASTER_ADDR", "MASTER_PORT") if not variable(n)):
        raise _not_of_torchrun(f"WORLD_SIZE={variable('WORLD_SIZE')} without {lacking}")


def _not_of_torchrun(what: str) -> UserError:
    return UserError(
        f"{what} in the environment is not what torchrun sets; start by torchrun, or unset RANK "
        "LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE"
    )


def variable(name: str) -> str:
    """A variable of the environment; empty where there is none."""
    return os.environ.get(name, "")


def unset(name: str) -> None:
    """Takes a variable away, from this process and those that it starts."""
    os.environ.pop(name, None)


def is_first_rank() -> bool:
    """Whether this process is rank 0 under torchrun, or there are no others."""
    rank, world_size = variable("RANK"), variable("WORLD_SIZE")
    numbers = rank.isdecimal() and world_size.isdecimal()
    return not (numbers and 0 < int(rank) < int(world_size))


def leave(code: int, at_once: bool = False) -> int:
    """The exit code of a run that is over; a process with others beside it ends here.

    So does a run that ends `at_once`, while a thread is still writing. During Python's shutdown a
    gloo thread that wants the GIL makes the process abort (seen once in hundreds of runs), and a
    finished run would be reported as failed.
    """
    if at_once or variable("WORLD_SIZE") not in ("", "1"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
