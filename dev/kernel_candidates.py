"""Checks and times the pass whose kernels begin early, on one Hopper GPU, beside today's pass.

    python3 dev/kernel_candidates.py

One sequence of GPT-2 124M in bf16. Times are medians by CUDA events after a warm-up, in
milliseconds. A candidate that fails costs the others nothing; none starts after 120 s.
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
DEADLINE = 120
POSITIONS = 500
KERNELS = "_embed", "_linear", "_attend", "_project", "_head", "_choose"


def row(what: str, value: str, note: str = "") -> None:
    print(f"| {what:62s} | {value:>12s} | {note}", flush=True)


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
                .next_logits(copy, copy.clone())
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
                    kernels.OneSequence(model, c, early=e).next_logits(t, t.clone())
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


def replays(model) -> None:
    """Replays at 500 positions."""
    from gpt2.generate import few_token_pass
    from gpt2.kernels import triton_one_sequence as kernels

    T = kernels.Tiles

    written = torch.zeros(1, dtype=torch.int64, device="cuda")

    def timed(name: str, work, tokens: int = 4) -> None:
        with attempt(name):
            cache, token = cache_of(model), torch.tensor([464], device="cuda")
            graph = graphed(lambda: [work(token, cache) for _ in range(tokens)])
            took = ms(graph.replay, reset=lambda: cache.lengths.fill_(POSITIONS)) / tokens
            row(f"{name}: a token, ms", f"{took:.4f}", f"{1e3 / took:,.0f} tokens/s at most")

    def today(token, cache):
        token.copy_(few_token_pass.next_logits(model, token[:, None], cache).argmax(-1))

    def new(early=1, greedy=True, **tiles):
        return lambda token, cache: kernels.OneSequence(
            model, cache, early=early, tiles=T(**tiles)
        ).next_logits(token, written if greedy else None)

    timed("today's pass, 1 token a graph", today, 1)
    timed("today's pass, 4 tokens a graph", today)
    timed("begins early, 1 token a graph", new(), 1)
    timed("begins early, 8 tokens a graph", new(), 8)
    timed("not early", new(early=0))
    timed("signals after the wait", new(early=2))
    timed("signals after the loads", new(early=3))
    timed("without the choice", new(greedy=False))
    good = {"fc": (2, 1), "out": (2, 8), "proj": (8, 8)}
    variants = {
        "as in the first round: fc 8/4, out 2/4, proj 4/4": {
            "fc": (8, 4),
            "out": (2, 4),
            "proj": (4, 4),
        },
        "good: fc 2/1, out 2/8, proj 8/8": good,
        "good again": good,
        "good, attention of 4 warps": good | {"attention_warps": 4},
        "good, qkv 2/1": good | {"qkv": (2, 1)},
        "good, qkv 4/1": good | {"qkv": (4, 1)},
        "good, qkv 2/2": good | {"qkv": (2, 2)},
        "good, qkv 8/4": good | {"qkv": (8, 4)},
        "good, qkv 16/8": good | {"qkv": (16, 8)},
        "good, fc 4/4": good | {"fc": (4, 4)},
        "good, fc 1/1": good | {"fc": (1, 1)},
        "good, fc 4/1": good | {"fc": (4, 1)},
        "good, fc 16/8": good | {"fc": (16, 8)},
        "good, out 1/2": good | {"out": (1, 2)},
        "good, out 1/4": good | {"out": (1, 4)},
        "good, out 4/16": good | {"out": (4, 16)},
        "good, out 4/8": good | {"out": (4, 8)},
        "good, proj 4/4": good | {"proj": (4, 4)},
        "good, proj 8/4": good | {"proj": (8, 4)},
        "good, proj 16/16": good | {"proj": (16, 16)},
        "good, shares 8": good | {"shares": 8},
        "good, shares 8, 4 warps": good | {"shares": 8, "attention_warps": 4},
        "good, head 4/4": good | {"head": (4, 4)},
        "good, head 8/4, 6 programs": good | {"head_programs": 6},
        "good, head 8/4, 8 programs": good | {"head_programs": 8},
        "good, head 16/8, 2 programs": good | {"head": (16, 8), "head_programs": 2},
        "good, head 2/1, 16 programs": good | {"head": (2, 1), "head_programs": 16},
        "good, head 4/2, 8 programs": good | {"head": (4, 2), "head_programs": 8},
    }
    for name, tiles in variants.items():
        if time.perf_counter() - BEGAN > DEADLINE:
            row(name, "left out", "no time")
            continue
        timed(name, new(**tiles))


def fused_mlp(model) -> None:
    """Four kernels a layer, the MLP's programs adding to one vector in any order."""
    sys.path.insert(0, str(ROOT / "dev"))
    from candidate_mlp import FusedMLP

    from gpt2.generate import few_token_pass
    from gpt2.kernels import triton_one_sequence as kernels

    good = kernels.Tiles(fc=(2, 1), out=(2, 8), proj=(8, 8))
    for size in ((16, 8), (16, 4), (32, 8), (32, 16), (24, 8), (8, 4)):
        name = f"one kernel of the MLP, {size[0]} hidden, {size[1]} warps"
        if size[0] == 24:
            continue
        with attempt(name):
            cache, token = cache_of(model), torch.tensor([464], device="cuda")
            wanted = few_token_pass.next_logits(model, token[:, None], cache).float()
            cache = cache_of(model)
            one = FusedMLP(model, cache, size=size, tiles=good)
            off = (one.next_logits(token).float() - wanted).abs().max().item()
            graph = graphed(lambda o=one, t=token: [o.next_logits(t, t.clone()) for _ in range(4)])
            took = ms(graph.replay, reset=lambda c=cache: c.lengths.fill_(POSITIONS)) / 4
            row(f"{name}: a token, ms", f"{took:.4f}", f"difference {off:.2e}")


