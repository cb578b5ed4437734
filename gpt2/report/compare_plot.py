"""The picture of `gpt2 compare`: loss by step, tokens and seconds, and the last losses."""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

from .compare import Group
from .plot import DPI, HEIGHT, WIDTH, save_figure, series
from .runs import Run
from .statistics import mean_and_error

# Colours that colour-blind people can tell apart (Okabe and Ito, 2008); then other dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
EARLY = 0.1  # share of a run whose losses may leave the picture
MOST_LABELS = 12  # seeds that are written at the ends of their curves


def draw_comparison(groups: list[Group], target: Path, way_out: str = "") -> Path:
    """Draws recipes as one PNG of four panels; a recipe has one colour, a seed one line.

    Raises:
        UserError: the target holds something else, or cannot be written.
    """
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), layout="constrained")
    by_step, by_tokens, by_seconds, ends = figure.subplots(2, 2).flat
    for axes, name in ((by_step, "step"), (by_tokens, "tokens"), (by_seconds, "seconds")):
        for number, group in enumerate(groups):
            _draw_curves(axes, group, name, *style(number), len(groups))
        axes.set_xlabel("seconds of training" if name == "seconds" else name)
        axes.set_ylabel("validation loss (nats per token)")
        axes.xaxis.set_major_formatter(EngFormatter(sep="") if name == "tokens" else _plain())
        axes.set_xlim(left=0)
        _limit_losses(axes, groups)
    _draw_ends(ends, groups)
    for axes in figure.axes:
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = by_step.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(groups)))
    return save_figure(figure, target, way_out)


def style(number: int) -> tuple[str, str]:
    """(colour, dash) of a recipe."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def curve(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, validation losses) of a run; x is the step, or what the run had counted at that step."""
    evaluations = [(step, loss) for step, loss in run.evaluations if math.isfinite(loss)]
    steps = np.array([step for step, _ in evaluations], dtype=float)
    losses = np.array([loss for _, loss in evaluations], dtype=float)
    if name == "step":
        return steps, losses
    known, values = series(run.rows, run.clock if name == "seconds" else name)
    if not len(known):
        return known, known
    # Before the first step a run has counted nothing.
    return np.interp(steps, np.r_[0.0, known], np.r_[0.0, values]), losses


def _draw_curves(  # noqa: PLR0917
    axes: Axes, group: Group, name: str, colour: str, dash: str, recipes: int
) -> None:
    label: str | None = group.name.replace("$", r"\$")
    for run in group.runs:
        x, losses = curve(run, name)
        if not len(x):
            continue
        axes.plot(x, losses, dash, color=colour, linewidth=1.2, marker=".", ms=4, label=label)
        label = None  # one entry of the legend for each recipe
        if recipes * len(group.runs) <= MOST_LABELS:
            axes.annotate(f" seed {run.seed}", (x[-1], losses[-1]), color=colour, fontsize=7)


def _limit_losses(axes: Axes, groups: list[Group]) -> None:
    """Lets the fall at the beginning of the runs leave the picture."""
    late = []
    for run in (run for group in groups for run in group.runs):
        steps, losses = curve(run, "step")
        late.append(losses[steps >= EARLY * steps[-1]])
    values = np.concatenate(late)
    margin = 0.08 * max(float(values.max() - values.min()), 0.01)
    axes.set_ylim(values.min() - margin, values.max() + margin)


def _draw_ends(axes: Axes, groups: list[Group]) -> None:
    """A dot for the last loss of each seed, a bar for mean ± standard error."""
    for number, group in enumerate(groups):
        colour, _ = style(number)
        mean, error = mean_and_error(group.last)
        axes.errorbar(mean, number, xerr=error, fmt="D", color=colour, capsize=5, ms=6)
        places = number + np.linspace(0.15, 0.35, len(group.last))
        axes.plot(group.last, places, ".", color=colour, alpha=0.7)
    names = [group.name.replace("$", r"\$") for group in groups]
    axes.set_yticks(range(len(groups)), names, fontsize=8)
    axes.set_ylim(len(groups) - 0.3, -0.7)
    axes.set_xlabel("last validation loss: each seed, and mean ± standard error")
    axes.locator_params(axis="x", nbins=6)


def _plain() -> FuncFormatter:
    return FuncFormatter(lambda x, _: f"{x:,.10g}")
