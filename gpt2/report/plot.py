"""Pictures: of a run (loss, learning rate, gradient norm, throughput), and of document lengths."""

import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator

from ..config.model import GPT2Config
from ..errors import UserError
from ..files import check_replaceable, write_atomically
from ..untrusted.display import shown
from .console import format_count, format_seconds
from .metrics import METRICS, measured, read_metrics

# Colours that colour-blind people can tell apart (Okabe and Ito, 2008).
BLUE, SKY, ORANGE, GREEN, PURPLE = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7"
WIDTH, HEIGHT, DPI = 1500, 1000, 125  # pixels
OTHER_PICTURES = ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".eps", ".gif", ".tif", ".tiff"
PNG = b"\x89PNG"  # the first bytes of such a file
LARGEST = 1e30  # of a value that is drawn
BLOCK_SIZE = GPT2Config.block_size  # GPT-2's context, marked among the lengths of documents


def plot_run(out_dir: Path, target: Path | None = None, way_out: str = "") -> Path:
    """Draws a run's metrics.jsonl as one PNG of four panels.

    Args:
        out_dir: Folder of the run.
        target: File to write; None means loss.png in out_dir.
        way_out: End of the message where the file cannot be written.

    Returns:
        The file written.

    Raises:
        UserError: when there is nothing to draw, or the target cannot be written.
    """
    out_dir = Path(out_dir)
    path = out_dir / METRICS
    if not path.is_file():
        raise UserError(
            f"no {path}; name the folder of a run (--out_dir= of `gpt2 train`) to plot it"
        )
    rows = read_metrics(path)
    if not rows:
        raise UserError(f"{path} holds no steps yet; plot again once the run has logged some")
    target = Path(target) if target else out_dir / "loss.png"
    return save_figure(draw(rows, out_dir.resolve().name), target, way_out)


def plot_lengths(
    lengths: dict[str, Counter[int]], medians: dict[str, int], name: str, target: Path
) -> Path:
    """Draws how long the documents of each split are as a histogram; returns the file written.

    Args:
        lengths: split -> tokens of a document -> how many documents have that many.
        medians: split -> median of these lengths.
        name: of the folder, for the title.
        target: the PNG to write.

    Raises:
        UserError: when there are no documents, or the target cannot be written.
    """
    lengths = {split: counts for split, counts in lengths.items() if counts}
    if not lengths:
        raise UserError("there are no documents")
    longest = max(max(counts) for counts in lengths.values())
    # three bins per factor of two, up to the longest document
    bins = 2.0 ** np.arange(0, math.log2(longest) + 2 / 3, 1 / 3)
    figure = Figure(figsize=(WIDTH / DPI, 0.6 * HEIGHT / DPI), layout="constrained")
    axes = figure.subplots()
    for (split, counts), color in zip(lengths.items(), (ORANGE, BLUE), strict=False):
        values, weights = np.array(list(counts)), np.array(list(counts.values()))
        label = (
            f"{split}: {format_count(counts.total())} documents, median {medians[split]:,} tokens"
        )
        share = 100 * weights / weights.sum()
        axes.hist(
            values, list(bins), weights=share, histtype="step", color=color, lw=1.6, label=label
        )
        axes.axvline(medians[split], color=color, linestyle=":", linewidth=1.2)
    axes.axvline(BLOCK_SIZE, color="0.4", linewidth=1, label=f"block_size {BLOCK_SIZE:,}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("% of the documents")
    axes.set_title(f"{shown(name)}: document lengths", fontsize=12, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    _legend_below(axes)
    return save_figure(figure, target)


def save_figure(figure: Figure, target: Path, way_out: str = "") -> Path:
    """Writes a figure as PNG; raises UserError where it cannot, or something else is there."""
    if target.suffix.lower() in OTHER_PICTURES:
        raise UserError(f"{shown(str(target))}: pictures are PNG files; name it .png")
    check_replaceable(target, PNG, "picture")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, image.getvalue())
    except OSError as problem:
        reason = problem.strerror or problem
        raise UserError(f"{target}: cannot write there ({reason}){way_out}") from None
    return target


def draw(rows: list[dict], name: str) -> Figure:
    """The figure of a run; `rows` as `report.read_metrics` gives them, at least one."""
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), layout="constrained")
    figure.suptitle(_title(rows, shown(name)), fontsize=14, parse_math=False)
    loss, rate, norm, speed = figure.subplots(2, 2).flat
    _draw_loss(loss, rows)
    _draw_line(rate, *series(rows, "lr"), GREEN)
    rate.set_ylim(bottom=0)
    _draw_norm(norm, rows)
    _draw_speed(speed, rows)
    titles = ("Loss (nats per token)", "Learning rate", "Gradient norm", "Throughput (tokens/s)")
    last = max(row["step"] for row in rows)
    for axes, title in zip((loss, rate, norm, speed), titles, strict=True):
        axes.set_title(title, fontsize=12)
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", integer=True, nbins=6)
        axes.set_xlim(0, 1.01 * max(last, 1))
        if not axes.lines:
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color="0.5")
    _add_token_axis(loss, rows)
    _add_token_axis(rate, rows)
    return figure


