"""The Hugging Face Hub: lists a dataset's files and receives them, whatever the connection does.

Requests go through huggingface_hub's client, so that HF_ENDPOINT, HF_TOKEN, proxies and
HF_HUB_OFFLINE count, and its cache is looked into first. The bytes are received here and not by
`hf_hub_download`: that one writes to a new file of random name at every call, so that after a kill
it begins at zero again. Here a file grows under a fixed name and goes on by an HTTP range.
"""

import importlib
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote

from ..errors import UserError

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0  # before a request is made again
TRIES = 8  # requests in a row that bring nothing, with about two minutes of waiting in between
COMMIT = re.compile(r"[0-9a-f]{40}")

T = TypeVar("T")


@dataclass(frozen=True)
class File:
    """A file of a dataset: its path in the repository, with forward slashes."""

    name: str
    size_bytes: int
    sha256: str = ""  # empty for small files outside git LFS: of those only the size is known


class _Passing(Exception):
    """A failure that may be over in a while; `seconds`: how long the Hub asked to wait."""

    def __init__(self, reason: str, seconds: float = 0.0):
        super().__init__(reason)
        self.seconds = seconds


class Stopped(Exception):
    """`HubDataset.stop` was called."""


class HubDataset:
    """A dataset repository at one revision.

    Args:
        repository: OWNER/NAME.
        revision: commit, tag or branch; `find` makes a commit of it.
        log: is told, from any thread, what is waited for.
    """

    def __init__(self, repository: str, revision: str, log: Callable[[str], None]):
        self.repository, self.revision = repository, revision
        self._log = log
        self._stop = threading.Event()

    @property
    def page(self) -> str:
        """The address where a browser shows it."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/datasets/{self.repository}"

    def stop(self) -> None:
        """Ends waiting and receiving, in other threads, by a `Stopped`."""
        self._stop.set()

    def find(self, path: str) -> list[File]:
        """All files below a folder of the repository ("": all of it); settles the commit.

        Raises:
            UserError: no such dataset, revision or folder, no access, or no connection.
        """
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return self._find_in_cache(path)
        api = f"{constants.ENDPOINT}/api/datasets/{self.repository}"
        if not COMMIT.fullmatch(self.revision):
            answer, _ = self._json(f"{api}/revision/{quote(self.revision, '')}")
            self.revision = answer["sha"]
        url = f"{api}/tree/{self.revision}/{quote(path, '/')}".rstrip("/") + "?recursive=true"
        files = []
        while url:
            entries, url = self._json(url)
            for entry in entries:
                name = PurePosixPath(entry["path"])
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(f"{self.repository} holds a file {name}, outside its folder")
                if entry["type"] == "file":
                    sha256 = (entry.get("lfs") or {}).get("oid", "")
                    files.append(File(entry["path"], entry["size"], sha256))
        return files

    def cached(self, file: File) -> Path | None:
        """Where the Hub's cache holds a file; not verified."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(
            self.repository, file.name, repo_type="dataset", revision=self.revision
        )
        return Path(path) if isinstance(path, str) else None  # else None, or "does not exist"

    def download(self, file: File, target: Path) -> None:
        """Appends to `target` what it lacks of a file; whatever it takes, within TRIES.

        Raises:
            UserError: no access, no such file, or no connection.
            OSError: of the disk.
            Stopped: `stop` was called.
        """
        self._patiently(lambda: self._receive(file, target), lambda: bytes_of_file(target))

    def _receive(self, file: File, target: Path) -> None:
        """One request. Raises _Passing when it is cut short."""
        from huggingface_hub import hf_hub_url

        have = bytes_of_file(target)
        if have >= file.size_bytes:
            return
        url = hf_hub_url(self.repository, file.name, repo_type="dataset", revision=self.revision)
        with self._request(url, {"Range": f"bytes={have}-"} if have else {}) as response:
            place = response.headers.get("Content-Range", "")
            goes_on = response.status_code == 206 and place.startswith(f"bytes {have}-")
            with open(target, "ab" if goes_on else "wb") as out:
                for chunk in response.iter_bytes():
                    if self._stop.is_set():
                        raise Stopped
                    out.write(chunk)
                    out.flush()  # what has come is kept, whatever ends the process
                    if out.tell() > file.size_bytes:
                        return
        if bytes_of_file(target) < file.size_bytes:
            raise _Passing("the connection was closed early")

    def _json(self, url: str) -> tuple[Any, str]:
        """The answer of the Hub's API, and the address of its next page or ""."""

        def ask() -> tuple[Any, str]:
            with self._request(url) as response:
                response.read()
                return response.json(), response.links.get("next", {}).get("url", "")

        try:
            return self._patiently(ask)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{url} answers with something else than the Hub; {WAY_OUT}") from None

    @contextmanager
    def _request(self, url: str, headers: dict[str, str] | None = None) -> Iterator[Any]:
        """Gives the response to a GET, as httpx makes it, before its body is read.

        Raises:
            _Passing: an overloaded or failing server, a time-out, a lost connection.
            UserError: any other answer than the one asked for.
        """
        from huggingface_hub import constants, errors, get_session
        from huggingface_hub.utils import build_hf_headers

        http = http_library()
        # identity: a range of compressed bytes would be no use
        headers = build_hf_headers() | {"Accept-Encoding": "identity"} | (headers or {})
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with get_session().stream("GET", url, headers=headers, timeout=seconds) as response:
                self._check(response)
                yield response
        except errors.OfflineModeIsEnabled:
            raise UserError(
                f"HF_HUB_OFFLINE is set and {url} is not in the cache; unset it, or download first"
            ) from None
        except (http.InvalidURL, http.UnsupportedProtocol) as error:
            raise UserError(f"{url}: {error}; check HF_ENDPOINT and the proxy settings") from None
        except http.TimeoutException:
            raise _Passing(f"nothing came for {seconds} s") from None
        except http.HTTPError as error:
            raise _Passing(next(iter(str(error).splitlines()), type(error).__name__)) from None

    def _check(self, response: Any) -> None:
        status, headers = response.status_code, response.headers
        if status < 400:
            return
        if status in (408, 425, 429) or status >= 500:
            raise _Passing(f"the Hub answered {status}", _asked_seconds(headers))
        name, page, code = self.repository, self.page, headers.get("X-Error-Code", "")
        if status in (401, 403):
            text = (
                f"no access to the dataset {name} (HTTP {status}): check its name; a private or "
                f"gated one needs HF_TOKEN or `hf auth login`, and its terms accepted at {page}"
            )
        elif code == "RevisionNotFound":
            text = f"the dataset {name} has no revision {self.revision}; see {page}"
        elif code == "EntryNotFound":
            text = f"the dataset {name} has no {response.url.path.partition('/tree/')[2] or 'file'}"
            text += f" like this; see {page}/tree/{self.revision}"
        elif status == 404:
            text = f"the Hub has no dataset {name} (HTTP 404); see {page}"
        else:
            text = f"the Hub refused {response.url} (HTTP {status}); {WAY_OUT}"
        raise UserError(text)

    def _patiently(self, call: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Calls until it works; waits longer and longer while that brings no progress."""
        failures = 0
        while True:
            before = progress()
            try:
                return call()
            except _Passing as error:
                failures = 1 if progress() > before else failures + 1
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
            if self._stop.wait(seconds):
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
        found = [p for p in (root / path).rglob("*") if p.is_file()]
        self._log(
            f"HF_HUB_OFFLINE is set: taking the {len(found)} files of {self.repository} that the "
            "cache holds; whether these are all of them cannot be known"
        )
        return [File(p.relative_to(root).as_posix(), p.stat().st_size) for p in found]


WAY_OUT = "run the same command again to continue, or use --source=PATH"


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
