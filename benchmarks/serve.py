"""Requests per second and latency of `gpt2 serve` with many clients at once.

    python -m benchmarks.serve out/out_ckpt.pt --clients=32
    python -m benchmarks.serve --size=gpt2 --clients=1,32

Starts the server in a process of its own, on a checkpoint or on random weights of a size. Each
client is a thread that asks for one streamed completion after the other. There is a line of JSON
for each number of clients. `lost` are requests without an answer of full length.
"""

import argparse
import http.client
import inspect
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gpt2.api import GPT2
from gpt2.config.model import SIZES

from .arguments import count, counts

WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be"]


def prompt_of(number: int, words: int) -> str:
    """Another prompt for every request."""
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words))


def ask(port: int, number: int, options: argparse.Namespace) -> dict:
    """One streamed request: seconds to the first token and in all, and the tokens of the text."""
    body = {
        "prompt": prompt_of(number, options.prompt_words),
        "max_tokens": options.new_tokens,
        "seed": number,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, text, tokens, finish = time.perf_counter(), None, "", 0, None
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        for line in connection.getresponse():
            if not line.startswith(b"data: {"):
                continue
            data = json.loads(line[6:])
            first = first or time.perf_counter()
            for choice in data.get("choices", []):
                text, finish = text + choice["text"], choice["finish_reason"] or finish
            tokens = (data.get("usage") or {}).get("completion_tokens", tokens)
    except (OSError, http.client.HTTPException):
        finish = None
    finally:
        connection.close()
    ended = time.perf_counter()
    whole = finish == "stop" or tokens == options.new_tokens
    return {
        "first": (first or ended) - began,
        "seconds": ended - began,
        "tokens": tokens,
        "text": text,
        "whole": bool(finish) and whole,
    }


def measure(port: int, clients: int, options: argparse.Namespace) -> tuple[dict, list[dict]]:
    """All requests of so many clients."""
    numbers = range(clients * options.requests)
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        rows = list(pool.map(lambda n: ask(port, n, options), numbers))
    seconds = time.perf_counter() - began

    def percentiles(name: str) -> dict[str, float]:
        values = [row[name] for row in rows]
        cuts = statistics.quantiles(values * (1 + (len(values) < 2)), n=100, method="inclusive")
        return {f"p{p}": round(cuts[p - 1], 4) for p in (50, 90, 99)}

    return {
        "clients": clients,
        "requests": len(rows),
        "lost": sum(not row["whole"] for row in rows),
        "requests_per_second": round(len(rows) / seconds, 3),
        "tokens_per_second": round(sum(row["tokens"] for row in rows) / seconds, 1),
        "first_token_seconds": percentiles("first"),
        "seconds": percentiles("seconds"),
    }, rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("checkpoint", nargs="?", help="empty: random weights of --size")
    made.add_argument("--size", default="gpt2", choices=SIZES)
    made.add_argument("--clients", type=counts, default=[32], help="several by commas: 1,32")
    made.add_argument("--requests", type=count, default=2, help="of each client")
    made.add_argument("--prompt_words", type=count, default=32)
    made.add_argument("--new_tokens", type=count, default=64)
    made.add_argument("--temperature", type=float, default=1.0)
    made.add_argument("--device", default="auto")
    made.add_argument("--slots", type=count, default=32)
    made.add_argument(
        "--same_as_alone",
        action="store_true",
        help="ask all again, one by one; other texts are an error",
    )
    return made


def main() -> int:
    """Starts the server, measures, ends it."""
    options = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.checkpoint
        if not path:
            torch.manual_seed(0)
            path = str(Path(folder) / f"{options.size}.pt")
            GPT2(options.size).save(path)
        command = [
            sys.executable,
            "-m",
            "gpt2",
            "serve",
            path,
            "--port=0",
            f"--device={options.device}",
            f"--slots={options.slots}",
            f"--max_queue={max(options.clients)}",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            said, log = "", None
            try:
                while not (found := re.search(r"http://127.0.0.1:(\d+)/", said)):
                    line = server.stdout.readline()
                    if not line:
                        return 1  # its error stands above
                    said += line
                print(said.splitlines()[0], file=sys.stderr)
                log = ThreadPoolExecutor(1).submit(server.stdout.read)  # or the pipe fills up
                return run(int(found[1]), said.splitlines()[0], options)
            finally:
                server.terminate()
                if log:
                    log.result()


def run(port: int, machine: str, options: argparse.Namespace) -> int:
    """Measures each number of clients; 1 if a text is another than alone."""
    ask(port, 0, options)  # warms up
    for clients in options.clients:
        result, rows = measure(port, clients, options)
        if options.same_as_alone:
            alone = [ask(port, n, options)["text"] for n in range(len(rows))]
            differ = sum(a != row["text"] for a, row in zip(alone, rows, strict=True))
            result["differ_from_alone"] = differ
        setting = {"prompt_words": options.prompt_words, "new_tokens": options.new_tokens}
        print(json.dumps({"model": machine, **setting, **result}), flush=True)
        if result["lost"] or result.get("differ_from_alone"):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
