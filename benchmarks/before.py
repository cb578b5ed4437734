"""An earlier build as a contender of a benchmark: `--before=REV`.

`gpt2/` and `benchmarks/` of a git revision are written into a temporary folder, from which
processes of their own import them. The repository itself stays as it is: nothing is checked out in
it, and it keeps no record that an interrupted benchmark could leave behind. Each build runs its own
`benchmarks/`, and takes the options by their names.

Builds and other contenders take turns for several rounds, so that a machine that becomes slower
meanwhile is no advantage to anyone. A ratio is taken within each round.
"""

import argparse
import contextlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpt2.config.model import GPT2_VOCAB_SIZE
from gpt2.data.random_tokens import write_random_shards
from gpt2.errors import UserError

ROOT = Path(__file__).parents[1]
ROUNDS = 3  # with an earlier build; else one
SHARD_TOKENS = 1_000_000
LOSSES = """
import json, pathlib, sys
from benchmarks import throughput
options, options.extra = throughput.parser().parse_known_args(sys.argv[3:])
with throughput.ours(options, pathlib.Path(sys.argv[1])) as step:
    print(json.dumps([step()() for _ in range(int(sys.argv[2]))]))
"""


@dataclass(frozen=True)
class Build:
    """A version of this project, in a folder that has its `gpt2/` and `benchmarks/`."""

    name: str
    folder: Path = field(default_factory=lambda: ROOT)

    def run(self, *arguments: str) -> str:
        """What `python ARGUMENTS` prints with this build in the place of any other.

        Raises:
            UserError: the last line of its errors, when it fails.
        """
        path = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        # Without PYTHONSAFEPATH the current folder, often another build, would come first.
        own = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], env=own, capture_output=True, text=True, check=False
        )
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        told = re.fullmatch(r"[\w.]*UserError: (.*)", reason)
        if not (done.returncode and told):  # else the traceback is of no use
            sys.stderr.write(done.stderr)
        if done.returncode:
            raise UserError(f"{self.name} failed: {told[1] if told else reason}")
        return done.stdout

    def row(self, benchmark: str, argv: Sequence[str]) -> dict:
        """The row of one contender of a benchmark, under this build's name."""
        printed = self.run("-m", f"benchmarks.{benchmark}", *argv)
        return json.loads(printed.splitlines()[-1]) | {"name": self.name}


def add_options(made: argparse.ArgumentParser):
    """`--before` and `--rounds`."""
    made.add_argument("--before", help="a git revision: this project as it was, in the same call")
    made.add_argument(
        "--rounds", type=int, help=f"runs of each contender; 1, with --before {ROUNDS}"
    )


def resolve_rounds(options: argparse.Namespace) -> int:
    """How often every contender runs.

    Raises:
        UserError: less than once.
    """
    rounds = (ROUNDS if options.before else 1) if options.rounds is None else options.rounds
    if rounds < 1:
        raise UserError(f"--rounds={rounds}: use a whole number of at least 1")
    return rounds


@contextlib.contextmanager
def earlier_build(revision: str | None, benchmark: str) -> Iterator[list[Build]]:
    """The build of a git revision in a folder that is removed afterwards; none without a revision.

    Raises:
        UserError: no git, no such revision, or one that lacks this benchmark.
    """
    if not revision:
        yield []
        return
    commit = _git(revision, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    commit = commit.decode().strip()
    held = _git(revision, "ls-tree", "-r", "--name-only", commit, "gpt2", "benchmarks").decode()
    for needed in ("gpt2/__init__.py", f"benchmarks/{benchmark}.py"):
        if needed not in held.splitlines():
            raise UserError(f"--before={revision}: it has no {needed}; use a later revision")
    files = _git(revision, "archive", "--format=tar", commit, "gpt2", "benchmarks")
    with tempfile.TemporaryDirectory(prefix="gpt2-before-") as folder:
        with tarfile.open(fileobj=io.BytesIO(files)) as archive:
            archive.extractall(folder, filter="data")
        yield [Build(f"at {commit[:7]}", Path(folder))]


def _git(revision: str, *arguments: str) -> bytes:
    """What git prints in this repository; its error as one line."""
    try:
        command = ["git", "-C", ROOT, *arguments]
        in_english = os.environ | {"LC_ALL": "C"}
        done = subprocess.run(command, env=in_english, capture_output=True, check=False)
    except OSError:
        raise UserError(f"--before={revision} needs git, and there is none here") from None
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        reason = reason[0].removeprefix("fatal: ") if reason else "no reason given"
        if reason == "Needed a single revision":
            reason = "there is no such revision; `git log --oneline` lists them"
        raise UserError(f"--before={revision}: {reason}")
    return done.stdout


def merge(rows: Sequence[dict]) -> dict:
    """The rounds of one contender at one batch size as one row, of medians.

    `rates` keeps the tokens per second of each round.
    """
    merged = dict(rows[0])
    for key in ("tokens_per_second", "ms_per_65536_tokens", "first_step_seconds"):
        if key in merged:
            merged[key] = statistics.median(row[key] for row in rows)
    if "tokens_per_second" in merged:
        merged["rates"] = [row["tokens_per_second"] for row in rows]
    return merged


def merge_rounds(rows: Sequence[dict]) -> list[dict]:
    """One row for each contender and batch size, in the order of the first round."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["batch_size"]), []).append(row)
    return [merge(group) for group in groups.values()]


def advantage(mine: dict, other: dict) -> tuple[str, str]:
    """How many times as fast `mine` is: the median over the rounds, and the least and greatest.

    Both are rows of `merge_rounds`; the texts are empty for `mine` itself.
    """
    if mine is other:
        return "", ""
    ratios = [a / b for a, b in zip(mine["rates"], other["rates"], strict=False)]
    spread = f"{min(ratios):.2f}–{max(ratios):.2f}" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f} ×", spread


def loss_parity(builds: Sequence[Build], argv: Sequence[str], steps: int) -> str:
    """A sentence about the losses of two builds that train on one text with the same options.

    Args:
        builds: today's and the earlier one.
        argv: options of benchmarks.throughput.
        steps: optimizer steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_random_shards(Path(folder), SHARD_TOKENS, GPT2_VOCAB_SIZE)
        if not any(given.startswith("--max_steps=") for given in argv):
            argv = [*argv, f"--max_steps={steps}"]  # else all steps are of a long warm-up
        printed = [b.run("-c", LOSSES, folder, str(steps), *argv) for b in builds]
    today, earlier = (json.loads(text.splitlines()[-1]) for text in printed)
    apart = max(abs(a - b) for a, b in zip(today, earlier, strict=True))
    told = "equal to the last bit" if today == earlier else f"at most {apart:.1e} apart"
    return (
        f"Losses of {steps} steps on one text, {' and '.join(b.name for b in builds)}: {told}; "
        f"from {today[0]:.4f} and {earlier[0]:.4f} to {today[-1]:.4f} and {earlier[-1]:.4f}"
    )
