"""The command line as people type it."""

import contextlib
import dataclasses
import math
import re
import tempfile
import tomllib
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpt2.config.command_line import (
    FILES,
    fields_of,
    parse,
    parse_keywords,
    parse_with_positional,
    to_toml,
)
from gpt2.config.commands import (
    AverageConfig,
    ChatConfig,
    DoctorConfig,
    EvalConfig,
    ExportConfig,
    InspectConfig,
    PrepareConfig,
    ProfileConfig,
    PushConfig,
    SampleConfig,
    ServeConfig,
    ShowConfig,
)
from gpt2.config.earlier import current_names
from gpt2.config.finetune import FinetuneConfig
from gpt2.config.model import SIZES, GPT2Config, sizes_table
from gpt2.config.options import flatten
from gpt2.config.other_names import CHECKPOINTS, INSTEAD, NOTES, SYNONYMS
from gpt2.config.train import ModelOptions, TrainConfig
from gpt2.errors import UserError
from gpt2.untrusted.parsing import SURROGATES, read_toml

from ..conftest import ROOT

CONFIGS = [TrainConfig, FinetuneConfig, ProfileConfig, PrepareConfig, SampleConfig, ShowConfig]
CONFIGS += [EvalConfig, ExportConfig, PushConfig, ChatConfig, ServeConfig, InspectConfig]
CONFIGS += [AverageConfig, DoctorConfig]


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
        ("--foo=1", "unknown option --foo; see --help"),
        ("--gpu=1", "unknown option --gpu; see --help"),
        ("--learnin_rate=1", "did you mean --learning_rate?"),
        ("--bacth_size=1", "did you mean --batch_size?"),
        ("--max_step=1", "did you mean --max_steps?"),
        ("--dtype=bf16", "bfloat16"),
        ("--batch_size=8.5", "not a whole number"),
        ("--batch_size=many", "argument --batch_size: invalid whole number value: 'many'"),
        ("--learning_rate=many", "argument --learning_rate: invalid number value: 'many'"),
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


