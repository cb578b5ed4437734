"""A process that renders chat templates of strangers; `templates.py` starts it and talks with it.

The sandbox of jinja2 keeps a template from Python's own objects, but not from using all memory or
time. This process has its own limit of memory, and whoever started it kills it after some seconds.
It reads requests and writes answers, each behind its length in 4 bytes.
"""

import json
import signal
import sys
from typing import IO, Any

MAX_MEMORY_BYTES = 2**30


def main() -> None:
    """Answers until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # as in transformers
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    _limit_memory()
    templates: dict[str, Any] = {}
    while request := receive(sys.stdin.buffer):
        source, values = json.JSONDecoder().decode(request.decode())
        try:
            if source not in templates:
                templates = {source: environment.from_string(source)}
            answer = b"+" + templates[source].render(values).encode("utf-8", "replace")
        except MemoryError:
            answer = b"-it takes too much memory"
        except Exception as error:  # noqa: BLE001 - a template raises whatever Python raises
            answer = b"-" + (str(error) or type(error).__name__)[:1000].encode("utf-8", "replace")
        send(sys.stdout.buffer, answer)


def send(stream: IO[bytes], content: bytes) -> None:
    """Writes a message."""
    stream.write(len(content).to_bytes(4, "little") + content)
    stream.flush()


def receive(stream: IO[bytes], limit: int = 2**31) -> bytes:
    """Reads a message; b"" when nobody writes any more, or one is longer than the limit."""
    size = int.from_bytes(stream.read(4), "little")
    return stream.read(size) if size <= limit else b""


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def _to_json(value: Any, indent: int | None = None) -> str:
    """As transformers does it: without HTML's escapes, in the order of the keys."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(text: str = "") -> None:
    raise ValueError(text)


if __name__ == "__main__":
    main()