def series(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one field in the order of steps; of a repeated step the last counts."""
    known = [row for row in rows if isinstance(row.get(name), int | float)]
    points = {row["step"]: row[name] for row in known if abs(row[name]) < LARGEST}  # no NaN
    steps = sorted(points)
    return np.array(steps, dtype=float), np.array([points[step] for step in steps], dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average, without lag, over half a percent of the points on either side."""
    reach = len(values) // 200
    window = np.ones(2 * reach + 1)
    total = np.convolve(values, window)[reach : reach + len(values)]
    return total / np.convolve(np.ones(len(values)), window)[reach : reach + len(values)]


def _title(rows: list[dict], name: str) -> str:
    last = max(row["step"] for row in rows)
    parts = [f"{last:,} step{'s' if last != 1 else ''}"]
    if len(tokens := series(rows, "tokens")[1]):
        parts.append(f"{format_count(tokens[-1])} tokens")
    if len(seconds := series(rows, "seconds")[1]):
        parts.append(f"{format_seconds(seconds[-1])} of training")
    return f"{name}: {', '.join(parts)}"


def _draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, **style: Any) -> None:
    """A line, or a dot where there is only one point; nothing without points."""
    if len(steps):
        marker = {"marker": "o"} if len(steps) == 1 else {}
        axes.plot(steps, values, color=color, **(marker | style))


def _then_nan(rows: list[dict], name: str) -> str:
    """Says that the last value of a field was NaN or infinite, which no line can show."""
    values = [value for row in rows if (value := measured(row, name)) is not None]
    return ", then NaN" if values and math.isnan(values[-1]) else ""


def _draw_loss(axes: Axes, rows: list[dict]) -> None:
    steps, train = series(rows, "loss")
    val_steps, val = series(rows, "val_loss")
    is_long = len(steps) >= 200
    if is_long:
        _draw_line(axes, steps, train, SKY, linewidth=0.6, alpha=0.6)
    if len(steps):
        smoothed = smooth(train)
        label = f"training{', smoothed' if is_long else ''}: {smoothed[-1]:.4f}"
        label += _then_nan(rows, "loss")
        _draw_line(axes, steps, smoothed, BLUE, linewidth=1.6, label=label)
    if len(val):
        label = f"validation: {val[-1]:.4f}{_then_nan(rows, 'val_loss')}"
        dots = {"marker": "o", "markersize": 4, "markevery": max(1, len(val) // 25)}
        _draw_line(axes, val_steps, val, ORANGE, linewidth=1, label=label, **dots)
    if len(steps) + len(val):
        _legend_below(axes, title="last value")
    if is_long:
        # The fall from ln(50,257) would squeeze the rest: let the first 2 % leave the picture.
        late = steps >= steps[0] + 0.02 * (steps[-1] - steps[0])
        late_val = val[val_steps >= steps[late][0]]
        low = np.concatenate([train[late], late_val]).min()
        high = np.concatenate([smoothed[late], late_val]).max()  # above single noisy steps
        margin = 0.08 * max(high - low, 0.01)
        axes.set_ylim(low - margin, high + margin)


def _draw_norm(axes: Axes, rows: list[dict]) -> None:
    steps, norms = series(rows, "grad_norm")
    positive = norms > 0
    _draw_line(axes, steps[positive], norms[positive], PURPLE, linewidth=0.9)
    if positive.any():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        if norms[positive].max() < 10 * norms[positive].min():  # less than a decade: even numbers
            axes.set_ylim(norms[positive].min() / 1.1, norms[positive].max() * 1.1)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_minor_locator(NullLocator())
        named = "25" if norms[positive].max() < 100 * norms[positive].min() else ""
        axes.yaxis.set_minor_formatter(
            FuncFormatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in named else "")
        )


def _draw_speed(axes: Axes, rows: list[dict]) -> None:
    steps, speeds = series(rows, "tokens_per_second")
    if len(steps):
        median = float(np.median(speeds))
        _draw_line(axes, steps, speeds, BLUE, linewidth=0.9, label=f"median {format_count(median)}")
        axes.set_ylim(0, 1.15 * max(speeds.max(), 1e-9))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        _legend_below(axes)


def _legend_below(axes: Axes, title: str | None = None) -> None:
    """A legend under the label of the x axis, where it covers no curve."""
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=3,
        fontsize=10,
        title=title,
        frameon=False,
    )


def _add_token_axis(axes: Axes, rows: list[dict]) -> None:
    """Tokens along the top, where they grow evenly with the steps."""
    steps, tokens = series(rows, "tokens")
    if not len(steps) or steps[-1] <= 0 or tokens[-1] <= 0:
        return
    per_step = tokens[-1] / steps[-1]
    if not np.allclose(tokens, steps * per_step, rtol=0.01):
        return
    top = axes.secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
    giga = EngFormatter(sep="")
    top.xaxis.set_major_formatter(FuncFormatter(lambda x, _: giga(x).replace("G", "B")))
    top.set_xlabel("tokens")
