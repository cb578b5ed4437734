"""Recording a micro-batch as a CUDA graph, and replaying it.

A step of GPT-2 launches some 500 kernels, one after the other, from Python. With small batches that
takes longer than the kernels: at 8 sequences an H100 waited for more than half of the time. A
replay launches all of them by one call. The kernels are the same, and so are the numbers.

A graph reads and writes the addresses that it was recorded with. Each batch is therefore copied to
one place, and the gradients of each step lie in the memory of the gradients before.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_line

STEPS_BEFORE = 2  # they compile, and search for the fastest algorithms; neither can be recorded


class MicroBatchGraph:
    """The CUDA graphs of a micro-batch; its gradients add up in `.grad`.

    A step's first micro-batch creates `.grad` and the others add to it, so there are two graphs.

    Args:
        model: whose gradients they are.
        enabled: whether to record; else every call computes by the ordinary launches.
        log: gets one line when the micro-batch cannot be recorded.
    """

    def __init__(self, model: nn.Module, enabled: bool, log: Callable[[str], None]):
        self.model, self.enabled, self.log = model, enabled, log
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._forget(None)

    def __call__(
        self, compute: Callable[..., Tensor], inputs: Sequence[Tensor], first: bool
    ) -> Tensor:
        """compute(*inputs), by a replay as soon as it is recorded.

        Args:
            compute: forward and backward; returns the loss. Always the one function.
            inputs: its tensors on the GPU. Other shapes or types start a new recording.
            first: whether this is the first micro-batch of a step, where `.grad` is None.
        """
        if not self.enabled:
            return compute(*inputs)
        kind = [(t.shape, t.dtype) for t in inputs]
        if kind != self._kind:
            self._forget(kind)
        self._steps += first
        if self._steps <= STEPS_BEFORE:
            return compute(*inputs)
        try:
            return self._replay(compute, inputs, first)
        except RuntimeError as error:  # running out of memory is one too
            if first in self._graphs:
                raise
            reason = first_line(error)
        # Outside `except`: the live exception keeps the failed recording's tensors allocated.
        return self._go_on_without(reason, compute, inputs, first)

    def forget(self) -> None:
        """Drops what was recorded, as the same inputs are to be computed in another way."""
        self._forget(None)
        if self.enabled:
            torch.cuda.empty_cache()  # the graph's memory pool, which nothing else may use

    def _forget(self, kind: Any) -> None:
        """Drops the graphs, which are of other shapes than `kind`."""
        self._kind, self._steps = kind, 0
        self._inputs: list[Tensor] = []
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._grads: list[Tensor | None] = []

    def _replay(
        self, compute: Callable[..., Tensor], inputs: Sequence[Tensor], first: bool
    ) -> Tensor:
        if first not in self._graphs:
            self._record(compute, inputs, first)
        for kept, new in zip(self._inputs, inputs, strict=True):
            kept.copy_(new)
        if first:  # the optimizer's `zero_grad` of the step before has set them to None
            for p, grad in zip(self.parameters, self._grads, strict=True):
                p.grad = grad
        graph, loss = self._graphs[first]
        graph.replay()
        return loss

    def _record(
        self, compute: Callable[..., Tensor], inputs: Sequence[Tensor], first: bool
    ) -> None:
        """Records without running; the graph owns the tensors that it computes."""
        self._inputs = self._inputs or [t.clone() for t in inputs]
        # The two graphs never run at once, so they may share one memory pool.
        pool = None if first else self._graphs[True][0].pool()
        graph = torch.cuda.CUDAGraph()
        # The thread that reads the data may go on pinning memory meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            loss = compute(*self._inputs)
        self._graphs[first] = graph, loss
        if first:
            self._grads = [p.grad for p in self.parameters]

    def _go_on_without(
        self, reason: str, compute: Callable[..., Tensor], inputs: Sequence[Tensor], first: bool
    ) -> Tensor:
        self.log(f"a step cannot be recorded as a CUDA graph ({reason[:150]}); going on without")
        self.enabled = False
        if first:  # recorded gradients have not been computed
            for p in self.parameters:
                p.grad = None
        self._forget(None)
        torch.cuda.empty_cache()  # the graph's memory pool, which nothing else may use
        return compute(*inputs)