def written_and_read(config):
    """The config that `--config=` reads from the file which a run writes about its config."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        file.write_bytes(to_toml(flatten(config)).encode("utf-8", SURROGATES))
        assert read_toml(file) == flatten(config)
        return parse(type(config), [f"--config={file}"], "gpt2 x")


HARD_TO_WRITE = (
    'C:\\runs\\"a"',
    "".join(map(chr, range(0xA0))),  # both rows of control characters, and DEL
    "\r\n\n\t",
    "\ufeff\u2028\u2029\u202e",
    "漢字 🦄 'single' ''' \"\"\"",
    "not UTF-8 \udcff \ud800",
    "# = [x]",
    "--config=other.toml",
)


@pytest.mark.parametrize("text", HARD_TO_WRITE)
@pytest.mark.parametrize("name", ["run_name", "out_dir", "data_dir", "init"])
def test_any_name_is_read_back_from_a_file_of_settings(name, text):
    config = parse(TrainConfig, [f"--{name}={text}"], "gpt2 train")
    assert flatten(config)[name] == text
    assert written_and_read(config) == config


@pytest.mark.parametrize("text", HARD_TO_WRITE)
def test_a_setting_is_one_line_of_toml(text):
    written = to_toml({"name": text})
    assert tomllib.loads(written) == {"name": text}
    assert written.count("\n") == 1


def values_of(field: dataclasses.Field) -> st.SearchStrategy:
    """Values of an option, in the range that most options allow."""
    if choices := field.metadata["choices"]:
        return st.sampled_from(choices)
    any_text = st.text(st.characters(exclude_categories=[]), max_size=20)
    return {
        bool: st.booleans(),
        int: st.integers(0, 2**63),
        float: st.floats(0, 1e300) | st.floats(0, 1),
        str: any_text | st.text(st.characters(max_codepoint=0x7F), max_size=20),
    }[field.type]


def options_of(cls: type) -> list[dataclasses.Field]:
    nested = [f.type for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.type)]
    own = [f for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(f.type)]
    return own + [field for group in nested for field in dataclasses.fields(group)]


@pytest.mark.long
@pytest.mark.parametrize("cls", CONFIGS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_settings_are_read_back_from_a_file(cls, data):
    chosen = data.draw(st.lists(st.sampled_from(options_of(cls)), min_size=1, max_size=4))
    argv = [f"--{field.name}={data.draw(values_of(field), field.name)}" for field in chosen]
    try:
        config = parse(cls, argv, "gpt2 x")
    except UserError:  # options that do not fit together
        assume(False)
    assert written_and_read(config) == config


def test_numbers_that_python_writes_with_an_exponent_or_many_digits_are_read_back():
    argv = ["--learning_rate=1e16", "--weight_decay=1e-07", f"--max_steps={2**70}", "--shuffle=0"]
    config = parse(TrainConfig, argv, "gpt2 train")
    assert written_and_read(config) == config
    assert flatten(config)["max_steps"] == 2**70


def test_old_names_of_options_are_aliases(tmp_path):
    file = tmp_path / "old.toml"
    file.write_text('window_start = "document"\n')
    for argument in (
        "--window_start=document",
        "--window-start=document",
        "--sequence_start=document",
        f"--config={file}",
    ):
        assert train(argument)["sequence_start"] == "document"
    assert "window_start" not in train()


def test_settings_of_a_run_of_an_earlier_version(tmp_path):
    """`earlier_config.toml` was written by a run of commit 74df706."""
    earlier = Path(__file__).parent / "earlier_config.toml"
    got = train(f"--config={earlier}")
    stored = tomllib.loads(earlier.read_text("utf-8"))
    assert stored["window_start"] == "document"
    stored["cooldown"] = 0.6  # 0.4 there, which a cosine does not read
    assert got == train() | current_names(stored)
    assert got["min_lr_ratio"] == 0.1  # of the file


def test_positional_argument():
    argv = ["out/out_ckpt.pt", "--top_k=5"]
    names = {"checkpoint": "a file"}
    config, values = parse_with_positional(SampleConfig, argv, "gpt2 sample", names)
    assert values == ["out/out_ckpt.pt"]
    assert config.top_k == 5
    with pytest.raises(UserError, match="checkpoint"):
        parse_with_positional(SampleConfig, [], "gpt2 sample", names)


def test_a_bare_switch_takes_no_name_behind_it():
    names = {"checkpoint": "", "repository": ""}
    a, b = "a.pt", "me/x"
    for arguments in (["--private", a, b], [a, "--private", b], ["--private", "true", a, b]):
        config, values = parse_with_positional(PushConfig, arguments, "gpt2 push", names)
        assert (config.private, *values) == (True, a, b)
    config, values = parse_with_positional(
        PushConfig, ["--private", "False", a, b], "gpt2 push", names
    )
    assert (config.private, *values) == (False, a, b)
    with pytest.raises(UserError, match=f"arguments: {b}; --private Flase was taken as --private="):
        parse_with_positional(PushConfig, ["--private", "Flase", a, b], "gpt2 push", names)


def test_positional_argument_that_may_be_left_out():
    names = {"checkpoint": "a file", "text": "what to look at"}
    for argv, expected in ((["a", "b"], ["a", "b"]), (["a"], ["a", ""])):
        _, values = parse_with_positional(InspectConfig, argv, "gpt2 inspect", names, ("text",))
        assert values == expected


@pytest.mark.parametrize("cls", CONFIGS)
def test_help_explains_every_option(cls, capsys):
    with pytest.raises(SystemExit):
        parse(cls, ["--help=all"], "gpt2 x")
    shown = capsys.readouterr().out
    for name in flatten(cls()):
        assert (f"--{name} " in shown) == (name not in getattr(cls, "HIDDEN", ()))


@pytest.mark.parametrize("cls", [TrainConfig, FinetuneConfig])
def test_help_begins_with_the_daily_options(cls, capsys):
    """Fifteen, with examples; the rest is one more word away."""
    with pytest.raises(SystemExit):
        parse(cls, ["--help"], "gpt2 x")
    shown = capsys.readouterr().out
    found = re.findall(r"^  --(\w+)", shown, re.MULTILINE)
    assert found == ["config", *cls.DAILY]
    assert len(cls.DAILY) == 15
    assert set(cls.DAILY) <= set(flatten(cls()))
    assert "examples:\n  gpt2 " in shown
    more = int(re.search(r"`gpt2 x --help=all` lists (\d+) more options", shown)[1])
    assert more == len(flatten(cls())) - len(getattr(cls, "HIDDEN", ())) - 15
    assert all(len(line) <= 100 for line in shown.splitlines())


def test_examples_of_the_help_are_commands(monkeypatch):
    """Their options exist; what follows two spaces is a remark."""
    for cls in (TrainConfig, FinetuneConfig, ProfileConfig):
        lines = re.findall(r"^  gpt2 \w+ (.*)$", cls.HELP_END, re.MULTILINE)
        assert lines
        for line in lines:
            monkeypatch.chdir(ROOT)
            parse(cls, line.partition("  ")[0].split(), "gpt2 x")


def test_help_of_train_has_a_table_of_sizes():
    """And GPT-2 small is nowhere the one of 30M."""
    for name, numbers in SIZES.items():
        model = GPT2Config(**numbers)
        exact = math.prod((model.vocab_size, model.n_embd)) + model.block_size * model.n_embd
        exact += model.n_layer * (12 * model.n_embd**2 + 13 * model.n_embd) + 2 * model.n_embd
        (line,) = (x for x in sizes_table().splitlines() if x.split()[0] == name)
        assert line.split()[-1] == f"{exact / 1e6:,.0f}M"
    assert "gpt2-small" not in sizes_table() + str(SIZES)


def test_the_old_name_of_the_size_of_30m_works():
    assert train("--size=gpt2-small") == train("--size=gpt2-30m")
    assert ModelOptions(size="gpt2-small").shape() == GPT2Config(**SIZES["gpt2-30m"])
    assert current_names({"size": "gpt2-small", "seed": 1}) == {"size": "gpt2-30m", "seed": 1}


@pytest.mark.parametrize(
    ("cls", "given", "meant"),
    [
        (TrainConfig, "--lr=1e-3", "--learning_rate"),
        (TrainConfig, "--model=gpt2", "--size"),
        (TrainConfig, "--epochs=3", "--max_steps"),
        (FinetuneConfig, "--num_epochs=3", "--epochs"),
        (TrainConfig, "--context=256", "--block_size"),
        (TrainConfig, "--seq-len=256", "--block_size"),
        (TrainConfig, "--steps=10", "--max_steps"),
        (TrainConfig, "--accum=4", "--grad_accum_steps"),
        (SampleConfig, "--max_tokens=4", "--max_new_tokens"),
    ],
)
def test_words_of_other_programs_are_understood(cls, given, meant):
    with pytest.raises(UserError, match=f"; did you mean {meant}\\?"):
        parse(cls, [given], "gpt2 x")


NANOGPT = [  # its options that have another name here, and those of its children
    (TrainConfig, "eval_interval", "did you mean --eval_every?"),
    (TrainConfig, "log_interval", "did you mean --log_every?"),
    (TrainConfig, "eval_iters", "did you mean --eval_tokens? (tokens in place of batches)"),
    (TrainConfig, "eval_only", "write: gpt2 eval CHECKPOINT"),
    (TrainConfig, "always_save_checkpoint", "did you mean --save_every?"),
    (TrainConfig, "init_from", "did you mean --init?"),
    (TrainConfig, "wandb_log", "did you mean --log_to? (--log_to=wandb)"),
    (TrainConfig, "wandb_project", "did you mean --log_to? (--log_to=wandb, with"),
    (TrainConfig, "wandb_run_name", "did you mean --run_name?"),
    (TrainConfig, "dataset", "did you mean --data_dir?"),
    (TrainConfig, "gradient_accumulation_steps", "did you mean --grad_accum_steps?"),
    (TrainConfig, "max_iters", "did you mean --max_steps?"),
    (TrainConfig, "decay_lr", "did you mean --schedule? (how it decays; --min_lr_ratio=1"),
    (TrainConfig, "warmup_iters", "did you mean --warmup_steps?"),
    (TrainConfig, "lr_decay_iters", "did you mean --max_steps? (the learning rate decays until"),
    (TrainConfig, "min_lr", "did you mean --min_lr_ratio? (a share of learning_rate, as 0.1)"),
    (TrainConfig, "max_lr", "did you mean --learning_rate?"),
    (TrainConfig, "total_batch_size", "did you mean --total_batch_tokens?"),
    (TrainConfig, "input_bin", "did you mean --data_dir?"),
    (TrainConfig, "backend", "leave it out"),
    (TrainConfig, "compile", "did you mean --compile_model?"),
    (FinetuneConfig, "init_from", "did you mean --init?"),
    (FinetuneConfig, "eval_only", "write: gpt2 eval CHECKPOINT"),
    (EvalConfig, "eval_iters", "did you mean --eval_tokens?"),
    (EvalConfig, "dataset", "did you mean --data_dir?"),
    (EvalConfig, "out_dir", "write: gpt2 x VALUE …"),
    (ExportConfig, "out_dir", "write: gpt2 x CHECKPOINT VALUE …"),
    (SampleConfig, "start", "did you mean --prompt?"),
    (SampleConfig, "out_dir", "write: gpt2 x VALUE …"),
    (SampleConfig, "init_from", "write: gpt2 x VALUE …"),
    (SampleConfig, "compile", "leave it out"),
    (SampleConfig, "min_lr", "see --help"),  # not --min_p
    (SampleConfig, "dataset", "see --help"),
]


@pytest.mark.parametrize(("cls", "word", "hint"), NANOGPT)
def test_options_of_nanogpt_are_led_to_ours(cls, word, hint):
    names = {ExportConfig: ("checkpoint", "folder")}.get(cls, ("checkpoint",))
    places = {} if cls in (TrainConfig, FinetuneConfig) else dict.fromkeys(names, "a file")
    with pytest.raises(UserError) as caught:
        parse_with_positional(cls, [f"--{word}=VALUE"], "gpt2 x", places)
    assert f"unknown option --{word}; {hint}" in str(caught.value)


@pytest.mark.parametrize("word", ["batch_size", "block_size", "dropout", "bias", "grad_clip"])
def test_options_of_nanogpt_that_have_their_names_here(word):
    assert word in flatten(TrainConfig())


def test_every_synonym_leads_to_an_option():
    known = {name for cls in CONFIGS for name in flatten(cls())}
    for word, names in SYNONYMS.items():
        assert set(names) <= known, word
    assert set(NOTES) <= set(SYNONYMS)
    noted = re.findall(r"--(\w+)=", "".join([*NOTES.values(), *INSTEAD.values()]))
    assert set(noted) <= known


def test_keywords_of_python_know_the_names_of_other_programs():
    with pytest.raises(UserError, match=r"train\(min_lr=…\): unknown option; did you mean min_lr_"):
        parse_keywords(TrainConfig, {"min_lr": 6e-5}, "train")


def test_a_value_that_is_called_as_an_option_is_a_value():
    given = ["--prompt", "model", "m.pt"]
    config, places = parse_with_positional(SampleConfig, given, "gpt2 x", {"checkpoint": "a file"})
    assert (config.prompt, places) == ("model", ["m.pt"])


@pytest.mark.parametrize("word", CHECKPOINTS)
@pytest.mark.parametrize("value", ["=m.pt", "", "=resume"])
def test_a_checkpoint_needs_no_option(word, value):
    wanted = r"m\.pt" if value == "=m.pt" else "CHECKPOINT"
    with pytest.raises(UserError, match=f"write: gpt2 sample {wanted} …"):
        parse_with_positional(
            SampleConfig, [f"{word}{value}", "m.pt"], "gpt2 sample", {"checkpoint": "a file"}
        )


def test_a_checkpoint_that_is_there_is_not_asked_for_again():
    names = {"checkpoint": "a file"}
    with pytest.raises(UserError, match="write: gpt2 eval CHECKPOINT …"):
        parse_with_positional(EvalConfig, ["box", "--out_dir=results"], "gpt2 eval", names)
    with pytest.raises(UserError, match=r"did you mean --out\?"):
        parse_with_positional(InspectConfig, ["box", "--out_dir=page"], "gpt2 inspect", names)


@pytest.mark.parametrize(("word", "said"), [
    ("eval_only", "write: gpt2 eval CHECKPOINT"),
    ("backend", "leave it out: GPUs talk by nccl"),
    ("min_lr", r"did you mean min_lr_ratio\? \(a share of learning_rate"),
])  # fmt: skip
def test_python_gets_the_same_advice(word, said):
    with pytest.raises(UserError, match=rf"^train\({word}=…\): unknown option; {said}"):
        parse_keywords(TrainConfig, {word: 1}, "train")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """Bash and sh expand `--out_dir ~/x`, and not `--out_dir=~/x`."""
    home = str(tmp_path)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("USERPROFILE", home)
    (tmp_path / "r.toml").write_text('out_dir = "~/out"\ndata_dir = "~/a:0.5,~/b:0.5"\n')
    config = parse(TrainConfig, ["--config=~/r.toml", "--sample_prompt=~/x", "--init=a~b"], "x")
    assert config.output.out_dir == f"{home}/out"
    assert config.data.data_dir == f"{home}/a:0.5,{home}/b:0.5"
    assert (config.eval.sample_prompt, config.model.init) == ("~/x", "a~b")
    assert parse_keywords(TrainConfig, {"out_dir": "~/y"}, "train").output.out_dir == f"{home}/y"
    no_path = parse_keywords(TrainConfig, {"data_dir": "~\0"}, "train")
    assert no_path.data.data_dir == "~\0"


def test_every_option_for_files_knows_the_home_folder():
    """An option whose help speaks of a file or a folder."""
    texts = [f for cls in CONFIGS for f in fields_of(cls) if f.type is str]
    of_files = {
        f"--{f.name}"
        for f in texts
        if not f.metadata["choices"] and re.search(r"\b(files?|folders?)\b", f.metadata["help"])
    }
    assert of_files - FILES == {"--name"}  # of a model; its help speaks of its file


def test_none_is_refused():
    with pytest.raises(UserError, match=r"train\(out_dir=None\): give a value, or leave it out"):
        parse_keywords(TrainConfig, {"out_dir": None}, "train")


def test_a_list_in_python_is_what_commas_are_in_a_command_line():
    given = {"log_to": ["wandb", "tensorboard"], "data_dir": ("a:1", "b:2")}
    found = parse_keywords(TrainConfig, given, "train")
    assert (found.output.log_to, found.data.data_dir) == ("wandb,tensorboard", "a:1,b:2")
