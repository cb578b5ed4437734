"""Many clients at once, some of which hang up or read slowly; prints what came of it as JSON.

    python -m tests.serve.soak --seconds=60 --clients=64

A text is compared with the one that its request gets alone. Where they differ, the probabilities at
the first other token say whether rounding can explain it: matmuls with more rows round differently,
and a draw that falls between two tokens may then take the other. Everything else counts as mixed.
"""

import argparse
import functools
import http.client
import json
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from gpt2.api import GPT2
from gpt2.generate.sampling import Sampling, choose, uniforms
from gpt2.generate.stream import generate
from gpt2.tokenizer import END_OF_TEXT, gpt2_tokenizer

from .running import Server, save_model

KINDS = 48  # different requests; clients choose among them
NOISE, DRAWS = 1e-4, 64  # added to logits, so often, to see whether rounding changes a token
SETTINGS = ({"temperature": 0}, {"temperature": 1}, {"temperature": 0.9, "top_k": 40})


@dataclass
class Asked:
    """A request and what its client got."""

    number: int
    left: bool = False  # by the client
    whole: bool = False
    text: str = ""


def settings_of(number: int) -> dict:
    """Prompt, number of new tokens, and sampling of a request."""
    sampling = SETTINGS[number % len(SETTINGS)]
    return {"prompt": f"Number {number}", "max_tokens": 8 + number % 57, "seed": number, **sampling}


def ask(server: Server, number: int, rng: random.Random) -> Asked:
    """One request: read whole, read slowly, or left at a random moment."""
    asked, how = Asked(number), rng.choice(["whole", "whole", "whole", "slow", "leaves"])
    streamed = rng.random() < 0.7
    body = json.dumps({**settings_of(number), "stream": streamed}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection = server.connect(head.encode() + body, 2048 if how == "slow" else 0)
    with connection:
        if how == "leaves":
            asked.left = True
            connection.settimeout(rng.choice([0.01, 0.1, 0.5]))
        try:
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            read_text(answer, asked, streamed, 0.02 if how == "slow" else 0)
        except (OSError, http.client.HTTPException):
            pass  # its text, so far, is compared all the same
    return asked


def read_text(answer: http.client.HTTPResponse, asked: Asked, streamed: bool, pause: float) -> None:
    """Reads the answer into `asked`, with a pause of so many seconds after each line."""
    if not streamed:
        (choice,) = json.loads(answer.read())["choices"]
        asked.text, asked.whole = choice["text"], choice["finish_reason"] is not None
        return
    for line in answer:
        time.sleep(pause)
        if line.startswith(b"data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            asked.text += choice["text"]
        asked.whole |= line.startswith(b"data: [DONE]")


def soak(server: Server, seconds: float, clients: int) -> tuple[list[Asked], list[float]]:
    """All requests of the clients, and the server's memory (MB) once a second."""
    ends, process, megabytes = time.monotonic() + seconds, psutil.Process(server.process.pid), []

    def client(number: int) -> list[Asked]:
        rng, all_asked = random.Random(number), []
        while time.monotonic() < ends:
            all_asked.append(ask(server, rng.randrange(KINDS), rng))
        return all_asked

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, number) for number in range(clients)]
        while time.monotonic() < ends:
            time.sleep(1)
            megabytes.append(process.memory_info().rss / 2**20)
        return [asked for future in running for asked in future.result()], megabytes


class Alone:
    """What each request gets when it is the only one."""

    def __init__(self, model: GPT2):
        self.model = model
        self.tokens = functools.cache(self._tokens)

    def _tokens(self, number: int) -> list[int]:
        given = settings_of(number)
        prompt, count = gpt2_tokenizer().encode(given.pop("prompt")), given.pop("max_tokens")
        return generate(self.model, [prompt], count, stop_token=END_OF_TEXT, **given)[0]

    def compare(self, asked: Asked) -> str:
        """equal, rounded or mixed; a text that was not read to its end is compared so far."""
        tokens = self.tokens(asked.number)
        expected = gpt2_tokenizer().decode(tokens)
        if asked.text == expected or (not asked.whole and expected.startswith(asked.text)):
            return "equal"
        pairs = zip(asked.text, expected, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(asked.text))
        lengths = [len(gpt2_tokenizer().decode(tokens[: k + 1])) for k in range(len(tokens))]
        at = next((k for k, length in enumerate(lengths) if length > same), len(tokens) - 1)
        # the text of the other token may begin as that of the expected ones does
        near = any(self._is_near(asked.number, k) for k in range(max(0, at - 3), at + 1))
        return "rounded" if near else "mixed"

    @torch.inference_mode()
    def _is_near(self, number: int, step: int) -> bool:
        """Whether a little noise in the logits changes the token of a step."""
        given, tokens = settings_of(number), self.tokens(number)
        prompt = gpt2_tokenizer().encode(given["prompt"])
        before = torch.tensor([prompt + tokens[:step]])
        logits = self.model.logits(self.model.hidden(before))[0, -1].float()
        uniform = uniforms(number, 1, step + 1)[step]
        sampling = Sampling(**SETTINGS[number % len(SETTINGS)])
        noisy = logits + NOISE * torch.randn(DRAWS, len(logits))
        return bool((choose(noisy, uniform.expand(DRAWS), sampling) != tokens[step]).any())


def main() -> int:
    """Starts a server, lets the clients ask, compares; 1 if a request was lost or mixed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.pt"
        alone = Alone(save_model(path))
        server = Server(path, "--slots=16", f"--max_queue={options.clients}")
        try:
            everything, megabytes = soak(server, options.seconds, options.clients)
            server.wait_until_idle()
            health = server.health()["requests"]
        finally:
            code, said = server.stop()
    compared = [alone.compare(asked) for asked in everything]
    whole = [asked.whole for asked in everything]
    found = {
        "seconds": options.seconds,
        "clients": options.clients,
        "sent": len(everything),
        "whole": sum(whole),
        "left": sum(asked.left and not asked.whole for asked in everything),
        "lost": sum(not asked.left and not asked.whole for asked in everything),
        **{how: compared.count(how) for how in ("equal", "rounded", "mixed")},
        "megabytes": [round(megabytes[len(megabytes) // 4]), round(megabytes[-1])],
        "server": health,
        "exit_code": code,
        "tracebacks": said.count("Traceback"),
    }
    print(json.dumps(found))
    return int(bool(found["lost"] or found["mixed"] or found["tracebacks"]))


if __name__ == "__main__":
    sys.exit(main())
