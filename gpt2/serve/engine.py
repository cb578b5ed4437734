"""`Engine`: runs the requests of many clients on one `BatchDecoder`, in its own thread.

Requests wait in one queue. When a slot becomes free, the request at the head of the queue gets it
for one of its texts and then moves to the end of the queue (round robin): a request for a hundred
texts does not delay a request for one.

The thread shares two things with the server's event loop: the queue, guarded by `_changed`, and
the new text of each step, sent to the loop by `call_soon_threadsafe`.
"""

import asyncio
import statistics
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

from ..errors import UserError
from ..generate.continuous_batch import BatchDecoder, Generation
from ..model.gpt import LanguageModel
from .choice import Choice, Piece

PREFILL_TOKENS = 512  # prompt tokens read between two steps (or one prompt): bounds the pause
LATENCIES_KEPT = 1000  # finished requests that the percentiles are taken over


class Busy(UserError):
    """The queue is full."""


class Failed(RuntimeError):
    """The text cannot be finished: the server is stopping, or generation has failed."""


class TextRequest:
    """The texts that one client asked for, and the times of a request's stages.

    Times are seconds of `time.perf_counter`.

    Args:
        choices: at least one.
        prompt_tokens: tokens of all prompts; a prompt of several texts counts once.
    """

    def __init__(self, choices: list[Choice], prompt_tokens: int):
        self.choices, self.prompt_tokens = choices, prompt_tokens
        self.waiting = deque(choices)
        self.arrived = time.perf_counter()
        self.begun: float | None = None  # when the first prompt was taken from the queue
        self.first: float | None = None  # when the first token arrived
        self.over = ""  # how the request ended: done, cancelled or failed
        self.queue: asyncio.Queue[Piece | Failed | None] = asyncio.Queue()

    @property
    def written(self) -> int:
        """New tokens of all texts so far."""
        return sum(choice.written for choice in self.choices)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields text as it is generated, until all texts have ended or the request is cancelled.

        Raises:
            Failed: the server is stopping, or generation has failed.
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
    """Generates the texts of requests.

    Args:
        model: on its device.
        slots: texts generated at a time.
        max_waiting: texts that may wait for a slot.
    """

    def __init__(self, model: LanguageModel, slots: int, max_waiting: int):
        graph = model.transformer.wte.weight.is_cuda
        self.batch, self.slots = BatchDecoder(model, slots, graph=graph), slots
        self.max_waiting = max_waiting
        self.on_failure: Callable[[], None] = lambda: None  # called in the loop after a failure
        self.failure: str | None = None
        self.counts = {"done": 0, "cancelled": 0, "failed": 0, "refused": 0}
        self._latencies: deque[dict[str, float]] = deque(maxlen=LATENCIES_KEPT)
        # requests of the generations in the batch; written by the thread alone
        self._running: dict[Generation, tuple[TextRequest, Choice]] = {}
        self._queue: deque[TextRequest] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._alive: set[TextRequest] = set()  # used by the loop alone

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread; `loop` is where the request handlers run."""
        self._loop = loop
        self._thread.start()

    def close(self) -> None:
        """Ends all requests with `Failed`, and the thread after its current step."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify()
        self._fail_all("the server is shutting down")

    def submit(self, request: TextRequest) -> None:
        """Puts a request into the queue.

        Raises:
            Busy: too many texts are waiting.
            Failed: the server is stopping, or generation has failed.
        """
        if self._closed or self.failure:
            raise Failed(self.failure or "the server is shutting down")
        running, waiting = self.count_texts()
        if running + waiting + len(request.choices) > self.slots + self.max_waiting:
            self.counts["refused"] += 1
            raise Busy(f"{waiting} texts are waiting already; try again in a moment")
        self._alive.add(request)
        with self._changed:
            self._queue.append(request)
            self._changed.notify()

    def finish(self, request: TextRequest, how: str) -> None:
        """Ends a request and frees its slots; a second call does nothing.

        Args:
            request: one that was submitted.
            how: done, cancelled or failed.
        """
        if request.over:
            return
        request.over = how
        self.counts[how] += 1
        self._alive.discard(request)
        for choice in request.choices:
            choice.generation.ended = True
        with self._changed:
            if request in self._queue:
                self._queue.remove(request)
            self._changed.notify()
        request.queue.put_nowait(None)
        if how == "done":
            self._latencies.append(latency(request))

    def count_texts(self) -> tuple[int, int]:
        """(texts being generated, texts that wait for a slot)."""
        with self._changed:
            waiting = sum(len(request.waiting) for request in self._queue)
            return sum(not generation.ended for generation in self._running), waiting

    def percentiles(self) -> dict[str, dict[str, float]]:
        """p50, p90 and p99 of each number of `latency`, over the last finished requests."""
        found: dict[str, dict[str, float]] = {}
        latencies = list(self._latencies)
        for name in latencies[0] if latencies else ():
            values = [each[name] for each in latencies]
            several = len(values) > 1
            cuts = statistics.quantiles(values, n=100, method="inclusive") if several else []
            at = {f"p{p}": cuts[p - 1] if cuts else values[0] for p in (50, 90, 99)}
            found[name] = {p: round(value, 4) for p, value in at.items()}
        return found

    def _run(self) -> None:
        try:
            while (joining := self._next_generations()) is not None:
                for generation in joining:
                    self.batch.join(generation)
                arrived = self.batch.step()
                self._post([self._piece(generation, token) for generation, token in arrived])
        except Exception as error:  # noqa: BLE001 - after any error clients must not wait forever
            self.failure = f"writing has failed ({type(error).__name__}: {error})"
            self._call(self._fail_all, self.failure)
            self._call(self.on_failure)

    def _next_generations(self) -> list[Generation] | None:
        """Generations that join the batch now; blocks while idle; None after `close`."""
        self.batch.leave()
        self._running = {g: held for g, held in self._running.items() if self.batch.holds(g)}
        joining: list[Generation] = []
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._queue or self.batch.busy)
            if self._closed:
                return None
            free, room = self.slots - len(self.batch.running), PREFILL_TOKENS
            while self._queue and len(joining) < free:
                request = self._queue.popleft()
                choice = request.waiting[0]
                room -= len(choice.generation.tokens)
                if joining and room < 0:
                    self._queue.appendleft(request)
                    break
                request.waiting.popleft()
                if request.waiting:
                    self._queue.append(request)
                request.begun = request.begun or time.perf_counter()
                self._running[choice.generation] = (request, choice)
                joining.append(choice.generation)
        return joining

    def _piece(self, generation: Generation, token: int) -> tuple[TextRequest, Piece]:
        request, choice = self._running[generation]
        request.first = request.first or time.perf_counter()
        return request, choice.add(token)

    def _post(self, pieces: list[tuple[TextRequest, Piece]]) -> None:
        if pieces:
            self._call(self._deliver, pieces)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Calls a function in the event loop."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed, so no client listens any more
            self._closed = True

    def _deliver(self, pieces: list[tuple[TextRequest, Piece]]) -> None:
        for request, piece in pieces:
            if not request.over and (piece.text or piece.finish):
                request.queue.put_nowait(piece)

    def _fail_all(self, reason: str) -> None:
        for request in list(self._alive):
            request.queue.put_nowait(Failed(reason))


def latency(request: TextRequest) -> dict[str, float]:
    """Seconds in the queue, to the first token and in all; tokens per second of generation."""
    now = time.perf_counter()
    begun = request.begun or now
    return {
        "queue_seconds": begun - request.arrived,
        "first_token_seconds": (request.first or now) - request.arrived,
        "seconds": now - request.arrived,
        "tokens_per_second": request.written / (now - begun) if request.written else 0.0,
    }
