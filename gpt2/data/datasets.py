"""The datasets of a run: folders of shards, their shares, and how a resumed run finds them again.

A checkpoint stores the identity of every shard. A resumed run compares it with the folders of
today, so that it continues on the data on which it began.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ..config.train import DataOptions
from ..errors import UserError
from .loader import available_eval_tokens
from .sequence_order import Mixture, SequenceOrder
from .shards import SequenceReader, find_shards

Identity = list[list]  # [name, tokens, sha256 of samples] of each shard of a dataset


@dataclass(frozen=True)
class Dataset:
    """A folder of shards whose headers have been checked."""

    folder: Path
    share: float  # of the sequences of the run; the shares of all datasets sum to 1
    train: Sequence[SequenceReader]
    val: Sequence[SequenceReader]
    identity: Identity = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the folder, by which a dataset is known."""
        return os.path.basename(os.path.abspath(self.folder))

    def name_of(self, shard: SequenceReader) -> str:
        """Path of a shard, relative to the folder."""
        return Path(os.path.relpath(shard.path, self.folder)).as_posix()


@dataclass(frozen=True)
class MixStart:
    """Where a mixture begins."""

    began: int = 0  # sequences that the run had consumed
    before: Sequence[int] = ()  # sequences of each dataset among those


def open_datasets(text: str, with_training: bool = True) -> list[Dataset]:
    """The datasets of `--data_dir=`: one folder, or several as `folder:weight,folder:weight`.

    Args:
        text: value of the option.
        with_training: False: the folders need no training shards.

    Raises:
        UserError: a weight that is missing or not above 0, two folders of one name, a folder
            without shards, a damaged header.
    """
    parts = parse_mix(text)
    total = math.fsum(weight for _, weight in parts)
    datasets = [
        Dataset(
            folder=Path(folder),
            share=weight / total,
            train=find_shards(folder, "train") if with_training else [],
            val=find_shards(folder, "val"),
        )
        for folder, weight in parts
    ]
    for dataset in datasets:
        if not any(shard.tokens > 1 for shard in dataset.val):
            raise UserError(f"{dataset.folder}: the validation shards hold no text")
        if sum(other.name == dataset.name for other in datasets) > 1:
            raise UserError(
                f"--data_dir={text}: two of the folders are named {dataset.name}; datasets are "
                "told apart by the names of their folders, so rename one"
            )
    return datasets


def parse_mix(text: str) -> list[tuple[str, float]]:
    """The (folder, weight) pairs of `folder:weight,folder:weight`.

    If the whole text names a folder, it is that folder. Only a number after the last colon is a
    weight: `C:\\data` is a folder.
    """
    if os.path.isdir(text):
        return [(text, 1.0)]
    pieces = text.split(",")
    parts = []
    for piece in pieces:
        folder, colon, number = piece.rpartition(":")
        weight = _number(number) if colon else None
        if weight is None:
            folder, weight = piece, 1.0
            if len(pieces) > 1:
                raise UserError(
                    f"--data_dir={text}: {piece!r} has no weight; "
                    "a mix is written --data_dir=fineweb:0.8,code:0.2"
                )
        if not 0 < weight <= 1e9:
            raise UserError(f"--data_dir={text}: use a weight above 0 and up to 1e9, not {number}")
        if not folder:
            raise UserError(f"--data_dir={text}: the name of a folder is missing")
        parts.append((folder, weight))
    return parts


def build_mixture(
    datasets: list[Dataset], data: DataOptions, block_size: int, seed: int, start: MixStart
) -> Mixture:
    """The order of the sequences of all datasets."""
    orders = [
        SequenceOrder(d.train, block_size, seed, data.shuffle, data.sequence_start)
        for d in datasets
    ]
    return Mixture(orders, [d.share for d in datasets], start.began, start.before)


def split_eval_tokens(datasets: list[Dataset], eval_tokens: int) -> list[int]:
    """Tokens of each dataset that validation predicts: its share, or all of a small dataset."""
    ends = [0, *(round(eval_tokens * upto) for upto in accumulate(d.share for d in datasets))]
    asked = [max(1, end - begin) for begin, end in pairwise(ends)]
    return [available_eval_tokens(d.val, n) for d, n in zip(datasets, asked, strict=True)]


# ---- resuming: are these the shards of the checkpoint? -------------------------------------------


def identify(dataset: Dataset) -> Identity:
    """Name, size and fingerprint of each shard, without reading the shards in full.

    Raises:
        UserError: a damaged shard.
    """
    shards = [*dataset.train, *dataset.val]
    return sorted([dataset.name_of(s), s.tokens, s.fingerprint()] for s in shards)


def remember(datasets: list[Dataset], mixture: Mixture, position: int) -> dict[str, Any]:
    """The state of the datasets as plain values, which a checkpoint stores for `continue_mix`."""
    consumed = mixture.consumed(position)
    described = [
        {
            "name": dataset.name,
            "share": dataset.share,
            "before": mixture.before[i],
            "consumed": consumed[i],
            "shards": dataset.identity,
        }
        for i, dataset in enumerate(datasets)
    ]
    return {"began": mixture.began, "datasets": described}


def continue_mix(
    datasets: list[Dataset], stored: dict[str, Any], position: int, path: Path
) -> tuple[list[Dataset], MixStart, list[str]]:
    """Continues the datasets where a checkpoint left them.

    A dataset is recognised by the name of its folder or, if the folder was renamed, by its shards.
    Shards that were added since the checkpoint are left out, because they would change the order of
    all sequences. If the datasets or their shares have changed, a new mixture begins here, and each
    dataset continues at its own position.

    Args:
        datasets: the datasets of `--data_dir=` today, with identities.
        stored: the values of `remember` in the checkpoint.
        position: sequences that the run has consumed.
        path: of the checkpoint, for messages.

    Returns:
        (the datasets without added shards, where their mixture begins, notes to print).

    Raises:
        UserError: a shard of the checkpoint has changed or is missing.
    """
    known, notes = stored["datasets"], []
    now: list[Dataset] = []
    before: list[dict | None] = []
    for dataset in datasets:
        old = next((k for k in known if k["name"] == dataset.name), None)
        if old:
            now.append(_only_known(dataset, old["shards"], path))
            if added := len(dataset.identity) - len(old["shards"]):
                notes.append(
                    f"{dataset.name}: shards that were added since {path} was saved are left out "
                    f"({added}); --resume=never starts over with all"
                )
        else:
            now.append(dataset)
            old = next((k for k in known if k["shards"] == dataset.identity), None)
            if not old:
                notes.append(f"{dataset.name}: not in {path}, so it is read from its beginning")
        before.append(old)
    if before == known and [d.share for d in datasets] == [old["share"] for old in known]:
        return now, MixStart(stored["began"], [old["before"] for old in known]), notes
    return now, MixStart(position, [old["consumed"] if old else 0 for old in before]), notes


def _only_known(dataset: Dataset, shards: Identity, path: Path) -> Dataset:
    """A dataset with only the shards that the checkpoint lists."""
    now = {shard[0]: shard for shard in dataset.identity}
    for shard in shards:
        name = shard[0]
        if now.get(name) != shard:
            what = "holds other tokens than" if name in now else "is missing; it was there"
            raise UserError(
                f"{dataset.folder / name} {what} when {path} was saved: put that file back, give "
                "the folder another name to go on with it as new text, or use --resume=never"
            )
    names = {shard[0] for shard in shards}
    return replace(
        dataset,
        train=[shard for shard in dataset.train if dataset.name_of(shard) in names],
        val=[shard for shard in dataset.val if dataset.name_of(shard) in names],
        identity=shards,
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
