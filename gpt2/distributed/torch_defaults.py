"""What PyTorch assumes where nothing is said: of a new process, not of a caller's notebook."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def of_a_new_process() -> Iterator[None]:
    """Within, tensors are float32 and on the CPU by default, with gradients and no autocast.

    A caller's `torch.set_default_dtype`, `torch.set_default_device`, `torch.autocast` and
    `torch.no_grad` would change a run, or its numbers; they are there again afterwards.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # which enables gradients as well
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield
