"""Downloads of a dataset's files: each is verified; the next downloads while one is in use.

A file is complete under its name and incomplete under its name with `.part`, at which a later run
goes on.
"""

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..files import move, sha256_of
from .hub import File, HubDataset, bytes_of_file

POLL_SECONDS = 0.1  # how soon Ctrl-C is noticed; Windows cannot interrupt a longer wait


class Downloads:
    """A dataset's files in a folder.

    Args:
        dataset: where they come from.
        folder: for files that are being downloaded or read.
        keep: leave whole files in `folder` instead of deleting each after its use.
        log: is told, from any thread, what is downloaded.
    """

    def __init__(self, dataset: HubDataset, folder: Path, keep: bool, log: Callable[[str], None]):
        self.dataset, self.keep = dataset, keep
        self._folder, self._log = folder, log
        self._begun: dict[str, Future] = {}  # by name; at most one besides the one in use

    def local(self, file: File) -> Path | None:
        """Where a file lies already, in the Hub's cache or kept here; only its size is checked."""
        for path in (self.dataset.cached(file), self._folder / file.name):
            if path and path.is_file() and bytes_of_file(path) == file.size_bytes:
                return path
        return None

    @contextmanager
    def open(self, file: File, following: File | None = None) -> Iterator[Path]:
        """Gives the path of a whole and verified file, and downloads the following one meanwhile.

        A downloaded file is deleted at the end, unless it is to be kept, the work was interrupted
        (then the next run verifies and uses it), or it lies in the Hub's cache.

        Raises:
            UserError: what went wrong while downloading, in this thread.
        """
        path = self._wait_for(file)
        if following:
            self._begin(following)
        ours = path == self._folder / file.name
        try:
            yield path
        except UserError:  # damaged: the next run must not find it again
            if ours:
                path.unlink(missing_ok=True)
            raise
        if ours and not self.keep:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Ends what is being downloaded; a stalled connection is left to end by itself."""
        self.dataset.stop()
        wait(self._begun.values(), timeout=1)

    def _wait_for(self, file: File) -> Path:
        future = self._begin(file)
        if not wait([future], POLL_SECONDS).done:
            from tqdm import tqdm

            part = self._part(file)
            with tqdm(
                total=file.size_bytes,
                unit="B",
                unit_scale=True,
                desc=Path(file.name).name,
                disable=None,
                leave=False,
                dynamic_ncols=True,
            ) as bar:
                while not wait([future], POLL_SECONDS).done:
                    bar.update(bytes_of_file(part) - bar.n)
        del self._begun[file.name]
        return future.result()

    def _begin(self, file: File) -> Future:
        """Starts a download, or finds the one that was started."""
        if file.name not in self._begun:
            future = self._begun[file.name] = Future()
            # A daemon, so that a stalled connection does not keep the program from ending.
            threading.Thread(target=self._work, args=(file, future), daemon=True).start()
        return self._begun[file.name]

    def _work(self, file: File, future: Future) -> None:
        try:
            future.set_result(self._fetch(file))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "disk full" if full else error.strerror or error
            text = (
                f"{reason} while downloading {file.name} to {self._folder}; finished shards are "
                "kept: free some space and run the same command again to continue"
            )
            future.set_exception(UserError(text))
        except BaseException as error:  # noqa: BLE001 - the main thread raises it, whatever it is
            future.set_exception(error)

    def _fetch(self, file: File) -> Path:
        """A whole file: found, or downloaded; a wrong one is downloaded once more."""
        found = self.local(file)
        if found and not _problem(found, file):
            return found
        path, part = self._folder / file.name, self._part(file)
        part.parent.mkdir(parents=True, exist_ok=True)
        self._log(f"downloading {file.name}, {file.size_bytes / 1e9:.2f} GB")
        for last in (False, True):
            part.touch()
            self.dataset.download(file, part)
            problem = _problem(part, file)
            if not problem:
                move(part, path)
                return path
            part.unlink()
            if not last:
                self._log(f"{file.name}: {problem}; downloading it again")
        raise UserError(
            f"{file.name} of {self.dataset.repository}: {problem}, twice; run the same command "
            "again later, or ask the dataset's owner"
        )

    def _part(self, file: File) -> Path:
        return self._folder / f"{file.name}.part"


def _problem(path: Path, file: File) -> str:
    """The fault of a downloaded file in words, or ""."""
    if bytes_of_file(path) != file.size_bytes:
        return f"{bytes_of_file(path):,} bytes came instead of {file.size_bytes:,}"
    if file.sha256:
        found = sha256_of(path)
        if found != file.sha256:
            return f"its sha256 is {found[:12]}… instead of {file.sha256[:12]}…"
    return ""
