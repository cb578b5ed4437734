"""`gpt2 serve` in a process of its own, for tests."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from gpt2.api import GPT2
from gpt2.config.model import GPT2Config
from gpt2.train.setup import network

from .. import forks
from ..conftest import ROOT

httpx, openai = (pytest.importorskip(name) for name in ("httpx", "openai"))  # extra `dev`

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 128}
LOWERED = """
import sys
from gpt2.cli import main
from gpt2.serve import connections, security
seconds = float(sys.argv[1])
connections.SECONDS_FOR_HEADERS = connections.SECONDS_TO_READ = seconds
connections.SECONDS_FOR_BODY = security.SECONDS_FOR_BODY = seconds
sys.exit(main(sys.argv[2:]))
"""


def save_model(path: Path, config: GPT2Config | None = None) -> GPT2:
    """Weights that make some tokens clearly likelier, so that rounding seldom decides."""
    from gpt2.checkpoint import model_file

    torch.manual_seed(0)
    model = network(config or GPT2Config(**SHAPE)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    model_file.save_model(path, model, 0, None)
    return GPT2.from_checkpoint(path, device="cpu")


class Server:
    """A running `gpt2 serve`; `stop` gives (exit code, what it said).

    Args:
        path: the model.
        options: of `gpt2 serve`.
        key: the API key.
        seconds: time limit of headers, bodies and unread answers, instead of the real ones.
        fork: by tests/forks.py, which is faster; not where the end of a process is tested.
    """

    def __init__(
        self, path: Path, *options: str, key: str = "", seconds: float = 0, fork: bool = False
    ):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "GPT2_API_KEY": key}
        gpt2 = ["-c", LOWERED, str(seconds)] if seconds else ["-m", "gpt2"]
        python = forks.server(ROOT).python if fork and forks.AVAILABLE else sys.executable
        command = [python, *gpt2, "serve", str(path), "--port=0", "--device=cpu", *options]
        self.process = subprocess.Popen(
            command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.said, self._ready = "", threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)  # or the pipe fills up
        self._reader.start()
        self._ready.wait(120)
        found = re.search(r"http://[\d.]+:(\d+)/", self.said)
        assert found, f"the server has ended: {self.said}"
        self.url, self.port = found[0].rstrip("/"), int(found[1])
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0, timeout=120
        )

    def _read(self) -> None:
        for line in self.process.stdout:
            self.said += line
            if "http://" in line:
                self._ready.set()
        self._ready.set()

    def health(self) -> dict:
        return httpx.get(f"{self.url}/health", timeout=60).json()

    def connect(self, sent: bytes = b"", buffer: int = 0) -> socket.socket:
        """A connection on which `sent` has been sent; `buffer` is how much it takes unread."""
        opened = socket.socket()
        if buffer:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        opened.settimeout(60)
        opened.connect(("127.0.0.1", self.port))
        opened.sendall(sent)
        return opened

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 30
        while (now := self.health())["running"] or now["waiting"]:
            assert time.monotonic() < deadline, now
            time.sleep(0.05)

    def wait_until_said(self, pattern: str) -> None:
        deadline = time.monotonic() + 30
        while not re.search(pattern, self.said):
            assert time.monotonic() < deadline, (pattern, self.said)
            time.sleep(0.05)

    def stop(self, ask: bool = True) -> tuple[int, str]:
        self.client.close()
        if ask and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.process.wait(60)
        self._reader.join(60)
        self.process.stdout.close()
        return self.process.returncode, self.said


def read_answer(connection: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of an answer with Content-Length."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head)[1])
    while len(body) < length:
        body += connection.recv(65536)
    return head, body


def read_all(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection, also if it resets it."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    connection.close()
    return received
