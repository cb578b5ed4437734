"""Recording a micro-batch, as far as that is seen without a GPU (the rest: tests/test_gpu.py)."""

import contextlib
import gc
import weakref

import pytest
import torch

from gpt2.train.cuda_graph import MicroBatchGraph

X = torch.ones(2, 3)


class Room:
    """What was allocated before memory ran out."""


@pytest.fixture(autouse=True)
def no_collector():
    """The error, and what it holds, must be gone by itself."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_what_cannot_be_recorded_runs_without_and_lets_go_of_memory(monkeypatch, error):
    recording, held, told = [False], [], []

    @contextlib.contextmanager
    def graph(*_, **__):
        recording[0] = True
        try:
            yield
        finally:
            recording[0] = False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    model = torch.nn.Linear(3, 1)

    def run(x, y, factor):
        room = Room()
        loss = model(x).sum()
        (loss * factor).backward()
        if recording[0]:
            held.append(weakref.ref(room))
            raise error("no room\nin two lines")
        assert not any(ref() for ref in held)
        return loss.detach()

    graph_of = MicroBatchGraph(model, enabled=True, log=told.append)
    for _ in range(4):
        model.zero_grad(set_to_none=True)
        loss = graph_of(run, (X, X, torch.tensor(1.0)), first=True)
        torch.testing.assert_close(model.weight.grad, torch.full((1, 3), 2.0))
        assert loss == model(X).sum()
    assert len(held) == 1
    assert told == ["a step cannot be recorded as a CUDA graph (no room); going on without"]
    assert not graph_of.enabled
