"""What more GPUs would do: tokens per second, memory, time and cost, from the step of one.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --measure
    python -m benchmarks.scaling --measure --only="8 GPUs" --seconds=300 --out_dir=out/eight
    python -m benchmarks.scaling --report out/scaling/scaling.jsonl out/eight/scaling.jsonl

Without options nothing is measured. `--measure` trains on the GPUs of this machine and compares
(scaling_measure.py); `--report` makes table and plot of what was measured before, and also of what
was killed. `--measure --device=cpu` tries everything out with tiny networks.

The model on paper: a micro-batch of b sequences, 64 at most, takes one GPU c + a b; both were
measured (see `MEASURED`). With n GPUs a step lasts longer by the communication that the backward
pass does not hide:

* all-reduce of S bytes by a ring: each GPU sends and receives 2 (n - 1) / n S (Patarasu & Yuan
  2009), at the bus bandwidth that nccl-tests reports, and for each bucket of 25 MB a latency of
  2 log2 n hops;
* what is sent while the backward pass of the last micro-batch runs costs nothing but the share of
  the GPU that the sending kernels take; the last bucket, which holds the gradient of the tied
  embedding, is complete only at its end, and is waited for;
* FSDP gathers weights in bf16 before forward and backward of each micro-batch, and reduces float32
  gradients once: 2 · 2 N · micro-batches + 4 N bytes, each times (n - 1) / n.

The tables are in docs/scaling.md, where a test compares them with what this prints.
"""

import argparse
import inspect
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from gpt2.config.model import SIZES, GPT2Config
from gpt2.errors import UserError

BATCH_TOKENS, CONTEXT, STEPS = 524_288, 1024, 19_073
LARGEST = 64  # sequences of a micro-batch
BUCKET = 25 * 2**20  # bytes; DDP's default
# One H200, torch 2.11, 124M, bf16 (dev/LOG.md). 64 sequences: 110.46 ms. The part that does not
# grow with the batch is from an earlier commit: 64 sequences 505k, 16 470k tokens/s.
MEASURED, FIXED = 0.11046, 0.0033  # seconds


@dataclass(frozen=True)
class Machine:
    """GPUs and the links between them, per direction."""

    name: str
    gpus: int
    per_node: int = 8
    node_bandwidth: float = 360e9  # bytes/s; bus bandwidth of NCCL's all-reduce over NVLink 4
    net_bandwidth: float = 8 * 50e9 * 0.8  # of a node's eight 400 Gb/s adapters, a fifth lost
    hop: float = 5e-6  # seconds
    net_hop: float = 12e-6

    @property
    def bandwidth(self) -> float:
        """Of the slowest link in the ring."""
        return min(self.node_bandwidth, self.net_bandwidth) if self.across else self.node_bandwidth

    @property
    def across(self) -> bool:
        """Whether there are several nodes."""
        return self.gpus > self.per_node


MACHINES = (
    Machine("1 GPU", 1),
    Machine("2 GPUs", 2),
    Machine("8×H100", 8),
    Machine("2×8×H100", 16),
    Machine("64 GPUs", 64),
)
SENDING = 0.05  # share of a GPU that NCCL's kernels take while they run


def parameters(size: str) -> int:
    """Of a network of the table of sizes, with the embedding counted once."""
    c = GPT2Config(**SIZES[size])
    block = 12 * c.n_embd**2 + 13 * c.n_embd
    return (c.vocab_size + c.block_size) * c.n_embd + c.n_layer * block + 2 * c.n_embd


def ring_bytes(size: float, gpus: int) -> float:
    """Bytes that each GPU sends to all-reduce `size` bytes; half of it gathers or scatters."""
    return 2 * (gpus - 1) / gpus * size


def step_seconds(machine: Machine, sequences: int) -> tuple[float, float]:
    """(seconds of a step with so many sequences per GPU, seconds of it that wait for messages)."""
    n, per_sequence = parameters("gpt2"), (MEASURED - FIXED) / LARGEST
    compute = FIXED * math.ceil(sequences / LARGEST) + per_sequence * sequences
    if machine.gpus == 1:
        return compute, 0.0
    backward = per_sequence * min(sequences, LARGEST) * 2 / 3  # of the last micro-batch
    waiting, sending = ddp_seconds(machine, 4 * n, backward)
    return compute + waiting + sending, waiting


def ddp_seconds(machine: Machine, gradients: int, backward: float) -> tuple[float, float]:
    """(seconds that a step waits for messages, seconds that sending takes from computing).

    Args:
        machine: of several GPUs.
        gradients: bytes.
        backward: seconds of the last micro-batch's backward pass, which hides messages.
    """
    hop = machine.net_hop if machine.across else machine.hop
    latency = 2 * math.log2(machine.gpus) * hop
    embedding = 4 * 50_257 * 768
    last = ring_bytes(embedding, machine.gpus) / machine.bandwidth + latency
    rest = ring_bytes(gradients - embedding, machine.gpus) / machine.bandwidth
    rest += latency * math.ceil((gradients - embedding) / BUCKET)
    return max(0.0, rest - backward) + last, SENDING * min(rest, backward)


def fsdp_seconds(machine: Machine, size: str, micro_batches: int, compute: float) -> float:
    """Seconds by which a step with `--parallel=fsdp` is longer than its arithmetic.

    The first all-gather and the last reduce-scatter, both of the embedding, have nothing to hide
    behind; the others run beside `compute`, the seconds of the arithmetic.
    """
    c = GPT2Config(**SIZES[size])
    share = (machine.gpus - 1) / machine.gpus / machine.bandwidth
    alone = (2 + 4) * (c.vocab_size + c.block_size) * c.n_embd * share
    sent = fsdp_bytes(size, machine.gpus, micro_batches) / machine.bandwidth
    rest = max(0.0, sent - alone)
    return alone + max(0.0, rest - compute) + SENDING * min(rest, compute)