def floors(model) -> None:
    """Kernels that do next to nothing in a chain; and a pass whose weights stay in the L2 cache."""
    import triton
    import triton.language as tl

    from gpt2.kernels import triton_one_sequence as kernels

    begin, wait = kernels._begin, kernels._wait

    @triton.jit
    def link(x, early: tl.constexpr, begin: tl.constexpr, wait: tl.constexpr):
        begin(early)
        wait(early)
        tl.store(x + tl.program_id(0), tl.load(x + tl.program_id(0)) + 1.0)

    x = torch.zeros(4096, device="cuda")
    for programs, warps in ((1, 1), (128, 4), (576, 4), (1536, 1)):
        for early in (0, 1, 2):
            name = f"chain of kernels, {programs} programs of {warps} warps, early {early}"
            with attempt(name):
                options = {"launch_pdl": True} if early else {}

                def chain(p=programs, w=warps, e=early, o=options):
                    for _ in range(64):
                        link[(p,)](x, e, begin, wait, num_warps=w, **o)

                took = ms(graphed(chain).replay) / 64
                row(f"{name}: µs of one", f"{took * 1e3:.2f}")
    blocks = model.transformer.h
    try:
        model.transformer.h = torch.nn.ModuleList([blocks[0]] * len(blocks))
        for early in (0, 1, 2):
            name = f"one layer's weights twelve times, early {early}"
            with attempt(name):
                cache, token = cache_of(model), torch.tensor([464], device="cuda")
                one = kernels.OneSequence(model, cache, early=early)
                graph = graphed(lambda o=one, t=token: [o.next_logits(t) for _ in range(4)])
                took = ms(graph.replay, reset=lambda c=cache: c.lengths.fill_(POSITIONS)) / 4
                row(f"{name}: a token, ms", f"{took:.4f}")
    finally:
        model.transformer.h = blocks


def parts(model) -> None:
    """Each kind of kernel, 36 in a chain, early and not: microseconds of one."""
    from gpt2.kernels import triton_one_sequence as kernels

    for kept in KERNELS:
        for early in (1, 0):
            name = f"only {kept}, {'early' if early else 'not early'}"
            with attempt(name):
                cache, token = cache_of(model), torch.tensor([464], device="cuda")
                originals = {k: getattr(kernels, k) for k in KERNELS}

                class Nothing:
                    def __getitem__(self, grid):
                        return lambda *_, **__: None

                try:
                    for k in originals:
                        if k != kept:
                            setattr(kernels, k, Nothing())
                    graph = graphed(
                        lambda c=cache, t=token, e=early: kernels.OneSequence(
                            model, c, early=e
                        ).next_logits(t, t.clone())
                    )
                finally:
                    for k, kernel in originals.items():
                        setattr(kernels, k, kernel)
                took = ms(graph.replay, reset=lambda c=cache: c.lengths.fill_(POSITIONS))
                count = {"_linear": 36, "_attend": 12, "_project": 12}.get(kept, 1)
                row(f"{name}: ms of {count}", f"{took:.4f}", f"{took / count * 1e3:.2f} µs each")


