"""Checks and times the pass over one token of one sequence, on one Hopper GPU.

    python3 dev/one_sequence_candidates.py [SECONDS]

GPT-2 124M in bf16. Times are medians by CUDA events after a warm-up, in milliseconds. For so many
seconds it changes one size of programs at a time, keeps what is faster, and then writes texts.
"""
# ruff: noqa: BLE001, D103

import contextlib
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BEGAN = time.perf_counter()
SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 40.0
POSITIONS = 500


def row(what: str, value: str, note: str = "") -> None:
    print(f"| {what:62s} | {value:>12s} | {note}", flush=True)


@contextlib.contextmanager
@contextlib.contextmanager
def attempt(what: str):
    try:
        yield
    except Exception as error:  # a candidate may fail in any way
        row(what, "FAILED", f"{type(error).__name__}: {str(error)[:200]!r}")
        traceback.print_exc(limit=-4)


def ms(work, calls: int = 60, warm: int = 10, reset=lambda: None) -> float:
    """Median of events around one call each, queued: launches from Python do not count."""
    for _ in range(warm):
        reset()
        work()
    torch.cuda.synchronize()
    pairs = []
    for _ in range(calls):
        reset()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def graphed(work):
    """The replay of a CUDA graph of work()."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def model_of(dtype, size="gpt2"):
    from gpt2.config.model import SIZES, GPT2Config
    from gpt2.model.gpt import GPT

    torch.manual_seed(0)
    model = GPT(GPT2Config(**SIZES[size]))
    for p in model.parameters():  # biases and norms that matter
        if p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)
    return model.eval().to("cuda", dtype)


def cache_of(model, capacity: int = 640):
    cache = model.new_cache(1, model.transformer.wte.weight.dtype, capacity)
    cache.lengths = torch.full((1,), POSITIONS, device="cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    cache.keys.normal_(generator=generator)
    cache.values.normal_(generator=generator)
    return cache


def differences(model) -> None:
    """Logits of one pass at several lengths beside today's, and beside float64-free float32."""
    from gpt2.generate import few_token_pass
    from gpt2.kernels import triton_one_sequence as kernels

    dtype = model.transformer.wte.weight.dtype
    for length, shares in ((0, 4), (3, 4), (500, 4), (639, 4), (500, 1), (639, 8)):
        name = f"{dtype}, {length} positions, {shares} shares"
        with attempt(name):
            first, second = cache_of(model), cache_of(model)
            token = torch.tensor([464], device="cuda")
            for cache in (first, second):
                cache.lengths.fill_(length)
                cache.length = length
            wanted = few_token_pass.next_logits(model, token[:, None], first).float()
            sizes = kernels.Tiles(shares=shares)
            copy = token.clone()
            found = (
                kernels.OneSequence(model, second, tiles=sizes)
                .next_logits(copy, choose=True)
                .float()
            )
            torch.cuda.synchronize()
            off = (found - wanted).abs().max().item()
            stored = (first.keys - second.keys).abs().max().item()
            right = int(copy) == int(found.argmax()) and int(second.lengths) == length + 1
            row(
                f"{name}: greatest difference of logits",
                f"{off:.2e}",
                f"of {wanted.abs().max().item():.2f}; keys {stored:.1e}; token and length {right}",
            )


def repeats(model) -> None:
    """A race would show as different bits of a replay on the same cache."""
    from gpt2.kernels import triton_one_sequence as kernels

    for early in (1, 0):
        with attempt(f"repeats, early {early}"):
            cache, token = cache_of(model), torch.tensor([464], device="cuda")
            logits: list = []
            graph = graphed(
                lambda c=cache, t=token, e=early, o=logits: o.append(
                    kernels.OneSequence(model, c, early=e).next_logits(t, choose=True)
                )
            )
            kept, wrong = None, 0
            for _ in range(400):
                cache.lengths.fill_(POSITIONS)
                token.fill_(464)
                graph.replay()
                found = logits[-1].clone()
                kept = found if kept is None else kept
                wrong += int(not torch.equal(kept, found))
            row(f"400 replays, early {early}: with other bits than the first", str(wrong))
            if early:
                first = kept
            else:
                row("early and not early: equal bits", str(torch.equal(first, kept)))


