"""FSDP2 on two GPUs: what tests/test_parallel.py asks of two CPU processes."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from .conftest import ROOT, TINY
from .train.test_loop import metrics, same, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SMALL = [a for a in TINY if not a.startswith(("--device", "--dtype", "--n_embd", "--n_head"))]
SMALL += ["--n_embd=128", "--n_head=2", "--max_steps=6", "--eval_every=3", "--save_every=3"]
SMALL += ["--keep_last=9", "--activation_checkpointing=True"]


@pytest.fixture(scope="session")
def data_dir(gpt2_data_dir):
    """Shards of GPT-2's vocabulary: a GPU has kernels for its size."""
    return gpt2_data_dir


def train(data_dir, out, *arguments, ranks=2, script="train_gpt2.py"):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*torchrun, script, f"--data_dir={data_dir}", f"--out_dir={out}", *SMALL]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        check=True,
        timeout=170,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    return done.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize("compiled", ["False", "True"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "normuon"])
def test_losses_equal_those_of_ddp(optimizer, compiled, data_dir, tmp_path):
    """2e-2 in bf16, where FSDP rounds the gradients of a micro-batch."""
    arguments = [f"--optimizer={optimizer}", f"--compile_model={compiled}", "--dtype=bfloat16"]
    for how in ("ddp", "fsdp"):
        train(data_dir, tmp_path / how, *arguments, f"--parallel={how}")
    assert metrics(tmp_path / "fsdp") == pytest.approx(metrics(tmp_path / "ddp"), abs=2e-2)
    assert metrics(tmp_path / "fsdp", "val_loss") == pytest.approx(
        metrics(tmp_path / "ddp", "val_loss"), abs=2e-2
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_recorded_micro_batch_trains_as_ddp_does(dtype, data_dir, tmp_path):
    """CUDA graphs with gradients averaged after them, against DDP's own all-reduces."""
    script = tmp_path / "without.py"
    script.write_text(
        "import sys\n"
        "from gpt2.cli import main\n"
        "from gpt2.distributed import devices\n"
        "devices.choose_graph = lambda *_: (False, 'for the comparison')\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    arguments = [f"--dtype={dtype}", "--compile_model=True", "--activation_checkpointing=False"]
    recorded = train(data_dir, tmp_path / "graph", *arguments)
    assert "CUDA graph True" in recorded
    plain = train(data_dir, tmp_path / "ddp", *arguments, script=str(script))
    assert "CUDA graph False: for the comparison" in plain
    for name in ("loss", "grad_norm", "val_loss"):
        found, expected = (metrics(tmp_path / how, name) for how in ("graph", "ddp"))
        assert found == pytest.approx(expected, abs=5e-3)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("compiled", ["False", "True"])
def test_wide_layers_train_under_fsdp(compiled, data_dir, tmp_path):
    """Beyond 1,024 channels LayerNorm has a kernel of its own, which gets FSDP's bf16 gains."""
    # A rate of 1e-3 makes the loss of this width jump, and rounding decides how far.
    arguments = ["--n_embd=1152", "--dtype=bfloat16", f"--compile_model={compiled}"]
    arguments += ["--block_size=256", "--batch_size=8", "--learning_rate=1e-5"]
    for how in ("ddp", "fsdp"):
        train(data_dir, tmp_path / how, *arguments, f"--parallel={how}")
    assert metrics(tmp_path / "fsdp") == pytest.approx(metrics(tmp_path / "ddp"), abs=2e-2)


@pytest.mark.timeout(900)
def test_masks_in_compiled_blocks_equal_tables(data_dir, tmp_path):
    """FlexAttention in the blocks that FSDP compiles, against the plain network."""
    arguments = ["--window_pattern=SL", "--window=100", "--document_mask=True"]
    arguments += ["--block_size=256", "--batch_size=2", "--dtype=bfloat16", "--parallel=fsdp"]
    for compiled in ("True", "False"):
        train(data_dir, tmp_path / compiled, *arguments, f"--compile_model={compiled}")
    for name in ("loss", "val_loss"):
        found, plain = (metrics(tmp_path / compiled, name) for compiled in ("True", "False"))
        assert found == pytest.approx(plain, abs=2e-2)


@pytest.mark.timeout(900)
def test_states_go_on_and_to_one_gpu(data_dir, tmp_path):
    """Products of float32 are in TF32, so that losses are compared to 1e-3."""
    arguments = ["--dtype=float32", "--compile_model=False", "--parallel=fsdp"]
    train(data_dir, tmp_path / "whole", *arguments)
    for name, ranks in (("two", 2), ("one", 1)):
        out = tmp_path / name
        shutil.copytree(tmp_path / "whole", out)
        shutil.rmtree(out / "state/step_00000006")
        accumulation = [f"--grad_accum_steps={4 // ranks}"]
        train(data_dir, out, *arguments, *accumulation, ranks=ranks)
        assert metrics(out) == pytest.approx(metrics(tmp_path / "whole"), abs=1e-3)
        ours, theirs = (weights(f / "out_ckpt.pt") for f in (out, tmp_path / "whole"))
        assert ours.keys() == theirs.keys()
        assert not same(ours, {n: torch.zeros_like(t) for n, t in ours.items()})
