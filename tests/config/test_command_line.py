"""The command line as people type it."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.config.command_line import parse, to_toml
from gpt2.config.commands import PrepareConfig, SampleConfig
from gpt2.config.options import flatten
from gpt2.config.train import TrainConfig
from gpt2.errors import UserError


def train(*argv: str) -> dict:
    return flatten(parse(TrainConfig, list(argv), "gpt2 train"))


def test_the_form_everybody_copies():
    got = train("--compile_model=True", "--dtype=bfloat16", "--grad_accum_steps=8")
    assert got["compile_model"] == "True"
    assert got["dtype"] == "bfloat16"
    assert got["grad_accum_steps"] == 8
    changed = {k for k, v in got.items() if v != flatten(TrainConfig())[k]}
    assert changed == {"compile_model", "dtype", "grad_accum_steps"}


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("--compile_model=true", "compile_model", "True"),
        ("--compile_model", "compile_model", "True"),
        ("--compile-model=False", "compile_model", "False"),
        ("--grad-accum-steps=2", "grad_accum_steps", 2),
        ("--eval_tokens=1e6", "eval_tokens", 1_000_000),
        ("--eval_tokens=1_000", "eval_tokens", 1000),
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--shuffle=false", "shuffle", False),
        ("--shuffle", "shuffle", True),
        ("--out_dir=a=b", "out_dir", "a=b"),
    ],
)
def test_spellings(argument, name, value):
    assert train(argument)[name] == value
    assert type(train(argument)[name]) is type(value)


def test_value_as_a_word_of_its_own():
    assert train("--batch_size", "3", "--dtype", "float32")["batch_size"] == 3


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--grad_acum_steps=8", "did you mean --grad_accum_steps"),
        ("--n_layers=8", "did you mean --n_layer"),
        ("--zzz=1", "see --help"),
        ("--dtype=bf16", "bfloat16"),
        ("--batch_size=8.5", "not a whole number"),
        ("--batch_size=many", "many"),
        ("--learning_rate=nan", "not a finite number"),
        ("--shuffle=perhaps", "neither True nor False"),
        ("--batch_size=0", "batch_size=0: use 1 or more"),
        ("--beta2=1", "below 1"),
        ("--max_steps=inf", "not a whole number"),
        ("--seed=-1", "seed=-1: use a whole number"),
        ("stray", "unrecognized arguments: stray"),
        ("--config=missing.toml", "No such file"),
    ],
)
def test_mistakes_are_one_clear_line(argument, message):
    with pytest.raises(UserError) as caught:
        train(argument)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_toml_file_and_override(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text('size = "gpt2-tiny"\nbatch_size = 4\nlearning_rate = 1e-3\nshuffle = false\n')
    got = train(f"--config={file}", "--batch_size=2")
    assert (got["size"], got["batch_size"], got["shuffle"]) == ("gpt2-tiny", 2, False)
    # the command line wins wherever it stands
    assert train("--batch_size=2", "--config", str(file))["batch_size"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("grad_acum_steps = 8", "did you mean --grad_accum_steps"),
        ("batch_size = 8.5", "not a whole number"),
        ("[model]\nn_layer = 2", "plain value"),
        ("batch_size = [1]", "plain value"),
        ("batch_size", "not a TOML file"),
        ('config = "other.toml"', "unknown option --config"),
    ],
)
def test_mistakes_in_toml_files(tmp_path, content, message):
    file = tmp_path / "x.toml"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        train(f"--config={file}")


@given(st.text(max_size=30))
def test_any_argument_gives_an_answer_or_one_line(text):
    with contextlib.suppress(UserError, SystemExit):  # SystemExit is --help
        assert train("--batch_size=2", text)["batch_size"] in (2, _last_batch_size(text))


def _last_batch_size(text: str) -> int | None:
    name, _, value = text.partition("=")
    return int(float(value)) if name.replace("-", "_") == "__batch_size" else None


def test_settings_written_as_toml_are_read_back(tmp_path):
    settings = train('--out_dir=C:\\runs\\"a"', "--learning_rate=3e-4", "--shuffle=False")
    file = tmp_path / "config.toml"
    file.write_text(to_toml(settings), encoding="utf-8")
    assert train(f"--config={file}") == settings


def test_positional_argument():
    argv = ["out/out_ckpt.pt", "--top_k=5"]
    config, values = parse(SampleConfig, argv, "gpt2 sample", {"checkpoint": "a file"})
    assert values == ["out/out_ckpt.pt"]
    assert config.top_k == 5
    with pytest.raises(UserError, match="checkpoint"):
        parse(SampleConfig, [], "gpt2 sample", {"checkpoint": "a file"})


@pytest.mark.parametrize("cls", [TrainConfig, PrepareConfig, SampleConfig])
def test_help_explains_every_option(cls, capsys):
    with pytest.raises(SystemExit):
        parse(cls, ["--help"], "gpt2 x")
    shown = capsys.readouterr().out
    for name in flatten(cls()):
        assert f"--{name} " in shown