def replay(model, early, tiles, tokens: int = 4) -> float:
    from gpt2.kernels import triton_one_sequence as kernels

    try:
        cache, token = cache_of(model), torch.tensor([464], device="cuda")
        one = kernels.OneSequence(model, cache, early=early, tiles=tiles)
        graph = graphed(lambda: [one.next_logits(token, choose=True) for _ in range(tokens)])
        reset = lambda: cache.lengths.fill_(POSITIONS)  # noqa: E731
        return ms(graph.replay, calls=40, warm=6, reset=reset) / tokens
    except Exception as error:
        row(f"{early} {tiles}", "FAILED", f"{type(error).__name__}: {str(error)[:200]!r}")
        return 9.0


def descent(model):
    """One size at a time; what is faster stays."""
    from gpt2.kernels import triton_one_sequence as kernels

    best = {"early": 3, "tiles": kernels.Tiles()}
    top = replay(model, **best)
    row("as in the code", f"{top:.4f}", str(best))
    linear = [(4, 4), (8, 8), (8, 4), (16, 8), (4, 2), (2, 2), (2, 1), (4, 1), (16, 16), (16, 4)]
    options = [
        *(({name: size},) for name in ("qkv", "fc", "out") for size in linear),
        *(({"proj": size},) for size in [(8, 8), (4, 4), (8, 4), (16, 16), (32, 16), (16, 4)]),
        *(
            ({"shares": a, "attention_warps": b, "attention_rows": c},)
            for a, b, c in [
                (4, 8, 4),
                (8, 4, 4),
                (8, 2, 8),
                (16, 1, 8),
                (4, 4, 4),
                (2, 8, 8),
                (8, 4, 8),
            ]
        ),
        *(
            ({"head": a, "head_programs": b},)
            for a, b in [
                ((2, 1), 24),
                ((1, 1), 32),
                ((4, 1), 12),
                ((4, 4), 8),
                ((4, 2), 12),
                ((8, 4), 6),
            ]
        ),
        ({}, 2),
        ({}, 1),
    ]
    for sizes, *early in options + options[:30]:
        if time.perf_counter() - BEGAN > SECONDS:
            break
        tried = {
            "early": early[0] if early else best["early"],
            "tiles": best["tiles"]._replace(**sizes),
        }
        if tried == best:
            continue
        took = replay(model, **tried)
        row(f"{sizes} {early}", f"{took:.4f}")
        if took < top:
            best, top = tried, took
    row("best", f"{top:.4f}", str(best))
    return best


def texts(model, best) -> None:
    """Greedy and sampled, 128 + 512 tokens, through the public API; beside the plain pass."""
    from gpt2.generate import few_token_pass
    from gpt2.generate.sampling import Sampling
    from gpt2.generate.stream import decoder_for, generate
    from gpt2.kernels import triton_one_sequence as kernels

    prompt = [torch.randint(50257, (128,), generator=torch.Generator().manual_seed(2)).tolist()]
    begins_early, found = few_token_pass.begins_early, {}
    defaults = kernels.OneSequence.__init__.__kwdefaults__
    for name, switch, temperature, given in (
        ("plain pass", False, 0.0, {}),
        ("early, sizes of the code", True, 0.0, {}),
        ("early, best", True, 0.0, best),
        ("plain pass, sampled", False, 1.0, {}),
        ("early, best, sampled", True, 1.0, best),
    ):
        with attempt(name), torch.inference_mode():
            few_token_pass.begins_early = begins_early if switch else (lambda *_: False)
            defaults.update({"early": 3, "tiles": None} | given)
            decoder = decoder_for(model, prompt, 512, Sampling(temperature=temperature))
            write = lambda d=decoder: generate(model, prompt, 512, seed=1, decoder=d)[0]  # noqa: E731
            text, seconds = write(), []
            for _ in range(5):
                began = time.perf_counter()
                again = write()
                seconds.append(time.perf_counter() - began)
            found[name] = text
            other = found["plain pass, sampled" if "sampled" in name else "plain pass"]
            same = sum(a == b for a, b in zip(text, other, strict=True))
            note = f"{same} of 512 as the plain pass; a repeat is equal: {again == text}"
            row(f"{name}: tokens/s", f"{512 / statistics.median(seconds):,.0f}", note)
    few_token_pass.begins_early = begins_early


def main() -> None:
    row(torch.cuda.get_device_name(), "torch", torch.__version__)
    with torch.inference_mode():
        model = model_of(torch.bfloat16)
        for part in (differences, repeats):
            with attempt(part.__name__):
                part(model)
        with attempt("float32"):
            differences(model_of(torch.float32))
        best = {}
        with attempt("descent"):
            best = descent(model)
        texts(model, best)
    row("seconds", f"{time.perf_counter() - BEGAN:.0f}")


if __name__ == "__main__":
    main()
