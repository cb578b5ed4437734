"""Runs side by side: recipes with their seeds, what differs, and which difference is real.

Runs whose options are equal but for the seed are one recipe. Recipes are compared by their last
validation loss. Runs that have not reached their end or that diverged, and runs of other validation
tokens or of another vocabulary, are named and left out of every number.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..untrusted.display import shown
from .console import format_count, format_seconds
from .runs import SAME_RESULT, Run
from .statistics import LEVEL, POWER, holm, mean_and_error, seeds_needed, variance, welch

LONGEST_NAME = 60  # characters of a recipe named by its options
USED = 0.9  # share of the seconds of a run, below which the report says so
UNEQUAL = 1.02  # times as many tokens as another recipe, from which on the table says so
Result = tuple[str, Sequence[float]]  # name of a recipe, last validation loss of each seed


@dataclass(frozen=True)
class Group:
    """A recipe: runs that differ in their seed alone."""

    name: str
    runs: list[Run]
    settings: dict[str, Any]  # those that change a result, and "changed on the way"

    @property
    def last(self) -> list[float]:
        """The last validation loss of each run, in nats per token."""
        return [run.evaluations[-1][1] for run in self.runs]

    @property
    def best(self) -> list[float]:
        """The lowest validation loss of each run."""
        return [min(run.comparable_losses, default=run.evaluations[-1][1]) for run in self.runs]


@dataclass(frozen=True)
class Findings:
    """Recipes that can be compared, and the runs that cannot, with the reason."""

    groups: list[Group]
    left_out: list[tuple[Run, str]]
    notes: list[str] = field(default_factory=list)


# ---- recipes ------------------------------------------------------------------------------------


def find_groups(runs: list[Run]) -> Findings:
    """Sorts runs into recipes, in the order given; says which are left out, and why."""
    left_out = [(run, why) for run in runs if (why := _no_result(run))]
    ended = [run for run in runs if not _no_result(run)]
    kept: list[Run] = []
    for run in ended:
        if other := _other_validation(ended[0], run):
            left_out.append((run, f"{other} than {ended[0].folder}: the losses do not compare"))
        else:
            kept.append(run)
    groups: dict[tuple, list[Run]] = {}
    for run in kept:
        same = groups.setdefault(_identity(run), [])
        twin = next((other for other in same if other.seed == run.seed), None)
        if twin:
            left_out.append((run, f"the options and the seed of {twin.folder}: it counts once"))
        else:
            same.append(run)
    named = _names(list(groups.values()))
    settings = [_settings(of_one[0]) for of_one in groups.values()]
    found = [Group(*parts) for parts in zip(named, groups.values(), settings, strict=True)]
    return Findings(found, left_out, _notes(found, kept))


def differences(groups: list[Group]) -> dict[str, list[Any]]:
    """Options in which the recipes differ: name -> value of each recipe; None: it has none."""
    names = dict.fromkeys(name for group in groups for name in group.settings)
    values = {name: [group.settings.get(name) for group in groups] for name in names}
    return {name: found for name, found in values.items() if len({repr(v) for v in found}) > 1}


def _no_result(run: Run) -> str:
    """Why a run has no loss to compare; "" for one that has."""
    return f"diverged ({run.diverged})" if run.diverged else run.unfinished()


def _other_validation(first: Run, run: Run) -> str:
    """In what the validation of a run differs from the first one's; "" if it does not."""
    (data, vocabulary, tokens), (data_1, vocabulary_1, tokens_1) = (
        run.validation(),
        first.validation(),
    )
    if vocabulary != vocabulary_1:
        return "another vocabulary"
    if data != data_1:
        return "other validation data"
    return "" if tokens == tokens_1 else "another number of validation tokens"


def _settings(run: Run) -> dict[str, Any]:
    own = {name: value for name, value in run.settings.items() if name not in SAME_RESULT}
    if run.plugins:
        own["plugin_sha256"] = str(run.plugins)[:200]
    return own | ({"changed on the way": "; ".join(run.changes)} if run.changes else {})


