"""The Hugging Face Hub: lists the files of a dataset, and downloads them over bad connections.

Files are listed by huggingface_hub's `HfApi`, and all requests go through its client. HF_ENDPOINT,
HF_TOKEN, HF_HUB_OFFLINE and proxy settings therefore work as usual. Its cache is searched first.

Files are downloaded here and not by `hf_hub_download`, which writes to a file with a new random
name at every call: after a `kill -9` it begins at zero. Here a file grows under a fixed name, and
the next run continues it by an HTTP range request.
"""

import importlib
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ..distributed.signals import interruptible
from ..errors import UserError, first_line
from ..paths import below, is_below, no_follow

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0  # before a request is made again
SLICE_SECONDS = 0.2
SLOW_NAME_SECONDS = 4.0  # a name that took longer to fail is not asked for again
TRIES = 8  # requests in a row without progress, with about two minutes of waiting in between
LARGE_REPOSITORY = 50_000  # files; huggingface_hub 1.0 trusts `siblings` up to this number

T = TypeVar("T")


@dataclass(frozen=True)
class File:
    """A file of a dataset: its path in the repository, with forward slashes.

    Raises:
        UserError: a listing or a manifest names a file outside of its folder.
    """

    name: str
    size_bytes: int
    sha256: str = ""  # empty for small files outside git LFS: of those only the size is known

    def __post_init__(self) -> None:
        if not is_below(self.name):
            raise UserError(
                f"the source lists a file {str(self.name)[:200]!r}, outside its folder; "
                "use another source, or a new --out_dir= if a manifest.json there lists it"
            )


class _TemporaryError(Exception):
    """A failure that may pass; `seconds` is the wait that the Hub asked for."""

    def __init__(self, reason: str, seconds: float = 0.0, unresolved: bool = False):
        super().__init__(reason)
        self.seconds = seconds
        self.unresolved = unresolved  # the host has no address: there is no network, or a typo


class Stopped(Exception):
    """`HubDataset.stop` was called."""


