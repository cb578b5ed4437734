"""Tokens per second, time left, and the peak rate of a GPU for the MFU."""

import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Throughput:
    """Training time and tokens per second; time inside `pause()` does not count.

    Read the losses of all steps before `pause`: an accelerator that still works on queued steps
    would be timed too short.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._laps: deque[float] = deque(maxlen=100)  # seconds per token
        self._tokens = 0
        self._is_first_lap = True
        self.start()

    def start(self, seconds_before: float = 0.0, first_steps: float = 0.0) -> None:
        """Starts the clock.

        Args:
            seconds_before: the training time before a resume.
            first_steps: the part of it that earlier processes spent in their first steps.
        """
        self._lap_started = self._finished = self._clock()
        self._seconds_before = seconds_before
        self.first_steps = first_steps
        self._steps, self._counted_before = 0, seconds_before - first_steps

    def step(self, tokens: int, finished_at: float | None = None) -> None:
        """Counts the tokens of one optimizer step.

        Args:
            tokens: of the step.
            finished_at: when the device had computed it, by the clock; None: now.
        """
        self._tokens += tokens
        self._finished = self._clock() if finished_at is None else finished_at
        if self._steps == 0:
            self.first_steps += self._finished - self._lap_started
        self._steps += 1

    def seconds(self) -> float:
        """Seconds of training until the last step's end."""
        return self._seconds_before + self._finished - self._lap_started

    def counted(self) -> float:
        """Seconds of training without the first step of each process, which compiles."""
        return self.seconds() - self.first_steps

    def next_is_last(self, max_seconds: float) -> bool:
        """Whether a step after the next, at the mean pace, would end after `max_seconds`."""
        counted = self.counted()
        mean = (counted - self._counted_before) / max(1, self._steps - 1)
        return 0 < max_seconds < counted + 2 * mean

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around evaluation and saving."""
        started = self._clock()
        try:
            yield
        finally:
            paused = self._clock() - started
            self._lap_started, self._finished = self._lap_started + paused, self._finished + paused

    def lap(self) -> tuple[float, float]:
        """(tokens per second from the last lap to the last step's end, seconds of training)."""
        seconds = max(self._finished - self._lap_started, 1e-9)
        self._lap_started, self._seconds_before = self._finished, self._seconds_before + seconds
        tokens, self._tokens = self._tokens, 0
        if tokens:
            if len(self._laps) == 1 and self._is_first_lap:
                self._laps.clear()  # compilation and first allocations tell nothing of the rest
                self._is_first_lap = False
            self._laps.append(seconds / tokens)
        return tokens / seconds, self._seconds_before

    def seconds_left(self, tokens_left: int) -> float | None:
        """Estimate from the median of the last 100 laps; None before the first one."""
        return tokens_left * statistics.median(self._laps) if self._laps else None


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak FLOP/s of a GPU as its vendor states it; None when it is not in the table.

    Args:
        device_name: As the driver calls it, such as "NVIDIA H100 80GB HBM3".
        dtype: "bfloat16" and "float16" give the rate of the tensor cores, without sparsity and
            with float32 accumulation. "float32" gives the rate of the ordinary (CUDA) cores;
            TF32 matmuls can exceed it.
    """
    words = re.split(r"[\s-]+", device_name.lower().strip())
    # Every other word ("laptop", "mig", "max") means another chip or a part of one.
    name = " ".join(w for w in words if not _NOT_THE_CHIP.fullmatch(w))
    if name not in _PEAK_TFLOPS or dtype not in ("bfloat16", "float16", "float32"):
        return None
    if dtype == "bfloat16" and name.startswith(_BEFORE_BFLOAT16):
        return None
    half, single = _PEAK_TFLOPS[name]
    return 1e12 * (single if dtype == "float32" else half)


_NOT_THE_CHIP = re.compile(r"nvidia|tesla|geforce|rtx|sxm\d|hbm\d\w?|\d+gb?")
_BEFORE_BFLOAT16 = ("p100", "v100", "t4", "2080")
# fmt: off
_PEAK_TFLOPS = {  # name: (16 bit, float32), from data sheets and architecture white papers
    "p100": (21.2, 10.6), "p100 pcie": (18.7, 9.3),  # no tensor cores
    "v100": (125, 15.7), "v100 pcie": (112, 14),
    "t4": (65, 8.1), "2080 ti": (53.8, 13.4),
    "3060": (25.5, 12.7), "3060 ti": (32.4, 16.2), "3070": (40.6, 20.3),
    "3080": (59.5, 29.8), "3080 ti": (68.2, 34.1), "3090": (71, 35.6), "3090 ti": (80, 40),
    "a10": (125, 31.2), "a10g": (70, 35), "a40": (149.7, 37.4), "a6000": (154.8, 38.7),
    "a100": (312, 19.5), "a100 pcie": (312, 19.5), "a800": (312, 19.5), "a800 pcie": (312, 19.5),
    "4070": (58.3, 29.1), "4070 super": (71, 35.5), "4070 ti": (80.2, 40.1),
    "4080": (97.5, 48.7), "4080 super": (104.4, 52.2), "4090": (165.2, 82.6),
    "l4": (121, 30.3), "l40": (181, 90.5), "l40s": (362, 91.6),
    "h100": (989.4, 66.9), "h100 pcie": (756.5, 51.2), "h100 nvl": (835.5, 60),
    "h800": (989.4, 66.9), "h800 pcie": (756.5, 51.2), "gh200": (989.4, 66.9),
    "h200": (989.4, 66.9), "h200 nvl": (835.5, 60),
    "5070": (61.7, 30.9), "5070 ti": (87.9, 43.9), "5080": (112.6, 56.3), "5090": (209.5, 104.8),
    "b200": (2250, 75),
}
