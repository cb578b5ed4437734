"""/docs and /openapi.json: true to what is accepted, and with examples that run."""

import contextlib
import io
import shutil
import subprocess

import httpx
import pytest
from fastapi.openapi.models import OpenAPI

from gpt2.serve.docs_page import docs_page
from gpt2.serve.errors import ApiError
from gpt2.serve.openapi import ABOUT, openapi
from gpt2.serve.requests import ChatRequest, CompletionRequest, make_request, parse
from gpt2.serve.served_model import ServedModel
from gpt2.tokenizer import gpt2_tokenizer
from gpt2.untrusted.parsing import load_json

from ..browser import chromium
from .canned import FAINT
from .running import Server, save_model

VALUES = [None, True, False, 0, 1, -1, 7, 10**30, 0.5, 1.5, -0.5, "", "x", "none", "auto", "tiny",
          [], [7], ["x"], [["x"]], [[7]], ["x", [7]], [7, "x"], [0.5], [""], [[]], [True], {},
          {"a": 1},
          {"type": "text"}, ["text"], "x" * 300, ["x"] * 17, {"include_usage": True},
          {"include_usage": 1}, [{"role": "user", "content": "x"}], [{"role": "user"}],
          [{"role": "king", "content": "x"}],
          [{"role": "tool", "content": [{"text": "x"}]}]]  # fmt: skip
BASE = {
    CompletionRequest: {"prompt": "a", "echo": True, "max_tokens": 1, "stream": True},
    ChatRequest: {"messages": [{"role": "user", "content": "a"}], "stream": True, "logprobs": True},
}
BETWEEN_FIELDS = {"best_of": 7}  # needs n to be equal


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return ServedModel(name="tiny", block_size=128, vocab_size=50257, chat="trained", max_texts=9,
                       tokenizer=gpt2_tokenizer())  # fmt: skip


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_the_description_accepts_what_the_server_accepts(served, kind):
    """Every field with every kind of value, by the schema and by the server's own checks."""
    jsonschema = pytest.importorskip("jsonschema")
    document = openapi(served)
    schema = document["components"]["schemas"][kind.__name__]
    assert set(schema["properties"]) == set(kind.model_fields)
    assert schema["additionalProperties"] is False
    check = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
    differ = []
    for name in schema["properties"]:
        for value in VALUES:
            body = {**BASE[kind], name: value}
            if BETWEEN_FIELDS.get(name) == value or (name == "stream" and value is None):
                continue
            try:
                make_request(
                    parse(httpx.Request("POST", "http://a", json=body).content, kind), served
                )
                accepted = True
            except ApiError:
                accepted = False
            if accepted != check.is_valid(body):
                differ.append((name, value, accepted))
    assert not differ, differ


def test_the_description_is_openapi_and_every_field_is_explained(served):
    document = openapi(served)
    OpenAPI.model_validate(document)
    for name in ("ChatRequest", "CompletionRequest", "StreamOptions"):
        for field in document["components"]["schemas"][name]["properties"].values():
            assert field["description"].endswith(".")
    known = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    assert set(ABOUT) - known == {"include_usage", "include_obfuscation"}
    limited = openapi(ServedModel("tiny", 128, 50257, "trained", max_new_tokens=5))
    fields = limited["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["max_tokens"]["anyOf"][0]["maximum"] == 5


def test_names_cannot_become_html(served):
    evil = "<img src=x>'\"{0}"
    one = ServedModel(evil, 128, 50257, "trained")
    assert "<img" not in docs_page(openapi(one), f"http://{evil}", evil)


def test_the_page_works_offline_and_its_examples_run(tmp_path, monkeypatch):
    """In a browser; then by OpenAI's client and by curl, as they stand on the page, with a key."""
    save_model(tmp_path / "tiny.pt")
    server = Server(tmp_path / "tiny.pt", "--name=tiny", "--chat=True", key="secret", fork=True)
    try:
        with chromium() as browser:
            page = browser.new_page(color_scheme="dark")
            problems, asked = [], []
            page.on("console", lambda m: m.type == "error" and problems.append(m.text))
            page.on("request", lambda r: asked.append(r.url))
            page.goto(f"{server.url}/docs")
            assert (
                page.locator("[aria-label='Copy example']").count() == page.locator("pre").count()
            )
            page.click("text=Fields >> nth=0")
            assert page.is_visible("text=repetition_penalty")
            assert page.evaluate(FAINT)["found"] == []
            page.click("#theme")
            assert page.evaluate(FAINT)["found"] == []
            python, curl = (
                page.locator(f"pre.{kind}").all_inner_texts() for kind in ("python", "curl")
            )
            assert problems == []
            assert {url for url in asked if not url.startswith(("data:", server.url))} == set()
        described = httpx.get(f"{server.url}/openapi.json")
        assert described.headers["content-security-policy"].startswith("default-src 'none'")
        paths = described.json()["paths"]
        assert len(curl) == len(paths)
        assert len(python) == 3
        monkeypatch.setenv("GPT2_API_KEY", "secret")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            for code in python:
                exec(code, {})
        assert printed.getvalue().endswith("tiny\n")
        assert server.health()["requests"]["done"] == 2
        if shutil.which("curl"):
            for command in curl:
                done = subprocess.run(["sh", "-c", command], text=True, timeout=60,
                                      capture_output=True, check=True)  # fmt: skip
                assert "error" not in load_json(done.stdout.encode(), "the answer", dict)
    finally:
        server.stop()
