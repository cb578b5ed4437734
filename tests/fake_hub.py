"""A Hugging Face Hub on this machine: just what `gpt2 prepare` asks for FineWeb-Edu."""

import hashlib
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from gpt2.sources import FINEWEB_FOLDER, FINEWEB_REPOSITORY, FINEWEB_REVISION

TREE = f"/api/datasets/{FINEWEB_REPOSITORY}/tree/{FINEWEB_REVISION}/{FINEWEB_FOLDER}"
FILES = f"/datasets/{FINEWEB_REPOSITORY}/resolve/{FINEWEB_REVISION}/"


class FakeHub:
    """Files by their path in the repository, and the requests that came."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.requests: list[str] = []
        self.url = ""

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that make huggingface_hub ask this Hub, and keep its files in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def downloads(self) -> list[str]:
        """Paths of the files that were fetched, in order."""
        return [line.split(FILES)[1] for line in self.requests if line.startswith(f"GET {FILES}")]


def parquet_bytes(texts: list[str]) -> bytes:
    """A parquet file with a text column, and another one."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "score": [3.5] * len(texts)}), buffer)
    return buffer.getvalue()


@contextmanager
def fake_hub(files: dict[str, bytes]):
    """Serves until the block ends; gives a FakeHub."""
    hub = FakeHub(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(self.path.split("?")[0])
            hub.requests.append(f"{self.command} {path}")
            name = path.removeprefix(FILES)
            if path == TREE:
                self.answer(json.dumps([entry(*item) for item in hub.files.items()]).encode())
            elif name in hub.files:
                self.answer(hub.files[name])
            else:
                self.answer(b"{}", status=404)

        def answer(self, body: bytes, status: int = 200):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", FINEWEB_REVISION)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    def entry(name: str, body: bytes) -> dict:
        oid = hashlib.sha1(body).hexdigest()
        return {"type": "file", "path": name, "size": len(body), "oid": oid}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