def _identity(run: Run) -> tuple:
    return tuple(sorted((name, repr(value)) for name, value in _settings(run).items()))


def _names(groups: list[list[Run]]) -> list[str]:
    """Each recipe by the options in which it differs, or by its first folder if those are many."""
    if len(groups) < 2:
        return [runs[0].folder.name or str(runs[0].folder) for runs in groups]
    settings = [_settings(runs[0]) for runs in groups]
    names = dict.fromkeys(name for own in settings for name in own)
    differ = [n for n in names if len({repr(own.get(n)) for own in settings}) > 1]
    by_options = [", ".join(f"{n}={own.get(n)}" for n in differ) for own in settings]
    if max(map(len, by_options)) <= LONGEST_NAME:
        return [shown(name) for name in by_options]
    by_folder = [shown(str(runs[0].folder), LONGEST_NAME) for runs in groups]
    return [f"{name} …" if len(r) > 1 else name for name, r in zip(by_folder, groups, strict=True)]


def _notes(groups: list[Group], runs: list[Run]) -> list[str]:
    """What a reader must know before believing the table."""
    notes = []
    if runs and not all(run.starts for run in runs):
        notes.append(
            "some runs are of an older version, which did not record its validation tokens: their "
            "data was compared by --data_dir= alone"
        )
    notes += _other_training(runs)
    used = {shown(run.folder): share for run in runs if (share := run.share_of_seconds)}
    if short := [name for name, share in used.items() if share == math.inf]:
        notes.append(
            "their seconds were over before their steps, so the learning rate did not come to the "
            f"end of its schedule: {', '.join(short)}"
        )
    if idle := [f"{name} ({share:.0%})" for name, share in used.items() if share < USED]:
        notes.append(
            "their steps were over before their seconds, of which they used a part, because the "
            f"machine was slower when the speed was measured: {', '.join(idle)}"
        )
    trained = [run.last("tokens") or 0 for group in groups for run in group.runs]
    if trained and max(trained) > UNEQUAL * max(min(trained), 1):
        few, many = format_count(min(trained)), format_count(max(trained))
        notes.append(f"the runs trained on unequal numbers of tokens: {few} to {many}")
    return notes


def _other_training(runs: list[Run]) -> list[str]:
    """A note for each `--data_dir=` whose training tokens changed between the runs."""
    notes = []
    for data_dir in dict.fromkeys(run.settings["data_dir"] for run in runs):
        here = [run for run in runs if run.settings["data_dir"] == data_dir and run.training]
        if others := [shown(r.folder) for r in here if r.training != here[0].training]:
            notes.append(
                f"{shown(data_dir)} held other training tokens than for {shown(here[0].folder)} "
                f"when these runs read it: {', '.join(others)}"
            )
    return notes


# ---- the report ---------------------------------------------------------------------------------


def report(findings: Findings) -> str:
    """The table, what differs, the runs left out, and the verdict, as Markdown."""
    groups = findings.groups
    parts = [table(groups)] if groups else []
    differ = differences(groups)
    if differ:
        lines = [_row(["option", *(g.name for g in groups)]), "|---" * (len(groups) + 1) + "|"]
        lines += [_row([name, *("" if v is None else v for v in differ[name])]) for name in differ]
        parts.append("\n".join(lines))
    notes = [f"{shown(run.folder)} is left out: {why}" for run, why in findings.left_out]
    if notes or findings.notes:
        parts.append("\n".join([*notes, *findings.notes]))
    results = [(group.name, group.last) for group in groups]
    return "\n\n".join([*parts, "\n".join(verdict(results))])


