"""Files of conversations as training data: read, cut to the context, packed into rows.

A row holds as many whole conversations as fit; `packed` keeps them from seeing one another. To the
order of sequences, the loader and the checkpoints, the rows of a file are one more shard.

Shapes: `T` block_size.
"""

import hashlib
import json
import re
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..config.model import IGNORE
from ..config.options import at_least
from ..errors import UserError
from .chat_template import encode_conversation, messages_of
from .datasets import Dataset, parse_mix
from .shards import SequenceReader
from .text_files import read_items

CHAT_FILE = re.compile(r"\.(jsonl?(\.(gz|xz|zst))?|parquet)$", re.IGNORECASE)
TEXT_FILE = re.compile(r"\.txt(\.(gz|xz|zst))?$", re.IGNORECASE)


@dataclass
class Counts:
    """What became of the conversations of a file."""

    read: int = 0
    truncated: int = 0  # longer than the context; their end is cut off
    left_out: int = 0  # nothing of the assistant's in them, or in what the context holds


class Conversations(SequenceReader):
    """Rows of conversations, as a shard of one sequence a row.

    Args:
        path: a name for messages and checkpoints.
        encoded: (ids, learned) of each conversation, at most block_size + 1 tokens each.
        block_size: T.
    """

    def __init__(self, path: Path, encoded: list[tuple[list[int], list[bool]]], block_size: int):
        self.path, self.block_size = path, block_size
        lengths = [len(ids) for ids, _ in encoded]
        self._ends = np.cumsum([0, *lengths])
        self._ids = np.fromiter(chain.from_iterable(i for i, _ in encoded), np.uint16)
        self._learned = np.fromiter(chain.from_iterable(m for _, m in encoded), bool)
        self.rows = pack([n - 1 for n in lengths], block_size)
        self.tokens = len(self.rows) * block_size + 1

    def sequence(self, start: int, count: int) -> tuple[np.ndarray, ...]:
        """(inputs, targets, begins) of the row that begins at token `start`, each (count,) int64.

        Targets are `IGNORE` but for the assistant's; begins: see `packed.Packed`.
        """
        row, offset = divmod(start, self.block_size)
        assert not offset, start
        x, begins = np.zeros(self.block_size, np.int64), np.arange(self.block_size)
        y, at = np.full_like(x, IGNORE), 0
        for number in self.rows[row]:
            first, end = self._ends[number : number + 2]
            upto = at + end - first - 1
            x[at:upto] = self._ids[first : end - 1]
            targets, learned = self._ids[first + 1 : end], self._learned[first + 1 : end]
            y[at:upto] = np.where(learned, targets.astype(np.int64), IGNORE)
            begins[at:upto] = at
            at = upto
        return x[:count], y[:count], begins[:count]

    def fingerprint(self) -> str:
        """sha256 of all that is in the rows."""
        digest = hashlib.sha256(repr((self.block_size, self.rows)).encode())
        for part in (self._ids, self._learned, self._ends):
            digest.update(part.tobytes())
        return digest.hexdigest()

    def shares(self) -> tuple[float, float]:
        """(how full the rows are, which share of the tokens is learned)."""
        used = self._ends[-1] - (len(self._ends) - 1)
        return used / (self.tokens - 1), self._learned.sum() / used


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the items that share a row: the longest first, each where it fits best.

    Best fit decreasing (Johnson 1973) needs at most 11/9 of the fewest rows.

    Args:
        lengths: from 1 to room.
        room: of a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), ascending
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(free, (lengths[item], -1))
        if at == len(free):
            free.append((room, len(rows)))
            rows.append([])
        left, row = free.pop(at)
        rows[row].append(item)
        insort(free, (left - lengths[item], row))
    return rows


