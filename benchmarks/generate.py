"""New tokens per second, beside transformers and nanoGPT on the same machine.

    python -m benchmarks.generate
    python -m benchmarks.generate --nanogpt=../nanoGPT --device=cuda --batch_sizes=1,256
    python -m benchmarks.generate --before=REV

Every contender runs in a process of its own, one after the other, with the same random weights of
the size given and the same random prompts, greedy. The clock runs over whole calls, from the
prompts to the last token on the CPU, after one call to warm up; what is compiled, recorded or
copied once is in that call, unless it takes over a minute: then it is the one that counts. The
number is the median of the calls. The tokens of all contenders are compared. On a GPU weights are
bf16 and nanoGPT is compiled as its sample.py can; on a CPU they are float32 (`--dtype=` for
another). With --before an earlier build of this project, as it was at a git revision, is one more
contender, and all take turns for --rounds rounds, of which the table has the medians.
"""

import argparse
import inspect
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.before import (
    Build,
    add_options,
    advantage,
    earlier_build,
    merge_rounds,
    resolve_rounds,
)
from benchmarks.throughput import classes_of
from gpt2.config.model import SIZES, GPT2Config
from gpt2.errors import UserError
from gpt2.generate.sampling import Sampling
from gpt2.generate.stream import decoder_for, generate
from gpt2.huggingface.model_format import to_hf
from gpt2.model.gpt import GPT

from .arguments import count, counts_as_text

LONG_SECONDS = 60  # a call that is not repeated
Write = Callable[[list[list[int]]], list[list[int]]]  # prompts to new tokens


def make_model(options: argparse.Namespace) -> GPT:
    """Our network with weights that are the same for every contender."""
    torch.manual_seed(0)
    model = GPT(GPT2Config(**SIZES[options.size])).eval()
    return model.to(options.device, getattr(torch, options.dtype))


def ours(options: argparse.Namespace, _: Path) -> Write:
    """`gpt2.generate` with a decoder that is kept, as a server keeps it."""
    model, prompts = make_model(options), make_prompts(options, options.batch_size)
    decoder = decoder_for(model, prompts, options.new_tokens, Sampling(temperature=0))
    return lambda p: generate(model, p, options.new_tokens, temperature=0, decoder=decoder)


