"""Asynchronous saving: tensors are copied to host memory, and a thread writes the copies.

Training waits only for the copy. A GPU copies into pinned memory at the speed of the PCIe bus. The
copies take 1.5 GB of host memory on the writing rank for 124M parameters (weights and AdamW's
optimizer state in float32). The next save reuses this memory.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


class Saver:
    """Copies tensors to host memory and writes them in one background thread, in order.

    Use it as a `with` block around training. The end of the block waits for all writes, also after
    an error in training. A KeyboardInterrupt (a second Ctrl-C) does not wait.

    Args:
        warn: called with one line when a write failed.

    Attributes:
        check: is called before each write, in the thread; a UserError of it is one of the write.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self.check: Callable[[], object] = lambda: None
        self._buffers: dict[str, Tensor] = {}
        self._current: set[str] = set()  # names of buffers that hold the values of `_step`
        self._step = -1
        self._copied: torch.cuda.Event | None = None
        self._queue: queue.Queue = queue.Queue()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None  # a bug, not a full disk

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        at_once = kind is not None and issubclass(kind, KeyboardInterrupt)
        try:
            if kind is None:
                self.wait()
            elif not at_once:
                self._queue.join()
        except KeyboardInterrupt:
            at_once = True
            raise
        finally:
            self._queue.put(None)  # ends the thread
            if self._thread and not at_once:
                self._thread.join()  # it frees tensors, which must not meet Python's shutdown

    def copy(self, step: int, tree: Any, name: str = "") -> Any:
        """Returns the tree with each tensor replaced by a copy in host memory.

        Earlier steps are written before their buffers are reused. A tensor is copied once per step:
        the training state and the model file share the copied weights.

        Args:
            step: optimizer steps done; tensors do not change within a step.
            tree: nested dicts, lists and tuples of plain values and of tensors on any device.
            name: prefix of the names of the buffers.
        """
        if step != self._step:
            self.wait()
            self._step, self._current = step, set()
        copies = self._copy(tree, name)
        if self._copied is not None:
            self._copied.record()
        return copies

    def write_later(self, write: Callable[[], Any]) -> None:
        """Queues `write` for the thread. A UserError in it is a warning, and training goes on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="saver", daemon=True)
            self._thread.start()
        self._queue.put((self._copied, write))

    def wait(self) -> None:
        """Blocks until all queued writes are done."""
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
            except RuntimeError:  # the system has no pinned memory left
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._buffers[name] = buffer
        # The stream orders the copy after the running step and before the next one.
        buffer.copy_(tensor, non_blocking=on_gpu)
        if on_gpu and self._copied is None:
            self._copied = torch.cuda.Event(blocking=True)

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            copied, write = task
            try:
                if copied is not None:
                    copied.synchronize()
                self.check()
                write()
            except UserError as error:
                self._warn(f"{error}; training goes on, and what was saved before is kept")
            except BaseException as error:  # noqa: BLE001 - raised again in `wait`
                self._failure = self._failure or error
            finally:
                self._queue.task_done()
