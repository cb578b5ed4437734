"""Table, plot and predictions of what `benchmarks.scaling --measure` has measured."""

import functools
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from gpt2.config.command_line import parse
from gpt2.config.parameter_shapes import parameter_shapes
from gpt2.config.train import TrainConfig
from gpt2.errors import UserError
from gpt2.untrusted.parsing import load_json

from . import scaling
from .scaling import BATCH_TOKENS, MACHINES, Machine
from .scaling_rows import TRIED

PREDICTED = (16, 32, 64)  # GPUs
# Tokens/s of one H100, docs/speed.md; medium with checkpointing loses what XL does.
ONE_GPU = {
    "medium": 220e3,
    "medium, activation checkpointing": 220e3 * 39.3 / 50.7,
    "XL": 50.7e3,
    "XL, activation checkpointing": 39.3e3,
}


def read(paths: Iterable[Path]) -> list[dict]:
    """The lines of several scaling.jsonl.

    Raises:
        UserError: a file that is not there or is another one.
    """
    found = []
    for path in paths:
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; --measure writes such a file") from None
        for line in filter(None, lines):
            try:
                row = load_json(line, path, dict)
            except UserError:  # half a line, of what was killed
                continue
            if not {"name", "result"} <= row.keys():
                raise UserError(f"{path} has lines without name and result; it is another file")
            found.append(row)
    return found


def measured(rows: list[dict]) -> list[dict]:
    """The training rows that have a result."""
    return [row for row in rows if "tokens_per_second" in row]


def one_gpu(rows: list[dict], label: str, tokens: int) -> float | None:
    """Mean tokens per second of the one-GPU rows of a label; None without any."""
    found = [
        row["tokens_per_second"]
        for row in measured(rows)
        if (row["gpus"], row["label"], row["tokens_per_step"]) == (1, label, tokens)
    ]
    return statistics.mean(found) if found else None


def share_of_ideal(row: dict, rows: list[dict]) -> float | None:
    """Its tokens per second of as many as its GPUs would make alone; None: not known."""
    if "tokens_per_second" not in row or row["gpus"] == 1:
        return None
    alone = one_gpu(rows, row["label"], row["ideal_tokens"])
    return row["tokens_per_second"] / row["gpus"] / alone if alone else None


# ---- the model on paper --------------------------------------------------------------------------


@functools.cache
def modern_parameters(config: str) -> int:
    """Of the network of a file of configs/."""
    path = Path(__file__).parent.parent / config
    shape = parse(TrainConfig, [f"--config={path}"], "scaling").model.shape()
    return sum(math.prod(s) for s in parameter_shapes(shape).values())


def on_paper(row: dict, rows: list[dict]) -> float | None:
    """Tokens per second that the model of benchmarks/scaling.py predicts for a row.

    One GPU's rate is from docs/speed.md, and for the modern recipe, which has none there, measured.
    None: tiny networks on CPUs, or a rate that is not known.
    """
    if row.get("tiny", True) or "bytes" in row:
        return None
    machine = Machine("", row["gpus"])
    sequences = row["batch_size"] * row["micro_batches"]
    if row["label"] == "124M" and row["parallel"] == "ddp":
        return row["tokens_per_step"] / scaling.step_seconds(machine, sequences)[0]
    if row["label"] == "124M":
        compute = scaling.step_seconds(MACHINES[0], sequences)[0]
    else:
        rate = ONE_GPU.get(row["label"]) or one_gpu(rows, row["label"], row["ideal_tokens"])
        if not rate:
            return None
        compute = sequences * row["block_size"] / rate
    if machine.gpus == 1:
        return row["tokens_per_step"] / compute
    if row["parallel"] == "fsdp":
        more = scaling.fsdp_seconds(machine, row["size"], row["micro_batches"], compute)
    else:
        config = row["config"]
        own = modern_parameters(config) if config else scaling.parameters(row["size"])
        backward = compute / row["micro_batches"] * 2 / 3
        more = sum(scaling.ddp_seconds(machine, 4 * own, backward))
    return row["tokens_per_step"] / (compute + more)


