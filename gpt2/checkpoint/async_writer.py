"""Asynchronous saving: tensors are copied to host memory, and a thread writes the copies.

Training waits for the copy alone, which runs at the speed of the bus on a GPU (into pinned memory)
and of memory on a CPU. The rank that writes needs host memory for all that is saved: 1.5 GB for
124M parameters (weights and AdamW's optimizer state in float32), kept from one save to the next.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


class Saver:
    """Copies tensors, and calls functions that write them, one after the other, in a thread.

    Use it as a `with` block around training. The block ends when everything is written, also after
    an error in training; KeyboardInterrupt, a second Ctrl-C, does not wait.

    Args:
        warn: gets one line when a write failed.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._buffers: dict[str, Tensor] = {}
        self._current: set[str] = set()  # names of buffers that hold the values of `_step`
        self._step = -1
        self._copied: torch.cuda.Event | None = None
        self._queue: queue.Queue = queue.Queue()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None  # a mistake of ours, not a full disk

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            if kind is None:
                self.wait()
            elif not issubclass(kind, KeyboardInterrupt):
                self._queue.join()
        finally:
            self._queue.put(None)  # ends the thread

    def copy(self, step: int, tree: Any, name: str = "") -> Any:
        """Nested dicts and lists with their tensors replaced by copies in host memory.

        Waits until earlier copies in these buffers are written. A tensor that has been copied at
        this step is not copied again: a checkpoint and the model for use share the weights.

        Args:
            step: optimizer steps done; tensors of one step do not change.
            tree: tensors on any device, in dicts, lists and tuples, beside plain values.
            name: of the tree, which tells its buffers from those of others.
        """
        if step != self._step:
            self.wait()
            self._step, self._current = step, set()
        copies = self._copy(tree, name)
        if self._copied is not None:
            self._copied.record()
        return copies

    def write_later(self, write: Callable[[], Any]) -> None:
        """Calls `write` in the thread; when it raises UserError, training goes on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="saver", daemon=True)
            self._thread.start()
        self._queue.put((self._copied, write))

    def wait(self) -> None:
        """Returns when all is written."""
        self._queue.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _copy(self, tree: Any, name: str) -> Any:
        if isinstance(tree, dict):
            return {key: self._copy(value, f"{name}/{key}") for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self._copy(value, f"{name}/{i}") for i, value in enumerate(tree))
        if not isinstance(tree, Tensor):
            return tree
        if name not in self._current:
            self._fill(name, tree.detach())
            self._current.add(name)
        return self._buffers[name]

    def _fill(self, name: str, tensor: Tensor) -> None:
        on_gpu = tensor.device.type == "cuda"
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            try:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            except RuntimeError:  # the system gives no more memory of that kind
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._buffers[name] = buffer
        # On a GPU the copy is queued behind the running step, and the next step behind the copy.
        buffer.copy_(tensor, non_blocking=on_gpu)
        if on_gpu and self._copied is None:
            self._copied = torch.cuda.Event(blocking=True)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            copied, write = job
            try:
                if copied is not None:
                    copied.synchronize()
                write()
            except UserError as error:
                self._warn(f"{error}; training goes on, and what was saved before is kept")
            except BaseException as error:  # noqa: BLE001 - raised again in `wait`
                self._failure = self._failure or error
            finally:
                self._queue.task_done()
