"""Every recipe that is shipped, made small: first loss, exact resume, two ranks like one."""

import shutil
import sys

import pytest

from gpt2.checkpoint import model_file, training_state
from gpt2.config.command_line import parse
from gpt2.config.train import TrainConfig
from gpt2.errors import UserError
from gpt2.train import loop

from .conftest import ROOT, TINY, TORCHRUN, run_python
from .train.test_loop import metrics, same, weights

RECIPES = sorted((ROOT / "configs").glob("*.toml"))
SMALL = [
    *TINY, "--n_layer=6", "--total_batch_tokens=0", "--max_steps=4", "--save_every=2",
    "--eval_every=0", "--keep_last=9", "--log_every=1", "--size=gpt2",
]  # fmt: skip
GROWING = ["--batch_warmup=0.8", "--window_warmup=0.8", "--window_pattern=SL", "--window=8",
           "--grad_accum_steps=4", "--muon_momentum_warmup=3"]  # fmt: skip


def arguments(recipe, data_dir, out_dir, *more) -> list[str]:
    small = [*SMALL, "--window=8"] if "\nwindow = " in recipe.read_text("utf-8") else SMALL
    return [f"--config={recipe}", f"--data_dir={data_dir}", f"--out_dir={out_dir}", *small, *more]


def run(*given):
    assert loop.run(parse(TrainConfig, arguments(*given), "gpt2 train")) == 0


def check_resume(recipe, data_dir, out, *more):
    """As if the run had been killed after half of its steps: the same bits."""
    run(recipe, data_dir, out, *more)
    whole, losses = weights(out / "out_ckpt.pt"), metrics(out)
    shutil.rmtree(training_state.state_folders(out)[-1])
    (out / "out_ckpt.pt").unlink()
    run(recipe, data_dir, out, *more)
    assert same(weights(out / "out_ckpt.pt"), whole)
    assert metrics(out) == losses


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_first_loss_and_exact_resume(recipe, data_dir, tmp_path, capsys):
    check_resume(recipe, data_dir, tmp_path)
    assert ": as expected" in capsys.readouterr().out


@pytest.mark.slow
def test_exact_resume_while_batch_window_and_momentum_grow(data_dir, tmp_path):
    check_resume(ROOT / "configs/speedrun.toml", data_dir, tmp_path, *GROWING)
    assert list(metrics(tmp_path, "tokens").values()) == [64, 192, 384, 640]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv on Windows")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_two_ranks_equal_one(recipe, data_dir, tmp_path):
    """Against one process with twice the accumulation."""
    two = arguments(recipe, data_dir, tmp_path / "two")
    run_python(*TORCHRUN, "--nproc_per_node=2", "train_gpt2.py", *two)
    run(recipe, data_dir, tmp_path / "one", "--grad_accum_steps=4")
    one, both = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert list(one) == [1, 2, 3, 4]
    assert both == pytest.approx(one, abs=1e-4)


SPEEDRUN = ROOT / "configs/speedrun.toml"


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ([], ["--qk_norm=True"], "you asked for qk_norm True instead of False"),
        (["--softcap=9"], [], "you asked for softcap 0.0 instead of 9.0"),
        ([], ["--optimizer=muon"], "another optimizer for some parameters"),
        (["--embedding_lr=1e-3"], [], "another optimizer for some parameters"),
    ],
)
def test_another_network_or_optimizer_is_no_continuation(first, then, message, data_dir, tmp_path):
    common = [f"--data_dir={data_dir}", f"--out_dir={tmp_path}", *TINY, "--max_steps=1"]
    loop.run(parse(TrainConfig, [*common, *first], "gpt2 train"))
    with pytest.raises(UserError, match=message):
        loop.run(parse(TrainConfig, [*common, "--max_steps=2", *then], "gpt2 train"))


def test_init_takes_the_switches_over(data_dir, tmp_path, capsys):
    run(SPEEDRUN, data_dir, tmp_path / "a", "--max_steps=1")
    init = f"--init={tmp_path / 'a' / 'out_ckpt.pt'}"
    common = [f"--data_dir={data_dir}", *(a for a in TINY if not a.startswith("--n_")), init]
    argv = [*common, f"--out_dir={tmp_path / 'b'}", "--max_steps=2", "--learning_rate=0"]
    loop.run(parse(TrainConfig, argv, "gpt2 train"))
    assert same(weights(tmp_path / "a/out_ckpt.pt"), weights(tmp_path / "b/out_ckpt.pt"))
    config = model_file.load_model(tmp_path / "b/out_ckpt.pt")[0]
    assert (config.softcap, config.skips, config.qk_norm) == (15.0, "unet+input", True)
    with pytest.raises(UserError, match="has mlp=relu2, not swiglu; its switches are taken over"):
        loop.run(parse(TrainConfig, [*argv, "--mlp=swiglu", "--resume=never"], "gpt2 train"))


def test_a_batch_that_cannot_grow_is_refused(data_dir, tmp_path):
    more = ["--grad_accum_steps=1", "--batch_warmup=0.5"]
    with pytest.raises(UserError, match="a step has only one"):
        run(SPEEDRUN, data_dir, tmp_path, *more)
