"""The one file computes what the package computes."""

import ast
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt2.config.command_line import parse
from gpt2.config.model import GPT2Config
from gpt2.config.train import OptimOptions, TrainConfig, with_floor
from gpt2.data import loader
from gpt2.data.sequence_order import SequenceOrder
from gpt2.data.shards import find_shards
from gpt2.generate import stream
from gpt2.model.gpt import GPT
from gpt2.report.metrics import read_metrics
from gpt2.train import loop, optimizer, schedules
from learn import gpt2_in_one_file as one_file

from ..conftest import ROOT, TINY, error

pytestmark = pytest.mark.long

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 24, "vocab_size": 61}
RUN = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 2}
RUN |= {"grad_accum_steps": 2, "eval_tokens": 256, "learning_rate": 1e-3, "warmup_steps": 2}
RUN |= {"max_steps": 20, "device": "cpu"}


def pair(dtype=torch.float32):
    """The package's network and the one file's, with equal weights that are far from fresh."""
    torch.manual_seed(0)
    theirs = GPT(GPT2Config(**SMALL)).to(dtype)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = one_file.GPT(one_file.Config(**SMALL)).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def ids(rows=3, length=24) -> torch.Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(1))


def test_it_is_short_and_needs_torch_and_numpy_only():
    text = (ROOT / "learn/gpt2_in_one_file.py").read_text("utf-8")
    assert len(text.splitlines()) <= 300
    names = set()
    for node in ast.parse(text).body:  # at the top; `main` imports the tokenizer for a text
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    standard = {"argparse", "collections", "dataclasses", "itertools", "math", "pathlib"}
    assert names == standard | {"numpy", "torch"}


def test_fresh_weights_and_logits_are_equal_bit_by_bit():
    torch.manual_seed(5)
    theirs = GPT(GPT2Config(**SMALL)).state_dict()
    torch.manual_seed(5)
    ours = one_file.GPT(one_file.Config(**SMALL)).state_dict()
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    theirs, ours = pair()
    with torch.no_grad():
        assert torch.equal(theirs(ids()), ours.logits(ids()))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_loss_and_gradients_are_equal(dtype, limit):
    """In both precisions; the one file always takes the loss in float32."""
    theirs, ours = pair(dtype)
    for model in (theirs, ours):
        model(ids()[:, :-1], ids()[:, 1:]).backward()
    with torch.no_grad():
        losses = [model(ids()[:, :-1], ids()[:, 1:]) for model in (theirs, ours)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=limit)
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if not name.endswith("c_attn.bias"):  # a bias of the keys has gradient 0, up to rounding
            assert error(b.grad, a.grad) < limit, name


@pytest.mark.parametrize("block", [1, 7, 1_000_000])
def test_order_of_the_data_is_equal(block):
    """In three epochs, with groups of shards."""
    millions = (70, 0, 90, 30, 1, 20, 70) if block > 7 else (0.00005, 0.0001, 0.00002)
    sizes = [int(n * 1e6) + 3 for n in millions]
    shards = [SimpleNamespace(tokens=n, path=None) for n in sizes]
    theirs = SequenceOrder(shards, block, 7, shuffle=True)
    ours = one_file.sequence_order(sizes, block, 7)
    for n, (shard, start) in zip(range(3 * theirs.per_epoch), ours, strict=False):
        expected = theirs.locate(n)
        assert (shards[shard], start) == (expected[0], expected[1]), n


@pytest.mark.parametrize("warmup", [0, 5, 40])
def test_schedule_is_equal(warmup):
    common = {"max_steps": 30, "warmup_steps": warmup, "learning_rate": 3e-4, "min_lr_ratio": 0.2}
    options, config = OptimOptions(**common), one_file.Config(**common)
    for step in range(35):
        theirs = schedules.learning_rate_at(step, options)
        assert theirs == one_file.learning_rate(step, config)


def test_optimizer_has_the_same_groups():
    theirs, ours = pair()
    options = OptimOptions(weight_decay=0.3, beta1=0.8, beta2=0.9)
    found = one_file.build_optimizer(ours, one_file.Config(weight_decay=0.3, beta1=0.8, beta2=0.9))
    expected = optimizer.build_optimizer(theirs, options)
    for a, b in zip(expected.param_groups, found.param_groups, strict=True):
        assert [p.shape for p in a["params"]] == [p.shape for p in b["params"]]
        names = ("weight_decay", "betas", "eps", "fused")
        assert [a[name] for name in names] == [b[name] for name in names]


