"""Numbers that arrive from a device, and when."""

import time

import pytest
import torch

from gpt2.distributed.device_copy import DeviceCopy


def test_on_a_cpu_the_numbers_are_there_at_once():
    copy = DeviceCopy(torch.tensor([1.5, -2.0]))
    before = time.perf_counter()
    assert copy.read() == [1.5, -2.0]
    assert before <= copy.finished_at() <= time.perf_counter()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_time_of_the_device_whatever_is_queued_behind_it():
    numbers = torch.zeros(3, device="cuda")
    torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second; the second time it is loaded
    torch.cuda.synchronize()
    began = time.perf_counter()
    torch.cuda._sleep(200_000_000)
    copy = DeviceCopy(numbers + 1)
    torch.cuda._sleep(1_000_000_000)
    time.sleep(0.3)  # the CPU is busy with launching
    assert copy.read() == [1.0, 1.0, 1.0]
    asked = time.perf_counter()
    took = copy.finished_at() - began
    assert 0.05 < took < 0.2 < asked - began
    torch.cuda.synchronize()
    assert time.perf_counter() - began > 3 * took
