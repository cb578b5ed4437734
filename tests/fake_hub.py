"""A Hugging Face Hub on this machine: what this project asks of it, and trouble on demand.

One dataset, and any number of models, which may also be uploaded.
"""

import base64
import hashlib
import io
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from gpt2.prepare.sources import FINEWEB_REPOSITORY, FINEWEB_REVISION

MODEL_COMMIT = "d" * 40


@dataclass
class Trouble:
    """What one request is answered with instead of what it asked for."""

    status: int = 0  # this instead of the file
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int = -1  # bytes, then the connection is closed
    stall_after: int = -1  # bytes, then nothing more comes
    body: bytes | None = None  # other content


class FakeHub:
    """Files by their path in the repository, the requests that came, and trouble to come."""

    def __init__(self, files: dict[str, bytes], repository: str, revision: str):
        self.files, self.repository, self.revision = files, repository, revision
        self.requests: list[str] = []
        self.url = ""
        self.trouble: dict[str, list[Trouble]] = {}  # by a part of the address; used up in order
        self.sizes: dict[str, int] = {}  # to be listed with these sizes
        self.ranges = True  # whether requests for a range are understood
        self.token = ""  # that must come along
        self.models: dict[str, dict[str, bytes]] = {}  # files by repository and path
        self.private: list[str] = []  # models made private
        self.uploaded: dict[str, bytes] = {}  # large files that no commit names yet, by sha256
        self.page_size = 1000  # entries per page of a listing
        self.over = threading.Event()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that make huggingface_hub ask this Hub, and keep its files in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    @property
    def _resolve(self) -> str:
        return f"/datasets/{self.repository}/resolve/{self.revision}/"

    def downloads(self) -> list[str]:
        """Requests for files, in order: a path, and "+N" where it began at byte N."""
        start = f"GET {self._resolve}"
        return [line.removeprefix(start) for line in self.requests if line.startswith(start)]

    def answer(self, address: str, first: int) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) for a GET of bytes `first` to the end."""
        url = urlsplit(address)
        path, api = unquote(url.path), f"/api/datasets/{self.repository}"
        name = path.removeprefix(self._resolve)
        if path.startswith(self._resolve) and name in self.files:
            body = self.files[name]
            headers = {"ETag": f'"{sha256(body)}"', "X-Repo-Commit": self.revision}
            if first and self.ranges:
                headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
                return 206, headers, body[first:]
            return 200, headers, body
        if path.startswith(f"{api}/revision/"):
            if path.rpartition("/revision/")[2] in ("main", self.revision):
                blobs = parse_qs(url.query).get("blobs") == ["true"]
                names = [self._sibling(name, blobs) for name in self.files]
                info = {"id": self.repository, "sha": self.revision, "siblings": names}
                return 200, {}, json.dumps(info).encode()
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if path.startswith(f"{api}/tree/{self.revision}"):
            folder = path.removeprefix(f"{api}/tree/{self.revision}").strip("/")
            return self._tree(folder, int(parse_qs(url.query).get("cursor", ["0"])[0]))
        code = "EntryNotFound" if path.startswith((api, self._resolve)) else "RepoNotFound"
        return 404, {"X-Error-Code": code}, b"{}"

    def answer_model(self, address: str) -> tuple[int, dict[str, str], bytes] | None:
        """The same for a file of a model, None for any other address."""
        owner, _, rest = unquote(urlsplit(address).path).strip("/").partition("/")
        name, slash, rest = rest.partition("/resolve/")
        if not slash or owner == "datasets":
            return None
        revision, _, path = rest.partition("/")
        files = self.models.get(f"{owner}/{name}")
        if files is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if revision not in ("main", MODEL_COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Repo-Commit": ""}, b"{}"
        if path not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": MODEL_COMMIT}, b"{}"
        etag = f'"{sha256(files[path])}"'
        return 200, {"ETag": etag, "X-Repo-Commit": MODEL_COMMIT}, files[path]

    def take(self, method: str, address: str, body: bytes) -> tuple[int, Any]:
        """(status, JSON) for what comes with an upload: safetensors as large files, by LFS."""
        path = urlsplit(address).path
        name = "/".join(path.removeprefix("/api/models").split(".git/")[0].split("/")[1:3])
        if method == "PUT":
            self.uploaded[sha256(body)] = body
            return 200, {}
        steps = {
            "/repos/create": lambda: self._create(json.loads(body)),
            "/validate-yaml": lambda: (200, {"warnings": [], "errors": []}),
            "/preupload/": lambda: (200, {"files": [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]}),
            "/info/lfs/objects/batch": lambda: (200, {"transfer": "basic", "objects": [
                {**o, "actions": {"upload": {"href": f"{self.url}/upload/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]}),
            "/commit/": lambda: self._commit(name, body),
        }  # fmt: skip
        return next((step() for part, step in steps.items() if part in path), (404, {}))

    def _create(self, asked: dict) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.models else 200
        if status == 200:
            self.models[name] = {}
            hidden = asked.get("private") or asked.get("visibility") == "private"
            self.private += [name] if hidden else []  # huggingface_hub 1 and 2
        return status, {"url": f"{self.url}/{name}"}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                self.models[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.models[name][value["path"]] = self.uploaded[value["oid"]]
        url = f"{self.url}/{name}/commit/{MODEL_COMMIT}"
        return 200, {"commitUrl": url, "commitOid": MODEL_COMMIT, "success": True}

    def _sibling(self, name: str, blobs: bool) -> dict[str, Any]:
        """A file as the answer about a repository lists it."""
        if not blobs:
            return {"rfilename": name}
        size, oid = self.sizes.get(name, len(self.files[name])), sha256(self.files[name])
        lfs = {"sha256": oid, "size": size, "pointerSize": 134}
        return {"rfilename": name, "size": size, "blobId": oid[:40], "lfs": lfs}

    def _tree(self, folder: str, first: int) -> tuple[int, dict[str, str], bytes]:
        found = [n for n in self.files if not folder or n.startswith(f"{folder}/")]
        if folder and not found:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        headers, last = {}, first + self.page_size
        if last < len(found):
            address = f"{self.url}/api/datasets/{self.repository}/tree/{self.revision}/{folder}"
            headers["Link"] = f'<{address}?recursive=true&cursor={last}>; rel="next"'
        entries: list[dict] = [{"type": "directory", "path": "sample", "size": 0, "oid": "0" * 40}]
        for name in found[first:last]:
            size, oid = self.sizes.get(name, len(self.files[name])), sha256(self.files[name])
            lfs = {"oid": oid, "size": size, "pointerSize": 134}
            entries.append(
                {"type": "file", "path": name, "size": size, "oid": oid[:40], "lfs": lfs}
            )
        return 200, headers, json.dumps(entries).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def parquet_bytes(texts: list[str]) -> bytes:
    """A parquet file with a text column, and another one."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "score": [3.5] * len(texts)}), buffer)
    return buffer.getvalue()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server.hub
        first = int(self.headers.get("Range", "bytes=0-")[len("bytes=") :].split("-")[0])
        place = f"+{first}" if first else ""
        hub.requests.append(f"{self.command} {unquote(urlsplit(self.path).path)}{place}")
        status, headers, body = hub.answer_model(self.path) or hub.answer(self.path, first)
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            status, headers, body = 401, {"X-Error-Code": "GatedRepo"}, b"{}"
        waiting = next((t for part, t in hub.trouble.items() if part in self.path and t), [])
        trouble = waiting.pop(0) if waiting else Trouble()
        if trouble.status:
            status, headers, body = trouble.status, trouble.headers, b"{}"
        self.send(status, headers, body if trouble.body is None else trouble.body, trouble)

    def do_POST(self):
        hub = self.server.hub
        hub.requests.append(f"{self.command} {unquote(urlsplit(self.path).path)}")
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        known = not hub.token or self.headers.get("Authorization") == f"Bearer {hub.token}"
        if self.command == "POST" and not known:
            self.send(401, {}, b'{"error": "Invalid credentials"}', Trouble())
            return
        waiting = next((t for part, t in hub.trouble.items() if part in self.path and t), [])
        status, answer = hub.take(self.command, self.path, body) if not waiting else (
            waiting.pop(0).status, {"error": "trouble"}
        )  # fmt: skip
        self.send(
            status, {"Content-Type": "application/json"}, json.dumps(answer).encode(), Trouble()
        )

    def do_PUT(self):
        self.do_POST()

    def send(self, status, headers, body, trouble):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            stops = [n for n in (trouble.cut_after, trouble.stall_after) if n >= 0]
            self.wfile.write(body[: min(stops, default=len(body))])
            self.wfile.flush()
            if trouble.stall_after >= 0:
                self.server.hub.over.wait(60)
            self.close_connection = bool(stops)

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    hub: FakeHub

    def handle_error(self, *args):
        """A client that was killed is no fault of ours."""


@contextmanager
def fake_hub(
    files: dict[str, bytes], repository: str = FINEWEB_REPOSITORY, revision: str = FINEWEB_REVISION
):
    """Serves until the block ends; gives a FakeHub."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = hub = FakeHub(files, repository, revision)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