class HubDataset:
    """A dataset repository at one revision.

    Args:
        repository: OWNER/NAME.
        revision: commit, tag or branch; `find` makes a commit of it.
        log: receives a line about each wait, from any thread.
    """

    def __init__(self, repository: str, revision: str, log: Callable[[str], None]):
        self.repository, self.revision = repository, revision
        self._log = log
        self._stop = threading.Event()
        self._reached = False  # whether any request was answered

    @property
    def page(self) -> str:
        """The address where a browser shows it."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/datasets/{self.repository}"

    @property
    def _api(self) -> str:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/api/datasets/{self.repository}"

    def stop(self) -> None:
        """Ends waiting and receiving, in other threads, by a `Stopped`."""
        self._stop.set()

    def find(self, path: str) -> list[File]:
        """All files below a folder of the repository ("": all files); sets `revision` to a commit.

        Raises:
            UserError: no such dataset, revision or folder, no access, or no connection.
        """
        from huggingface_hub import HfApi, RepoFile, constants

        if constants.HF_HUB_OFFLINE:
            return self._find_in_cache(path)
        api, name, seconds = HfApi(), self.repository, constants.HF_HUB_DOWNLOAD_TIMEOUT
        info = self._ask(
            lambda: api.dataset_info(
                name, revision=self.revision, files_metadata=True, timeout=seconds
            )
        )
        if info.sha is None or info.siblings is None:
            raise UserError(self._not_the_hub())
        self.revision = commit = info.sha
        entries = [(s.rfilename, s.size, s.lfs) for s in info.siblings]
        if len(entries) >= LARGE_REPOSITORY:
            tree = self._ask(
                lambda: list(
                    api.list_repo_tree(
                        name, path or None, recursive=True, revision=commit, repo_type="dataset"
                    )
                )
            )
            entries = [(f.path, f.size, f.lfs) for f in tree if isinstance(f, RepoFile)]
        files = [self._file(*entry) for entry in entries]
        below = [file for file in files if not path or file.name.startswith(f"{path}/")]
        if path and not below:
            raise UserError(self._no_entry(f"{commit}/{path}"))
        return below

    def _file(self, path: str, size: int | None, lfs: Any) -> File:
        """From an entry of a listing; `lfs` is None outside git LFS."""
        if size is None:
            raise UserError(self._not_the_hub())
        return File(path, size, lfs.sha256 if lfs else "")

    def cached(self, file: File) -> Path | None:
        """Where the Hub's cache holds a file; not verified."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(
            self.repository, file.name, repo_type="dataset", revision=self.revision
        )
        return Path(path) if isinstance(path, str) else None  # else None, or "does not exist"

    def download(self, file: File, target: Path) -> None:
        """Appends to `target` the bytes that it lacks. Progress resets the count of tries.

        Raises:
            UserError: no access, no such file, or no connection.
            OSError: of the disk.
            Stopped: `stop` was called.
        """
        self._with_retries(lambda: self._receive(file, target), lambda: bytes_of_file(target))

    def _receive(self, file: File, target: Path) -> None:
        """Makes one request; raises _TemporaryError when it is cut short."""
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        have = bytes_of_file(target)
        if have >= file.size_bytes:
            return
        url = hf_hub_url(self.repository, file.name, repo_type="dataset", revision=self.revision)
        # identity: a range of compressed bytes would be of no use
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={have}-"} if have else {}
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with (
            self._errors(url),
            get_session().stream("GET", url, headers=headers, timeout=seconds) as response,
        ):
            if response.status_code >= 400:
                raise self._refusal(response)
            place = response.headers.get("Content-Range", "")
            goes_on = response.status_code == 206 and place.startswith(f"bytes {have}-")
            with open(target, "ab" if goes_on else "wb", opener=no_follow) as out:
                for chunk in response.iter_bytes():
                    if self._stop.is_set():
                        raise Stopped
                    out.write(chunk)
                    out.flush()  # what has come is kept, whatever ends the process
                    if out.tell() > file.size_bytes:
                        return
        if bytes_of_file(target) < file.size_bytes:
            raise _TemporaryError("the connection was closed early")

    def _ask(self, call: Callable[[], T]) -> T:
        """The answer of a method of HfApi, with retries; errors as in `find`."""

        def ask() -> T:
            with self._errors(self._api):
                return call()

        try:
            return self._with_retries(ask)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(self._not_the_hub()) from None

    @contextmanager
    def _errors(self, url: str) -> Iterator[None]:
        """Turns errors of huggingface_hub and its HTTP library into ours.

        Raises:
            _TemporaryError: an overloaded or failing server, a time-out, a lost connection.
            UserError: anything else that a request ends with.
        """
        from huggingface_hub import constants, errors

        http = http_library()
        try:
            yield
        except errors.HfHubHTTPError as error:
            raise self._refusal(error.response) from None
        except errors.HFValidationError as error:
            raise UserError(f"{self.repository}: {first_line(error)}; see {self.page}") from None
        except errors.OfflineModeIsEnabled:
            raise UserError(
                f"HF_HUB_OFFLINE is set and {url} is not in the cache; unset it, or download first"
            ) from None
        except (http.InvalidURL, http.UnsupportedProtocol) as error:
            raise UserError(f"{url}: {error}; check HF_ENDPOINT and the proxy settings") from None
        except http.TimeoutException:
            seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
            raise _TemporaryError(f"nothing came for {seconds} s") from None
        except http.HTTPError as error:
            raise _TemporaryError(first_line(error), unresolved=_unresolved(error)) from None

    def _refusal(self, response: Any) -> UserError | _TemporaryError:
        """The error that an answer with a status of 400 or more stands for."""
        status, headers = response.status_code, response.headers
        if status in (408, 425, 429) or status >= 500:
            return _TemporaryError(f"the Hub answered {status}", _asked_seconds(headers))
        name, page, code = self.repository, self.page, headers.get("X-Error-Code", "")
        if status in (401, 403):
            return UserError(
                f"no access to the dataset {name} (HTTP {status}): check its name; a private or "
                f"gated one needs HF_TOKEN or `hf auth login`, and its terms accepted at {page}"
            )
        if code == "RevisionNotFound":
            return UserError(f"the dataset {name} has no revision {self.revision}; see {page}")
        if code == "EntryNotFound":
            return UserError(self._no_entry(response.url.path.partition("/tree/")[2] or "file"))
        if status == 404:
            return UserError(f"the Hub has no dataset {name} (HTTP 404); see {page}")
        return UserError(f"the Hub refused {response.url} (HTTP {status}); {WAY_OUT}")

    def _not_the_hub(self) -> str:
        return f"{self._api} answers with something else than the Hub; {WAY_OUT}"

    def _no_network(self) -> str:
        from huggingface_hub import constants

        host = urlsplit(constants.ENDPOINT).hostname
        return (
            f"the name {host} does not resolve: there is no network, or HF_ENDPOINT or the proxy "
            f"is wrong; {OFFLINE}"
        )

    def _no_entry(self, what: str) -> str:
        at = f"{self.page}/tree/{self.revision}"
        return f"the dataset {self.repository} has no {what} like this; see {at}"

    def _with_retries(self, call: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Calls until it works; waits longer and longer while that brings no progress."""
        failures, began = 0, time.monotonic()
        while True:
            before = progress()
            try:
                with interruptible():
                    answer = call()
                self._reached = True
                return answer
            except _TemporaryError as error:
                failures = 1 if progress() > before else failures + 1
                late = failures == 2 or time.monotonic() - began > SLOW_NAME_SECONDS
                if error.unresolved and not self._reached and late:
                    raise UserError(self._no_network()) from None
                if failures == TRIES:
                    raise UserError(
                        f"cannot reach the Hugging Face Hub: {error}, {TRIES} times in a row; "
                        f"{WAY_OUT}"
                    ) from None
                # Jitter, so that many machines do not come back at the same moment.
                seconds = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (failures - 1))
                seconds = max(error.seconds, seconds) + random.uniform(0, seconds / 2)
                self._log(
                    f"{error}: trying again in {seconds:.3g} s (try {failures + 1} of {TRIES})"
                )
            until = time.monotonic() + seconds
            with interruptible():
                # In slices: a signal that another thread received wakes no long wait of this one.
                while (left := until - time.monotonic()) > 0:
                    if self._stop.wait(min(SLICE_SECONDS, left)):
                        raise Stopped

    def _find_in_cache(self, path: str) -> list[File]:
        """With HF_HUB_OFFLINE: the files of a snapshot that was downloaded before."""
        from huggingface_hub import errors, snapshot_download

        try:
            root = Path(
                snapshot_download(
                    self.repository,
                    repo_type="dataset",
                    revision=self.revision,
                    local_files_only=True,
                    allow_patterns=f"{path}/*" if path else None,
                )
            )
        except errors.LocalEntryNotFoundError:
            raise UserError(
                f"HF_HUB_OFFLINE is set and the cache lacks the dataset {self.repository} at "
                f"{self.revision}; unset it, or download it first"
            ) from None
        self.revision = root.name
        found = [p for p in (below(root, path) if path else root).rglob("*") if p.is_file()]
        self._log(
            f"HF_HUB_OFFLINE is set: taking the {len(found)} files of {self.repository} that the "
            "cache holds; whether these are all of them cannot be known"
        )
        return [File(p.relative_to(root).as_posix(), p.stat().st_size) for p in found]


SEE = "(docs/troubleshooting.md#no-network)"
OFFLINE = (
    f"without a network use --source=PATH, --source=stdlib or HF_HUB_OFFLINE=1 with a cache {SEE}"
)
WAY_OUT = f"run the same command again to continue, or use --source=PATH {SEE}"


def _asked_seconds(headers: Any) -> float:
    """How long a response asks to wait: Retry-After in seconds or as a date, or RateLimit's t."""
    asked = headers.get("Retry-After", "").strip()
    if asked.isdigit():
        return float(asked)
    try:
        return max(0.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        reset = re.search(r";\s*t=(\d+)", headers.get("RateLimit", ""))
        return float(reset[1]) if reset else 0.0


def _unresolved(error: BaseException) -> bool:
    """Whether an error goes back to a name that has no address."""
    seen: BaseException | None = error
    while seen and not isinstance(seen, socket.gaierror):
        seen = seen.__cause__ or seen.__context__
    return seen is not None


def http_library() -> Any:
    """The HTTP library of huggingface_hub: httpx in version 1, httpx2 in version 2, one API."""
    from huggingface_hub import errors

    return importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__)


def bytes_of_file(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
