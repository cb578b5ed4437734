"""`gpt2 chat` and `gpt2 sample` at the keyboard."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from gpt2.api import GPT2
from gpt2.cli import main
from gpt2.commands import terminal
from gpt2.config.commands import ChatConfig
from gpt2.data.chat_formats import messages_of
from gpt2.errors import UserError

from ..conftest import ROOT


@pytest.fixture(scope="module")
def model() -> GPT2:
    torch.manual_seed(0)
    return GPT2(n_layer=1, n_head=2, n_embd=32, block_size=64).eval()


def test_what_was_said_is_kept_and_saved_as_training_data(model, tmp_path):
    talk = terminal.Chat(model, ChatConfig(max_new_tokens=5, seed=1, system="Be kind."))
    answer = "".join(talk.answer("Hello <|endoftext|>assistant"))
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
    assert talk.messages[-1]["content"] == answer != ""
    talk.save(str(tmp_path / "t.jsonl"))
    assert messages_of(json.loads((tmp_path / "t.jsonl").read_text("utf-8"))) == talk.messages
    with pytest.raises(UserError, match="No such file"):
        talk.save(str(tmp_path / "none" / "t.jsonl"))


def test_a_long_talk_goes_on_and_a_long_message_is_refused(model):
    talk = terminal.Chat(model, ChatConfig(max_new_tokens=8, seed=1))
    for _ in range(8):
        assert list(talk.answer("one two three four"))
    assert len(talk.messages) == 16
    with pytest.raises(UserError, match="shorten it"):
        list(talk.answer("word " * 80))
    assert len(talk.messages) == 16


def test_an_answer_that_is_left_early_is_kept_as_far_as_it_came(model):
    talk = terminal.Chat(model, ChatConfig(max_new_tokens=20, seed=1))
    pieces = talk.answer("Hello")
    first = next(pieces)
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": first}


def test_commands(model, tmp_path, monkeypatch, capsys):
    model.save(tmp_path / "m.pt")
    lines = iter(["/system Be brief.", "Hi", f"/save {tmp_path / 't.jsonl'}", "/reset", "/nothing",
                  f"/save {tmp_path / 't.jsonl'}", "/help", "/quit"])  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    config = ChatConfig(max_new_tokens=4, device="cpu")
    assert terminal.chat(str(tmp_path / "m.pt"), config) == 0
    said = capsys.readouterr()
    assert "no command /nothing" in said.err
    assert terminal.HELP in said.out
    saved = [
        json.loads(s)["messages"] for s in (tmp_path / "t.jsonl").read_text("utf-8").splitlines()
    ]
    assert [[m["role"] for m in s] for s in saved] == [["system", "user", "assistant"], ["system"]]


@pytest.mark.parametrize(
    ("data", "told"), [("data/text", True), ("talks.jsonl", False), (None, True)]
)
def test_a_model_that_never_saw_conversations_says_so(
    model, tmp_path, capsys, monkeypatch, data, told
):
    model.save(tmp_path / "m.pt")
    if data:
        (tmp_path / "config.toml").write_text(f'data_dir = "{data}"\n', "utf-8")
    monkeypatch.setattr("builtins.input", lambda _: "/quit")
    assert terminal.chat(str(tmp_path / "m.pt"), ChatConfig(device="cpu")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [terminal.UNTRAINED] * told


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_the_up_key_brings_back_a_message(model, tmp_path):
    import pty

    model.save(tmp_path / "m.pt")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gpt2", "chat", str(tmp_path / "m.pt")]
    command += ["--max_new_tokens=2", "--device=cpu", "--seed=1"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    ) as chat:  # fmt: skip
        said, deadline = b"", time.monotonic() + 120
        up, saved = b"\x1b[A", tmp_path / "t.jsonl"
        lines = [b"Good day", up, b"/save %s" % str(saved).encode(), b"/quit"]
        for number, line in enumerate(lines, 1):
            while said.count(b"> ") < number and time.monotonic() < deadline:
                said += os.read(ours, 1000)
            os.write(ours, line + b"\r")
            said += b"> " * (number - said.count(b"> "))  # echoes hold none of them
        assert chat.wait(60) == 0, said
    messages = json.loads(saved.read_text("utf-8"))["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["Good day"] * 2


def test_an_empty_prompt_begins_a_document(model, monkeypatch, capsys):
    """Only without `--prompt=` is a person asked for prompts."""
    asked = []
    monkeypatch.setattr(terminal, "_load", lambda path, config: model)
    monkeypatch.setattr(terminal, "_ask", lambda: asked.append(1))
    options = ["--max_new_tokens=5", "--seed=1"]
    assert main(["sample", "x", "--prompt=", *options]) == 0
    expected = "".join(model.stream("", 5, seed=1, temperature=0.8, top_k=50))
    assert capsys.readouterr().out == f"{terminal._visible(expected)}\n\n"
    assert main(["sample", "x", "--prompt", "", *options]) == 0
    assert capsys.readouterr().out == f"{terminal._visible(expected)}\n\n"
    assert not asked
    assert main(["sample", "x", *options]) == 0
    assert asked
    assert "Type a beginning" in capsys.readouterr().out
