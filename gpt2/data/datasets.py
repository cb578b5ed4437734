"""The datasets of a run: folders of shards, their shares in a mix, and their identity.

A checkpoint stores the identity of every shard. A resumed run compares these identities with the
shards on disk, so that it continues on unchanged data.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ..config.train import DataOptions
from ..errors import UserError
from ..untrusted.display import shown
from .loader import available_eval_tokens
from .sequence_order import Mixture, SequenceOrder
from .shards import SHARD_NAME, SequenceReader, find_shards

ODD_SHARE = 0.02  # by which a dataset may count more or less than the mix says
Identity = list[list]  # [name, tokens, sha256 of samples] of each shard of a dataset


@dataclass(frozen=True)
class Dataset:
    """A folder of shards with checked headers."""

    folder: Path
    share: float  # share of the run's sequences; shares sum to 1
    train: Sequence[SequenceReader]
    val: Sequence[SequenceReader]
    identity: Identity = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the folder, which identifies the dataset."""
        return os.path.basename(os.path.abspath(self.folder))

    def name_of(self, shard: SequenceReader) -> str:
        """Path of a shard relative to the dataset's folder."""
        return Path(os.path.relpath(shard.path, self.folder)).as_posix()


@dataclass(frozen=True)
class MixStart:
    """Position at which a mixture begins."""

    began: int = 0  # sequences consumed before the mixture
    before: Sequence[int] = ()  # sequences consumed before the mixture, per dataset


def open_datasets(text: str, with_training: bool = True) -> list[Dataset]:
    """Opens the datasets of `--data_dir=`: one folder, or `folder:weight,folder:weight`.

    Args:
        text: value of the option.
        with_training: whether the folders must have training shards.

    Raises:
        UserError: a weight is missing or not positive, two folders have one name, or a folder has
            no shards or a damaged header.
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

    An existing folder is taken whole, also with commas in its name. Only a number after the last
    colon is a weight: `C:\\data` is a folder.
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
    """The mixture of the shuffled sequences of all datasets."""
    orders = [
        SequenceOrder(d.train, block_size, seed, data.shuffle, data.sequence_start)
        for d in datasets
    ]
    return Mixture(orders, [d.share for d in datasets], start.began, start.before)


def split_eval_tokens(datasets: list[Dataset], eval_tokens: int) -> list[int]:
    """Validation tokens per dataset: the dataset's share, or all of a small dataset."""
    asked = asked_eval_tokens(datasets, eval_tokens)
    return [available_eval_tokens(d.val, n) for d, n in zip(datasets, asked, strict=True)]


def asked_eval_tokens(datasets: list[Dataset], eval_tokens: int) -> list[int]:
    """The share of each dataset in the validation tokens that are asked for; at least one token."""
    ends = [0, *(round(eval_tokens * upto) for upto in accumulate(d.share for d in datasets))]
    return [max(1, end - begin) for begin, end in pairwise(ends)]


def what_is_missing(datasets: list[Dataset], have: list[int], asked: int) -> str:
    """Why there are fewer validation tokens than asked for, and what that does to a mix."""
    if sum(have) >= asked:
        return ""
    parts = zip(datasets, have, asked_eval_tokens(datasets, asked), strict=True)
    short = [d.name for d, n, wanted in parts if n < wanted]
    of = f" of {', '.join(short)}" if len(short) < len(datasets) else ""
    counted = "".join(f"; {said}" for said in odd_shares(datasets, have))
    return f" (all there are{of}; {asked:,} were asked for){counted}"


def odd_shares(datasets: list[Dataset], have: list[int]) -> list[str]:
    """Of each dataset that counts otherwise in validation than in the mix, by how much."""
    return [
        f"{d.name} counts {n / sum(have):.0%} of it where the mix has {d.share:.0%}"
        for d, n in zip(datasets, have, strict=True)
        if abs(n / sum(have) - d.share) > ODD_SHARE
    ]


def validation_fingerprint(parts: Iterable[tuple[float, Identity]]) -> str:
    """A hash that is equal for runs whose validation loss is about the same tokens.

    It covers each dataset's share and the samples of its validation shards, not their names.

    Args:
        parts: (share, identity) of each dataset.
    """
    return _fingerprint(parts, of_validation=True)


def training_fingerprint(parts: Iterable[tuple[float, Identity]]) -> str:
    """As `validation_fingerprint`, a hash that is equal for runs on the same training tokens."""
    return _fingerprint(parts, of_validation=False)


def _fingerprint(parts: Iterable[tuple[float, Identity]], of_validation: bool) -> str:
    covered = [
        [
            round(share, 6),
            *(shard[1:] for shard in identity if _is_validation(shard[0]) == of_validation),
        ]
        for share, identity in parts
    ]
    return hashlib.sha256(json.dumps(covered).encode()).hexdigest()


def _is_validation(name: str) -> bool:
    """Whether an identity is of a validation shard, or of the held-out conversations of a file."""
    match = SHARD_NAME.fullmatch(os.path.basename(name))
    return name == "val" or (match is not None and match["split"] == "val")


# ---- resuming: compare the shards with the checkpoint --------------------------------------------


def identify(dataset: Dataset) -> Identity:
    """Name, size and sampled fingerprint of each shard.

    Raises:
        UserError: a shard is damaged.
    """
    shards = [*dataset.train, *dataset.val]
    return sorted([dataset.name_of(s), s.tokens, s.fingerprint()] for s in shards)


def remember(datasets: list[Dataset], mixture: Mixture, position: int) -> dict[str, Any]:
    """Plain values for a checkpoint, from which `continue_mix` restores the datasets."""
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
    """Continues the datasets at the position of a checkpoint.

    A dataset is identified by the name of its folder, or by its shards if the folder was renamed.
    Shards added since the checkpoint are left out, because they would change the order of all
    sequences. Changed datasets or shares begin a new mixture, in which each dataset continues at
    its own position.

    Args:
        datasets: the datasets of `--data_dir=`, with identities.
        stored: the values of `remember` in the checkpoint.
        position: sequences that the run has consumed.
        path: the checkpoint, for messages.

    Returns:
        (datasets without added shards, start of the mixture, notes to print).

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
    if stored["began"] > position:
        raise UserError(f"{path} is damaged: its mixture of datasets begins after its position")
    if before == known and [d.share for d in datasets] == [old["share"] for old in known]:
        return now, MixStart(stored["began"], [old["before"] for old in known]), notes
    return now, MixStart(position, [old["consumed"] if old else 0 for old in before]), notes


def _only_known(dataset: Dataset, shards: Identity, path: Path) -> Dataset:
    """Restricts a dataset to the shards that the checkpoint lists."""
    now = {shard[0]: shard for shard in dataset.identity}
    for shard in shards:
        name = shard[0]
        if now.get(name) != shard:
            what = "holds other tokens than" if name in now else "is missing; it was there"
            raise UserError(
                f"{dataset.folder / shown(name)} {what} when {path} was saved: put that file back, "
                "give the folder another name to go on with it as new text, or use --resume=never "
                "(docs/troubleshooting.md#resume-refused)"
            )
    names = {shard[0] for shard in shards}
    train = [shard for shard in dataset.train if dataset.name_of(shard) in names]
    val = [shard for shard in dataset.val if dataset.name_of(shard) in names]
    if not train or not val:
        raise UserError(f"{path}: not a whole checkpoint (it lists no shards of {dataset.name})")
    return replace(dataset, train=train, val=val, identity=shards)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
