"""Checks kernel candidates on one Hopper GPU and times them beside what they would replace.

    python3 dev/kernel_candidates.py            # every part, each in a process of its own
    python3 dev/kernel_candidates.py muon       # one part, in this process

A part that fails or passes its limit costs the others nothing. Times are medians in milliseconds by
CUDA events after a warm-up; "wall" is the clock over queued work and a wait at the end. The whole
takes about 7 minutes; the most important parts come first, and none starts after 440 s.
"""
# ruff: noqa: B023, BLE001, D103, PLW1510

import contextlib
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DEADLINE = 440


def row(what: str, value: str, note: str = "") -> None:
    print(f"| {what:58s} | {value:>12s} | {note}", flush=True)


def ms(work, calls: int = 20, warm: int = 5, flush: bool = False) -> float:
    """Median of events around one call each."""
    for _ in range(warm):
        work()
    cache = torch.empty(2**27 if flush else 1, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(calls):
        cache.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def graphed(work):
    """The replay of a CUDA graph of work(): its kernels without their launches from Python."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def wall(work, calls: int = 20) -> float:
    """Mean milliseconds of a call when the GPU is waited for once, at the end."""
    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3 / calls


@contextlib.contextmanager
def attempt(what: str):
    try:
        yield
    except Exception as error:  # a candidate may fail in any way
        row(what, "FAILED", f"{type(error).__name__}: {str(error)[:160]!r}")
        traceback.print_exc(limit=-3)


def relative(a, b) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def tests() -> None:
    """The tests of all candidates on the GPU."""
    files = ["kernels/test_triton_one_token.py", "train/test_update_graph.py", "train/test_muon.py",
             "kernels/test_triton_symmetric.py"]  # fmt: skip
    for file in files:
        path = ROOT / "tests" / file
        if not path.exists():
            continue
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=110)
        last = done.stdout.strip().splitlines()[-1:] or [""]
        row(f"tests/{file}", "passed" if done.returncode == 0 else "FAILED", last[0])
        if done.returncode:
            print(done.stdout[-2500:])


def generating() -> None:
    """One sequence of 124M in bf16, greedy: 128 + 512 tokens; the present pass, then the kernel."""
    from gpt2.config.model import SIZES, GPT2Config
    from gpt2.generate.sampling import Sampling
    from gpt2.generate.stream import decoder_for, generate
    from gpt2.kernels import triton_one_token as kernel
    from gpt2.model.gpt import GPT

    torch.manual_seed(0)
    model = GPT(GPT2Config(**SIZES["gpt2"])).eval().to("cuda", torch.bfloat16)
    prompt = [torch.randint(50257, (128,)).tolist()]
    fits, texts = kernel.fits, {}

    def rate(name: str) -> None:
        with attempt(name), torch.inference_mode():
            decoder = decoder_for(model, prompt, 512, Sampling(temperature=0))
            write = lambda: generate(model, prompt, 512, temperature=0, decoder=decoder)  # noqa: E731
            began = time.perf_counter()
            texts[name] = write()[0]
            first, seconds = time.perf_counter() - began, []
            for _ in range(4):
                began = time.perf_counter()
                write()
                seconds.append(time.perf_counter() - began)
            speed = 512 / statistics.median(seconds)
            same = sum(a == b for a, b in zip(texts["present"], texts[name], strict=True))
            row(f"{name}: tokens/s", f"{speed:,.0f}", f"first call {first:.1f} s; {same} of 512 as")
            decoder.forward.cache.lengths.fill_(500)
            row(f"{name}: a replay at 500 positions, ms", f"{ms(decoder.graph.replay):.4f}")
            one = decoder.forward.one_token
            if one is not None:
                cache = decoder.forward.cache
                cache.lengths.fill_(500)
                given = decoder.tokens, cache.keys, cache.values, cache.lengths
                row(f"{name}: its kernel alone, ms", f"{ms(graphed(lambda: one(*given))):.4f}")
                row(f"{name}: NaN in it", str(int(one.out.isnan().sum())), "0 is right")

    kernel.fits = lambda *_: False
    rate("present")
    kernel.fits = fits
    began = time.perf_counter()
    for warps, programs, shares in ((8, 128, 4), (4, 128, 4), (16, 128, 4), (16, 128, 8),
                                    (8, 96, 4), (16, 132, 8), (8, 64, 4)):  # fmt: skip
        if time.perf_counter() - began < 130:
            kernel.WARPS, kernel.PROGRAMS, kernel.SHARES = warps, programs, shares
            rate(f"one kernel, {warps} warps, {programs} programs, {shares} shares")
    from gpt2.generate.few_token_pass import small_layer

    hidden, parts = torch.randn(1, 768, device="cuda"), model.transformer
    with torch.inference_mode():
        head = lambda: small_layer(hidden, parts.wte, norm=parts.ln_f)  # noqa: E731
        logits = head()
        row(
            "head, ms",
            f"{ms(graphed(head), flush=True):.4f}",
            "77 MB: 0.026 at 3.0 TB/s, 0.018 at 4.3",
        )
        row(
            "argmax of 50,257, ms",
            f"{ms(graphed(lambda: logits.argmax(-1))):.4f}",
            "part of a token",
        )


def muon() -> None:
    """Update of the speedrun's and of GPT-2's matrices, launched and recorded."""
    from gpt2.config.model import GPT2Config
    from gpt2.config.train import OptimOptions
    from gpt2.distributed.runtime import Runtime
    from gpt2.model.gpt import GPT
    from gpt2.train.optimizer import build_optimizer

    rt = Runtime(torch.device("cuda"), torch.bfloat16)
    for layers in (8, 12):
        torch.manual_seed(0)
        shape = {"n_layer": layers, "n_head": 6, "n_embd": 768}
        model = GPT(GPT2Config(**shape)).cuda()
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for recorded in (False, True):
            name = f"normuon, {layers} layers, {'one graph' if recorded else 'launches'}"
            with attempt(name):
                optimizer = build_optimizer(model, OptimOptions(optimizer="normuon"), rt)
                optimizer.graph.enabled = recorded
                optimizer.grad_scale = torch.ones((), device="cuda")
                optimizer.found_inf = torch.zeros((), device="cuda")
                for _ in range(6):
                    optimizer.step()
                held = torch.cuda.memory_allocated() / 2**20
                row(f"{name}: whole step, GPU empty, ms", f"{ms(optimizer.step):.2f}")
                row(
                    f"{name}: whole step, queued, ms",
                    f"{wall(optimizer.step):.2f}",
                    f"{held:.0f} MiB",
                )
                groups = [g for g in optimizer.param_groups if "parts" in g]
                row(f"{name}: Muon alone, ms", f"{ms(lambda: optimizer._muon(groups)):.2f}")
                if recorded:
                    row(f"{name}: recorded", str(optimizer.graph._graph is not None))


def symmetric() -> None:
    """X Xᵀ by half of its blocks, beside cuBLAS."""
    from gpt2.kernels.triton_symmetric import symmetric_product
    from gpt2.train import muon as module

    for n, rows, columns in ((32, 768, 768), (16, 768, 3072), (48, 768, 768), (24, 768, 3072)):
        x = torch.randn(n, rows, columns, device="cuda", dtype=torch.bfloat16) / columns**0.5
        plain = ms(lambda x=x: x @ x.mT)
        row(f"X Xᵀ {n} × {rows} × {columns}: cuBLAS, ms", f"{plain:.3f}")
        for block, deep, warps, stages in ((128, 64, 4, 4), (128, 64, 8, 3), (128, 128, 8, 3),
                                           (64, 64, 4, 4)):  # fmt: skip
            name = f"  symmetric, blocks of {block} × {deep}, {warps} warps, {stages} stages"
            with attempt(name):
                work = lambda x=x, s=(block, deep, warps, stages): symmetric_product(x, *s)  # noqa: E731
                error = relative(work(), x.float() @ x.float().mT)
                row(f"{name}, ms", f"{ms(work):.3f}", f"error {error:.1e}")
    x = torch.randn(16, 768, 3072, device="cuda", dtype=torch.bfloat16)
    row("orthogonalise 16 × 768 × 3072, ms", f"{ms(lambda: module.orthogonalise(x)):.3f}")


def gradient_fp8() -> None:
    """Tiles of `_gradient_fp8`: 8,192 tokens, of which a step has eight times as many."""
    from gpt2.kernels import triton_training as kernels

    rows, padded, vocab = 8192, 50304, 50257
    logits = torch.randn(rows, padded, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocab, (rows,), device="cuda")
    sums = (logits[:, :vocab].float() / 1).logsumexp(1) / 0.6931471805599453
    out = torch.empty(rows, padded, device="cuda", dtype=torch.float8_e5m2)
    turned = torch.empty(padded, rows, device="cuda", dtype=torch.float8_e5m2)
    copied = torch.empty(rows * padded, device="cuda", dtype=torch.bfloat16)
    floor = ms(lambda: copied.copy_(logits.view(-1)))
    row("copy of as many bytes, ms", f"{floor:.3f}", "the floor of the kernel")
    first = None
    for tall, wide, warps in ((32, 128, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 8),
                              (128, 128, 8), (32, 256, 4), (128, 32, 4), (256, 32, 8)):  # fmt: skip
        name = f"_gradient_fp8 {tall} × {wide}, {warps} warps, ms"
        if padded % wide or rows % tall:
            continue
        with attempt(name):
            grid = (rows // tall * (padded // wide),)
            work = lambda g=grid, t=tall, w=wide, n=warps: kernels._gradient_fp8[g](  # noqa: E731
                logits, targets, sums, out, turned, rows, vocab, padded, 14, 15.0, True, t, w,
                num_warps=n)  # fmt: skip
            took = ms(work)
            both = torch.equal(out.view(torch.uint8).t(), turned.view(torch.uint8))
            first = out.view(torch.uint8).clone() if first is None else first
            same = torch.equal(first, out.view(torch.uint8))
            row(name, f"{took:.3f}", f"same {same}, transposed {both}")


def attention() -> None:
    """Flash-2 of PyTorch beside cuDNN's and, where it is installed, FlashAttention-3."""
    import torch.nn.functional as F
    from torch.nn import attention as choice

    names = getattr(choice, "list_flash_attention_impls", list)()
    row("implementations that can be activated", str(names))
    for B, H, D in ((64, 12, 64), (64, 6, 128), (8, 12, 64)):
        shape = (B, 1024, H, D)
        given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
                 .detach().requires_grad_() for _ in range(3)]  # fmt: skip
        dy = torch.randn_like(given[0])
        wanted = None

        def work(given=given, dy=dy):
            for t in given:
                t.grad = None
            y = F.scaled_dot_product_attention(*given, is_causal=True)
            y.backward(dy)
            return y

        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "FA3"):
            name = f"attention {B} × {H} × {D}, {backend}: forward and backward, ms"
            if backend == "FA3" and "FA3" not in names:
                continue
            with attempt(name):
                if backend == "FA3":
                    choice.activate_flash_attention_impl("FA3")
                kind = getattr(choice.SDPBackend, backend, choice.SDPBackend.FLASH_ATTENTION)
                with choice.sdpa_kernel(kind):
                    y = work().detach()
                    wanted = y if wanted is None else wanted
                    row(name, f"{ms(work):.3f}", f"difference {relative(y, wanted):.1e}")


