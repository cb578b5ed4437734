"""The hand-written parts of a training step beside the libraries that offer the same operation.

    python -m benchmarks.libraries
    python -m benchmarks.libraries --tokens=8192 --json=libraries.jsonl
    python -m benchmarks.libraries --only=head

Each subject is one operation at its size in GPT-2 (124M): in bf16 autocast, forward and backward,
with float32 weights and float32 weight gradients. All contenders of a subject run in one process,
one after the other, again and again.

- mlp: residual + proj(gelu(fc(x))), by cuBLASLt, PyTorch, torch.compile or nvmath-python.
- head: the head and its cross-entropy, in chunks, by PyTorch, torch.compile or Liger-Kernel.
- muon: a step of Muon over the matrices of all blocks, beside `torch.optim.Muon`, which takes
  queries, keys and values as one matrix; ours takes three.

`ms` is the median time on the GPU, measured by CUDA events while launches are queued: launches that
a CUDA graph would remove do not count, waiting for a result of the GPU does. `wall ms` is the
median with everything. `peak` is GPU memory at the highest, without the inputs of mlp and head, and
with weights, gradients and momentum of muon. `error` is the largest
relative error of the output and the gradients, compared with PyTorch in float32; for Muon that of
the updates, compared with the polar factor U Vᵀ that the polynomials approximate.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.config.model import IGNORE, GPT2Config
from gpt2.config.train import OptimOptions
from gpt2.distributed.devices import wait_for
from gpt2.distributed.runtime import Runtime
from gpt2.errors import first_line
from gpt2.kernels.head_loss import head_loss, head_loss_reference
from gpt2.kernels.linear import add_mlp
from gpt2.model.gpt import GPT
from gpt2.train.optimizer import build_optimizer

from .arguments import count, whole
from .nvmath_mlp import NvmathMatmuls, NvmathMLP

LIMIT = 2e-2  # relative error; of bf16 in a sum it is about 4e-3
MUON_LIMIT = 0.35  # the polynomials leave singular values between about 0.7 and 1.2
AUTOTUNED = 32  # algorithms that nvmath-python tries for each matmul, five times each
QUEUE_CYCLES = 40_000_000  # of the GPU's clock, about 20 ms in which launches are queued
Step = Callable[[], list[Tensor]]


@dataclass
class Subject:
    """An operation and those who offer it.

    `contenders` make a step, which returns what `error_of` compares; an error is a row of its own.
    """

    contenders: dict[str, Callable[[], Step]]
    error_of: Callable[[list[Tensor]], float]
    limit: float


class NotMeasured(Exception):
    """Why a contender has no numbers."""


def library(module: str) -> Any:
    """An imported library.

    Raises:
        NotMeasured: it is not installed, or there is no GPU, which these libraries need.
    """
    if importlib.util.find_spec(module.split(".", maxsplit=1)[0]) is None:
        raise NotMeasured("not installed")
    if not torch.cuda.is_available():
        raise NotMeasured("needs a CUDA GPU")
    return importlib.import_module(module)


def compiled(function: Callable, rt: Runtime) -> Callable:
    """By torch.compile, for one shape."""
    if rt.device.type != "cuda":
        raise NotMeasured("measured on a GPU only")
    return torch.compile(function, dynamic=False)


def relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest of the tensors' errors, each relative to the norm of the exact tensor."""
    pairs = [(f.float(), e.float()) for f, e in zip(found, exact, strict=True)]
    errors = [(f - e).norm() / e.norm() for f, e in pairs]
    return torch.stack(errors).max().item()  # not a number where one of them is not


def forward_backward(
    function: Callable, inputs: list[Tensor], upstream: Tensor | None, rt: Runtime
) -> Step:
    """A step: the output of function() and the gradients of the inputs."""

    def step() -> list[Tensor]:
        with rt.autocast():
            y = function()
        return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]

    return step


def mlp(options: argparse.Namespace, rt: Runtime) -> Subject:
    """Residual + proj(gelu(fc(x))); x and the residual are bf16, as in training."""
    width, device = options.width, rt.device
    fc, proj = nn.Linear(width, 4 * width).to(device), nn.Linear(4 * width, width).to(device)
    residual, x, upstream = torch.randn(3, options.tokens, width, device=device).to(rt.dtype)
    residual, x = (t.clone().requires_grad_() for t in (residual, x))
    inputs = [residual, x, *fc.parameters(), *proj.parameters()]

    def plain(residual: Tensor = residual, x: Tensor = x) -> Tensor:
        return residual + proj(F.gelu(fc(x), approximate="tanh"))

    def ours() -> Tensor:
        return add_mlp(residual, x, fc, proj)

    def by_nvmath(limit: int, autotuned: bool) -> Step:
        nvmath, advanced = library("nvmath"), library("nvmath.linalg.advanced")
        matmuls = NvmathMatmuls(nvmath, advanced, limit, autotuned)
        return step(lambda: NvmathMLP.apply(matmuls, *inputs))

    step = functools.partial(forward_backward, inputs=inputs, upstream=upstream, rt=rt)
    full = [t.detach().float().requires_grad_() for t in (residual, x)]
    y = plain(*full)
    exact = [y.detach(), *torch.autograd.grad(y, [*full, *inputs[2:]], upstream.float())]
    return Subject(
        {
            "ours, cuBLASLt": lambda: step(ours),
            "ours, torch.compile": lambda: step(compiled(ours, rt)),
            "PyTorch": lambda: step(plain),
            "PyTorch, torch.compile": lambda: step(compiled(plain, rt)),
            "nvmath-python": lambda: by_nvmath(8, False),
            "nvmath-python, autotuned": lambda: by_nvmath(AUTOTUNED, True),
        },
        functools.partial(relative_error, exact=exact),
        LIMIT,
    )


