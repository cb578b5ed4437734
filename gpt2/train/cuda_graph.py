"""Forward and backward of a micro-batch; on a GPU recorded once as a CUDA graph, and replayed.

A step of GPT-2 launches some 500 kernels, one after the other, from Python. With small batches
that takes longer than the kernels: at 8 sequences an H100 waited for more than half of the time. A
replay launches all of them by one call. The kernels are the same, and so are the numbers.

What a graph reads and writes stays where it was when it was recorded: each batch is copied to one
place, and the gradients of each step lie in the memory of those before.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_line
from ..model.packed_documents import Packed

STEPS_BEFORE = 2  # they compile, and find the fastest algorithms, which cannot be recorded
Run = Callable[[Tensor, Tensor, Tensor, Packed | None], Tensor]


class MicroBatches:
    """Runs micro-batches; gradients add up in `.grad`.

    Args:
        model: whose gradients they are.
        run: forward and backward; is given ids (B, T), targets (B, T), a () factor of the loss
            whose gradient is wanted, and documents or None; returns the loss, a sum in nats.
        graph: whether to record it.
        tell: is told when it cannot be recorded.
    """

    def __init__(self, model: nn.Module, run: Run, graph: bool, log: Callable[[str], None]):
        self.model, self.run, self.graph, self.log = model, run, graph, log
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._forget(None)

    def __call__(
        self, x: Tensor, y: Tensor, factor: Tensor, inside: Packed | None, first: bool
    ) -> Tensor:
        """The loss of a micro-batch, on its device; `first`: of a step, `.grad` is None."""
        if not self.graph or inside is not None:  # documents are other tensors every time
            return self.run(x, y, factor, inside)
        given = [x, y, factor]
        kind = [(t.shape, t.dtype) for t in given]
        if kind != self._kind:
            self._forget(kind)
        self._steps += first
        if self._steps <= STEPS_BEFORE:
            return self.run(*given, None)
        try:
            return self._replay(given, first)
        except RuntimeError as error:  # running out of memory is one too
            if first in self._graphs:
                raise
            reason = first_line(error)
        # Only here, where the error, which holds what was allocated before it, is gone.
        return self._go_on_without(reason, given, first)

    def _forget(self, kind: Any):
        """Drops what was recorded of other shapes."""
        self._kind, self._steps = kind, 0
        self._given: list[Tensor] = []
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._grads: list[Tensor | None] = []

    def _replay(self, given: Sequence[Tensor], first: bool) -> Tensor:
        if first not in self._graphs:
            self._record(given, first)
        for kept, new in zip(self._given, given, strict=True):
            kept.copy_(new)
        if first:  # of each step: the optimizer's `zero_grad` has taken them away
            for p, grad in zip(self.parameters, self._grads, strict=True):
                p.grad = grad
        graph, loss = self._graphs[first]
        graph.replay()
        return loss

    def _record(self, given: Sequence[Tensor], first: bool):
        """Without being run; a step's first micro-batch makes `.grad`, the others add to it."""
        self._given = self._given or [t.clone() for t in given]
        pool = None if first else self._graphs[True][0].pool()  # one is over before the other runs
        graph = torch.cuda.CUDAGraph()
        # The thread that reads the data may go on pinning memory meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            loss = self.run(*self._given, None)
        self._graphs[first] = graph, loss
        if first:
            self._grads = [p.grad for p in self.parameters]

    def _go_on_without(self, reason: str, given: Sequence[Tensor], first: bool) -> Tensor:
        self.log(f"a step cannot be recorded as a CUDA graph ({reason[:150]}); going on without")
        self.graph = False
        if first:  # what was recorded so far has not been computed
            for p in self.parameters:
                p.grad = None
        self._forget(None)
        torch.cuda.empty_cache()  # of the graph, whose memory nobody else may use
        return self.run(*given, None)
