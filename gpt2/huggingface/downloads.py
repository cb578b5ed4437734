"""Downloads of a dataset's files: verified by sha256, with the next file prefetched.

An incomplete file has the suffix `.part`, which a later run continues. A complete file has its own
name.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path

from ..distributed.signals import interruptible
from ..errors import UserError
from ..files import move, sha256_of
from ..paths import below, check_unlinked, no_follow
from .hub import File, HubDataset, bytes_of_file

POLL_SECONDS = 0.1  # latency of Ctrl-C: Windows cannot interrupt a longer wait


class Downloads:
    """A dataset's files in a folder.

    Args:
        dataset: the dataset on the Hub.
        folder: for files that are being downloaded or read.
        keep: leave complete files in `folder` instead of deleting each after its use.
        log: receives a line about each download, from any thread.
    """

    def __init__(self, dataset: HubDataset, folder: Path, keep: bool, log: Callable[[str], None]):
        self.dataset, self.keep = dataset, keep
        self._folder, self._log = folder, log
        self._begun: dict[str, Future] = {}  # by file name; at most one prefetch

    def local(self, file: File) -> Path | None:
        """Path of a copy in the Hub's cache or the folder, or None. Checks the size only."""
        for path in (self.dataset.cached(file), self._path(file)):
            if path and path.is_file() and bytes_of_file(path) == file.size_bytes:
                return path
        return None

    @contextmanager
    def open(self, file: File, following: File | None = None) -> Iterator[Path]:
        """Gives the path of a complete and verified file, and prefetches the following one.

        A downloaded file is deleted when the block ends, unless `keep` is set. After an
        interruption it stays, and the next run verifies and uses it. A file in the Hub's cache
        always stays.

        Raises:
            UserError: the download failed. Raised in this thread, not in the downloading one.
        """
        path = self._wait_for(file)
        if following:
            self._begin(following)
        ours = path == self._path(file)
        try:
            yield path
        except UserError:  # damaged: the next run must download it again
            if ours:
                path.unlink(missing_ok=True)
            raise
        if ours and not self.keep:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Ends running downloads. A stalled connection is not waited for."""
        self.dataset.stop()
        wait(self._begun.values(), timeout=1)

    def clear(self, files: Iterable[File]) -> None:
        """Deletes these files, whole or incomplete, and folders that are empty then."""
        folders = {self._folder}
        with suppress(OSError):
            for file in files:
                for path in (self._path(file), self._path(file, ".part")):
                    path.unlink(missing_ok=True)
                    folders |= {p for p in path.parents if self._folder in p.parents}
        for folder in sorted(folders, reverse=True):
            with suppress(OSError):  # not empty, or not there
                folder.rmdir()

    def _wait_for(self, file: File) -> Path:
        future = self._begin(file)
        if not wait([future], POLL_SECONDS).done:
            from tqdm import tqdm

            part = self._path(file, ".part")
            with (
                tqdm(
                    total=file.size_bytes,
                    unit="B",
                    unit_scale=True,
                    desc=Path(file.name).name,
                    disable=None,
                    leave=False,
                    dynamic_ncols=True,
                ) as bar,
                interruptible(),
            ):
                while not wait([future], POLL_SECONDS).done:
                    bar.update(bytes_of_file(part) - bar.n)
        del self._begun[file.name]
        return future.result()

    def _begin(self, file: File) -> Future:
        """Starts a download, or returns the running one."""
        if file.name not in self._begun:
            future = self._begun[file.name] = Future()
            # A daemon thread: a stalled connection must not keep the process alive.
            threading.Thread(target=self._work, args=(file, future), daemon=True).start()
        return self._begun[file.name]

    def _work(self, file: File, future: Future) -> None:
        try:
            future.set_result(self._fetch(file))
        except OSError as error:
            full = error.errno == errno.ENOSPC
            reason = "disk full" if full else error.strerror or error
            text = (
                f"{reason} while downloading {file.name} to {self._folder}; finished shards are "
                "kept: free some space and run the same command again to continue"
            )
            future.set_exception(UserError(text))
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            future.set_exception(error)

    def _fetch(self, file: File) -> Path:
        """The path of a complete file. A download with a wrong sha256 is repeated once.

        Raises:
            UserError: two downloads were wrong, or the Hub refuses.
            OSError: of the disk.
        """
        found = self.local(file)
        if found and not _problem(found, file):
            return found
        path, part = self._path(file), self._path(file, ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        self._log(f"downloading {file.name}, {file.size_bytes / 1e9:.2f} GB")
        for last in (False, True):
            os.close(no_follow(str(part), os.O_CREAT | os.O_WRONLY))
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

    def _path(self, file: File, suffix: str = "") -> Path:
        path = below(self._folder, file.name + suffix)
        check_unlinked(self._folder, path)
        return path


def _problem(path: Path, file: File) -> str:
    """Describes a wrong size or sha256; "" for a correct file."""
    if bytes_of_file(path) != file.size_bytes:
        return f"{bytes_of_file(path):,} bytes came instead of {file.size_bytes:,}"
    if file.sha256:
        found = sha256_of(path)
        if found != file.sha256:
            return f"its sha256 is {found[:12]}… instead of {file.sha256[:12]}…"
    return ""
