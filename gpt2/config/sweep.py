"""Options of `gpt2 sweep`: the runs of a grid of options, each with several seeds."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ..errors import UserError
from .command_line import fields_of, option_name, parse
from .earlier import comparable
from .options import at_least, check_seed, flatten, option
from .train import TrainConfig

OF_THE_SWEEP = {  # options of training that a sweep sets itself -> what to use instead
    "seed": "--seeds=",
    "device": "--devices=",
    "out_dir": "--out_dir= of the sweep, the folder around its runs",
    "run_name": "the names of the folders",
    "resume": "the same command again, which goes on",
    "max_seconds": "--seconds=",
}
MOST_RUNS = 1000


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """All options of `gpt2 sweep`; every other option is one of `gpt2 train`, for all runs."""

    seeds: str = option("1,2,3", "seeds of each recipe, comma-separated")
    set: str = option(
        "",
        "an option and its values, as in muon_lr=0.01,0.02 (values with commas: a;b); given "
        "several times, every combination runs",
    )
    tokens: int = option(
        0, "tokens that each run trains on; 0: as many as max_steps of the first run gives"
    )
    seconds: float = option(
        0.0,
        "seconds that each run trains at most; its speed is measured first, so that its schedule "
        "ends with them; 0: equal tokens",
    )
    devices: str = option("auto", "devices, a run at a time on each: cuda:0,cuda:1; auto: all GPUs")
    out_dir: str = option("out/sweep", "folder for the folders of the runs, and compare.png")

    def __post_init__(self) -> None:
        at_least(0, tokens=self.tokens, seconds=self.seconds)
        if not self.out_dir:
            raise UserError("out_dir is empty; name a folder, or leave the option out")
        if self.tokens and self.seconds:
            raise UserError("--tokens= and --seconds= are two budgets; give one")


@dataclass(frozen=True)
class Job:
    """A run of a sweep."""

    recipe: str  # its values of the swept options; equal for all seeds
    seed: int
    folder: Path
    argv: tuple[str, ...]  # of `gpt2 train`
    config: TrainConfig

    def with_steps(self, steps: int, seconds: float = 0.0) -> "Job":
        """The job with another number of steps, and seconds after which it ends in any case."""
        argv = (*self.argv, f"--max_steps={steps}", *[f"--max_seconds={seconds}"] * (seconds > 0))
        return replace(self, argv=argv, config=parse(TrainConfig, list(argv), "gpt2 train"))


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """(arguments of the sweep, texts of `--set`, arguments of `gpt2 train`)."""
    own, texts, rest = [], [], []
    names = {f.name for f in fields(SweepConfig)}
    queue = iter(argv)
    for argument in queue:
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_") if argument.startswith("--") else ""
        if name in names and not equals:
            value = next(queue, "")
        if name == "set":
            texts.append(value)
        elif name in names:
            own.append(f"--{name}={value}")
        elif argument in ("-h", "--help"):
            own.append(argument)
        else:
            rest.append(argument)
    return own, texts, rest


def jobs(path: str, config: SweepConfig, texts: Sequence[str], rest: Sequence[str]) -> list[Job]:
    """The runs of a sweep, a seed of each recipe after the other.

    Args:
        path: TOML file of the recipe.
        config: options of the sweep.
        texts: `name=value,value` of each `--set`.
        rest: options of `gpt2 train` for all runs.

    Raises:
        UserError: everything that `gpt2 train` would refuse, for any of the runs.
    """
    fixed = [option_name(argument) for argument in rest if argument.startswith("--")]
    for name in fixed:
        _check_free(name)
    swept = [_values(text) for text in texts]
    _check_once([name for name, _ in swept], fixed)
    if (config.tokens or config.seconds) and "max_steps" in dict(swept):
        raise UserError("--set max_steps= is a budget too; leave --tokens= and --seconds= out")
    grid = [[f"--{name}={value}" for value in values] for name, values in swept]
    recipes = list(itertools.product(*grid))
    seeds = _seeds(config.seeds)
    if len(seeds) * len(recipes) > MOST_RUNS:
        raise UserError(f"{len(seeds) * len(recipes):,} runs; a sweep has at most {MOST_RUNS:,}")
    found = []
    for given, seed in itertools.product(recipes, seeds):
        recipe = ",".join(argument[2:] for argument in given)
        name = re.sub(r"[^\w.=,+-]", "_", f"{recipe},seed={seed}".removeprefix(","))
        folder = Path(config.out_dir, name)
        argv = [f"--config={path}", *rest, *given, f"--seed={seed}", f"--out_dir={folder}"]
        parsed = parse(TrainConfig, argv, "gpt2 train")
        found.append(Job(recipe or Path(path).stem, seed, folder, tuple(argv), parsed))
    folders = [job.folder for job in found]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice:
        raise UserError(f"{twice.name} comes twice in the sweep; name each value and seed once")
    _check_different(found)
    return found


def _check_different(found: Sequence[Job]) -> None:
    """Raises UserError for two runs that train alike, as by 1e-3 and 0.001."""
    seen: dict[tuple, Job] = {}
    for job in found:
        settings = comparable(flatten(job.config)) | {"out_dir": ""}
        other = seen.setdefault(tuple(sorted(settings.items())), job)
        if other is not job:
            raise UserError(
                f"{job.recipe} and {other.recipe} are the same run twice; name each value once"
            )


def _values(text: str) -> tuple[str, list[str]]:
    """The name and the values of a `--set`."""
    name, equals, values = text.removeprefix("--").partition("=")
    name = name.strip().replace("-", "_")
    found = [value.strip() for value in values.split(";" if ";" in values else ",")]
    if not equals or not name or not all(found):
        raise UserError(f"--set {text or '(nothing)'}: write --set muon_lr=0.01,0.02")
    _check_free(name)
    return name, found


def _check_once(names: Sequence[str], fixed: Sequence[str]) -> None:
    """Raises UserError for an option of two --set, or of --set and for all runs; one would hold.

    Args:
        names: options of --set.
        fixed: options for all runs.
    """
    alias = {f.metadata["alias"]: f.name for f in fields_of(TrainConfig)}
    own = [alias.get(name, name) for name in names]
    if twice := [name for name in own if own.count(name) > 1]:
        raise UserError(
            f"--set {twice[0]}= comes twice; give all its values in one, as {twice[0]}=a,b"
        )
    if both := [name for name in own if name in {alias.get(n, n) for n in fixed}]:
        raise UserError(
            f"--{both[0]}= is for all runs, and --set {both[0]}= for some; give all its values in "
            "--set"
        )


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds={text}: write whole numbers, as in --seeds=1,2,3") from None
    for seed in seeds:
        check_seed(seed)
    return seeds


def _check_free(name: str) -> None:
    """Raises UserError for an option of training that a sweep sets for each run."""
    if name in OF_THE_SWEEP:
        raise UserError(f"a sweep sets --{name}= of each run; use {OF_THE_SWEEP[name]}")