def texts(model) -> None:
    """Greedy, 128 + 512 tokens, through the public API, with the switch between both passes."""
    from gpt2.generate import decoder as decoding
    from gpt2.generate import few_token_pass, stream
    from gpt2.generate.sampling import Sampling
    from gpt2.generate.stream import decoder_for, generate
    from gpt2.kernels import triton_one_sequence as kernels

    prompt = [torch.randint(50257, (128,), generator=torch.Generator().manual_seed(2)).tolist()]
    begins_early, found = few_token_pass.begins_early, {}
    good = kernels.Tiles(fc=(2, 1), out=(2, 8), proj=(8, 8))
    first = kernels.Tiles(fc=(8, 4), out=(2, 4), proj=(4, 4))
    for name, switch, temperature, burst, tiles in (
        ("today's pass", False, 0.0, 8, None),
        ("begins early, no bursts", True, 0.0, 0, None),
        ("begins early, bursts of 4", True, 0.0, 4, None),
        ("begins early, bursts of 8, first round's tiles", True, 0.0, 8, first),
        ("begins early, bursts of 8, good tiles", True, 0.0, 8, good),
        ("begins early, bursts of 16, good tiles", True, 0.0, 16, good),
        ("begins early, bursts of 32, good tiles", True, 0.0, 32, good),
        ("today's pass, sampled", False, 1.0, 8, None),
        ("begins early, sampled, bursts of 8, good tiles", True, 1.0, 8, good),
    ):
        with attempt(name), torch.inference_mode():
            few_token_pass.begins_early = begins_early if switch else (lambda *_: False)
            decoding.BURST, stream.BURST_MIN_TOKENS = burst or 8, 64 if burst else 10**9
            kernels.OneSequence.__init__.__kwdefaults__["tiles"] = tiles
            decoder = decoder_for(model, prompt, 512, Sampling(temperature=temperature))
            assert bool(decoder.forward.early) is switch, "the pass does not fit this GPU"
            write = lambda d=decoder: generate(model, prompt, 512, seed=1, decoder=d)[0]  # noqa: E731
            text, seconds = write(), []
            for _ in range(5):
                began = time.perf_counter()
                again = write()
                seconds.append(time.perf_counter() - began)
            found[name] = text
            with contextlib.suppress(KeyError):
                other = found["today's pass, sampled" if "sampled" in name else "today's pass"]
                same = sum(a == b for a, b in zip(text, other, strict=True))
                row(
                    f"{name}: tokens/s of 128 + 512",
                    f"{512 / statistics.median(seconds):,.0f}",
                    f"{same} of 512 as today's; a repeat is equal: {again == text}",
                )
    few_token_pass.begins_early = begins_early
    kernels.OneSequence.__init__.__kwdefaults__["tiles"] = None


def sizes() -> None:
    """Larger networks: a replay of today's pass and of the new one."""
    from gpt2.generate import few_token_pass
    from gpt2.kernels import triton_one_sequence as kernels

    for size in ("gpt2-medium", "gpt2-large", "gpt2-xl"):
        if time.perf_counter() - BEGAN > DEADLINE + 10:
            row(size, "left out", "no time")
            continue
        model = model_of(torch.bfloat16, size)

        def today(token, cache, model=model):
            logits = few_token_pass.next_logits(model, token[:, None], cache)
            token.copy_(logits.argmax(-1))

        def early(token, cache, model=model):
            kernels.OneSequence(model, cache).next_logits(token, token.clone())

        for name, work in (("today's pass", today), ("begins early", early)):
            with attempt(f"{size}, {name}"):
                cache, token = cache_of(model), torch.tensor([464], device="cuda")
                graph = graphed(lambda w=work, t=token, c=cache: w(t, c))
                took = ms(graph.replay, reset=lambda c=cache: c.lengths.fill_(POSITIONS))
                row(f"{size}, {name}: a replay, ms", f"{took:.4f}", f"next token {int(token)}")


def main() -> None:
    row(torch.cuda.get_device_name(), "torch", torch.__version__)
    with torch.inference_mode():
        model = model_of(torch.bfloat16)
        for part in (differences, repeats, texts, replays, fused_mlp, floors, parts):
            with attempt(part.__name__):
                part(model)
        with attempt("float32"):
            differences(model_of(torch.float32))
        with attempt("sizes"):
            sizes()
    row("seconds", f"{time.perf_counter() - BEGAN:.0f}")


if __name__ == "__main__":
    main()
