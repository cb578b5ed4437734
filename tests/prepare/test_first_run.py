"""The hint that `gpt2 prepare` ends with: its options, and how much they make a run do."""

import os
import shlex
from pathlib import Path

import pytest

from gpt2.config.command_line import parse
from gpt2.config.train import TrainConfig, plan_batch
from gpt2.prepare import first_run
from gpt2.prepare.first_run import CPU_EPOCHS, CPU_STEPS, command, options

from ..conftest import ROOT


def test_the_driver_tells_the_device(monkeypatch, tmp_path):
    monkeypatch.setattr(first_run, "AMD_DRIVER", tmp_path / "kfd")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert first_run.device_here() == "cpu"
    (tmp_path / "kfd").touch()
    assert first_run.device_here() == "cuda"
    (tmp_path / "kfd").unlink()
    program = tmp_path / ("nvidia-smi.exe" if os.name == "nt" else "nvidia-smi")
    program.touch(mode=0o755)
    assert first_run.device_here() == "cuda"


def parsed(tokens: int, device: str) -> TrainConfig:
    program, train, *arguments = shlex.split(command(tokens, device, Path("data/mine")))
    assert (program, train) == ("gpt2", "train")
    return parse(TrainConfig, arguments, "gpt2 train")


@pytest.mark.parametrize("tokens", [61, 3_000, 30_000, 1_000_000, 10**10])
def test_on_a_cpu_it_takes_minutes(tokens):
    c = parsed(tokens, "cpu")
    plan = plan_batch(c.data, c.model.block_size, world_size=1)
    assert plan.tokens_per_step == (1024 if tokens > 256 else 128)
    assert 1 <= c.optim.max_steps <= CPU_STEPS  # at 0.4 to 1.6 s each on two cores
    assert c.optim.max_steps * plan.tokens_per_step <= CPU_EPOCHS * tokens
    assert (c.data.data_dir, c.output.out_dir) == ("data/mine", "out/mine")


@pytest.mark.parametrize(("tokens", "on_cpu", "on_gpu"), [
    (61, 32, 32), (64, 32, 32), (65, 64, 64), (246, 128, 128), (257, 256, 256), (1024, 256, 512),
    (1025, 256, 1024),
])  # fmt: skip
def test_a_sequence_fits_into_the_text(tokens, on_cpu, on_gpu):
    """A sequence needs the token after it, too."""
    found = [parsed(tokens, device).model.block_size for device in ("cpu", "cuda")]
    assert found == [on_cpu, on_gpu]


@pytest.mark.parametrize("tokens", [64, 30_000, 1_000_000, 50_000_000, 10**9, 2 * 10**9, 10**11])
def test_on_a_gpu_it_ends(tokens):
    c = parsed(tokens, "cuda")
    plan = plan_batch(c.data, 1024, world_size=1)
    trained = plan.tokens_per_step * c.optim.max_steps
    assert trained <= max(4 * tokens, 8192)
    assert trained <= 10**10  # ten days at 12k tokens/s, an RTX 3060's
    assert c.optim.max_steps >= min(1000, 4 * tokens // 8192)
    assert (c.model.size == "gpt2") == (4 * tokens >= 10**9)


@pytest.mark.skipif(os.name == "nt", reason="shlex reads the quotes of POSIX shells")
def test_the_command_can_be_pasted():
    line = command(3_000, "cpu", Path("/my data/a text"))
    c = parse(TrainConfig, shlex.split(line)[2:], "gpt2 train")
    assert (c.data.data_dir, c.output.out_dir) == ("/my data/a text", "out/a text")


def test_the_full_sample_of_fineweb_is_the_default_recipe():
    assert options(10**10, "cuda") == {}


def test_laptop_toml_is_the_hint_for_a_text_that_is_large_enough():
    c = parse(TrainConfig, [f"--config={ROOT}/configs/laptop.toml"], "gpt2 train")
    hint = parsed(10**7, "cpu")
    assert (c.model, c.eval, c.optim) == (hint.model, hint.eval, hint.optim)
    assert c.data.batch_size == hint.data.batch_size
