"""Who is let in: `Origin`, `Host`, the API key, methods; and how long errors are."""

import os
from urllib.parse import quote

import pytest

from gpt2 import cli
from gpt2.serve.engine import Engine
from gpt2.serve.security import Guard
from gpt2.serve.served_model import ServedModel
from gpt2.serve.server import make_app

from .running import save_model

testclient = pytest.importorskip("starlette.testclient")  # needs httpx, of the extra `dev`

GET = ["/", "/health", "/v1/models", "/v1/models/tiny"]
OWN = {"origin": "http://localhost"}


def client_of(tmp_path, key: str = ""):
    """A client of the application that raises what the application raises."""
    model = save_model(tmp_path / "m.pt")
    served = ServedModel(name="tiny", block_size=128, vocab_size=50257, chat="untrained")
    app = Guard(make_app(Engine(model, 1, 1), served), set(), key)
    return testclient.TestClient(app, base_url="http://localhost")


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "http://a]b", "null", "//", "é", ""])
def test_an_origin_that_is_no_address_is_refused(tmp_path, origin):
    client = client_of(tmp_path)
    assert client.get("/health", headers=OWN).status_code == 200
    answer = client.get("/health", headers={"origin": origin.encode()})
    assert answer.status_code == 403
    assert answer.json()["error"]["type"] == "permission_error"


@pytest.mark.parametrize(("sent", "status"), [
    ("Bearer secret", 200), ("bearer secret", 200), ("BEARER   secret ", 200),
    ("secret", 401), ("Bearersecret", 401), ("Basic secret", 401), ("Bearer", 401), ("", 401),
    ("Bearer secret2", 401), ("Bearer Bearer secret", 401), ("Bearer sécret", 401),
])  # fmt: skip
def test_the_key_comes_with_the_scheme_bearer_in_any_case(tmp_path, sent, status):
    answer = client_of(tmp_path, "secret").get(
        "/v1/models", headers={"authorization": sent.encode()}
    )
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", [" ", "\t", " secret", "secret\n", "sécret", "se\x00cret", "キー"])
def test_a_key_that_no_client_can_send_is_refused_at_the_start(key, monkeypatch, capsys):
    """Before the port is opened and the model is read."""
    monkeypatch.setattr("gpt2.serve.server._listen", lambda *_: 1 / 0)
    monkeypatch.setattr("gpt2.distributed.environment.variable", lambda _: key)
    for arguments in ([], [f"--api_key={key}"]):
        assert cli.main(["serve", "missing.pt", *arguments]) == 2
        error = capsys.readouterr().err
        assert "no client can send this API key: use printable ASCII" in error
        assert error.count("\n") == 1
        assert "cret" not in error


@pytest.mark.parametrize("path", [*GET, "/nothing", "/v1/completions", "/v1/models/other"])
def test_head_answers_as_get_does_without_a_body(tmp_path, path):
    client = client_of(tmp_path)
    got, head = client.get(path), client.head(path)
    assert head.status_code == got.status_code == (200 if path in GET else got.status_code)
    assert head.headers.get("content-type") == got.headers.get("content-type")
    assert head.headers.get("allow") == got.headers.get("allow")
    if path == "/v1/completions":
        assert (got.status_code, got.headers["allow"]) == (405, "POST")


def test_errors_repeat_at_most_100_characters(tmp_path):
    client, long = client_of(tmp_path), "x\x1b[31m" * 1000
    for answer in (
        client.get(f"/v1/models/{quote(long)}"),
        client.get(f"/{quote(long)}"),
        client.get("/health", headers={"host": "x" * 5000}),
        client.request("X" * 5000, "/health"),
        client.post("/v1/completions", json={"model": long}),
        client.post("/v1/completions", json={long: 1}),
        client.post("/v1/completions", json={"stream_options": {long: 1}}),
        client.post("/v1/chat/completions", json={"messages": [{"role": long, "content": "a"}]}),
    ):
        assert 400 <= answer.status_code < 500
        assert len(answer.text) < 1000
        assert "\x1b" not in answer.json()["error"]["message"]


def test_a_fifo_is_no_model(tmp_path, capsys):
    """Opening it would wait until somebody writes into it."""
    os.mkfifo(tmp_path / "m.pt")
    assert cli.main(["serve", str(tmp_path / "m.pt"), "--port=0"]) == 2
    assert "m.pt is neither a file nor a folder" in capsys.readouterr().err
