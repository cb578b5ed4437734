"""Jobs on several devices: on each of them one after the other."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Job = TypeVar("Job")


def on_devices(
    jobs: Sequence[Job], devices: Sequence[str], run_one: Callable[[Job, str, queue.Queue], None]
) -> Iterator[Any]:
    """What the jobs put into a queue, as it comes; a device takes the next job when it is free.

    Args:
        jobs: in the order in which they begin.
        devices: one thread each.
        run_one: called in such a thread with a job, its device and the queue.

    Raises:
        Exception: of a job; the devices then take no more jobs.
    """
    waiting: queue.Queue[Job] = queue.Queue()
    results: queue.Queue = queue.Queue()
    ended = object()
    for job in jobs:
        waiting.put(job)

    def work(device: str) -> None:
        try:
            while not waiting.empty():
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    break
                run_one(job, device, results)
            results.put(ended)
        except Exception as error:  # noqa: BLE001 - raised again by the reader
            results.put(error)

    for device in devices:
        threading.Thread(target=work, args=(device,), daemon=True).start()
    running = len(devices)
    while running:
        result = results.get()
        if result is ended:
            running -= 1
        elif isinstance(result, Exception):
            with waiting.mutex:
                waiting.queue.clear()
            raise result
        else:
            yield result
