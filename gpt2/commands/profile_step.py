"""`gpt2 profile`: where the time of a training step goes.

Runs a few training steps under torch.profiler. Sums the time of the kernels (on a CPU: operators)
by group, and compares it with the time of the arithmetic at the speed of the best library kernels.
On a GPU the profiler makes steps longer, as it slows down Python, so a step's own time is that of
steps before it, computed as in training. Writes only a trace, for chrome://tracing and
ui.perfetto.dev.
"""

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from ..config.commands import ProfileConfig
from ..config.model import GPT2_VOCAB_SIZE
from ..config.train import TrainConfig
from ..data.random_tokens import write_random_shards
from ..distributed import runtime, signals
from ..distributed.devices import wait_for
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..files import check_writable_file, move
from ..model.gpt import LanguageModel
from ..paths import check_unlinked
from ..report import console, throughput
from ..train import setup
from ..train import step as training_step
from ..train.messages import out_of_memory
from ..train.setup import resolve_init
from ..train.state import TrainState

WARMUP_STEPS, TIMED_STEPS, STEPS = 5, 10, 3
HEAD = "gpt2::head_loss_and_gradients"  # all kernels that this operator launches belong to the head
GROUPS = {  # group -> parts of the names of its kernels or operators; the first match counts
    "attention": ("sdpa", "attention", "flash", "fmha", "compute_dot_do_o", "convert_dq"),
    "head": ("cross_entropy", "log_softmax", "nll_loss", "gradient_fp8", "quantize", HEAD),
    "optimizer": ("adam", "multi_tensor", "fusedopti", "foreach", "lpnorm", "optimizer"),
    "matmuls": (
        *("gemm", "gemv", "nvjet", "xmma", "cutlass", "splitk", "::mm", "::addmm", "::bmm"),
        *("mkldnn", "mkl_", "gpt2::product", "gpt2::weight_gradient"),
    ),
    "norms": ("layer_norm", "layernorm"),
    "copies": ("memcpy", "memset", "copy_", "::to", "direct_copy"),
}
OTHERS = "GELU, residuals, sums, …"
ORDER = ("matmuls", "head", "attention", "norms", "optimizer", "copies", OTHERS)
# Shares of the peak rate that the best library kernels reach on an H200 with 65,536 tokens of the
# 124M model (720, 650 and, causal half not deducted, 410 of 989 TFLOP/s).
REACHABLE = {"matmuls": 0.73, "head": 0.66, "attention": 0.42}


def run(options: ProfileConfig) -> int:
    """Profiles `STEPS` steps and prints the table; returns an exit code.

    Raises:
        UserError: settings that `gpt2 train` refuses; a trace that cannot be written.
    """
    config: TrainConfig = options
    trace, path = options.trace, Path(options.trace)
    if not path.parent.is_dir():
        raise UserError(f"trace={trace}: there is no folder {path.parent}")
    if not path.name.endswith((".json", ".json.gz")):
        raise UserError(f"trace={trace}: use a name that ends in .json or .json.gz")
    check_unlinked(path.parent, path)  # a link is no earlier trace
    check_writable_file(path, "trace=")
    # nothing is lost by a signal, so it ends the profile in the middle of a step
    started = runtime.start(config.system)
    with started as rt, signals.interruptible(), _data(config) as data_dir:
        if rt.world_size > 1:
            raise UserError("gpt2 profile looks at one process; run it without torchrun")
        config = replace(config, data=replace(config.data, data_dir=data_dir))
        config, init = resolve_init(config, rt, None)
        state = setup.build(config, rt, None, init)
        recorded = state.graph.enabled
        announce(state, rt)
        try:
            seconds, times = measure(state, config, rt, path)
        except torch.OutOfMemoryError:
            checkpointing = config.system.activation_checkpointing == "True"
            raise UserError(out_of_memory(state.plan, checkpointing)) from None
        finally:
            state.loader.close()
    if recorded:
        console.log("kernels one by one; step and waiting as in training, with a CUDA graph")
    for line in format_table(times, seconds, state, rt):
        console.log(line)
    console.log(f"trace: {path} (open it in chrome://tracing or ui.perfetto.dev)")
    return 0


def announce(state: TrainState, rt: Runtime) -> None:
    """Says, before the first step, what will be measured."""
    for note in (*rt.choices, *state.notes):
        console.log(note)
    console.log(str(state.plan))
    timed = f"{TIMED_STEPS} timed, " if rt.device.type == "cuda" else ""
    console.log(f"running {WARMUP_STEPS} steps to warm up, {timed}{STEPS} under the profiler")


def measure(
    state: TrainState, config: TrainConfig, rt: Runtime, trace: Path
) -> tuple[float, Counter[str]]:
    """(seconds per step, seconds per step of each group); writes the trace."""

    def steps(count: int) -> float:
        """Seconds per step of so many."""
        wait_for(rt.device)
        began = time.perf_counter()
        for _ in range(count):
            step = training_step.train_step(state, config, rt)
        step.read()
        wait_for(rt.device)
        return (time.perf_counter() - began) / count

    steps(WARMUP_STEPS)
    on_gpu = rt.device.type == "cuda"
    in_training = steps(TIMED_STEPS) if on_gpu else 0.0
    state.graph.forget()
    state.graph.enabled = False  # a graph hides which operation launches a kernel
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch_profile(activities=kinds) as profiler:
        profiled = steps(STEPS)
    write_trace(profiler, trace)
    events = profiler.events()
    times = _on_gpu(events) if on_gpu else _on_cpu(events)
    of_groups = Counter({name: value / STEPS / 1e6 for name, value in times.items()})
    return in_training or profiled, of_groups


