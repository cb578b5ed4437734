"""Recording an optimizer's update as a CUDA graph, and replaying it.

Muon's update launches some hundred kernels, which take an H100 half as long as Python takes to
launch them. A replay launches all of them by one call; the kernels are the same.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

STEPS_BEFORE = 2  # they compile kernels and create the state; neither can be recorded


class UpdateGraph:
    """The CUDA graph of an update, for as long as all its tensors keep their addresses."""

    def __init__(self) -> None:
        self.enabled = True
        self._key: Hashable = None
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, update: Callable[[], None], key: Hashable) -> None:
        """Does update(), by a replay once `key` has stayed the same for some steps.

        Args:
            update: reads and writes tensors at fixed addresses alone, except those in `key`.
            key: addresses of the tensors; other ones start a new recording.
        """
        if key != self._key:
            self._key, self._steps, self._graph = key, 0, None
        self._steps += 1
        if self.enabled and self._graph is None and self._steps > STEPS_BEFORE:
            self._graph = self._record(update)
        if self._graph is None:
            update()
        else:
            self._graph.replay()

    def _record(self, update: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """Records without running; None where something in the update cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                update()
        except RuntimeError:  # running out of memory is one too
            self.enabled = False
            return None
        return graph


class Numbers:
    """() tensors that keep their addresses, so that a CUDA graph reads the values of each step."""

    def __init__(self) -> None:
        self._tensors: dict[Hashable, Tensor] = {}
        self._values: dict[Hashable, float] = {}

    def __call__(self, name: Hashable, value: float, device: torch.device) -> Tensor:
        """The tensor of a name, which now has this value."""
        if name not in self._tensors:
            self._tensors[name] = torch.full((), value, device=device)
        elif self._values.get(name) != value:
            self._tensors[name].fill_(value)
        self._values[name] = value
        return self._tensors[name]

    def copy(self, name: Hashable, value: Tensor | None, otherwise: float, like: Tensor) -> None:
        """Gives a name the value of a tensor of one element, or another if there is none."""
        if value is None:
            self(name, otherwise, like.device)
            return
        kept = self(name, otherwise, like.device) if name not in self._tensors else self[name]
        kept.copy_(value.reshape(()))
        self._values.pop(name, None)

    def __getitem__(self, name: Hashable) -> Tensor:
        return self._tensors[name]
