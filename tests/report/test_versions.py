"""The warning about a torch that nobody has tested."""

import pytest
import torch

from gpt2.api import GPT2
from gpt2.config.model import GPT2Config
from gpt2.report import versions
from gpt2.report.versions import NEWEST_TORCH, newer_torch
from gpt2.train import loop

from ..train.test_loop import config

NEWEST = ".".join(map(str, NEWEST_TORCH))
NEXT = f"{NEWEST_TORCH[0]}.{NEWEST_TORCH[1] + 1}"


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.13.0+cpu", f"{NEWEST}.9+cu130", f"{NEWEST}.0.dev20261101", "of ours"]
)
def test_nothing_is_said_of_a_version_that_was_tested(version):
    assert newer_torch(version) == ""


@pytest.mark.parametrize("version", [f"{NEXT}.0", f"{NEXT}.0.dev20270101+cpu", "2.100.1", "3.0.0"])
def test_a_newer_version_gives_one_line_with_a_way_out(version):
    said = newer_torch(version)
    assert said.startswith(f"torch {version} is newer than {NEWEST}, the newest that was tested;")
    assert said.endswith(f'pip install "torch<{NEXT}"')
    assert "\n" not in said


@pytest.fixture
def newer(monkeypatch):
    monkeypatch.setattr(torch, "__version__", f"{NEXT}.0+cpu")
    versions.warn_of_newer_torch.cache_clear()
    yield
    versions.warn_of_newer_torch.cache_clear()


@pytest.mark.usefixtures("newer")
def test_it_is_said_once_and_nothing_is_refused(data_dir, tmp_path, capfd):
    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=8))
    model.save(tmp_path / "m.pt")
    for _ in range(2):
        GPT2.from_checkpoint(tmp_path / "m.pt", device="cpu")
    assert loop.run(config(data_dir, tmp_path / "out", "--max_steps=1", "--device=cpu")) == 0
    assert capfd.readouterr().err.count(f"warning: torch {NEXT}.0+cpu is newer") == 1


@pytest.mark.usefixtures("newer")
def test_a_run_says_it_too_on_its_first_rank_alone(data_dir, tmp_path, capfd, monkeypatch):
    assert loop.run(config(data_dir, tmp_path / "out", "--max_steps=1", "--device=cpu")) == 0
    assert capfd.readouterr().err.count("is newer") == 1
    versions.warn_of_newer_torch.cache_clear()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    versions.warn_of_newer_torch()
    assert capfd.readouterr().err == ""