def table(groups: list[Group]) -> str:
    """One row for each recipe: mean ± standard error over seeds."""
    lines = [_row(["recipe", "seeds", "last loss", "best loss", "steps", "tokens", "seconds"])]
    lines.append("|---" * 7 + "|")
    for group in groups:
        tokens = [run.last("tokens") or math.nan for run in group.runs]
        seconds = [run.last(run.clock) or math.nan for run in group.runs]
        steps = sorted({run.last_step for run in group.runs})
        lines.append(
            _row([
                group.name,
                len(group.runs),
                plus_minus(group.last),
                plus_minus(group.best),
                " to ".join(f"{step:,}" for step in dict.fromkeys((steps[0], steps[-1]))),
                format_count(sum(tokens) / len(tokens)),
                format_seconds(sum(seconds) / len(seconds)),
            ])
        )  # fmt: skip
    return "\n".join(lines)


def plus_minus(values: Sequence[float]) -> str:
    """Mean ± standard error; the error is left out for one value."""
    mean, error = mean_and_error(values)
    return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"


def verdict(results: Sequence[Result]) -> list[str]:
    """One sentence for each recipe beside the best one: is it worse by more than the seeds do?

    Welch's t-test of the last validation loss. All pairs of recipes count for Holm's correction,
    because the best one is chosen by its result.

    Args:
        results: of each recipe its name, and the last validation loss of each seed in nats.
    """
    if not results:
        return ["There is nothing to compare."]
    if len(results) == 1:
        n = len(results[0][1])
        seeds = f"{n} seed{'s' if n > 1 else ''}"
        return [f"One recipe: there is nothing to compare it with ({seeds})."]
    testable = [n for n, (_, losses) in enumerate(results) if len(losses) > 1]
    pairs = list(itertools.combinations(testable, 2))
    tests = {pair: welch(*(results[n][1] for n in pair)) for pair in pairs}
    corrected = dict(zip(pairs, holm([test.p for test in tests.values()]), strict=True))
    means = [mean_and_error(losses)[0] for _, losses in results]
    best = means.index(min(means))
    lines = []
    for number, (name, losses) in enumerate(results):
        if number == best:
            continue
        begin = f"`{results[best][0]}` is {means[number] - means[best]:.4f} nats below `{name}`"
        if sorted(losses) == sorted(results[best][1]):
            lines.append(f"`{results[best][0]}` and `{name}` have equal losses.")
            continue
        alone = [results[n][0] for n in (best, number) if len(results[n][1]) < 2]
        if alone:
            named = " and ".join(f"`{name}`" for name in alone)
            lines.append(
                f"{begin}, but {named} ran with one seed, whose spread nobody knows: run each "
                "recipe with three seeds or more."
            )
            continue
        pair = (min(best, number), max(best, number))
        error, p = tests[pair].error, corrected[pair]
        lines.append(_sentence(begin, losses, results[best][1], error, p, len(tests)))
    return lines


def _sentence(  # noqa: PLR0917
    begin: str, losses: Sequence[float], best: Sequence[float], error: float, p: float, tests: int
) -> str:
    how = f"± {error:.4f}, Welch's t-test p = {p:.2g}"
    how += f" after Holm's correction for {tests} pairs" if tests > 1 else ""
    counts = sorted((len(losses), len(best)))
    few, many = counts
    seeds = f"{few} seeds each" if few == many else f"{few} and {many} seeds"
    if p < LEVEL:
        return f"{begin} ({how}, {seeds}): larger than the seeds' difference."
    difference = mean_and_error(losses)[0] - mean_and_error(best)[0]
    deviation = math.sqrt((variance(losses) + variance(best)) / 2)
    needed = seeds_needed(difference, deviation, LEVEL / tests) if difference else None
    more = "no number of seeds that one would run tells it"
    if needed:
        missing = max(1, needed - counts[0])
        more = f"about {missing} more seeds of each would tell a difference of this size"
        more += f" (with a chance of {POWER:.0%})"
    return f"{begin} ({how}, {seeds}): not larger than the seeds' difference; {more}."


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(shown(cell).replace("|", "/") for cell in cells) + " |"
