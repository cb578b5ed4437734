"""Parts of a plugin: what is accepted survives a checkpoint, what is not ends in one line."""

import shutil
import sys

import pytest
import torch
from torch import nn

import gpt2
from gpt2 import cli
from gpt2.config.model import ModernConfig
from gpt2.config.registry import forget
from gpt2.distributed.runtime import Runtime
from gpt2.errors import UserError
from gpt2.train.plugin_parts import check_parts
from gpt2.train.setup import network

from ..conftest import TINY, run_python
from ..test_distributed import command

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 50}
SMALL = [*TINY, "--n_layer=1", "--n_embd=16"]


@pytest.fixture(autouse=True)
def _no_plugins():
    yield
    forget()


class Linear(nn.Module):
    """An MLP whose forward is a function of its output."""

    change = staticmethod(lambda y: y)

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_embd)
        self.add(config.n_embd)

    def add(self, width):
        pass

    def forward(self, x):
        return type(self).change(self.c_fc(x))


def mlp(add=None, forward=None, change=None):
    """A class like `Linear` with more tensors, or with another forward."""
    given = {"add": add, "forward": forward, "change": change and staticmethod(change)}
    return type("Part", (Linear,), {name: value for name, value in given.items() if value})


def check(part, kind="mlp", dtype=torch.float32, **more):
    gpt2.register(kind, "own")(part)
    model = network(ModernConfig(**SHAPE, **{kind: "own"}))
    rt = Runtime(torch.device("cpu"), dtype, **more)
    check_parts(model, rt)
    return model


def attribute(make):
    return lambda self, width: setattr(self, "kept", make(width))


def buffer(make, persistent=False):
    return lambda self, width: self.register_buffer("kept", make(width), persistent=persistent)


def by_index(self, x):
    return self.c_fc(x[..., self.kept])


def counted(self, x):
    self.kept += 1
    return self.c_fc(x) * self.kept


def whole_numbers(width):
    return nn.Parameter(torch.arange(width), requires_grad=False)


class Reused(Linear):
    def add(self, width):
        self.c_2 = self.c_fc

    def forward(self, x):
        return self.c_2(self.c_fc(x))


ONE = nn.Linear(16, 16)


# ---- what a checkpoint keeps ---------------------------------------------------------------------


@pytest.mark.parametrize(("part", "said"), [
    (mlp(buffer(lambda n: torch.zeros(1), True)), "mlp=own: its buffer kept is no parameter"),
    (mlp(buffer(torch.randperm, True), by_index), "give register_buffer persistent=False"),
    (mlp(attribute(nn.BatchNorm1d)), "its buffer kept.running_mean is no parameter"),
    (mlp(attribute(whole_numbers), by_index), "its parameter kept is int64"),
    (mlp(attribute(nn.LazyLinear)), "its parameter kept.weight has no shape yet"),
    (Reused, "mlp.own.c_fc.weight and transformer.h.0.mlp.own.c_2.weight are one tensor"),
    (mlp(attribute(lambda n: ONE)), "h.0.mlp.own.kept.weight and transformer.h.1.mlp.own.kept"),
    (mlp(buffer(torch.randperm), by_index), "it gives other outputs (kept differs)"),
    (mlp(attribute(torch.randperm), by_index), "draw constants by a torch.Generator with a seed"),
    (mlp(buffer(torch.zeros), counted), "gives other outputs (kept differs)"),
    (nn.Identity(), "or a class of torch.nn.Module, not one module for all layers"),
    (type("Other", (), {"__init__": lambda self, config: None}), "not another class"),
])  # fmt: skip
def test_what_a_checkpoint_would_lose_is_refused(part, said):
    with pytest.raises(UserError) as caught:
        check(part)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


CONSTANTS = """
import gpt2, torch

@gpt2.register("mlp", "mixed")
class Mixed(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        n, g = config.n_embd, torch.Generator().manual_seed(1)
        self.c_fc = torch.nn.Linear(n, n)
        self.gain = torch.nn.Parameter(torch.rand(n), requires_grad=False)
        self.register_buffer("order", torch.randperm(n, generator=g), persistent=False)
        self.register_buffer("mask", torch.arange(n) % 2 == 0, persistent=False)
        self.register_buffer("table", torch.empty(n).normal_(generator=g), persistent=False)

    def forward(self, x):
        return self.gain * self.c_fc(x[..., self.order] * self.mask + self.table.to(x.dtype))
"""


@pytest.fixture
def constants(tmp_path, data_dir, monkeypatch):
    """The options of a run with a part that has constants, and a frozen parameter."""
    (tmp_path / "p.py").write_text(CONSTANTS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return ["--plugin=p.py", "--mlp=mixed", "--save_every=2"]


def test_a_part_with_constants_survives_its_checkpoint(constants, data_dir, capsys):
    def train(out):
        argv = [*SMALL, f"--data_dir={data_dir}", *constants, "--max_steps=3", f"--out_dir={out}"]
        return cli.main(["train", *argv, "--ema_steps=2"])

    assert train("whole") == 0
    shutil.copytree("whole", "half")
    shutil.rmtree("half/state/step_00000003")  # as a kill after step 2 leaves it
    assert train("half") == 0
    states = [torch.load(f"{name}/out_ckpt.pt")["model"] for name in ("whole", "half")]
    assert all(torch.equal(states[0][name], t) for name, t in states[1].items())
    assert cli.main(["average", "whole", "--last=2", "--plugin=p.py"]) == 0
    for model in ("whole/out_ckpt.pt", "whole/mean.pt"):
        assert cli.main(["eval", model, "--plugin=p.py", f"--data_dir={data_dir}",
                         "--device=cpu", "--eval_tokens=500"]) == 0  # fmt: skip
    # The numbers of a network made from these weights in training, with constants of its own.
    model = gpt2.GPT2.from_checkpoint("whole/out_ckpt.pt", device="cpu")
    trained = network(model.config).eval()
    trained.load_state_dict(model.state_dict())
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids), trained(ids))
    model.save("again.pt")
    assert torch.equal(gpt2.GPT2.from_checkpoint("again.pt", device="cpu")(ids), model(ids))
    assert "error" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv on Windows")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_share_a_part_with_constants(constants, data_dir, tmp_path, parallel):
    more = [f"--parallel={parallel}", f"--plugin={tmp_path / 'p.py'}", *constants[1:]]
    run_python(*command(2, data_dir, tmp_path / "o", *more, "--max_steps=2"))
    run_python(*command(2, data_dir, tmp_path / "o", *more, "--max_steps=3"))
    argv = [*TINY, f"--data_dir={data_dir}", *constants, "--max_steps=4", "--out_dir=o"]
    assert cli.main(["train", *argv, "--grad_accum_steps=4"]) == 0  # one rank goes on
    assert gpt2.GPT2.from_checkpoint("o/out_ckpt.pt").generate([1, 2], 3)
