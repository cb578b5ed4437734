"""The server's log on the console."""

import contextlib
import time

from ..report import console


def log(event: str, text: str) -> None:
    """Logs one line with the time.

    Once nobody reads stdout any more (a closed pipe), lines are dropped: clients are still served.
    """
    with contextlib.suppress(BrokenPipeError):
        console.log(f"{time.strftime('%H:%M:%S')}  {event:9s}  {text}")
