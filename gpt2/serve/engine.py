"""`Engine`: requests of many clients on one `BatchDecoder`, in a thread of its own.

Requests wait in one queue. When there is a slot, the next request in turn gets it for one of its
texts and goes to the end of the queue with the others: who asks for a hundred texts does not keep
anyone waiting who asks for one.

The event loop of the server and the thread meet in two places only: `_changed` guards the queue,
and what was written goes to the loop by `call_soon_threadsafe`, once a step.
"""

import asyncio
import statistics
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..generate.continuous_batch import BatchDecoder, Row
from ..generate.stream import TextWriter
from ..model.gpt import GPT
from ..tokenizer import END_OF_TEXT

READ_TOKENS = 512  # of prompts read between two passes, or one prompt: nobody stands still for long
REMEMBERED = 1000  # requests whose latency is counted


class Busy(UserError):
    """The queue is full."""


class Failed(RuntimeError):
    """The text cannot be finished: the server stops, or has failed."""


class Choice:
    """One text in the making.

    Args:
        row: prompt and settings.
        index: its number in the answer.
        stops: strings before which it ends.
    """

    def __init__(self, row: Row, index: int, stops: Sequence[str] = ()):
        self.row, self.index = row, index
        self.writer = TextWriter(stops)
        self.written = 0  # tokens, without the one that ends a text
        self.finish: str | None = None  # "stop" or "length", when it has ended

    def take(self, token: int) -> str:
        """The text that is certain with this token."""
        if token == END_OF_TEXT:
            self.finish, piece = "stop", self.writer.finish()
        else:
            self.written += 1
            piece = self.writer.add(token)
            if self.writer.stopped:
                self.finish = "stop"
            elif self.written == self.row.limit:
                self.finish, piece = "length", piece + self.writer.finish()
        if self.finish:
            self.row.ended = True
        return piece


@dataclass(frozen=True)
class Piece:
    """Text that was added to a choice; `finish` says why it is the last."""

    choice: Choice
    text: str
    finish: str | None


class TextRequest:
    """The texts of one request, and when what happened to them, by time.perf_counter in seconds.

    Args:
        choices: at least one.
        prompt_tokens: read for them, each prompt counted once.
    """

    def __init__(self, choices: list[Choice], prompt_tokens: int):
        self.choices, self.prompt_tokens = choices, prompt_tokens
        self.waiting = deque(choices)
        self.arrived = time.perf_counter()
        self.begun: float | None = None  # the first of its prompts is read
        self.first: float | None = None  # the first token is there
        self.over = ""  # how it ended: done, cancelled, failed
        self.queue: asyncio.Queue[Piece | Failed | None] = asyncio.Queue()

    @property
    def written(self) -> int:
        """Tokens of all texts so far."""
        return sum(choice.written for choice in self.choices)

    async def pieces(self) -> AsyncIterator[Piece]:
        """What is written, until all texts have ended or the job is cancelled.

        Raises:
            Failed: the server stops, or has failed.
        """
        open_texts = len(self.choices)
        while open_texts:
            piece = await self.queue.get()
            if piece is None:
                return
            if isinstance(piece, Failed):
                raise piece
            open_texts -= piece.finish is not None
            yield piece