def fsdp_bytes(size: str, gpus: int, micro_batches: int) -> float:
    """Bytes that each GPU sends in a step with `--parallel=fsdp`."""
    n = parameters(size)
    return (gpus - 1) / gpus * (2 * 2 * n * micro_batches + 4 * n)


def memory_gib(size: str, gpus: int, accumulates: bool) -> tuple[float, float]:
    """(DDP, FSDP) GiB per GPU without activations: weights, gradients, two moments, in float32.

    FSDP adds what is gathered at once, in bf16: embeddings and two blocks, and where gradients of
    several micro-batches are added up before they are sent, all of these.
    """
    n, c = parameters(size), GPT2Config(**SIZES[size])
    block = 12 * c.n_embd**2 + 13 * c.n_embd
    gathered = 2 * (n - c.n_layer * block + 2 * block)
    whole_gradients = 4 * n if accumulates else 0
    return 16 * n / 2**30, (16 * n / gpus + gathered + whole_gradients) / 2**30


def scaling_table() -> list[str]:
    """Lines of markdown: the 124M recipe with 524,288 tokens a step, however many GPUs."""
    lines = [
        "| | sequences per GPU | sent per GPU and step | step | waiting | tokens/s | of ideal |",
        "|---|---|---|---|---|---|---|",
    ]
    one = BATCH_TOKENS / step_seconds(MACHINES[0], BATCH_TOKENS // CONTEXT)[0]
    for machine in MACHINES:
        sequences = BATCH_TOKENS // CONTEXT // machine.gpus
        seconds, waiting = step_seconds(machine, sequences)
        rate = BATCH_TOKENS / seconds
        sent = ring_bytes(4 * parameters("gpt2"), machine.gpus)
        lines.append(
            f"| {machine.name} | {sequences} | {sent / 1e6:,.0f} MB | {1e3 * seconds:.1f} ms "
            f"| {1e3 * waiting:.1f} ms | {rate / 1e6:.2f}M | {rate / one / machine.gpus:.0%} |"
        )
    return lines


def memory_table() -> list[str]:
    """Lines of markdown: GiB per GPU for XL, activations aside."""
    lines = [
        "| XL (1.56B), GiB per GPU | DDP | FSDP | FSDP, several micro-batches |",
        "|---|---|---|---|",
    ]
    for gpus in (2, 4, 8, 16, 64):
        ddp, fsdp = memory_gib("gpt2-xl", gpus, accumulates=False)
        adding = memory_gib("gpt2-xl", gpus, accumulates=True)[1]
        lines.append(f"| {gpus} GPUs | {ddp:.1f} | {fsdp:.1f} | {adding:.1f} |")
    return lines


# Tokens/s for each TFLOP/s of a card's dense peak, as in the README's table of machines: the H100's
# 570k at 989 TFLOP/s, and four fifths of that on other cards.
BY_PEAK = 0.8 * 570e3 / 989
# name, tokens/s, how it is known, dollars an hour for all of it, where that is from
PRICES = (
    ("1×H200", 65_536 / MEASURED, "measured", 4.00),
    ("8×H100", BATCH_TOKENS / step_seconds(MACHINES[2], 64)[0], "the table above", 8 * 2.95),
    ("RTX 4090", BY_PEAK * 165.2, "calculated by peak rates: 165 of 989 TFLOP/s", 0.69),
    ("Kaggle, 2×T4", BY_PEAK * 2 * 65, "calculated by peak rates: 2 × 65 TFLOP/s", 0.0),
)


def cost_table() -> list[str]:
    """Lines of markdown: 19,073 steps of 524,288 tokens, without evaluation and start."""
    lines = [
        "| 10B tokens | tokens/s | how it is known | hours | dollars |",
        "|---|---|---|---|---|",
    ]
    for name, rate, how, price in PRICES:
        hours = STEPS * BATCH_TOKENS / rate / 3600
        cost = f"{hours * price:.0f}" if price else "free"
        lines.append(f"| {name} | {rate / 1e3:,.0f}k | {how} | {hours:.1f} | {cost} |")
    return lines


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = made.add_mutually_exclusive_group()
    what.add_argument("--measure", action="store_true", help="train on the GPUs of this machine")
    what.add_argument("--report", nargs="+", type=Path, help="scaling.jsonl of earlier calls")
    made.add_argument("--seconds", type=float, help="for all of --measure; 480 unless given")
    made.add_argument("--only", action="append", help="rows whose name has this part; repeatable")
    made.add_argument("--device", choices=("cuda", "cpu"), help="cuda unless given")
    made.add_argument("--out_dir", type=Path, help="of jsonl, table and plot; out/scaling")
    return made


def main() -> int:
    """Prints the tables on paper, measures, or reports."""
    options = parser().parse_args()
    given = [n for n in ("seconds", "only", "device") if getattr(options, n) is not None]
    try:
        if given and not options.measure:
            raise UserError(f"--{given[0]} is for --measure; give both")
        if options.measure:
            from .scaling_measure import measure  # torch; the tables on paper need none

            return measure(options)
        if options.report:
            from .scaling_report import read, report

            report(read(options.report), options.out_dir or Path("out/scaling"))
            return 0
        if options.out_dir:
            raise UserError("--out_dir is for --measure and --report; give one of them")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for table in (scaling_table(), memory_table(), cost_table()):
        print("\n".join(table), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