def head(options: argparse.Namespace, rt: Runtime) -> Subject:
    """Mean cross-entropy of a head with a vocabulary that is no multiple of anything."""
    tokens, vocab, width = options.tokens, options.vocab, options.width
    x = torch.randn(tokens, width, device=rt.device).to(rt.dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocab, width, device=rt.device)).requires_grad_()
    targets = torch.randint(vocab, (tokens,), device=rt.device)
    padded = -(-vocab // 128) * 128

    def plain() -> Tensor:
        return F.cross_entropy(F.linear(x, weight), targets)

    def plain_padded() -> Tensor:
        return head_loss_reference(x, weight, targets, padded, "mean")

    def liger(in_bf16: bool, chunk_memory: int) -> Step:
        found = library("liger_kernel.ops.fused_linear_cross_entropy")
        apply = found.LigerFusedLinearCrossEntropyFunction.apply
        # bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap,
        # return_z_loss, accum_dtype; then five of no use here, and chunk_mem_const
        first = None, None, IGNORE, 0.0, 0.0, "mean", None, False, torch.float32
        last = False, False, False, None, None, chunk_memory

        def loss() -> Tensor:
            head = weight.to(rt.dtype) if in_bf16 else weight
            return apply(x, head, targets, *first, *last)[0]

        return step(loss)

    step = functools.partial(forward_backward, inputs=[x, weight], upstream=None, rt=rt)
    return Subject(
        {
            "ours, in chunks": lambda: step(lambda: head_loss(x, weight, targets, padded, "mean")),
            "PyTorch": lambda: step(plain),
            "PyTorch, torch.compile": lambda: step(compiled(plain, rt)),
            "PyTorch, padded, torch.compile": lambda: step(compiled(plain_padded, rt)),
            "Liger-Kernel": lambda: liger(False, 1),
            "Liger-Kernel, bf16 weight": lambda: liger(True, 1),
            "Liger-Kernel, bf16 weight, larger chunks": lambda: liger(True, 16),
        },
        functools.partial(relative_error, exact=_exact_head(x, weight, targets)),
        LIMIT,
    )


def _exact_head(x: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Loss and gradients in float32 by plain PyTorch, 4096 rows at once."""
    total, of_x, of_weight = torch.zeros((), device=x.device), [], torch.zeros_like(weight)
    for rows, target in zip(x.detach().split(4096), targets.split(4096), strict=True):
        full = rows.float().requires_grad_()
        loss = F.cross_entropy(F.linear(full, weight), target, reduction="sum") / len(x)
        dx, dw = torch.autograd.grad(loss, [full, weight])
        total += loss.detach()
        of_weight += dw
        of_x.append(dx)
    return [total, torch.cat(of_x), of_weight]


def muon(options: argparse.Namespace, rt: Runtime) -> Subject:
    """A step of Muon over the matrices of the blocks; nothing else has gradients."""
    sizes = {"n_layer": options.layers, "n_embd": options.width, "vocab_size": options.vocab}
    config = GPT2Config(n_head=options.heads, **sizes)

    def network() -> tuple[GPT, torch.optim.Optimizer, list[Tensor]]:
        """The same weights and gradients each time, with our optimizer."""
        torch.manual_seed(0)
        model = GPT(config).to(rt.device)
        settings = OptimOptions(optimizer="muon", weight_decay=0.0)
        ours = build_optimizer(model, settings, rt)
        matrices = [p for g in ours.param_groups if "parts" in g for p in g["params"]]
        for p in matrices:
            p.grad = torch.randn_like(p)
        return model, ours, matrices

    def stepping(model: GPT, optimizer: torch.optim.Optimizer) -> Step:
        block = model.transformer.h[0]
        layers = block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj

        def step() -> list[Tensor]:
            optimizer.step()
            return [layer.weight.detach() for layer in layers]

        return step

    def ours() -> Step:
        return stepping(*network()[:2])

    def pytorchs() -> Step:
        model, _, matrices = network()
        return stepping(model, torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0))

    model, _, _ = network()
    block = model.transformer.h[0]
    weights = [layer.weight for layer in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)]
    before, grads = [w.detach().clone() for w in weights], [w.grad for w in weights]
    polar = [u @ vt for u, _, vt in (torch.linalg.svd(g, full_matrices=False) for g in grads)]

    def error(after: list[Tensor]) -> float:
        """Of the direction of the first update."""
        updates = [b - a for b, a in zip(before, after, strict=True)]
        scaled = [u * p.norm() / u.norm() for u, p in zip(updates, polar, strict=True)]
        return relative_error(scaled, polar)

    return Subject({"ours, batched": ours, "torch.optim.Muon": pytorchs}, error, MUON_LIMIT)


SUBJECTS = {"mlp": mlp, "head": head, "muon": muon}


def first_steps(subject: Subject, rt: Runtime) -> tuple[dict[str, Step], dict[str, dict]]:
    """The contenders that work, warm, and a row for each: its error and its memory."""
    steps, rows = {}, {}
    for name, make in subject.contenders.items():
        row = rows[name] = {"ms": None, "wall_ms": None, "peak_mib": None, "error": None}
        before = torch.cuda.memory_allocated() if rt.device.type == "cuda" else 0
        try:
            step = make()
            row["error"] = subject.error_of(step())
            step()
            row["peak_mib"] = peak_mib(step, before, rt)
            steps[name] = step
            row["result"] = "right" if row["error"] < subject.limit else "wrong"
        except Exception as error:  # noqa: BLE001 - one contender must not cost the others
            row["result"] = first_line(error)
        if rt.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    return steps, rows


def peak_mib(step: Step, before: int, rt: Runtime) -> float | None:
    """GPU memory at the highest in a step, less `before` bytes."""
    if rt.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def wall_ms(step: Step, rt: Runtime) -> float:
    """With launches and all waiting."""
    wait_for(rt.device)
    began = time.perf_counter()
    step()
    wait_for(rt.device)
    return 1e3 * (time.perf_counter() - began)


def gpu_ms(step: Step, rt: Runtime) -> float:
    """Between two CUDA events, which the GPU reaches when launches are queued."""
    if rt.device.type != "cuda":
        return wall_ms(step, rt)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUE_CYCLES)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(name: str, options: argparse.Namespace, rt: Runtime) -> Iterator[dict]:
    """A row for each contender of a subject."""
    torch.manual_seed(0)
    subject = SUBJECTS[name](options, rt)
    steps, rows = first_steps(subject, rt)
    taken = {contender: ([], []) for contender in steps}
    for turn in range(options.warmup + options.repeats):
        for contender, step in steps.items():
            with contextlib.suppress(torch.OutOfMemoryError):  # then a row has fewer repeats
                step()  # the allocator's blocks and the caches are this contender's
                times = gpu_ms(step, rt), wall_ms(step, rt)
                if turn >= options.warmup:
                    for kept, ms in zip(taken[contender], times, strict=True):
                        kept.append(ms)
    for contender, row in rows.items():
        if any(taken.get(contender, ())):
            row["ms"], row["wall_ms"] = (statistics.median(kept) for kept in taken[contender])
        yield {"subject": name, "contender": contender, "tokens": options.tokens} | row


def parser() -> argparse.ArgumentParser:
    """The command line; the sizes are those of GPT-2 (124M) at batch size 64."""
    made = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sizes = {"tokens": 65536, "width": 768, "vocab": 50257, "layers": 12, "heads": 12}
    for name, value in (sizes | {"repeats": 20}).items():
        made.add_argument(f"--{name}", type=count, default=value)
    made.add_argument("--warmup", type=whole, default=3)
    made.add_argument("--only", default=",".join(SUBJECTS), help="subjects, with commas")
    made.add_argument("--device", default="cuda", help="cpu: only what runs there, in float32")
    made.add_argument("--json", default="", help="a file for a JSON line of each row")
    return made


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {}
    for name in ("torch", "nvmath-python", "liger-kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def line(row: dict) -> str:
    """A row of the table."""
    shown = {"ms": "{:.3f}", "wall_ms": "{:.3f}", "peak_mib": "{:,.0f}", "error": "{:.1e}"}
    cells = ["–" if row[k] is None else form.format(row[k]) for k, form in shown.items()]
    return f"| {' | '.join([row['subject'], row['contender'], *cells, row['result']])} |"


def main() -> int:
    """Measures, and prints a table."""
    options = parser().parse_args()
    if unknown := set(options.only.split(",")) - SUBJECTS.keys():
        print(f"--only={','.join(sorted(unknown))}: use {', '.join(SUBJECTS)}", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.libraries needs a CUDA GPU, and there is none here", file=sys.stderr)
        return 2
    rt = Runtime(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    about = {"device": rt.device_name, "versions": versions()}
    print(", ".join([rt.device_name, *(f"{k} {v}" for k, v in about["versions"].items())]))
    print(f"{options.tokens:,} tokens, {options.width} channels, {options.vocab:,} ids\n")
    print("| subject | contender | ms | wall ms | peak MiB | error | result |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with open(options.json or os.devnull, "a", encoding="utf-8") as lines:
        for name in options.only.split(","):
            for row in measure(name, options, rt):
                print(line(row), flush=True)
                print(json.dumps(row | about), file=lines, flush=True)
            gc.collect()
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