class Engine:
    """Writes the texts of jobs.

    Args:
        model: on its device.
        slots: texts at a time.
        max_waiting: texts that may wait for a slot.
    """

    def __init__(self, model: GPT, slots: int, max_waiting: int):
        graph = model.transformer.wte.weight.is_cuda
        self.batch, self.slots = BatchDecoder(model, slots, graph=graph), slots
        self.max_waiting = max_waiting
        self.on_failure: Callable[[], None] = lambda: None  # in the loop, when writing has failed
        self.failure: str | None = None
        self.counts = {"done": 0, "cancelled": 0, "failed": 0, "refused": 0}
        self._latencies: deque[dict[str, float]] = deque(maxlen=REMEMBERED)
        self._jobs: dict[Row, tuple[TextRequest, Choice]] = {}  # of rows in the batch; the thread's
        self._queue: deque[TextRequest] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._alive: set[TextRequest] = set()  # the loop's

    def start(self, loop: asyncio.AbstractEventLoop):
        """Begins to work for the handlers that run in this loop."""
        self._loop = loop
        self._thread.start()

    def close(self):
        """Ends all jobs with `Failed`, and the thread after the step that it is in."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify()
        self._fail_all("the server is shutting down")

    def submit(self, job: TextRequest):
        """Puts a job into the queue.

        Raises:
            Busy: too many texts are waiting.
            Failed: the server stops, or has failed.
        """
        if self._closed or self.failure:
            raise Failed(self.failure or "the server is shutting down")
        running, waiting = self.load()
        if running + waiting + len(job.choices) > self.slots + self.max_waiting:
            self.counts["refused"] += 1
            raise Busy(f"{waiting} texts are waiting already; try again in a moment")
        self._alive.add(job)
        with self._changed:
            self._queue.append(job)
            self._changed.notify()

    def finish(self, job: TextRequest, how: str):
        """Frees what a job has; a second call does nothing.

        Args:
            job: one that was submitted.
            how: done, cancelled or failed.
        """
        if job.over:
            return
        job.over = how
        self.counts[how] += 1
        self._alive.discard(job)
        for choice in job.choices:
            choice.row.ended = True
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
            self._changed.notify()
        job.queue.put_nowait(None)
        if how == "done":
            self._latencies.append(latency(job))

    def load(self) -> tuple[int, int]:
        """(texts being written, texts that wait)."""
        with self._changed:
            waiting = sum(len(job.waiting) for job in self._queue)
            return sum(not row.ended for row in self._jobs), waiting

    def percentiles(self) -> dict[str, dict[str, float]]:
        """p50, p90 and p99 of what `latency` gives, over the last requests that were done."""
        found: dict[str, dict[str, float]] = {}
        rows = list(self._latencies)
        for name in rows[0] if rows else ():
            values = [row[name] for row in rows]
            cuts = statistics.quantiles(values, n=100, method="inclusive") if len(rows) > 1 else []
            at = {f"p{p}": cuts[p - 1] if cuts else values[0] for p in (50, 90, 99)}
            found[name] = {p: round(value, 4) for p, value in at.items()}
        return found

    def _run(self):
        try:
            while (joining := self._next_rows()) is not None:
                for row in joining:
                    self.batch.join(row)
                arrived = self.batch.step()
                self._post([self._piece(row, token) for row, token in arrived])
        except Exception as error:  # noqa: BLE001 - whatever it is, clients must not wait forever
            self.failure = f"writing has failed ({type(error).__name__}: {error})"
            self._call(self._fail_all, self.failure)
            self._call(self.on_failure)

    def _next_rows(self) -> list[Row] | None:
        """What joins the batch now; waits while there is nothing to do; None at the end."""
        self.batch.leave()
        self._jobs = {r: job for r, job in self._jobs.items() if r in self.batch.rows
                      or any(r in rows for rows, *_ in self.batch.sent)}  # fmt: skip
        joining: list[Row] = []
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._queue or self.batch.busy)
            if self._closed:
                return None
            free, room = self.slots - len(self.batch.rows), READ_TOKENS
            while self._queue and len(joining) < free:
                job = self._queue.popleft()
                choice = job.waiting[0]
                room -= len(choice.row.tokens)
                if joining and room < 0:
                    self._queue.appendleft(job)
                    break
                job.waiting.popleft()
                if job.waiting:
                    self._queue.append(job)
                job.begun = job.begun or time.perf_counter()
                self._jobs[choice.row] = (job, choice)
                joining.append(choice.row)
        return joining

    def _piece(self, row: Row, token: int) -> tuple[TextRequest, Piece]:
        job, choice = self._jobs[row]
        job.first = job.first or time.perf_counter()
        text = choice.take(token)
        return job, Piece(choice, text, choice.finish)

    def _post(self, pieces: list[tuple[TextRequest, Piece]]):
        if pieces:
            self._call(self._deliver, pieces)

    def _call(self, function, *arguments):
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has ended, and with it all who listen
            self._closed = True

    def _deliver(self, pieces: list[tuple[TextRequest, Piece]]):
        for job, piece in pieces:
            if not job.over and (piece.text or piece.finish):
                job.queue.put_nowait(piece)

    def _fail_all(self, reason: str):
        for job in list(self._alive):
            job.queue.put_nowait(Failed(reason))


def latency(job: TextRequest) -> dict[str, float]:
    """What a job took: seconds in the queue, to the first token, in all, and tokens a second."""
    now = time.perf_counter()
    begun = job.begun or now
    return {
        "queue_seconds": begun - job.arrived,
        "first_token_seconds": (job.first or now) - job.arrived,
        "seconds": now - job.arrived,
        "tokens_per_second": job.written / (now - begun) if job.written else 0.0,
    }
