"""A patch of learn/switches/ makes the one file compute what the package does with a switch."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2.config.command_line import parse
from gpt2.config.train import TrainConfig
from gpt2.report.metrics import read_metrics
from gpt2.train import loop
from learn import gpt2_in_one_file as one_file

from ..conftest import ROOT

pytestmark = pytest.mark.long

PATCHES = sorted((ROOT / "learn/switches").glob("*.patch"))
PAGE = ROOT / "learn/switches/README.md"
NAME = "learn/gpt2_in_one_file.py"
RUN = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 2}
RUN |= {"grad_accum_steps": 1, "eval_tokens": 32, "learning_rate": 3e-2, "warmup_steps": 1}
RUN |= {"max_steps": 4, "device": "cpu", "weight_decay": 0.1}


def options(patch: Path) -> list[str]:
    """The options of `gpt2 train` that the first line of a patch names."""
    first = patch.read_text("utf-8").splitlines()[0]
    assert re.fullmatch(r"[\w ,()-]+:( --\w+=[\w.+]+)+", first), first
    return re.findall(r"--\S+", first)


def patched(patch: Path, folder: Path, monkeypatch):
    """The one file with a patch, as a module."""
    (folder / "learn").mkdir()
    for source, copy in ((ROOT / NAME, NAME), (patch, "x.patch")):  # Git may have checked out CRLF
        (folder / copy).write_text(source.read_text("utf-8"), encoding="utf-8", newline="\n")
    subprocess.run(["git", "apply", "x.patch"], cwd=folder, check=True)
    assert (folder / NAME).read_text("utf-8") != (ROOT / NAME).read_text("utf-8")
    spec = importlib.util.spec_from_file_location("patched", folder / NAME)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "patched", module)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def data_dir(gpt2_data_dir):
    """The one file knows GPT-2's vocabulary only."""
    return gpt2_data_dir


@pytest.fixture(scope="module")
def plain(data_dir, tmp_path_factory) -> list[float]:
    """The losses of the file without a patch."""
    out = tmp_path_factory.mktemp("plain") / "m.pt"
    return one_file.train(one_file.Config(**RUN, data_dir=str(data_dir), out=str(out)))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_losses_are_those_of_the_switch(patch, plain, data_dir, tmp_path, monkeypatch):
    """Four steps by both, from equal seeds; without the switch the losses are others."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))  # it is in no repository
    module = patched(patch, tmp_path, monkeypatch)
    settings = {**RUN, "data_dir": str(data_dir), "out": str(tmp_path / "m.pt")}
    found = module.train(module.Config(**settings))
    arguments = [f"--{name}={value}" for name, value in RUN.items()]
    arguments += [f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}", *options(patch)]
    assert loop.run(parse(TrainConfig, [*arguments, "--dtype=float32"], "gpt2 train")) == 0
    rows = read_metrics(tmp_path / "out/metrics.jsonl")
    np.testing.assert_allclose(found, [row["loss"] for row in rows if "loss" in row], rtol=2e-5)
    assert not np.allclose(found, plain, rtol=1e-4)


def test_there_are_ten_and_the_page_names_them():
    assert len(PATCHES) == 10
    named = re.findall(r"\]\((\w+)\.patch\)", PAGE.read_text("utf-8"))
    assert sorted(named) == [patch.stem for patch in PATCHES]


def test_they_are_switches_of_the_speedrun():
    """But for those that the page names as left by it: these the recipe does not set."""
    recipe = (ROOT / "configs/speedrun.toml").read_text("utf-8")
    _, _, after = PAGE.read_text("utf-8").partition("The recipe has left two of them")
    left = re.findall(r"`(\w+)` for", after)
    assert len(left) == 2
    for name in left:
        assert not re.search(rf"^{name} ", recipe, re.MULTILINE), name
    for patch in PATCHES:
        if patch.stem in left:
            continue
        for option in options(patch):
            name, value = option.removeprefix("--").split("=")
            (set_to,) = re.findall(rf'^{name} = "?([\w.+]+)"?', recipe, re.MULTILINE)
            same = {"true": "True"}.get(set_to, set_to)
            assert same == value or float(same) == float(value), option


@pytest.mark.parametrize("path", [*PATCHES, PAGE], ids=lambda path: path.stem)
def test_results_are_those_of_the_documentation(path):
    """Every loss and every difference that a page states is in docs/."""
    pages = ("docs/results/ablations.md", "docs/switches.md")
    known = " ".join((ROOT / page).read_text("utf-8") for page in pages)
    prose = path.read_text("utf-8").split("\n--- a/")[0]
    stated = re.findall(r"(?<![\d.])[+-]?\d\.\d{3}(?!\d)", prose)
    assert stated or "not measured" in prose
    for number in stated:
        derived = {"0.034": "3.456 - 3.422"}.get(number)
        if derived:
            a, b = derived.split(" - ")
            assert f"{float(a) - float(b):.3f}" == number
            assert {a, b} <= set(re.findall(r"[\d.]+\d", known))
        else:
            assert number in known, number
