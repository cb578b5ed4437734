"""A run's folder, its config.toml included, from whichever folder it is used."""

import os
import shlex
import shutil
from pathlib import Path

import pytest

from gpt2 import GPT2, cli
from gpt2.checkpoint import model_file
from gpt2.config.command_line import parse
from gpt2.config.commands import ProfileConfig
from gpt2.config.finetune import FinetuneConfig, TuningOptions
from gpt2.config.run_paths import (
    as_written,
    find_beside,
    from_anywhere,
    from_first_folder,
    from_here,
)
from gpt2.config.train import TrainConfig
from gpt2.errors import UserError
from gpt2.model.lora import adapt, to_peft

from ..conftest import TINY


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with data and the folder of a run in it; another folder is the current one."""
    for name in ("data/mine", "data/more", "out/x", "elsewhere/data/mine"):
        (tmp_path / "project" / name).mkdir(parents=True)
    (tmp_path / "project/items.jsonl").touch()
    monkeypatch.chdir(tmp_path / "project/elsewhere")
    return tmp_path / "project"


def test_relative_paths_begin_where_the_run_was_started(project, monkeypatch):
    settings = {"out_dir": "out/x", "data_dir": "data/mine", "init": "gpt2", "seed": 1,
                "hellaswag": "items.jsonl"}  # fmt: skip
    config = project / "out/x/config.toml"
    found = from_here(config, settings)
    assert found == {
        "out_dir": f"{project}/out/x",
        "data_dir": f"{project}/data/mine",  # not that of the current folder
        "init": "gpt2",
        "seed": 1,
        "hellaswag": f"{project}/items.jsonl",
    }
    mix = {"out_dir": "out/x", "data_dir": "data/mine:0.8,data/more:0.2,gone:1"}
    wanted = f"{project}/data/mine:0.8,{project}/data/more:0.2,gone:1"
    assert from_here(config, mix)["data_dir"] == wanted
    monkeypatch.chdir(project)
    assert from_here(config, settings) is settings


def test_a_renamed_run_finds_its_data_and_begins_no_other(project, monkeypatch):
    (project / "out/x/metrics.jsonl").touch()
    (project / "out/x").rename(project / "out/y")
    config, settings = project / "out/y/config.toml", {"out_dir": "out/x", "data_dir": "data/mine"}
    assert from_here(config, settings)["data_dir"] == f"{project}/data/mine"
    config.write_text('out_dir = "out/x"\ndata_dir = "data/mine"\n')
    monkeypatch.chdir(project)
    with pytest.raises(UserError) as caught:
        parse(TrainConfig, ["--config=out/y/config.toml"], "gpt2 train")
    assert str(caught.value) == (
        "--config=out/y/config.toml: the run in this folder was called out/x; add "
        "--out_dir=out/y to go on with it, or another --out_dir= for a new run"
    )
    for out_dir in ("out/y", "out/new"):
        found = parse(
            TrainConfig, ["--config=out/y/config.toml", f"--out_dir={out_dir}"], "gpt2 train"
        )
        assert found.output.out_dir == out_dir
    (project / "out/y").rename(project / "out/x")
    assert (
        parse(TrainConfig, ["--config=out/x/config.toml"], "gpt2 train").output.out_dir == "out/x"
    )


@pytest.fixture
def renamed(project, monkeypatch):
    """The config.toml of a run in the current folder whose `out/x` is called `out/my run` now."""
    (project / "out/x/metrics.jsonl").touch()
    (project / "out/x/config.toml").write_text('out_dir = "out/x"\ndata_dir = "data/mine"\n')
    (project / "out/x").rename(project / "out/my run")
    monkeypatch.chdir(project)
    return Path("out/my run/config.toml")


def test_the_line_for_a_renamed_run_can_be_pasted(renamed):
    with pytest.raises(UserError) as caught:
        parse(FinetuneConfig, [f"--config={renamed}"], "gpt2 finetune")
    said = str(caught.value)
    assert "was called out/x; add --out_dir='out/my run' to go on" in said
    assert shlex.split(said.partition("add ")[2])[0] == "--out_dir=out/my run"


def test_only_a_run_that_begins_asks_for_the_name(renamed, tmp_path):
    given = f"--config={renamed}"
    assert parse(ProfileConfig, [given], "gpt2 profile").data.data_dir == "data/mine"
    other = tmp_path / "over.toml"
    other.write_text('out_dir = "out/second"\n')
    both = parse(TrainConfig, [given, f"--config={other}"], "gpt2 train")
    assert both.output.out_dir == "out/second"
    with pytest.raises(UserError, match="was called out/x"):  # the last file that names one counts
        parse(TrainConfig, [f"--config={other}", given], "gpt2 train")
    with pytest.raises(SystemExit):
        parse(TrainConfig, [given, "--help"], "gpt2 train")


def test_nothing_is_known_of_the_parents_of_a_folder_of_one_name(project, monkeypatch):
    """As the default, `out`: renamed, it may have been moved as well."""
    run = project / "runs/first"
    run.mkdir(parents=True)
    (project / "runs/data/mine").mkdir(parents=True)  # not the data of that run
    (run / "metrics.jsonl").touch()
    (run / "config.toml").write_text('out_dir = "out"\ndata_dir = "data/mine"\n')
    settings = {"out_dir": "out", "data_dir": "data/mine"}
    assert from_here(run / "config.toml", settings) is settings
    monkeypatch.chdir(project)
    with pytest.raises(UserError, match=r"was called out; add --out_dir=runs/first to go on"):
        parse(TrainConfig, ["--config=runs/first/config.toml"], "gpt2 train")


def test_a_renamed_run_that_goes_on_elsewhere_writes_its_new_name(renamed, project, monkeypatch):
    config = renamed.resolve()
    monkeypatch.chdir("/")
    settings = {"out_dir": os.fspath(config.parent), "data_dir": f"{project}/data/mine"}
    found = from_first_folder(settings, config, {"out_dir": "out/x"})
    assert found == {"out_dir": "out/my run", "data_dir": "data/mine"}


@pytest.mark.parametrize(
    ("name", "out_dir"),
    [
        ("out/x/recipe.toml", "out/x"),  # no run wrote it
        ("config.toml", "out/x"),  # copied out of its folder
        ("out/x/config.toml", "/absolute/x"),
        ("out/x/config.toml", "../out/x"),
        ("out/x/config.toml", ""),
        ("out/x/config.toml", 7),
    ],
)
def test_other_files_are_left_as_they_are(name, out_dir, project):
    settings = {"out_dir": out_dir, "data_dir": "data/mine"}
    assert from_here(project / name, settings) is settings


def test_absolute_paths_are_written_where_the_folder_does_not_tell(project, monkeypatch):
    monkeypatch.chdir(project)
    settings = {"data_dir": "data/mine", "init": "gpt2-xl", "hellaswag": "hub"}
    assert from_anywhere(settings | {"out_dir": "out/x"})["data_dir"] == "data/mine"
    for out_dir in ("/scratch/x", "../x"):
        found = from_anywhere(settings | {"out_dir": out_dir})
        assert found["data_dir"] == f"{project}/data/mine"
        assert (found["init"], found["hellaswag"]) == ("gpt2-xl", "hub")


def test_a_run_that_goes_on_elsewhere_writes_paths_of_its_first_folder(project):
    config, mix = project / "out/x/config.toml", "data/mine:0.8,data/more:0.2"
    first = {"out_dir": "out/x", "data_dir": mix, "init": "gpt2", "hellaswag": "items.jsonl"}
    assert from_anywhere(from_here(config, first), config, first) == first
    here = {"out_dir": "../out/x", "data_dir": "../data/more", "hellaswag": "/elsewhere/items"}
    found = from_anywhere(here, config, first)
    inside = {"out_dir": "out/x", "data_dir": "elsewhere/../data/more"}
    assert found == inside | {"hellaswag": "/elsewhere/items"}
    for earlier in ({}, first | {"out_dir": "/absolute/x"}, first | {"out_dir": "out/y"}):
        found = from_anywhere(here, config, earlier)
        assert found["data_dir"] == f"{project}/elsewhere/../data/more"


def test_a_moved_project_goes_on_after_its_run_was_used_from_elsewhere(
    data_dir, tmp_path, monkeypatch
):
    shutil.copytree(data_dir, tmp_path / "a/data/mine")
    (tmp_path / "a/sub").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    small = [*TINY, "--n_layer=1", "--data_dir=data/mine", "--out_dir=out/x"]
    assert cli.main(["train", *small, "--max_steps=1"]) == 0
    monkeypatch.chdir("sub")
    assert cli.main(["train", "--config=../out/x/config.toml", "--max_steps=2"]) == 0
    monkeypatch.chdir(tmp_path)
    os.rename("a", "b")
    monkeypatch.chdir("b")
    assert cli.main(["train", "--config=out/x/config.toml", "--max_steps=3"]) == 0
    assert Path("out/x/state/step_00000003").is_dir()


def test_a_run_from_elsewhere_is_the_run_that_it_was(data_dir, tmp_path, monkeypatch, capsys):
    """The weights that it began with and its data count as unchanged, also after a move."""
    shutil.copytree(data_dir, tmp_path / "a/data/mine")
    (tmp_path / "a/sub").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    small = [*TINY, "--data_dir=data/mine"]
    assert cli.main(["train", *small, "--out_dir=out/base", "--max_steps=1"]) == 0
    rest = [argument for argument in small if not argument.startswith("--n_")]
    begun = ["train", *rest, "--out_dir=out/x", "--init=out/base"]
    assert cli.main([*begun, "--max_steps=1"]) == 0
    monkeypatch.chdir("sub")
    capsys.readouterr()
    assert cli.main(["train", "--config=../out/x/config.toml", "--max_steps=2"]) == 0
    monkeypatch.chdir(tmp_path)
    os.rename("a", "b")
    monkeypatch.chdir("b")
    assert cli.main(["train", "--config=out/x/config.toml", "--max_steps=3"]) == 0
    said = capsys.readouterr().out
    changed = [line for line in said.splitlines() if line.startswith("changed since then")]
    assert changed == [f"changed since then: max_steps {n} -> {n + 1}" for n in (1, 2)]


def test_a_path_in_other_words_is_no_change(data_dir, tmp_path, monkeypatch, capsys):
    shutil.copytree(data_dir, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    ways = "data", "./data", str(tmp_path / "data")
    for steps, way in enumerate(ways, 1):
        argv = ["train", *TINY, f"--data_dir={way}", "--out_dir=x", f"--max_steps={steps}"]
        assert cli.main(argv) == 0
    said = capsys.readouterr().out.splitlines()
    changed = [line for line in said if line.startswith("changed since then")]
    assert changed == [f"changed since then: max_steps {n} -> {n + 1}" for n in (1, 2)]


def test_paths_that_differ_stay_as_they_were_given(project):
    """A checkpoint may hold any text: line breaks, other weights, more folders."""
    folder = f"{project}/data/mine"
    for given, written in (("a\nb", folder), ("gone:0.5", f"{folder}:0.4"), ("a,b", folder)):
        assert as_written({"data_dir": given}, {"data_dir": written}) == {"data_dir": given}
    assert as_written({"seed": 1}, {"data_dir": folder}) == {"seed": 1}
    assert as_written({"data_dir": "x", "init": ""}, {"init": folder}) == {
        "data_dir": "x", "init": ""}  # fmt: skip


def test_a_run_with_an_absolute_folder_is_known_from_elsewhere(
    data_dir, tmp_path, monkeypatch, capsys
):
    """As on a cluster: the run on another disk, its base by a relative path."""
    shutil.copytree(data_dir, tmp_path / "a/data/mine")
    monkeypatch.chdir(tmp_path / "a")
    small = [*TINY, "--data_dir=data/mine"]
    assert cli.main(["train", *small, "--out_dir=out/base", "--max_steps=1"]) == 0
    rest = [argument for argument in TINY if not argument.startswith("--n_")]
    shutil.copytree(data_dir, "data/more")
    rest.append("--data_dir=data/mine/:0.5,./data/more:0.5")
    begun = ["train", *rest, f"--out_dir={tmp_path}/disk/x", "--init=./out/base/"]
    assert cli.main([*begun, "--max_steps=1"]) == 0
    assert cli.main([*begun, "--max_steps=2"]) == 0
    monkeypatch.chdir(tmp_path)
    arguments = ["train", f"--config={tmp_path}/disk/x/config.toml"]
    assert cli.main([*arguments, "--max_steps=3"]) == 0
    said = capsys.readouterr().out
    changed = [line for line in said.splitlines() if line.startswith("changed since then")]
    assert changed == [f"changed since then: max_steps {n} -> {n + 1}" for n in (1, 2)]
    (tmp_path / "other").mkdir()
    assert cli.main([*arguments, "--max_steps=4", "--init=other"]) == 2


def test_a_base_is_found_above_the_file_that_names_it(project):
    file = project / "out/x/out_adapter/adapter_config.json"
    assert find_beside("data/more", file) == f"{project}/data/more"
    assert find_beside("data/mine", file) == "data/mine"  # it is here
    for name in ("gpt2", "OWNER/NAME", "/absolute", "../data/more"):
        assert find_beside(name, file) == name


def test_adapters_find_their_base_from_elsewhere(tmp_path, monkeypatch):
    """As `gpt2 finetune --init=out/base.pt` names it."""
    model = GPT2(n_layer=1, n_head=1, n_embd=8, block_size=8)
    for name in ("a/out", "c"):
        (tmp_path / name).mkdir(parents=True)
    model.save(tmp_path / "a/out/base.pt")
    adapt(model, TuningOptions(lora_rank=2))
    model_file.write_adapter(tmp_path / "a/out/x", *to_peft(model, "out/base.pt"))
    monkeypatch.chdir(tmp_path / "c")
    assert GPT2.from_pretrained(tmp_path / "a/out/x", device="cpu").config.n_embd == 8


def test_a_run_goes_on_and_is_evaluated_from_elsewhere(data_dir, tmp_path, monkeypatch, capsys):
    """Also after the whole project has moved."""
    shutil.copytree(data_dir, tmp_path / "a/data/mine")
    monkeypatch.chdir(tmp_path / "a")
    small = [a for a in TINY if not a.startswith(("--n_", "--block", "--eval_tokens"))]
    given = ["--data_dir=data/mine", "--out_dir=out/x", "--n_layer=1", "--n_head=1", "--n_embd=8",
             "--block_size=16", "--eval_tokens=100", "--device=cpu"]  # fmt: skip
    assert cli.main(["train", *small, *given, "--max_steps=1"]) == 0
    os.rename(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    run = tmp_path / "b/out/x"
    capsys.readouterr()
    assert cli.main(["eval", str(run / "out_ckpt.pt"), "--eval_tokens=100", "--device=cpu"]) == 0
    assert cli.main(["train", f"--config={run}/config.toml", "--max_steps=2"]) == 0
    said = capsys.readouterr().out
    assert f"continuing from {run}/state/step_00000001" in said
    assert not list(Path.cwd().iterdir())  # nothing was begun here
    assert GPT2.from_pretrained(run, device="cpu").config.n_embd == 8
    config = parse(TrainConfig, [f"--config={run}/config.toml"], "gpt2 train")
    assert config.data.data_dir == str(tmp_path / "b/data/mine")