def write_trace(profiler: Any, path: Path) -> None:
    """Writes what a profiler recorded; raises UserError where no file came of it.

    PyTorch says nothing of a `.json` file that it could not write. Its file is therefore made in a
    folder of its own, so that what is renamed to `path` is never the trace of an earlier call.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, "trace.json.gz" if path.suffix == ".gz" else "trace.json")
            profiler.export_chrome_trace(str(made))
            move(made, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}") from None


def _on_gpu(events: Iterable[Any]) -> Counter[str]:
    """Microseconds of kernels by group; every kernel launched by head or optimizer is theirs."""
    times: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CUDA:
            if not event.is_user_annotation:  # a range of kernels, which are events too
                times[group_of(event.name)] += event.time_range.elapsed_us()
        elif owner := _owner(event):
            for kernel in event.kernels:
                times[group_of(kernel.name)] -= kernel.duration
                times[owner] += kernel.duration
    return times


def _on_cpu(events: Iterable[Any]) -> Counter[str]:
    """Microseconds of operators by group, without the operators that they call."""
    times: Counter[str] = Counter()
    for event in events:
        name = HEAD if _owner(event) == "head" else event.name
        parent = event.cpu_parent
        while parent is not None and group_of(name) in (OTHERS, "copies"):
            name, parent = parent.name, parent.cpu_parent  # a part of something larger
        times[group_of(name)] += event.self_cpu_time_total
    return times


def _owner(event: Any) -> str | None:
    """Head or optimizer if an event happened inside of it, else None."""
    while event is not None:
        if event.name == HEAD:
            return "head"
        if event.name.startswith("Optimizer.step"):  # so torch.optim names it
            return "optimizer"
        event = event.cpu_parent
    return None


def group_of(name: str) -> str:
    """The group of a kernel or an operator, by its name."""
    name = name.lower()
    if name.startswith("triton_"):  # fuses many operators, copies among them
        return "norms" if "norm" in name else OTHERS
    for group, parts in GROUPS.items():
        if any(part in name for part in parts):
            return group
    return OTHERS


def flops(model: LanguageModel, tokens: int) -> dict[str, int]:
    """Floating point operations of forward and backward over so many tokens, by group.

    Each weight and token takes two forward and four backward. Attention is counted in full, its
    causal mask not deducted (`GPT.flops_per_token`).
    """
    c = model.config
    blocks = model.transformer.h.parameters()
    matrices = sum(p.numel() for p in blocks if p.ndim == 2)
    return {
        "matmuls": 6 * matrices * tokens,
        "head": 6 * c.n_embd * c.padded_vocab_size * tokens,
        "attention": 12 * c.n_layer * c.n_embd * c.block_size * tokens,
    }


def format_table(times: Counter[str], seconds: float, state: TrainState, rt: Runtime) -> list[str]:
    """Lines with milliseconds and share of each group, and the floor if the peak rate is known."""
    peak = throughput.peak_flops(rt.device_name, str(rt.dtype).removeprefix("torch."))
    floor = {}
    if peak:
        work = flops(state.model, state.plan.tokens_per_step)
        floor = {name: work[name] / peak / share for name, share in REACHABLE.items()}
    rows: list[tuple[str, float, float | None]]
    rows = [(name, times[name], floor.get(name)) for name in ORDER]
    rows.append(("waiting", max(0.0, seconds - sum(times.values())), None))
    rows.append(("step", seconds, sum(floor.values()) if floor else None))
    lines = [f"{'':28s} {'ms':>9s} {'share':>7s} {'floor ms':>9s}"]
    for name, value, least in rows:
        text = f"{1e3 * least:9.2f}" if least else f"{'-':>9s}"
        lines.append(f"{name:28s} {1e3 * value:9.2f} {value / seconds:7.1%} {text}")
    lines.append(
        "floor: the arithmetic alone at the shares of the peak rate that library kernels reach on "
        f"an H200 ({', '.join(f'{name} {share:.0%}' for name, share in REACHABLE.items())})"
        if peak
        else f"floor: not known, as the peak rate of {rt.device_name} is not in the table"
    )
    return lines


@contextlib.contextmanager
def _data(config: TrainConfig) -> Iterator[str]:
    """The folder of shards, or a temporary one with random tokens if it does not exist."""
    folder = config.data.data_dir
    if "," in folder or ":" in folder or Path(folder).exists():
        yield folder
        return
    console.log(f"{folder} is not here: profiling on random tokens")
    with tempfile.TemporaryDirectory() as made:
        write_random_shards(Path(made), 2_000_000, GPT2_VOCAB_SIZE)
        yield made
