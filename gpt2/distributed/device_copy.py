"""Numbers on their way from a device to the CPU, and the moment when they were computed."""

import time

import torch
from torch import Tensor


class DeviceCopy:
    """A copy to the CPU that is queued behind the work of the device; `read` waits for it alone.

    The CPU may ask long after the device was done: launching the next step can block it while the
    launch queue is full. `finished_at` therefore asks an event on the device.

    Args:
        numbers: 1-D, on any device.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event(blocking=True, enable_timing=True)
            self._copied.record()
            self._device = numbers.device

    def read(self) -> list[float]:
        """The numbers, once they have arrived."""
        if self._copied:
            self._copied.synchronize()
        return self._numbers.tolist()

    def finished_at(self) -> float:
        """When they arrived, in seconds of `time.perf_counter`; call it after `read`."""
        if not self._copied:
            return time.perf_counter()
        with torch.cuda.device(self._device):
            # Another stream: on the current one the event would wait for the steps after this one.
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.Stream())
            now.synchronize()
        return time.perf_counter() - 1e-3 * self._copied.elapsed_time(now)