def test_defaults_are_those_of_the_package():
    theirs = parse(TrainConfig, [], "gpt2 train")
    ours = one_file.Config()
    for part in (theirs.model.shape(), theirs.data, theirs.optim, theirs.system, theirs.eval):
        for f in fields(part):
            # the first three are derived; validation is longer in the package
            derived = ("grad_accum_steps", "warmup_steps", "min_lr_ratio", "eval_tokens", "device")
            if hasattr(ours, f.name) and f.name not in derived:
                assert getattr(part, f.name) == getattr(ours, f.name), f.name
    assert schedules.warmup_steps(theirs.optim) == ours.warmup_steps
    assert with_floor(theirs.optim).min_lr_ratio == ours.min_lr_ratio
    assert ours.batch_size * ours.block_size * ours.grad_accum_steps == 524_288


@pytest.fixture(scope="session")
def data_dir(gpt2_data_dir):
    """The one file knows GPT-2's vocabulary only."""
    return gpt2_data_dir


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """(losses, checkpoint) of twenty steps of the one file."""
    path = tmp_path_factory.mktemp("one") / "out/one_file.pt"
    config = one_file.Config(**RUN, data_dir=str(data_dir), out=str(path))
    return one_file.train(config), path


def test_losses_of_twenty_steps_are_equal(run, data_dir, tmp_path):
    """Weights, order, accumulation, clipping, AdamW and schedule, to five digits."""
    arguments = [f"--data_dir={data_dir}", f"--out_dir={tmp_path}", *TINY, "--max_steps=20"]
    arguments += ["--batch_size=2", "--eval_tokens=256", "--seed=1337"]
    assert loop.run(parse(TrainConfig, arguments, "gpt2 train")) == 0
    rows = read_metrics(tmp_path / "metrics.jsonl")
    theirs = [row["loss"] for row in rows if "loss" in row]
    assert len(theirs) == 20
    assert theirs[-1] < theirs[0] - 0.2
    np.testing.assert_allclose(run[0], theirs, rtol=1e-5)
    (val_loss,) = [row["val_loss"] for row in rows if "val_loss" in row]
    stored = torch.load(run[1], weights_only=True)
    assert stored["val_loss"] == pytest.approx(val_loss, rel=1e-5)


def test_checkpoints_are_read_by_both(run, tmp_path):
    """And the same seed gives the same tokens, also when the context is full."""
    from gpt2 import GPT2

    theirs, ours = GPT2.from_checkpoint(run[1], device="cpu"), one_file.load(str(run[1]))
    theirs.save(tmp_path / "package.pt")
    again = one_file.load(str(tmp_path / "package.pt"))
    prompt = [1, 2, 3]
    written = stream.stream(theirs, [prompt], 60, seed=4, top_k=50)
    expected = prompt + [token for (token,) in written]
    assert one_file.generate(ours, prompt, 60, 50, 4) == expected
    assert one_file.generate(again, prompt, 60, 50, 4) == expected


def test_commands(run, data_dir, tmp_path, capsys, monkeypatch):
    """Training and sampling by the command line, and mistakes."""

    def command(*arguments: str) -> tuple[int | str | None, str]:
        monkeypatch.setattr("sys.argv", ["gpt2_in_one_file.py", *arguments])
        try:
            said = one_file.main()
        except SystemExit as exit_:
            said = exit_.code
        return said, "".join(capsys.readouterr())

    tiny = [f"--{name}={value}" for name, value in RUN.items()]
    tiny += ["--max_steps=1", "--grad_accum_steps=1", f"--out={tmp_path / 'm.pt'}"]
    code, out = command(*tiny, f"--data_dir={data_dir}")
    assert (code, out[:15]) == (None, "step 1 loss 10.")
    _, out = command(f"--out={tmp_path / 'm.pt'}", "--prompt=Hello", "--device=cpu")
    assert out.startswith("Hello")
    code, _ = command(*tiny, f"--data_dir={tmp_path}")
    assert "make them with `gpt2 prepare`" in code
    code, _ = command(*tiny, f"--data_dir={data_dir}", "--block_size=90000")
    assert "use a smaller one" in code
    code, out = command("--max_step=1")
    assert code == 2
    assert "unrecognized arguments: --max_step=1" in out


def test_batches_are_the_loaders(data_dir):
    config = one_file.Config(block_size=32, batch_size=4, data_dir=str(data_dir), device="cpu")
    shards, theirs = one_file.open_shards(str(data_dir), "val"), find_shards(data_dir, "val")
    expected = loader.eval_batches(theirs, block_size=32, batch_size=4, eval_tokens=256)
    for first, (x, y) in zip((0, 4), expected, strict=True):
        found = one_file.batch(shards, [(0, 32 * (first + i)) for i in range(4)], config)
        assert torch.equal(found[0], x)
        assert torch.equal(found[1], y)
