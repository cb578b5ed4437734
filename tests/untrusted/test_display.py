"""Control characters from outside are shown, wherever they reach a terminal."""

import pytest
import torch

from gpt2.cli import main
from gpt2.commands import terminal
from gpt2.config.commands import SampleConfig
from gpt2.report import console
from gpt2.untrusted.display import CONTROL, shown

ESCAPE = "a\x1b[2J\x07\x9b31m\u202eb\u2028c\ud800\x7f"


def test_control_characters_are_shown():
    assert shown(ESCAPE) == "a\\x1b[2J\\x07\\x9b31m\\u202eb\\u2028c\\ud800\\x7f"
    assert shown("a\nb\tc\rd") == "a\\nb\\tc\\rd"
    assert shown("a\nb\tc\rd", keep="\n\t") == "a\nb\tc\\rd"
    assert shown("漢字 é 🦄 \u00a0") == "漢字 é 🦄 \u00a0"
    assert shown(3.5) == "3.5"


def test_long_text_is_cut_in_the_middle():
    assert shown("a" * 500) == "a" * 500
    cut = shown("a" * 400 + "b" * 400)
    assert len(cut) == 503
    assert cut.startswith("a" * 375 + " … ")
    assert cut.endswith("b" * 125)
    assert len(shown("a" * 9000, limit=0)) == 9000


@pytest.mark.parametrize("write", [console.log, console.warn, console.error])
def test_the_console_shows_them(write, capsys):
    write(f"first {ESCAPE}\nsecond")
    said = "".join(capsys.readouterr())
    assert "\\x1b[2J" in said
    assert not CONTROL.search(said.replace("\n", ""))
    assert said.count("\n") == (2 if write is console.log else 1)


def test_an_error_of_the_command_line_is_one_line(tmp_path, capsys):
    assert main(["train", f"--data_dir={tmp_path}/{ESCAPE}\nx", "--n_layer=1"]) == 2
    said = capsys.readouterr().err
    assert "\\x1b[2J" in said
    assert not CONTROL.search(said.removesuffix("\n"))
    assert main(["plot", "x" * 5000]) == 2
    assert len(capsys.readouterr().err) < 2100


def test_text_of_a_model_on_a_terminal(monkeypatch, capsys):
    class Model:
        config = None

        def stream(self, *_, **__):
            yield from ("one\n", "\ttwo \x1b[31m", "three\r", "four")

    terminal._write_sample(Model(), SampleConfig(), "prompt \x1b]0;x\x07", 0)
    said = capsys.readouterr().out
    assert said == "prompt \\x1b]0;x\\x07one\n\ttwo \\x1b[31mthree\\rfour\n\n"


def test_text_in_shards_on_a_terminal(tmp_path, capsys):
    text = '{"text": "one\\n\\ttwo \\u001b[31m three"}\n'
    (tmp_path / "x.jsonl").write_text(text * 40)
    argv = [f"--source={tmp_path / 'x.jsonl'}", f"--out_dir={tmp_path / 'out'}"]
    assert main(["prepare", *argv, "--num_workers=1", "--tokenizer=tiktoken"]) == 0
    capsys.readouterr()
    assert main(["shards", "show", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "one\n\ttwo \\x1b[31m three" in said
    assert "\x1b" not in said


def test_names_of_tensors_and_keys_on_a_terminal(tmp_path, capsys):
    content = {"model": {"\x1b[2J": torch.ones(1)}, "config": {"\x1b[2J": 1}}
    torch.save(content, tmp_path / "x.pt")
    (tmp_path / "x.jsonl").write_text('{"\\u001b[2J": 1}\n')
    assert main(["sample", str(tmp_path / "x.pt"), "--prompt=a"]) == 2
    argv = ["finetune", f"--init={tmp_path / 'x.pt'}", f"--data={tmp_path / 'x.jsonl'}"]
    assert main(argv) == 2
    said = "".join(capsys.readouterr())
    assert "\\x1b[2J" in said
    assert "\x1b" not in said
