"""The validation data of a checkpoint's run, as `gpt2 eval` finds them again.

Conversations are held out by their places in a file. The share is in the config.toml beside the
checkpoint, and history.jsonl has a fingerprint of the tokens.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint import weights
from ..config.command_line import read_toml
from ..config.commands import EvalConfig
from ..config.run_paths import CONFIG_FILE, from_here
from ..data.conversations import Conversations, check_eval_tokens, open_conversations
from ..data.datasets import Dataset, identify, parse_mix, validation_fingerprint
from ..distributed.environment import is_first_rank
from ..errors import UserError
from ..report import console, metrics

Settings = dict[str, Any]


def settings_of_run(place: Path) -> Settings:
    """The config.toml in the folder of a run, or beside a checkpoint; {} if there is none."""
    beside = folder_of_run(place) / CONFIG_FILE
    try:
        return from_here(beside, read_toml(beside))
    except (OSError, ValueError):
        return {}


def folder_of_run(place: Path) -> Path:
    """The folder that a run or its checkpoint names, where the files of the run lie."""
    return place if (place / CONFIG_FILE).is_file() else place.absolute().parent


def open_eval_conversations(
    data: str, place: Path, config: EvalConfig, found: weights.Weights
) -> list[Dataset]:
    """The conversations of `--data=` that the run held out; of files it did not have, all.

    Args:
        data: value of the option, or the run's.
        place: of the checkpoint.
        config: its block_size is resolved.
        found: the checkpoint.

    Raises:
        UserError: no run tells what was held out, or its rows have another length.
    """
    settings = settings_of_run(place)
    if "val_share" not in settings:
        raise UserError(
            f"{data}: which conversations were held out stands in the config.toml beside a "
            "checkpoint of `gpt2 finetune`, and there is none; use --text= or shards"
        )
    length, share = settings["block_size"], settings["val_share"]
    if _is_of_run(data, place, settings, found):
        if config.block_size != length:  # rows would be cut elsewhere
            fits = length <= found.config.block_size
            advice = f"use --block_size={length}" if fits else "evaluate a checkpoint of that run"
            raise UserError(
                f"{data} was packed for the run's block_size={length}, and this evaluation has "
                f"{config.block_size}; {advice}"
            )
    else:
        length, share = config.block_size, None
    datasets, _ = open_conversations(data, length, share, found.tokenizer)
    check_eval_tokens(config.eval_tokens, datasets, length)
    for dataset in datasets if is_first_rank() else ():
        held, rest = (sum(len(c) for s in shards for c in s.packed) for shards in _splits(dataset))
        what = "held out by the run" if rest else "none of them of the run"
        console.log(f"{dataset.name}: {held:,} of {held + rest:,} conversations, {what}")
    return datasets


def _splits(dataset: Dataset) -> Iterator[Iterator[Conversations]]:
    for shards in (dataset.val, dataset.train):
        yield (shard for shard in shards if isinstance(shard, Conversations))


def _is_of_run(data: str, place: Path, settings: Settings, found: weights.Weights) -> bool:
    """Whether these are the run's files, by their names or by their tokens."""
    names = {Path(name).name for name, _ in parse_mix(data)}
    if names & {Path(name).name for name, _ in parse_mix(str(settings.get("data_dir", "")))}:
        return True  # perhaps moved, or changed since
    known = _fingerprint_of_run(place)
    try:
        length, share = settings["block_size"], settings["val_share"]
        return known == fingerprint(open_conversations(data, length, share, found.tokenizer)[0])
    except UserError:  # too few conversations to hold some out
        return False


def fingerprint(datasets: list[Dataset]) -> str:
    """Of the validation tokens, as history.jsonl has it."""
    return validation_fingerprint((d.share, identify(d)) for d in datasets)


def _fingerprint_of_run(place: Path) -> str | None:
    history = folder_of_run(place) / metrics.HISTORY
    starts = metrics.read_metrics(history) if history.is_file() else []
    known = [start["validation"] for start in starts if isinstance(start.get("validation"), str)]
    return known[-1] if known else None


def check_held_out(place: Path, data_dir: str, datasets: list[Dataset]) -> None:
    """Raises UserError where the data of the run hold out other tokens than the run did.

    Conversations are held out by their places in the file, so that a changed file would hold out
    some that the model was trained on. A run without history.jsonl does not tell.
    """
    known = _fingerprint_of_run(place)
    if known and known != fingerprint(datasets):
        raise UserError(
            f"{data_dir} has changed since the run: its validation tokens are others, and some may "
            f"have been trained on; put the earlier data back, or use --data_dir={data_dir} to "
            "evaluate on these tokens in any case"
        )
