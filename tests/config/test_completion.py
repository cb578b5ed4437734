"""What a shell offers after a tab; bash is asked itself."""

import shutil
import subprocess

import pytest

from gpt2 import cli
from gpt2.config.command_line import options_of
from gpt2.config.completion import SHELLS
from gpt2.config.options import flatten

BASH = shutil.which("bash")


def script(shell: str, capsys) -> str:
    assert cli.main([f"--completion={shell}"]) == 0
    return capsys.readouterr().out


def offered(text: str, *words: str) -> list[str]:
    """What bash offers for the last of these words, cut as readline cuts them."""
    listed = " ".join(f"'{word}'" for word in words)
    asked = f"COMP_WORDS=(gpt2 {listed}); COMP_CWORD={len(words)}; _gpt2"
    shown = "printf '%s\\n' \"${COMPREPLY[@]}\""
    call = [BASH, "--norc", "-c", f"{text}\n{asked}\n{shown}"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(not BASH, reason="bash is not installed")
def test_bash_completes_commands_options_and_values(capsys, tmp_path, monkeypatch):
    text = script("bash", capsys)
    assert set(cli.COMMANDS) <= set(offered(text, ""))
    assert offered(text, "tr") == ["train"]
    assert offered(text, "train", "--grad_a") == ["--grad_accum_steps="]
    assert offered(text, "train", "--dtype", "=", "fl") == ["float32", "float16"]
    assert offered(text, "train", "--dtype", "=") == ["auto", "float32", "bfloat16", "float16"]
    assert offered(text, "train", "--dtype=fl") == ["--dtype=float32", "--dtype=float16"]
    assert offered(text, "chat", "--grad_a") == []
    assert offered(text, "shards", "ver") == ["verify"]
    assert offered(text, "train", "--help") == ["--help", "--help=all"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert offered(text, "train", "--data_dir", "=", "da") == ["data"]
    assert offered(text, "sample", "da") == ["data"]
    for command, cls in cli.OPTIONS.items():
        wanted = {f"--{name}=" for name, _, _ in options_of(cls)}
        assert wanted <= set(offered(text, command, "--"))


def test_every_command_with_options_is_known():
    assert set(cli.OPTIONS) == set(cli.COMMANDS) - {"shards", "lm_eval"}
    names = {name for name, _, _ in options_of(cli.OPTIONS["train"])}
    assert names == set(flatten(cli.OPTIONS["train"]()))


@pytest.mark.parametrize("shell", SHELLS)
def test_syntax(shell, capsys, tmp_path):
    """By the shell itself, where it is installed."""
    text = script(shell, capsys)
    assert all(command in text for command in cli.COMMANDS)
    (tmp_path / "script").write_text(text, "utf-8")
    if program := shutil.which(shell):
        call = [program, "-n", tmp_path / "script"]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("argv", [["--completion"], ["--completion=tcsh"], ["--completion", "sh"]])
def test_another_shell_is_one_line(argv, capsys):
    assert cli.main(argv) == 2
    assert "use one of bash, zsh, fish" in capsys.readouterr().err