def hugging_face(options: argparse.Namespace, _: Path) -> Write:
    """`generate` of transformers, with its cache."""
    import transformers

    shape = SIZES[options.size]
    config = transformers.GPT2Config(
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        n_embd=shape["n_embd"],
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.load_state_dict(to_hf(make_model(options).state_dict()))
    model = model.to(options.device, getattr(torch, options.dtype))

    def write(prompts: list[list[int]]) -> list[list[int]]:
        idx = torch.tensor(prompts, device=options.device)
        mask = torch.ones_like(idx)
        settings = {"max_new_tokens": options.new_tokens, "do_sample": False}
        return model.generate(idx, attention_mask=mask, **settings)[:, idx.shape[1] :].tolist()

    return write


def nanogpt(options: argparse.Namespace, folder: Path) -> Write:
    """`GPT.generate` of a clone, which keeps no cache; top_k=1 makes it greedy."""
    names = classes_of(options.nanogpt / "model.py", folder)
    shape = SIZES[options.size] | {"block_size": 1024, "vocab_size": 50257}
    model = names.GPT(names.GPTConfig(**shape)).eval()
    state = make_model(options).state_dict()
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    model = model.to(options.device, getattr(torch, options.dtype))
    if options.device == "cuda":
        model = torch.compile(model)

    @torch.no_grad()
    def write(prompts: list[list[int]]) -> list[list[int]]:
        idx = torch.tensor(prompts, device=options.device)
        return model.generate(idx, options.new_tokens, top_k=1)[:, idx.shape[1] :].tolist()

    return write


def contenders(options: argparse.Namespace) -> dict[str, Callable]:
    """Name -> what makes its function, for those that can run."""
    found: dict[str, Callable] = {"ours": ours}
    try:
        import transformers  # noqa: F401

        found["transformers"] = hugging_face
    except ImportError:
        if not options.only:
            print("transformers is left out: it is not installed (pip install transformers)")
    if options.nanogpt:
        found["nanoGPT"] = nanogpt
    return found


def make_prompts(options: argparse.Namespace, rows: int) -> list[list[int]]:
    """Random tokens, the same for every contender."""
    generator = torch.Generator().manual_seed(1)
    shape = (rows, options.prompt_tokens)
    return torch.randint(50257, shape, generator=generator).tolist()


def measure(write: Write, options: argparse.Namespace) -> dict:
    """Calls of one contender at one batch size."""
    prompts = make_prompts(options, options.batch_size)
    began = time.perf_counter()
    tokens = write(prompts)  # on the CPU as lists, so the device is done
    first_seconds, seconds = time.perf_counter() - began, []
    if first_seconds > LONG_SECONDS:
        seconds.append(first_seconds)
    while len(seconds) < options.calls and first_seconds <= LONG_SECONDS:
        began = time.perf_counter()
        assert len(write(prompts)) == options.batch_size
        seconds.append(time.perf_counter() - began)
    total = options.batch_size * options.new_tokens
    return {
        "batch_size": options.batch_size,
        "tokens_per_second": total / statistics.median(seconds),
        "fastest_tokens_per_second": total / min(seconds),
        "calls": len(seconds),
        "first_call_seconds": first_seconds,
        "tokens": tokens,
    }


def agreement(row: dict, other: dict) -> str:
    """How many tokens are equal up to the first difference of each sequence."""
    same = total = 0
    for a, b in zip(row["tokens"], other["tokens"], strict=True):
        total += len(a)
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return f"{same:,} of {total:,}"


def show(rows: list[dict], options: argparse.Namespace):
    """Prints a table, and writes JSON lines and a bar chart into --out_dir."""
    print(
        f"\n{'':14s} {'batch':>6s} {'tokens/s':>10s} {'ours is':>8s} {'of rounds':>11s} "
        f"{'first call':>11s}  same"
    )
    measured, rows = rows, merge_rounds(rows)
    first = {row["batch_size"]: row for row in rows if row["name"] == "ours"}
    for row in measured:
        row["same_tokens"] = agreement(first[row["batch_size"]], row)
    for row in rows:
        mine, rate = first[row["batch_size"]], row["tokens_per_second"]
        times, spread = advantage(mine, row)
        print(
            f"{row['name']:14s} {row['batch_size']:6d} {rate:10,.1f} {times:>8s} {spread:>11s} "
            f"{row['first_call_seconds']:9.1f} s  {agreement(mine, row)}"
        )
    if not options.out_dir:
        return
    options.out_dir.mkdir(parents=True, exist_ok=True)
    kept = [{k: v for k, v in row.items() if k != "tokens"} for row in measured]
    lines = "".join(json.dumps(row) + "\n" for row in kept)
    (options.out_dir / "generate.jsonl").write_text(lines, encoding="utf-8")
    from matplotlib.figure import Figure

    sizes = list(first)
    figure = Figure(figsize=(7, 0.8 + 0.5 * len(rows) + 0.4 * len(sizes)), layout="constrained")
    for axes, size in zip(figure.subplots(len(sizes), squeeze=False)[:, 0], sizes, strict=True):
        part = [row for row in rows if row["batch_size"] == size]
        rates = [row["tokens_per_second"] for row in part]
        bars = axes.barh([row["name"] for row in part], rates)
        axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel(f"new tokens per second, batch {size}")
    figure.suptitle(f"{rows[0]['machine']}, {rows[0]['setting']}", fontsize=9)
    figure.savefig(options.out_dir / "generate.png", dpi=120)


def describe(options: argparse.Namespace) -> dict:
    """What was measured, on what."""
    threads = torch.get_num_threads()
    machine = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {threads} threads"
    )
    setting = (
        f"{options.size}, {options.prompt_tokens} + {options.new_tokens} tokens, greedy, "
        f"{options.dtype}, torch {torch.__version__}"
    )
    return {"machine": machine, "setting": setting}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--nanogpt", type=Path, help="a clone of github.com/karpathy/nanoGPT")
    made.add_argument("--size", default="gpt2", choices=SIZES)
    made.add_argument("--batch_sizes", type=counts_as_text, help="1,256 on a GPU, 1 on a CPU")
    made.add_argument("--prompt_tokens", type=count, default=128)
    made.add_argument("--new_tokens", type=count, default=256)
    made.add_argument("--calls", type=count, default=3, help="calls to measure")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", help="bfloat16 on a GPU, float32 on a CPU")
    made.add_argument("--only", help="one contender, in this process")
    made.add_argument("--batch_size", type=count, help="with --only")
    add_options(made)
    made.add_argument("--out_dir", type=Path, help="also write generate.jsonl and .png there")
    return made


def main() -> int:
    """Runs all contenders at all batch sizes, or with --only one of them at one."""
    options = parser().parse_args()
    on_gpu = options.device == "cuda"
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    if options.only:
        with tempfile.TemporaryDirectory() as folder:
            write = contenders(options)[options.only](options, Path(folder))
            row = {"name": options.only, **describe(options), **measure(write, options)}
        print(json.dumps(row))
        return 0
    try:
        with earlier_build(options.before, "generate") as builds:
            show(list(measure_all(options, builds)), options)
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def measure_all(options: argparse.Namespace, builds: list[Build]) -> Iterator[dict]:
    """A row for each round, batch size and contender."""
    names = ("size", "prompt_tokens", "new_tokens", "calls", "device", "dtype")
    argv = [f"--{name}={getattr(options, name)}" for name in names]
    clone = [f"--nanogpt={options.nanogpt}"] if options.nanogpt else []
    runs = [(build, ["--only=ours"]) for build in (Build("ours"), *builds)]
    runs += [(Build(n), [f"--only={n}", *clone]) for n in contenders(options) if n != "ours"]
    sizes = options.batch_sizes or ("1,256" if options.device == "cuda" else "1")
    for turn in range(resolve_rounds(options)):
        for size in sizes.split(","):
            for build, chosen in runs:
                row = build.row("generate", [*argv, f"--batch_size={size}", *chosen])
                yield row | {"round": turn}
                rate = row["tokens_per_second"]
                print(f"{build.name}, batch {size}: {rate:,.1f} tokens/s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
