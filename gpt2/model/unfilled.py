"""Networks whose weights are about to be replaced: no memory, no random numbers, no slow import."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Fill tensors with random numbers. For the meta device PyTorch has them in Python only, whose first
# use imports torch._dynamo and sympy: over a second.
RANDOM = frozenset({
    *(Tensor.normal_, Tensor.uniform_),
    *(nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_),
})  # fmt: skip


class _NoRandomNumbers(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Sequence, args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        if func in RANDOM:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules made in this block have parameters on the meta device, for `load_into` to replace."""
    with torch.device("meta"), _NoRandomNumbers():
        yield