def adamw() -> None:
    """What a step of GPT-2's AdamW and the norm of its gradient take, beside moving the bytes."""
    from gpt2.config.model import GPT2Config
    from gpt2.config.train import OptimOptions
    from gpt2.distributed import fsdp
    from gpt2.model.gpt import GPT
    from gpt2.train.optimizer import build_optimizer

    model = GPT(GPT2Config()).cuda()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = build_optimizer(model, OptimOptions())
    row("fused AdamW, ms", f"{ms(optimizer.step):.3f}", "28 bytes a number, 124.4M numbers")
    norm = lambda: fsdp.gradient_norm(model.parameters())  # noqa: E731
    row("norm of the gradient, ms", f"{ms(norm):.3f}", "4 bytes a number")
    flat = torch.zeros(7 * 124_400_000 // 2, device="cuda")
    other = torch.empty_like(flat)
    row("copy of 28 bytes a number, ms", f"{ms(lambda: other.copy_(flat)):.3f}", "floor of AdamW")


def speedrun() -> None:
    """The whole step of configs/speedrun.toml with the update launched and recorded."""
    for name, numbers in (("launches", 0), ("one graph", 2**28)):
        code = (f"import sys, gpt2.train.muon as m; m.GRAPHED = {numbers}; "
                "from gpt2.cli import main; sys.exit(main(['profile', "
                "'--config=configs/speedrun.toml', '--fp8=head']))")  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
        )
        row(f"gpt2 profile of the speedrun, {name}", "passed" if not done.returncode else "FAILED")
        print(done.stdout[-1800:], done.stderr[-800:] if done.returncode else "")


PARTS = {"generating": 170, "muon": 90, "tests": 150, "symmetric": 60, "gradient_fp8": 60,
         "speedrun": 150, "attention": 60, "adamw": 40}  # fmt: skip


def main() -> None:
    if sys.argv[1:]:
        for part in sys.argv[1:]:
            with attempt(part):
                globals()[part]()
        return
    began = time.perf_counter()
    row(torch.cuda.get_device_name(), "torch", torch.__version__)
    for part, limit in PARTS.items():
        left = DEADLINE - (time.perf_counter() - began)
        if left < 15:
            row(f"{part}", "left out", "no time")
            continue
        print(f"\n### {part}", flush=True)
        command = [sys.executable, __file__, part]
        try:
            subprocess.run(command, timeout=min(limit, left), cwd=ROOT, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            row(part, "CUT OFF", type(error).__name__)


if __name__ == "__main__":
    main()
