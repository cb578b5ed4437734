"""The table, the verdict and the picture of `benchmarks.sprint`."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from gpt2.report.compare import plus_minus, verdict


def report(rows: list[dict]) -> str:
    """The table, and what `gpt2 compare` says of such losses, as Markdown.

    A longer context lowers the loss by itself. So recipes of different context are compared by
    their losses in windows of `--val_block_size`, or not at all.
    """
    curves = curves_of(rows)
    # rows of an earlier version have no block_size
    contexts = {curve[-1].get("block_size") for curve in curves.values()}
    key, note = "val_loss", ""
    if len(contexts) > 1:
        there = {curve[-1].get("val_block_size") for curve in curves.values()}
        listed = ", ".join(str(context) for context in sorted(contexts - {None}))
        listed += " tokens and of rows that do not name it" if None in contexts else " tokens"
        note = f"\nContexts of {listed}: losses in windows of these do not compare"
        if len(there) > 1 or None in there:
            return f"{table(rows)}{note}; use --val_block_size=.\n"
        key, note = "val_loss_there", f"{note}. In windows of {there.pop()}:\n"
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for (name, seed), curve in curves.items():
        losses[name][seed] = curve[-1][key]
    sentences = verdict([(name, list(by_seed.values())) for name, by_seed in losses.items()])
    return table(rows) + note + "\n" + "\n".join(sentences) + "\n"


def curves_of(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """The rows of each recipe and seed that was trained to its end."""
    curves: dict[tuple[str, int], list[dict]] = defaultdict(list)
    for row in rows:
        curves[row["name"], row["seed"]].append(row)
    return {key: curve for key, curve in curves.items() if "val_loss" in curve[-1]}


def table(rows: Iterable[dict]) -> str:
    """The last row of each recipe and seed, as Markdown: mean ± standard error over seeds.

    Spread: largest loss less smallest. Seconds, steps and speed are means. Δ: by how much a recipe
    differs from the first one.
    """
    ends: dict[str, dict[int, dict]] = defaultdict(dict)
    for row in rows:
        ends[row["name"]][row["seed"]] = row
    lines = [
        "| recipe | loss | spread | seeds | seconds | steps | tokens/s | GiB | Δ loss | Δ speed |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    first: tuple[float, float, int | None] | None = None
    for name, by_seed in ends.items():
        done = [row for row in by_seed.values() if "val_loss" in row]
        if not done:
            lines.append(f"| {name} | failed | | | | | | | | |")
            continue
        losses = [row["val_loss"] for row in done]
        spread = f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else ""
        peak = max(row["peak_gib"] or 0.0 for row in done)
        memory = f"{peak:.1f}" if peak else ""
        seconds, steps = (statistics.mean(row[key] for row in done) for key in ("seconds", "step"))
        rate = statistics.mean(row["tokens_per_second"] for row in done)
        context = done[0].get("block_size")
        loss = statistics.mean(losses)
        against = " | "
        if first:
            difference = f"{loss - first[0]:+.4f}" if context == first[2] else ""
            against = f"{difference} | {rate / first[1] - 1:+.1%}"
        first = first or (loss, rate, context)
        lines.append(
            f"| {name} | {plus_minus(losses)} | {spread} | {len(losses)} | {seconds:.1f} | "
            f"{steps:.0f} | {rate:,.0f} | {memory} | {against} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path):
    """Loss against seconds, a line for each recipe and seed; its legend has means at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    curves = curves_of(rows)
    ends: dict[str, list[float]] = defaultdict(list)
    for (name, _), curve in curves.items():
        ends[name].append(curve[-1]["val_loss"])
    colours: dict[str, str] = {}
    for (name, _), curve in curves.items():
        label = None if name in colours else f"{name}: {statistics.mean(ends[name]):.3f}"
        colour = colours.setdefault(name, f"C{len(colours)}")
        seconds, losses = ([row[key] for row in curve] for key in ("seconds", "val_loss"))
        axes.plot(seconds, losses, color=colour, label=label, marker=".")
    if curves:
        lowest = min(row["val_loss"] for curve in curves.values() for row in curve)
        axes.set_ylim(lowest - 0.1, lowest + 2.5)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        axes.set_title(next(iter(curves.values()))[0]["device"], fontsize=9)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