def all_gradients(rows: list[dict]) -> dict | None:
    """The measured all-reduce of the most bytes; None without one."""
    return max((r for r in rows if "bytes" in r), key=lambda r: r["bytes"], default=None)


def corrected(rows: list[dict]) -> list[str]:
    """Lines of markdown: the 124M recipe on 16 to 64 GPUs, from what was measured; or why not.

    A step is the measured step of one GPU with its share of the sequences; and all gradients sent
    after it, between machines by the network on paper, or by what was measured where that is less;
    and the rest: what the step of all GPUs takes longer here than these two.
    """
    reduced = all_gradients(rows)
    if not reduced:
        return ["No prediction: no all-reduce was measured."]
    here = reduced["gpus"]
    tokens = steps_tokens(rows)
    alone = {n: one_gpu(rows, "124M", tokens // n) for n in (here, *PREDICTED)}
    of_all = [
        row["tokens_per_second"]
        for row in measured(rows)
        if (row["label"], row["gpus"], row["tokens_per_step"]) == ("124M", here, tokens)
        and row["parallel"] == "ddp"
    ]
    whole = one_gpu(rows, "124M", tokens)
    if not (of_all and whole and alone[here]):
        return [f"No prediction: it needs the 124M rows of 1 and {here} GPUs, and of a share."]
    step, own = tokens / statistics.mean(of_all), tokens / here / alone[here]
    rest = step - own - reduced["seconds"]
    lines = [
        f"124M, {tokens:,} tokens a step. {here} GPUs: {ms(step)} = {ms(own)} of one GPU with its "
        f"share + {ms(reduced['seconds'])} all-reduce + {ms(rest)} rest.",
        "",
        "| | one GPU with its share | all-reduce | rest | step | tokens/s | of ideal | on paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for n in PREDICTED:
        if not alone[n]:
            lines.append(f"| {n} GPUs | not measured | | | | | | |")
            continue
        machine = Machine("", n, node_bandwidth=reduced["bus_bandwidth"])
        sent = scaling.ring_bytes(reduced["bytes"], n) / machine.bandwidth
        sent += 2 * math.log2(n) * machine.net_hop
        own = tokens / n / alone[n]
        seconds = own + sent + max(0.0, rest)
        paper = scaling.step_seconds(Machine("", n), BATCH_TOKENS // scaling.CONTEXT // n)[0]
        told = "–" if tokens != BATCH_TOKENS else rate_text(BATCH_TOKENS / paper)
        share = tokens / seconds / n / whole
        lines.append(
            f"| {n} GPUs | {ms(own)} | {ms(sent)} | {ms(max(0.0, rest))} | {ms(seconds)} "
            f"| {rate_text(tokens / seconds)} | {share:.0%} | {told} |"
        )
    return lines


def steps_tokens(rows: list[dict]) -> int:
    """Tokens of the recipe's step: fewer with tiny networks."""
    tiny = any(row.get("tiny") for row in rows)
    return 8 * 8 if tiny else BATCH_TOKENS


# ---- table and plot ------------------------------------------------------------------------------


def ms(seconds: float) -> str:
    """Milliseconds."""
    return f"{1e3 * seconds:.1f} ms"


def rate_text(rate: float | None) -> str:
    """Tokens per second."""
    if rate is None:
        return "–"
    if rate < 1e4:
        return f"{rate:.0f}"
    return f"{rate / 1e6:.2f}M" if rate >= 1e6 else f"{rate / 1e3:.1f}k"


def together(rows: list[dict]) -> list[dict]:
    """A row for each name: the mean of those that ran on each GPU, with the range of their rates.

    A row that was measured takes the place of one that was skipped or failed.
    """
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if "bytes" not in row:
            groups.setdefault(row["name"], []).append(row)
    found = []
    for group in groups.values():
        done = measured(group)
        if not done:
            found.append(group[-1])
            continue
        rates = [row["tokens_per_second"] for row in done]
        spread = f" ({rate_text(min(rates))} to {rate_text(max(rates))})" if len(rates) > 1 else ""
        mean = {"tokens_per_second": statistics.mean(rates), "spread": spread}
        slowest = max(row["first_step_seconds"] for row in done)
        found.append(done[-1] | mean | {"first_step_seconds": slowest})
    return found


def table(rows: list[dict]) -> list[str]:
    """Lines of markdown: a row for each of the training runs, and the all-reduces below."""
    lines = [
        "| | tokens/s | of ideal | on paper | peak GiB | first step |",
        "|---|---|---|---|---|---|",
    ]
    for row in together(rows):
        if "tokens_per_second" not in row:
            lines.append(f"| {row['name']} | {row['result'].replace('|', '/')} | | | | |")
            continue
        share, peak = share_of_ideal(row, rows), row["peak_gib"]
        cells = [
            row["name"] + ("" if row["recorded"] else ", without CUDA graph"),
            rate_text(row["tokens_per_second"]) + row["spread"],
            "" if share is None else f"{share:.1%}",
            rate_text(on_paper(row, rows)),
            f"{peak:.1f}" if peak else "–",
            f"{row['first_step_seconds']:.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    reduced = [row for row in rows if "bytes" in row]
    if reduced:
        lines += ["", "| all-reduce | time | bus bandwidth | on paper |", "|---|---|---|---|"]
    for row in reduced:
        paper = f"{Machine('', row['gpus']).bandwidth / 1e9:.0f} GB/s"
        lines.append(
            f"| {row['gpus']} GPUs, {row['bytes']:,} bytes | {1e3 * row['seconds']:.3f} ms "
            f"| {row['bus_bandwidth'] / 1e9:.1f} GB/s | {'–' if row['tiny'] else paper} |"
        )
    return lines


def report(rows: list[dict], out_dir: Path):
    """Prints the table and the prediction; writes them to scaling.md, and scaling.png."""
    devices = {f"{r['device']}, torch {r['torch']}": None for r in measured(rows)}
    heading = "; ".join(devices) or "Nothing was measured."
    heading += f": {TRIED}" if any(row.get("tiny") for row in measured(rows)) else ""
    lines = [heading, "", *table(rows)]
    if measured(rows):
        lines += ["", *corrected(rows)]
    out_dir.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    (out_dir / "scaling.md").write_text(text, encoding="utf-8")
    print("\n" + text)
    if measured(rows):
        draw(rows, out_dir / "scaling.png")


def draw(rows: list[dict], path: Path):
    """Tokens per second of the 124M model by GPUs, and the share of ideal of all rows."""
    from matplotlib.figure import Figure

    done = [row for row in together(rows) if "tokens_per_second" in row]
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes, bars = figure.subplots(1, 2)
    recipe = [row for row in done if row["label"] == "124M"]
    wanted = steps_tokens(rows)
    for tokens, parallel in ((wanted, "ddp"), (2 * wanted, "ddp"), (wanted, "fsdp")):
        points = sorted(
            (row["gpus"], row["tokens_per_second"], on_paper(row, rows))
            for row in recipe
            if row["tokens_per_step"] == tokens and row["parallel"] == parallel
        )
        if not points:
            continue
        gpus, rates, papers = zip(*points, strict=True)
        label = f"124M, {parallel.upper()}, {tokens:,} tokens a step"
        (line,) = axes.plot(gpus, [rate / 1e6 for rate in rates], marker="o", label=label)
        if None not in papers:
            paper = [rate / 1e6 for rate in papers]
            axes.plot(gpus, paper, ":", color=line.get_color(), label="the same on paper")
    axes.set_xlabel("GPUs")
    axes.set_ylabel("million tokens per second")
    axes.set_ylim(bottom=0)
    if axes.lines:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    axes.grid(alpha=0.3)
    shares = {row["name"]: share_of_ideal(row, rows) for row in done}
    known = {name: 100 * share for name, share in shares.items() if share is not None}
    if known:
        drawn = bars.barh(list(known), list(known.values()))
        bars.bar_label(drawn, fmt="%.1f %%", padding=3)
        bars.invert_yaxis()
        bars.margins(x=0.15)
    bars.set_xlabel("share of GPUs × one GPU, %")
    bars.tick_params(labelsize=8)
    figure.suptitle("; ".join(dict.fromkeys(row["device"] for row in done)), fontsize=9)
    figure.savefig(path, dpi=120)
