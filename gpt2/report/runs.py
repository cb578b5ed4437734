"""`Run`: what the folder of a run says: options, losses, seconds, and whether it has ended."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.earlier import comparable, current_names
from ..config.options import flatten
from ..config.run_paths import from_here, shortest
from ..config.train import TrainConfig
from ..errors import UserError
from ..untrusted.display import shown
from ..untrusted.parsing import read_toml
from .metrics import HISTORY, METRICS, measured, read_metrics

# Options that do not change what a run computes.
SAME_RESULT = {
    *("seed", "out_dir", "resume", "run_name", "log_to", "log_every", "save_every", "keep_last"),
    *("device", "hang_timeout_seconds"),
}
MOST_RUNS = 1000
DIVERGED = "diverged_since"  # of metrics.jsonl: the step of the first loss that was not finite


@dataclass(frozen=True)
class Run:
    """The folder of a run, as read from its files."""

    folder: Path
    settings: dict[str, Any]  # every option of training
    rows: list[dict]  # of metrics.jsonl
    starts: list[dict]  # of history.jsonl, see `lasting`; empty for runs of older versions

    @property
    def seed(self) -> int:
        """The seed of weights and data."""
        return self.settings["seed"]

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """(step, validation loss in nats) in the order of steps; the last of a repeated step.

        NaN stands for a loss that was NaN or infinite.
        """
        losses = [(row["step"], measured(row, "val_loss")) for row in self.rows]
        return sorted({step: loss for step, loss in losses if loss is not None}.items())

    @property
    def diverged(self) -> str:
        """Where the losses have become NaN or infinite for good; "" where they have not."""
        ends = itertools.takewhile(lambda e: not math.isfinite(e[1]), reversed(self.evaluations))
        if lost := [step for step, _ in ends]:
            return f"validation loss NaN at step {lost[-1]:,}"
        return f"loss or gradient NaN since step {self._gave_up:,}" if self._gave_up else ""

    @property
    def _gave_up(self) -> int:
        """The step from which on no loss was finite, of a run that ended by that; 0: it did not."""
        ends = [r.get(DIVERGED) for r in self.rows if r["step"] == self.last_step]
        return next((since for since in ends if type(since) is int), 0)

    @property
    def comparable_losses(self) -> list[float]:
        """Validation losses in nats, by step, about the tokens that the last one is about.

        A loss that was NaN or infinite counts as infinite.
        """
        since = -1  # the step at which the run last went on with other validation data
        for before, after in itertools.pairwise(self.starts):
            if before.get("validation") != after.get("validation"):
                since = after["step"]
        counts = {r["step"]: r["val_tokens"] for r in self.rows if "val_tokens" in r}
        now = self.last("val_tokens")
        here = [x for at, x in self.evaluations if at > since and counts.get(at) == now]
        return [x if math.isfinite(x) else math.inf for x in here]

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def changes(self) -> tuple[str, ...]:
        """Options that were changed on the way, in words.

        The seed is one: what follows is no run of that seed, as it began with another's.
        """
        found = [
            f"{name} {old} -> {new} from step {start['step']}"
            for start in self.starts
            for name, (old, new) in _pairs(start.get("changed"))
            if name not in SAME_RESULT or name == "seed"
        ]
        return tuple(dict.fromkeys(found))

    def last(self, name: str) -> float | None:
        """The last finite number of this name in metrics.jsonl."""
        numbers = [row[name] for row in self.rows if _is_number(row.get(name))]
        return numbers[-1] if numbers else None

    @property
    def clock(self) -> str:
        """Which seconds of metrics.jsonl count: those of the limit where there is one."""
        return "counted_seconds" if self.last("counted_seconds") is not None else "seconds"

    @property
    def time_was_up(self) -> bool:
        """Whether the run ended by `max_seconds`."""
        over = 0 < self.settings["max_seconds"] <= (self.last("time_was_up") or 0)
        return over and self.last_step < self.settings["max_steps"]

    @property
    def share_of_seconds(self) -> float:
        """The used share of `max_seconds`; infinite if they ended the run, 0 if there are none."""
        limit = self.settings["max_seconds"]
        if self.time_was_up:
            return math.inf
        return (self.last("counted_seconds") or 0) / limit if limit else 0.0

    def unfinished(self) -> str:
        """Why the run is not at its end; "" for one that is, also where it diverged."""
        asked, evaluations = self.settings["max_steps"], self.evaluations
        if self._gave_up:
            return ""
        if not evaluations:
            return f"no evaluation yet (step {self.last_step:,} of {asked:,})"
        patience = self.settings["early_stop_evals"]
        losses = [math.inf, *self.comparable_losses]  # the first evaluation is a gain, if finite
        stopped = 0 < patience <= len(losses) - 1 - losses.index(min(losses))
        timed_out = self.time_was_up and evaluations[-1][0] == self.last_step
        if evaluations[-1][0] < asked and not stopped and not timed_out:
            return f"at step {self.last_step:,} of {asked:,}"
        return ""

    @property
    def training(self) -> str:
        """Fingerprint of the training tokens; "" for runs of older versions."""
        return self._recorded("training", str) or ""

    @property
    def plugins(self) -> dict[str, str]:
        """The plugins of the run, path as it was given -> sha256."""
        return self._recorded("plugins", dict) or {}

    def _recorded(self, name: str, kind: type) -> Any:
        """The value of the last start that has one; None: no start has."""
        found = (start.get(name) for start in reversed(self.starts))
        return next((value for value in found if isinstance(value, kind) and value), None)

    def validation(self) -> tuple:
        """What a validation loss is about: the tokens, how many of them, and the vocabulary."""
        known: dict = next((s for s in reversed(self.starts) if s.get("validation")), {})
        where = known.get("validation") or f"--data_dir={self.settings['data_dir']}"
        return str(where), known.get("vocab_size"), self.last("val_tokens")


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders: each the folder of a run, or one that holds folders of runs.

    Raises:
        UserError: a folder that is missing or holds no run.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name the folders of runs (--out_dir=)")
        inside = [folder] if (folder / METRICS).is_file() else []
        if not inside:
            inside = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
        if not inside:
            raise UserError(
                f"{folder} is no run and holds none (no {METRICS}); name the --out_dir= of "
                "`gpt2 train`, or the folder around several"
            )
        found |= {path.resolve(): path for path in inside}
    if len(found) > MOST_RUNS:
        raise UserError(f"{len(found):,} runs; compare at most {MOST_RUNS:,} at a time")
    return [read_run(path) for path in found.values()]


def read_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        UserError: no config.toml, or one that is not of a run.
    """
    path = folder / "config.toml"
    if not path.is_file():
        raise UserError(
            f"{path} is missing, so the options of this run are not known; leave it out"
        )
    stored = shortest(from_here(path, current_names(read_toml(path))))
    settings = flatten(TrainConfig()) | stored
    for name in ("seed", "max_steps", "early_stop_evals"):
        if type(settings[name]) is not int:
            raise UserError(f"{path}: {name}={shown(settings[name])} is no whole number")
    if not isinstance(data := settings["data_dir"], str):
        raise UserError(f"{path}: data_dir={shown(data)} is no text")
    for name in ("max_seconds", "min_lr_ratio"):
        if not _is_number(settings[name]):
            raise UserError(f"{path}: {name}={shown(settings[name])} is no number")
    history = folder / HISTORY
    starts = read_metrics(history) if history.is_file() else []
    rows = read_metrics(folder / METRICS)
    return Run(folder, comparable(settings), rows, lasting(starts, rows))


def lasting(starts: list[dict], rows: list[dict]) -> list[dict]:
    """The starts that a run's steps come from.

    No step is from a start that a later one went back on, or that failed before its first step, or
    that found the run at its end.

    Args:
        starts: lines of history.jsonl.
        rows: lines of metrics.jsonl.
    """
    kept: list[dict] = []
    last = max((row["step"] for row in rows), default=0)
    for start in starts:
        while kept and kept[-1]["step"] >= start["step"]:
            kept.pop()
        kept.append(start)
    return [start for start in kept if start["step"] < max(1, last)]


def _pairs(changed: Any) -> list[tuple[str, tuple[Any, Any]]]:
    """The entries name -> [before, after] of a line of history.jsonl."""
    if not isinstance(changed, dict):
        return []
    return [(n, tuple(v)) for n, v in changed.items() if isinstance(v, list) and len(v) == 2]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
