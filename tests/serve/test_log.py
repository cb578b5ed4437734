"""Refused requests in the log: a line each, and one per second for a flood."""

import re
from types import SimpleNamespace

import pytest

from gpt2.serve import log as module
from gpt2.serve.engine import Busy, Engine, Failed
from gpt2.serve.log import REFUSALS_PER_SECOND, Refusals
from gpt2.serve.security import MAX_BODY, Guard
from gpt2.serve.served_model import ServedModel
from gpt2.serve.server import make_app
from gpt2.tokenizer import gpt2_tokenizer

from .running import save_model

testclient = pytest.importorskip("starlette.testclient")

KEY = {"authorization": "Bearer secret"}
TEXT = {"prompt": "a"}
POST, LIST = ("POST", "/v1/completions"), ("GET", "/v1/models")
REFUSED = [  # request, headers, JSON, status and reason
    (POST, KEY, {"n": "x"}, "400  n: input should be a valid integer"),
    (POST, KEY, {"promt": "a"}, "400  unknown field 'promt'; did you mean prompt?"),
    (LIST, {"authorization": "Bearer my-own-key"}, None, "401  this server wants its API key: "),
    (LIST, KEY | {"origin": "https://evil.org"}, None, "403  pages of other sites may not use"),
    (("GET", "/a%1b[31m"), KEY, None, r"404  no such address: '/a\x1b[31m'"),
    (POST, KEY, TEXT | {"model": "other"}, "404  the model 'other' does not exist here"),
    (("GET", "/v1/completions"), KEY, None, "405  'GET' is not allowed here"),
    (POST, KEY | {"content-length": str(MAX_BODY + 1)}, TEXT, "413  the body is larger than"),
    (POST, KEY | {"content-type": "text/plain"}, TEXT, "415  send JSON, with Content-Type"),
    (LIST, KEY | {"host": "evil.org"}, None, "421  the host 'evil.org' is not served here"),
    (POST, KEY, TEXT, "429  2 texts are waiting already"),
    (POST, KEY, TEXT, "503  the server is shutting down"),
]


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time that stands still, of a log in which nothing has been written."""
    now = SimpleNamespace(seconds=100.5)
    monkeypatch.setattr(module, "time", SimpleNamespace(
        monotonic=lambda: now.seconds, strftime=lambda _: "12:00:00"))  # fmt: skip
    for name, value in vars(Refusals()).items():
        monkeypatch.setattr(module.refusals, name, value)
    return now


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(save_model(tmp_path_factory.mktemp("log") / "m.pt"), 1, 1)


@pytest.mark.parametrize(("request_", "headers", "json", "expected"), REFUSED)
def test_a_refused_request_has_a_line(
    engine, monkeypatch, capsys, request_, headers, json, expected
):
    error = Busy("2 texts are waiting already") if "429" in expected else None
    error = Failed("the server is shutting down") if "503" in expected else error

    def submit(_):
        raise error

    monkeypatch.setattr(engine, "submit", submit)
    served = ServedModel(
        name="tiny", block_size=128, vocab_size=50257, chat="untrained", tokenizer=gpt2_tokenizer()
    )
    app = Guard(make_app(engine, served), set(), "secret")
    client = testclient.TestClient(app, base_url="http://localhost", client=("10.1.2.3", 5))
    answer = client.request(*request_, headers=headers, json=json)
    said = capsys.readouterr().out
    assert re.fullmatch(r"12:00:00  refused    \d{3}  [^\n\x1b]+ \(from 10\.1\.2\.3\)\n", said)
    assert f"refused    {expected}" in said
    assert said.split()[2] == str(answer.status_code)
    assert "my-own-key" not in said


def test_a_flood_takes_a_few_lines_a_second(clock, capsys):
    refusals = Refusals()
    for _ in range(1200):
        refusals.note(401, "no\nkey", "1.2.3.4")
    for _ in range(5):
        refusals.note(404, "no such", "5.6.7.8")
    assert len(capsys.readouterr().out.splitlines()) == REFUSALS_PER_SECOND
    clock.seconds += 1
    refusals.note(415, "send JSON", "9.9.9.9")
    refusals.log_rest()
    assert [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "refused    1,195 more: 401 × 1,190, 404 × 5 (1,190 from 1.2.3.4)",
        "refused    415  send JSON (from 9.9.9.9)",
    ]


def test_a_request_that_is_answered_has_no_such_line(engine, capsys):
    served = ServedModel(name="tiny", block_size=128, vocab_size=50257, chat="untrained")
    client = testclient.TestClient(make_app(engine, served), base_url="http://localhost")
    for path in ("/", "/health", "/v1/models"):
        assert client.get(path).status_code == 200
    assert capsys.readouterr().out == ""
