"""The server's log on the console."""

import contextlib
import time
from collections import Counter

from ..report import console

REFUSALS_PER_SECOND = 10  # that get a line each; the others are counted


def log(event: str, text: str) -> None:
    """Logs one line with the time.

    Once nobody reads stdout any more (a closed pipe), lines are dropped: clients are still served.
    """
    with contextlib.suppress(BrokenPipeError):
        console.log(f"{time.strftime('%H:%M:%S')}  {event:9s}  {text}")


class Refusals:
    """Logs refused requests: a line each, and in a flood a line per second that counts them."""

    def __init__(self) -> None:
        self._second, self._lines = 0, 0
        self._more: Counter[int] = Counter()  # requests without a line, by status
        self._hosts: Counter[str] = Counter()  # their clients

    def note(self, status: int, reason: str, host: str) -> None:
        """Logs a refused request.

        Args:
            status: of the answer.
            reason: what the client is told; line breaks in it become spaces.
            host: the client's address.
        """
        now = int(time.monotonic())
        if now != self._second:
            self.log_rest()
            self._second, self._lines = now, 0
        if self._lines < REFUSALS_PER_SECOND:
            self._lines += 1
            log("refused", f"{status}  {' '.join(reason.split())} (from {host})")
        else:
            self._more[status] += 1
            self._hosts[host] += 1

    def log_rest(self) -> None:
        """Logs one line about the requests that were refused since, if any had no line."""
        if self._more:
            statuses = ", ".join(f"{status} × {n:,}" for status, n in sorted(self._more.items()))
            host, most = self._hosts.most_common(1)[0]
            log("refused", f"{self._more.total():,} more: {statuses} ({most:,} from {host})")
            self._more.clear()
            self._hosts.clear()


refusals = Refusals()
