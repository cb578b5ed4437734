"""Names the rank that hangs, for which the other ranks would wait in silence.

Each rank publishes its progress every tenth of the limit. A rank without progress for the whole
limit reads what the others have published, logs which of them is behind or silent, and ends its
process; torchrun then ends the others. A rank that works alone, such as rank 0 writing a checkpoint
to a slow disk, publishes that too and is waited for.

NCCL's own monitor ends a process after its timeout without naming the rank that hangs, and gloo has
none; torchft restarts replicas, which is another and larger mechanism.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

from .store import Store

HUNG = 75  # exit code: "try again" of sysexits.h
PATIENCE = 1800.0  # seconds for what a rank does alone


class Watchdog:
    """Watches this rank, and remembers the last signs of life of the others.

    Args:
        store: shared by all ranks.
        rank: of this process.
        world_size: number of ranks.
        seconds: without progress, after which the process ends.
        log: gets the one line that names the rank.
        leave: gets the exit code and does not return.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        seconds: float,
        log: Callable[[str], None],
        leave: Callable[[int], None] = os._exit,
    ):
        self._store, self._rank, self._world_size = store, rank, world_size
        self._seconds, self._log, self._leave = seconds, log, leave
        self._period = min(30.0, seconds / 10)
        self._recent = max(2.0, 4 * self._period)  # seconds; a busy machine is late now and then
        self._step = self._beats = self._alone = 0
        self._armed = False
        self._moved = self._published = time.monotonic()
        self._seen: dict[int, tuple[str, float]] = {}  # what a rank last published, and when
        self._closed = threading.Event()
        for work in (self._publish, self._watch):  # two: the store may hang as well
            threading.Thread(target=work, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Counts progress; all ranks call it at the same places of the program."""
        self._beats += 1
        self._moved = time.monotonic()

    def reached(self, step: int) -> None:
        """Counts a finished step. The limit applies after the first, which may compile."""
        self._step, self._armed = step, True
        self.beat()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Around work for which the other ranks wait."""
        self._alone += 1
        try:
            yield
        finally:
            self._alone -= 1
            self._moved = time.monotonic()

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()

    def _publish(self) -> None:
        number = 0
        while not self._closed.wait(self._period if number else 0):
            number += 1
            own = f"{self._beats} {self._step} {self._alone} {number} {_who()}"
            try:
                self._store.set(str(self._rank), own)
                for rank in range(self._world_size):
                    text = self._store.get(str(rank)).decode()
                    if self._seen.get(rank, ("",))[0] != text:
                        self._seen[rank] = text, time.monotonic()
            except RuntimeError:  # torch's errors of a store that is gone: it does not answer
                continue
            self._published = time.monotonic()

    def _watch(self) -> None:
        excused = 0.0  # when another rank was last seen to work alone
        while not self._closed.wait(self._period / 2):
            now = time.monotonic()
            idle = now - self._moved
            if idle < PATIENCE and any(self._is_alone(rank) for rank in self._alive()):
                excused = now
            if not self._armed or self._alone or now - max(excused, self._moved) < self._seconds:
                continue
            if self._rank != min(self._alive(), default=self._rank):
                if self._closed.wait(2):  # the first of those who noticed tells it
                    return
            else:
                self._log(
                    f"[rank {self._rank}] no progress for {idle:.0f} seconds after step "
                    f"{self._step}: {self._reason()}; this run ends here, and the same command "
                    "goes on from the last checkpoint"
                )
            self._leave(HUNG)

    def _alive(self) -> list[int]:
        """Ranks whose sign of life is recent, this one among them."""
        now = time.monotonic()
        heard = [r for r, (_, at) in self._seen.items() if now - at < self._recent]
        return sorted({*heard, self._rank})

    def _is_alone(self, rank: int) -> bool:
        return rank in self._seen and self._seen[rank][0].split()[2] != "0"

    def _reason(self) -> str:
        if time.monotonic() - self._published > self._recent:
            return "the machine that started the run, or the network to it, does not answer"
        now, alive = time.monotonic(), self._alive()
        for rank, (text, at) in sorted(self._seen.items()):
            if rank not in alive:
                step, who = _step_and_who(text)
                return (
                    f"rank {rank} ({who}) has given no sign of life for {now - at:.0f} seconds and "
                    f"had done step {step}; its process or its machine is stopped"
                )
        behind = [(int(text.split()[0]), rank) for rank, (text, _) in self._seen.items()]
        least, rank = min(behind, default=(self._beats, self._rank))
        if least < self._beats:
            step, who = _step_and_who(self._seen[rank][0])
            return f"rank {rank} ({who}) has done step {step} and does not go on"
        return "all ranks wait at the same place, for the network between them or their devices"


def _who() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _step_and_who(text: str) -> tuple[str, str]:
    _, step, _, _, who = text.split(" ", 4)
    return step, who