def is_chat(text: str) -> bool:
    """Whether `--data=` names files of conversations, and not folders of shards.

    Raises:
        UserError: a file of text, or folders beside files.
    """
    names = [name for name, _ in parse_mix(text)]
    if plain := [name for name in names if TEXT_FILE.search(name) and not Path(name).is_dir()]:
        raise UserError(
            f"--data={plain[0]}: text becomes shards first: gpt2 prepare --source={plain[0]} "
            "--out_dir=data/text, then --data=data/text"
        )
    chats = [bool(CHAT_FILE.search(name)) and not Path(name).is_dir() for name in names]
    if any(chats) and not all(chats):
        raise UserError(f"--data={text}: files of conversations and folders of shards do not mix")
    return all(chats)


def open_conversations(text: str, block_size: int, val_share: float) -> tuple[list[Dataset], list]:
    """(datasets, a line on each) of `--data=`: one file, or several as `a.jsonl:0.8,b.jsonl:0.2`.

    Raises:
        UserError: a row that is no conversation, a file with too few of them.
    """
    parts = parse_mix(text)
    total = sum(weight for _, weight in parts)
    datasets, lines = [], []
    for name, weight in parts:
        dataset, line = _open(Path(name), weight / total, block_size, val_share)
        if any(dataset.name == other.name for other in datasets):
            raise UserError(f"--data={text}: two of the files are named {dataset.name}; rename one")
        datasets.append(dataset)
        lines.append(line)
    return datasets, lines


def _open(path: Path, share: float, block_size: int, val_share: float) -> tuple[Dataset, str]:
    counts = Counts()
    encoded = list(_encode(path, block_size, counts))
    held = max(1, round(val_share * len(encoded)))
    if len(encoded) <= held:
        left = f" ({counts.left_out:,} have nothing to learn from)" if counts.left_out else ""
        raise UserError(
            f"{path} gives {len(encoded):,} conversations{left}; training and validation need at "
            "least one each: use a larger file, or a smaller --val_share"
        )
    # the same ones, whatever the seed of the run: Philox is numpy's promise
    order = np.argsort(np.random.Philox(key=[0, 0]).random_raw(len(encoded)), kind="stable")
    train, val = (
        Conversations(path / split, [encoded[i] for i in sorted(numbers)], block_size)
        for split, numbers in (("train", order[held:]), ("val", order[:held]))
    )
    full, learned = train.shares()
    line = (
        f"{path.name}: {len(encoded) - held:,} conversations in {len(train.rows):,} rows of "
        f"{block_size:,} tokens ({full:.0%} full, {learned:.0%} of the tokens learned), {held:,} "
        f"for validation; {counts.truncated:,} truncated, {counts.left_out:,} left out because "
        "nothing in them is the assistant's"
    )
    return Dataset(folder=path, share=share, train=[train], val=[val]), line


def _encode(path: Path, block_size: int, counts: Counts) -> Iterator[tuple[list, list]]:
    """(ids, learned) of the conversations that teach something, at most block_size + 1 tokens."""
    for number, item in _items(path):
        try:
            ids, learned = encode_conversation(messages_of(item))
        except UserError as error:
            raise UserError(f"{path}: row {number}: {error}") from None
        counts.read += 1
        short, mask = ids[: block_size + 1], learned[: block_size + 1]
        counts.truncated += len(short) < len(ids) and any(mask)
        # an empty answer is only the token that ends it
        teaches = any(a and b for a, b in pairwise(mask)) or (any(mask) and len(short) < len(ids))
        counts.left_out += not teaches
        if teaches:
            yield short, mask


def _items(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix.lower() == ".json" and path.is_file():  # Alpaca's own file is one list
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable JSON file ({error})") from None
        if isinstance(values, list):
            if odd := next((n for n, v in enumerate(values, 1) if not isinstance(v, dict)), 0):
                raise UserError(f"{path}: row {odd} is not a JSON object")
            return enumerate(values, 1)
    return read_items(path)


def check_eval_tokens(eval_tokens: int, datasets: list[Dataset], block_size: int):
    """Raises UserError for an evaluation that would not reach a whole row of each file."""
    at_least(int(block_size / min(d.share for d in datasets)), eval_tokens=eval_tokens)
