"""Parts of a plugin: what is accepted survives a checkpoint, what is not ends in one line."""

import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpt2
from gpt2 import cli
from gpt2.config.model import ModernConfig
from gpt2.config.registry import forget
from gpt2.distributed.random_state import rng_state
from gpt2.distributed.runtime import Runtime
from gpt2.errors import UserError
from gpt2.model import gpt
from gpt2.train.plugin_parts import ROWS, check_parts
from gpt2.train.setup import network

from ..conftest import TINY, run_python
from ..test_distributed import command

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 50}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
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


def check(part, kind="mlp", dtype=torch.float32, positions=8, device="cpu", **more):
    gpt2.register(kind, "own")(part)
    model = network(ModernConfig(**SHAPE | {"block_size": positions}, **{kind: "own"}))
    rt = Runtime(torch.device(device), dtype, **more)
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


VIEWS = """
import gpt2, torch

@gpt2.register("mlp", "views")
class Views(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        both = 0.02 * torch.randn(config.n_embd, 2, config.n_embd)
        self.a, self.b = (torch.nn.Parameter(half) for half in BOTH)

    def forward(self, x):
        return (x @ self.a.to(x.dtype)).relu() * (x @ self.b.to(x.dtype))
"""


@pytest.mark.parametrize("both", ["both.transpose(0, 1).contiguous()", "both.unbind(1)"])
def test_views_of_one_tensor_survive_their_checkpoint(both, tmp_path, data_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.py").write_text(VIEWS.replace("BOTH", both))
    plugin = ["--plugin=p.py", "--mlp=views"]

    def train(out):
        argv = [*SMALL, f"--data_dir={data_dir}", *plugin, "--save_every=2", "--ema_steps=2"]
        return cli.main(["train", *argv, "--max_steps=3", f"--out_dir={out}"])

    assert train("whole") == 0
    shutil.copytree("whole", "half")
    shutil.rmtree("half/state/step_00000003")
    assert train("half") == 0
    states = [torch.load(f"{name}/out_ckpt.pt")["model"] for name in ("whole", "half")]
    assert all(torch.equal(states[0][name], t) for name, t in states[1].items())
    names = [f"transformer.h.0.mlp.own.{name}" for name in "ab"]
    model = gpt2.GPT2.from_checkpoint("half/out_ckpt.pt", device="cpu")
    assert all(torch.equal(model.state_dict()[name], states[0][name]) for name in names)
    assert not torch.equal(*(states[0][name] for name in names))
    model.save("again.pt")
    again = gpt2.GPT2.from_checkpoint("again.pt", device="cpu").state_dict()
    assert all(torch.equal(again[name], states[0][name]) for name in names)


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


# ---- what a part gives, and reads ----------------------------------------------------------------


@pytest.mark.parametrize(("kind", "part", "said"), [
    ("mlp", mlp(change=lambda y: y[..., :1]), "mlp=own gives (2, 8, 1) torch.float32"),
    ("mlp", mlp(change=lambda y: y.mean(1, keepdim=True)), "gives (2, 1, 16) torch.float32"),
    ("mlp", mlp(change=lambda y: None), "mlp=own gives NoneType"),
    ("mlp", mlp(change=lambda y: y / 0), "mlp=own gives NaN or infinity"),
    ("mlp", mlp(change=lambda y: y + y.mean(1, keepdim=True)), "reads later tokens or other"),
    ("mlp", mlp(change=lambda y: y + y.mean(0)), "reads later tokens or other sequences"),
    ("mlp", mlp(change=lambda y: y.roll(-1, 1)), "reads later tokens or other sequences"),
    ("mlp", mlp(change=lambda y: F.batch_norm(y, None, None, training=True)), "other sequences"),
    ("mlp", mlp(change=lambda y: y[:, :7]), "mlp=own gives (2, 7, 16)"),
    ("mlp", mlp(change=lambda y: y @ y), "=own: tried on an input of (2, 8, 16): RuntimeError"),
    ("mlp", lambda x: x[..., :1], "mlp=own gives (2, 8, 1) torch.float32 for an input of (2, 8, 6"),
    ("mlp", lambda x: x > 0, "mlp=own gives (2, 8, 64) torch.bool"),
    ("mlp", lambda x: x.cumsum(1).flip(1), "mlp=own reads later tokens"),
    ("norm", lambda x: x.mean(-1), "norm=own gives (2, 8) torch.float32"),
    ("norm", lambda x: x - x.mean(1, keepdim=True), "norm=own reads later tokens"),
    ("norm", lambda x: x.mul_(2), "norm=own writes into its input, which is the residual stream"),
    ("mlp", mlp(change=lambda y: y.double()), "mlp=own gives float64 for an input of "),
    ("norm", lambda x: x.double(), "norm=own gives float64 for an input of "),
    ("mlp", lambda x: x.double(), "mlp=own gives float64 for an input of "),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_that_breaks_its_contract_is_one_line(kind, part, said, dtype):
    with pytest.raises(UserError) as caught:
        check(part, kind, dtype)
    assert said.replace("float32", str(dtype)[6:]) in str(caught.value)
    assert "\n" not in str(caught.value)


class InTraining(Linear):
    """Reads later tokens in one mode."""

    leaks: bool

    def forward(self, x):
        y = self.c_fc(x)
        return y + y.mean(1, keepdim=True) if self.training == self.leaks else y


@pytest.mark.parametrize("leaks", [True, False])
def test_later_tokens_are_seen_in_training_and_in_evaluation(leaks):
    with pytest.raises(UserError, match="reads later tokens"):
        check(type("Part", (InTraining,), {"leaks": leaks}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", [2, 3, 1024])
@pytest.mark.parametrize("leak", [
    lambda y: y.mean((0, 1), keepdim=True),
    lambda y: y.square().mean((0, 1), keepdim=True),
    lambda y: y.roll(-1, 1).roll(1, 0),
    lambda y: y[-1:, -1:].detach(),
    lambda y: y.view(ROWS, -1, min(16, y.shape[1]), 16).mean(2).repeat_interleave(
        min(16, y.shape[1]), 1),
])  # fmt: skip
def test_later_tokens_are_seen_in_a_context_of_any_length(leak, positions, dtype):
    with pytest.raises(UserError, match="reads later tokens"):
        check(mlp(change=lambda y: y + leak(y)), dtype=dtype, positions=positions)


def test_other_sequences_are_seen_in_a_context_of_one_token():
    with pytest.raises(UserError, match="reads later tokens or other sequences"):
        check(mlp(change=lambda y: y + y.mean(0)), positions=1)
    check(Linear, positions=1)


class Zero(Linear):
    """Its output is 0 at first, whatever it reads."""

    def add(self, width):
        self.gain = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return self.gain * self.c_fc(x).mean(1, keepdim=True).expand_as(x)


def test_weights_of_zero_hide_nothing():
    with pytest.raises(UserError, match="reads later tokens"):
        check(Zero)


def dropped(self, x):
    return F.dropout(self.c_fc(x), 0.3, self.training)


def drawn(self, x):
    """With a generator of its own, whose draws differ from call to call."""
    generator = self.__dict__.setdefault("g", torch.Generator().manual_seed(0))
    noise = torch.rand(x.shape, generator=generator).to(x.device)
    return self.c_fc(x) * noise if self.training else x


def little_noise(self, x):
    """About the rounding of bf16, by a generator that no seed reaches."""
    self.calls = self.__dict__.get("calls", 0) + 1
    return self.c_fc(x) * (1 + 0.02 * self.calls * self.training)


class Experts(nn.Module):
    """Top-1 of experts with dropout inside: with other tokens it draws other masks."""

    def __init__(self, config):
        super().__init__()
        n = config.n_embd
        self.router = nn.Linear(n, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(n, n), nn.Dropout(0.5), nn.Linear(n, n)) for _ in range(4)
        )

    def forward(self, x):
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).float().softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            (at,) = (chosen == number).nonzero(as_tuple=True)
            if len(at):
                out = out.index_add(0, at, (expert(flat[at]) * weights[at, None]).to(out.dtype))
        return out.view_as(x)


@pytest.mark.parametrize(("kind", "part"), [
    ("mlp", Linear),
    ("mlp", mlp(forward=dropped)),
    ("mlp", mlp(forward=lambda self, x: drawn(self, x) + self.c_fc(x))),
    ("mlp", mlp(forward=little_noise)),
    ("mlp", Experts),
    ("mlp", mlp(attribute(torch.arange), by_index)),
    ("mlp", torch.relu_),
    ("mlp", lambda x: x.sigmoid() * x),
    ("norm", lambda x: F.normalize(x, dim=-1)),
    ("norm", torch.compile(lambda x: F.normalize(x, dim=-1), backend="eager")),
    ("norm", lambda x: x),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_right_part_passes_and_nothing_else_changes(kind, part, dtype, device, capsys):
    gpt2.register(kind, "own")(part)
    model = network(ModernConfig(**SHAPE | {"block_size": 64}, **{kind: "own"}))
    device = torch.device(device)
    weights, before = {n: t.clone() for n, t in model.state_dict().items()}, rng_state(device)
    check_parts(model, Runtime(device, dtype))
    after = rng_state(device)
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["python"][1], after["python"][1])
    assert device.type == "cpu" or torch.equal(before["cuda"], after["cuda"])
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert capsys.readouterr().err == ""


def test_a_part_that_reads_earlier_tokens_is_told_of_the_cache(capsys):
    check(mlp(change=lambda y: F.pad(y, (0, 0, 1, 0))[:, :-1]))
    assert "mlp=own reads tokens before its own, which the KV cache" in capsys.readouterr().err


def in_chunks(y):
    """The mean of the tokens so far in a chunk of 16."""
    chunks = y.view(len(y), -1, 16, y.shape[-1])
    return (chunks.cumsum(2) / torch.arange(1, 17)[:, None]).to(y.dtype).view(y.shape)


def mixed(y):
    """By a matrix that is made for the whole context alone."""
    return (torch.ones(64, 64).tril().to(y.dtype) / 64) @ y


@pytest.mark.parametrize("change", [in_chunks, mixed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_may_need_the_whole_context(change, dtype, capsys):
    check(mlp(change=change), dtype=dtype, positions=64)
    said = capsys.readouterr().err
    assert "warning: mlp=own fails on a single token, as the KV cache gives them: texts" in said
    assert said.count("\n") == 1


def parameter(value, change):
    return mlp(
        lambda self, width: setattr(self, "p", nn.Parameter(torch.full((width,), value))),
        lambda self, x: self.c_fc(x) * change(self.p),
    )


def test_a_changed_input_may_overflow(capsys):
    """The tokens by which later ones are looked for are all positive, unlike those of a run."""
    check(mlp(forward=lambda self, x: self.c_fc(x) * x.cumsum(1).exp()), positions=1024)
    assert capsys.readouterr().err.count("\n") == 1  # of the cache


@pytest.mark.parametrize(("value", "change"), [
    (0.99, lambda p: (1 - p).log()),
    (1e-2, torch.sqrt),
    (0.0, lambda p: (0.001 - p).log()),
])  # fmt: skip
def test_parameters_stay_where_they_are_valid(value, change):
    check(parameter(value, change))


@pytest.mark.parametrize("code", ["gpt2.register('mlp', 'a')(3)", "gpt2.register('loss', 'a')(3)"])
def test_a_part_that_cannot_be_called_is_refused(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.py").write_text(f"import gpt2\n{code}\n")
    assert cli.main(["train", "--plugin=p.py"]) == 2
    line = capsys.readouterr().err
    assert "'a') got 3; give it a function or a class" in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(("at", "line"), [("__init__", 5), ("forward", 7)])
def test_code_that_fails_is_named_by_its_line(at, line, tmp_path, data_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ends = {"__init__": "super().__init__()", "forward": "return x"} | {at: "1 / 0"}
    (tmp_path / "p.py").write_text(
        "import gpt2, torch\n@gpt2.register('norm', 'own')\nclass Own(torch.nn.Module):\n"
        f"    def __init__(self, config):\n        {ends['__init__']}\n"
        f"    def forward(self, x):\n        {ends['forward']}\n"
    )
    argv = [*SMALL, f"--data_dir={data_dir}", "--plugin=p.py", "--norm=own", "--max_steps=1"]
    assert cli.main(["train", *argv, "--out_dir=o"]) == 2
    said = capsys.readouterr().err
    tried = "tried on an input of (2, 32, 16): " if at == "forward" else ""
    assert f"norm=own: {tried}p.py, line {line}: ZeroDivisionError: division by zero" in said
    assert said.count("\n") == 1


# ---- random numbers under activation checkpointing -----------------------------------------------


@pytest.mark.parametrize(("part", "draws"), [
    (Linear, False),
    (torch.relu_, False),
    (mlp(attribute(lambda n: nn.Dropout(0.0))), False),
    (mlp(forward=dropped), True),
    (Experts, True),
    (lambda x: F.dropout(x, 0.1), True),
    (mlp(attribute(lambda n: nn.Dropout(0.1))), True),  # not used in the trial, maybe later
])  # fmt: skip
@pytest.mark.parametrize("device", DEVICES)
def test_the_random_state_is_saved_for_parts_that_draw(part, draws, device, monkeypatch):
    model, asked = check(part, device=device), []
    assert model.parts_draw is draws
    monkeypatch.setattr(
        gpt,
        "checkpoint",
        lambda block, *inputs, use_reentrant, preserve_rng_state: (
            asked.append(preserve_rng_state) or block(*inputs)
        ),
    )
    model.checkpoint_activations = True
    model(torch.arange(8)[None])
    assert asked == [draws] * 2
    fresh = network(model.config)  # in Python nobody tries the parts
    assert fresh.parts_draw
    assert not network(ModernConfig(**SHAPE)).parts_draw


# ---- gradients -----------------------------------------------------------------------------------


def unused(self, width):
    self.extra = nn.Linear(3, 3)


def with_zero(self, x):
    return self.c_fc(x) + 0 * sum(p.sum() for p in self.extra.parameters())


def test_a_parameter_without_a_gradient_is_named():
    with pytest.raises(UserError, match="no gradient reaches its parameter extra"):
        check(mlp(unused), world_size=2)
    with pytest.raises(UserError, match="no gradient reaches its parameter c_fc"):
        check(mlp(change=lambda y: y.detach()), world_size=2)
    frozen = mlp(lambda self, width: unused(self, width) or self.extra.requires_grad_(False))
    check(frozen, world_size=2)
    check(mlp(unused, with_zero), world_size=2)


def test_one_rank_trains_without_a_gradient(capsys):
    check(mlp(unused))
    assert "warning: mlp=own: no gradient reaches its parameter extra" in capsys.readouterr().err


def test_a_context_of_tokens_reaches_the_experts(capsys):
    check(Experts, positions=64, world_size=2)
    assert capsys.readouterr().err == ""


def test_fsdp_cannot_cut_a_single_number():
    part = mlp(
        lambda self, width: setattr(self, "gain", nn.Parameter(torch.ones(()))),
        lambda self, x: self.c_fc(x) * self.gain,
    )
    check(part)
    with pytest.raises(UserError, match="fsdp cannot cut its parameter gain"):
        check(part, sharded=True)


def of_kind(value, **more):
    return mlp(
        lambda self, width: setattr(self, "gain", nn.Parameter(value.clone(), **more)),
        lambda self, x: (self.c_fc(x) * self.gain).to(x.dtype),
    )


@pytest.mark.parametrize(("part", "said"), [
    (of_kind(torch.tensor(1.0), requires_grad=False), "fsdp cannot cut its parameter gain, a sing"),
    (of_kind(torch.ones(16, dtype=torch.bfloat16)), "parameter gain, which is bfloat16; make it"),
    (of_kind(torch.ones(16, dtype=torch.float64), requires_grad=False), "gain, which is float64;"),
])  # fmt: skip
def test_fsdp_takes_parameters_of_one_kind(part, said):
    check(part)
    with pytest.raises(UserError, match=said):
        check(part, sharded=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv on Windows")
def test_two_ranks_say_it_in_one_line(data_dir, tmp_path):
    (tmp_path / "p.py").write_text(
        CONSTANTS.replace("self.gain =", "self.extra = torch.nn.Linear(3, 3)\n        self.gain =")
    )
    more = [f"--plugin={tmp_path / 'p.py'}", "--mlp=mixed", "--max_steps=2"]
    done = run_python(*command(2, data_dir, tmp_path / "o", *more), check=False)
    assert done.returncode
    assert "mlp=mixed: no gradient reaches its parameter extra.weight" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("training", [False, True])
def test_a_norm_is_tried_in_both_modes(training):
    class Norm(nn.Module):
        def __init__(self, config):
            super().__init__()

        def forward(self, x):
            return x.mul_(2) if self.training == training else x * 2

    with pytest.raises(UserError, match="norm=own writes into its input"):
        check(Norm, "norm")
