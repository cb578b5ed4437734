"""Files of conversations as training data: encoded, truncated to the context, packed.

Packing fills each sequence of block_size tokens with whole conversations. Attention stays within a
conversation (`model/packed_documents.py`). Packed sequences have the interface of a shard, so that
order, loader and checkpoints need no special case.

Shapes: `T` block_size.
"""

import contextlib
import hashlib
import re
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..config.command_line import read_toml
from ..config.model import GPT2_VOCAB_SIZE, IGNORE
from ..config.options import at_least
from ..errors import UserError
from ..tokenizer import Tokenizer, gpt2_tokenizer
from ..untrusted.display import shown
from ..untrusted.parsing import load_json
from ..untrusted.templates import OURS, template_source
from .chat_formats import messages_of, unread_keys
from .chat_template import encode_conversation
from .datasets import Dataset, parse_mix
from .model_template import is_learned
from .shards import SequenceReader
from .text_files import read_items

CHAT_FILE = re.compile(r"\.(jsonl?(\.(gz|xz|zst))?|parquet)$", re.IGNORECASE)
MOST_KEYS = 8  # that the line about a file names
TEXT_FILE = re.compile(r"\.txt(\.(gz|xz|zst))?$", re.IGNORECASE)


@dataclass
class ConversationCounts:
    """Number of conversations of a file: read, truncated, left out."""

    read: int = 0
    truncated: int = 0  # the end was cut off to fit the context
    left_out: int = 0  # without a text of the assistant within the context
    beyond: int = 0  # of those left out: the assistant's text begins behind the context
    # rows with a key that is not read, by key
    unread: Counter[str] = field(default_factory=Counter)


class Conversations(SequenceReader):
    """Packed conversations, with the interface of a shard.

    Args:
        path: name in messages and checkpoints.
        encoded: (ids, learned) of each conversation, at most block_size + 1 tokens each.
        block_size: T.
        vocab_size: ids are below it.

    Attributes:
        packed: indices of the conversations in each sequence.
    """

    def __init__(
        self,
        path: Path,
        encoded: list[tuple[list[int], list[bool]]],
        block_size: int,
        vocab_size: int = GPT2_VOCAB_SIZE,
    ):
        self.path, self.block_size = path, block_size
        kind = np.uint16 if vocab_size <= 2**16 else np.uint32
        lengths = [len(ids) for ids, _ in encoded]
        self._ends = np.cumsum([0, *lengths])
        self._ids = np.fromiter(chain.from_iterable(i for i, _ in encoded), kind)
        self._learned = np.fromiter(chain.from_iterable(m for _, m in encoded), bool)
        self.packed = pack([n - 1 for n in lengths], block_size)
        self.tokens = len(self.packed) * block_size + 1

    def sequence(self, start: int, count: int) -> tuple[np.ndarray, ...]:
        """(inputs, targets, begins) of the sequence at token `start`, each (count,) int64.

        Only the assistant's tokens are targets; the rest is `IGNORE`. `begins` holds for each token
        the position at which its conversation begins.
        """
        sequence, offset = divmod(start, self.block_size)
        assert not offset, start
        x, begins = np.zeros(self.block_size, np.int64), np.arange(self.block_size)
        y, at = np.full_like(x, IGNORE), 0
        for number in self.packed[sequence]:
            first, end = self._ends[number : number + 2]
            upto = at + end - first - 1
            x[at:upto] = self._ids[first : end - 1]
            targets, learned = self._ids[first + 1 : end], self._learned[first + 1 : end]
            y[at:upto] = np.where(learned, targets.astype(np.int64), IGNORE)
            begins[at:upto] = at
            at = upto
        return x[:count], y[:count], begins[:count]

    def fingerprint(self) -> str:
        """sha256 over all packed sequences."""
        digest = hashlib.sha256(repr((self.block_size, self.packed)).encode())
        for part in (self._ids, self._learned, self._ends):
            digest.update(part.tobytes())
        return digest.hexdigest()

    def shares(self) -> tuple[float, float]:
        """(share of positions that hold tokens, share of tokens that are learned)."""
        used = self._ends[-1] - (len(self._ends) - 1)
        return used / (self.tokens - 1), self._learned.sum() / used


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Bin packing by best-fit decreasing: longest first, each into the fullest bin with room.

    At most 11/9 of the optimal number of bins are used (Johnson 1973).

    Args:
        lengths: length of each item, from 1 to `room`.
        room: capacity of a bin.

    Returns:
        The indices of the items in each bin.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), ascending
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(free, (lengths[item], -1))
        if at == len(free):
            free.append((room, len(bins)))
            bins.append([])
        left, chosen = free.pop(at)
        bins[chosen].append(item)
        insort(free, (left - lengths[item], chosen))
    return bins


def is_chat(text: str) -> bool:
    """Whether `--data=` names files of conversations, not folders of shards.

    Raises:
        UserError: a name is a file of another kind, or a folder of conversations; files and folders
            are mixed.
    """
    names = [name for name, _ in parse_mix(text)]
    if plain := [name for name in names if TEXT_FILE.search(name) and not Path(name).is_dir()]:
        raise UserError(
            f"--data={plain[0]}: text becomes shards first: gpt2 prepare --source={plain[0]} "
            "--out_dir=data/text, then --data=data/text"
        )
    for name in names:
        _check_kind(name)
    chats = [bool(CHAT_FILE.search(name)) and not Path(name).is_dir() for name in names]
    if any(chats) and not all(chats):
        raise UserError(f"--data={text}: files of conversations and folders of shards do not mix")
    return all(chats)


def _check_kind(name: str) -> None:
    """Raises UserError for a file that holds no conversations, and for a folder of such files."""
    path = Path(name)
    if path.is_file() and not CHAT_FILE.search(name):
        raise UserError(
            f"--data={name}: conversations are read from .jsonl and .json (both also .gz, .xz, "
            ".zst) and .parquet; convert this file. Shards are named by their folder"
        )
    if path.is_dir() and not any(path.glob("*.bin")):
        files = sorted(p for kind in ("*.jsonl*", "*.parquet") for p in path.glob(kind))
        if files:
            raise UserError(
                f"--data={name}: the folder holds no shards; conversations are named as files, "
                f"--data={files[0]}; text becomes shards first, by gpt2 prepare --source={name}"
            )


def was_chat(source: Path) -> bool:
    """Whether a model has learned conversations.

    That is what the config.toml in its folder, or beside its checkpoint, names as data; or there is
    the chat template that `gpt2 export` writes for such a model.
    """
    inside = source / "config.toml"
    if OURS.fullmatch(_template_in(source if source.is_dir() else source.absolute().parent)):
        return True
    beside = inside if inside.is_file() else source.absolute().parent / "config.toml"
    try:
        settings = read_toml(beside) if beside.is_file() else {}
        return is_chat(str(settings["data_dir"]))
    except (OSError, ValueError, KeyError):
        return False


def _template_in(folder: Path) -> str:
    """The chat template in a folder of Hugging Face's layout; "" without one."""
    path, settings, jinja = folder / "tokenizer_config.json", {}, None
    with contextlib.suppress(OSError, UserError):
        settings = load_json(path.read_bytes(), str(path), dict)
    with contextlib.suppress(OSError):
        jinja = (folder / "chat_template.jinja").read_bytes()
    return template_source(settings, jinja)


def chat_kind(source: Path, network: Any, tokenizer: Tokenizer) -> str:
    """Whether a model can chat.

    Args:
        source: its file or folder, as `checkpoint.weights.locate` finds it.
        network: its configuration.
        tokenizer: its tokenizer; a chat template means that it learned conversations.

    Returns:
        trained (on conversations), untrained, or impossible (document_mask hides earlier messages).
    """
    if getattr(network, "document_mask", False):
        return "impossible"
    return "trained" if tokenizer.template or was_chat(source) else "untrained"


def open_conversations(
    text: str, block_size: int, val_share: float | None, tokenizer: Tokenizer | None = None
) -> tuple[list[Dataset], list[str]]:
    """Opens the files of conversations of `--data=`: one, or `a.jsonl:0.8,b.jsonl:0.2`.

    Args:
        text: value of the option.
        block_size: tokens per sequence.
        val_share: share of each file's conversations that is held out for validation; None: all,
            and none is for training.
        tokenizer: the model's; by default GPT-2's.

    Returns:
        (a dataset per file, a line to print per file).

    Raises:
        UserError: a row is not a conversation, or a file has too few conversations.
    """
    parts = parse_mix(text)
    total = sum(weight for _, weight in parts)
    datasets: list[Dataset] = []
    lines: list[str] = []
    for name, weight in parts:
        dataset, line = _open(Path(name), weight / total, block_size, val_share, tokenizer)
        if any(dataset.name == other.name for other in datasets):
            raise UserError(f"--data={text}: two of the files are named {dataset.name}; rename one")
        datasets.append(dataset)
        lines.append(line)
    return datasets, lines


def _open(
    path: Path, share: float, block_size: int, val_share: float | None, tokenizer: Tokenizer | None
) -> tuple[Dataset, str]:
    counts, tokenizer = ConversationCounts(), tokenizer or gpt2_tokenizer()
    encoded = list(_encode(path, block_size, counts, tokenizer))
    if val_share is None:
        if not encoded:
            raise UserError(f"{path}: no answer of the assistant within {block_size} tokens")
        val = Conversations(path / "val", encoded, block_size, tokenizer.vocab_size)
        line = f"{path.name}: all {len(encoded):,} conversations{_unread(counts)}"
        return Dataset(folder=path, share=share, train=[], val=[val]), line
    held = max(1, round(val_share * len(encoded)))
    if len(encoded) <= held:
        left = f" ({counts.left_out:,} have nothing to learn from)" if counts.left_out else ""
        several = "s" * (len(encoded) != 1)
        if 2 * counts.beyond > counts.left_out:
            raise UserError(
                f"{path} gives {len(encoded):,} conversation{several}: in {counts.beyond:,} the "
                f"assistant's text begins behind the context of block_size={block_size} tokens; "
                "use a larger --block_size=, or a model with a longer context"
            )
        smaller = ", or a smaller --val_share" * (len(encoded) > 1)
        raise UserError(
            f"{path} gives {len(encoded):,} conversation{several}{left}; training and validation "
            f"need at least one each: use a file with more{smaller}"
        )
    # The validation set does not depend on the run's seed. numpy keeps Philox's integers stable.
    order = np.argsort(np.random.Philox(key=[0, 0]).random_raw(len(encoded)), kind="stable")
    size = tokenizer.vocab_size
    train, val = (
        Conversations(path / split, [encoded[i] for i in sorted(numbers)], block_size, size)
        for split, numbers in (("train", order[held:]), ("val", order[:held]))
    )
    full, learned = train.shares()
    line = (
        f"{path.name}: {len(encoded) - held:,} conversations in {len(train.packed):,} rows of "
        f"{block_size:,} tokens ({full:.0%} full, {learned:.0%} of the tokens learned), {held:,} "
        f"for validation; {counts.truncated:,} truncated, {counts.left_out:,} left out because "
        f"nothing in them is the assistant's"
        f"{_twice([encoded[i] for i in order[:held]], [encoded[i] for i in order[held:]])}"
        f"{_unread(counts)}"
    )
    return Dataset(folder=path, share=share, train=[train], val=[val]), line


def _twice(
    val: list[tuple[list[int], list[bool]]], train: list[tuple[list[int], list[bool]]]
) -> str:
    """How many held-out conversations are trained on as well, for the line about a file.

    They stay where they are: an earlier run with duplicates would not resume with another split.
    """
    held = [(tuple(ids), tuple(learned)) for ids, learned in val]
    both = set(held).intersection((tuple(ids), tuple(learned)) for ids, learned in train)
    count = sum(one in both for one in held)
    if not count:
        return ""
    return (
        f"; {count:,} of those for validation are trained on as well, so its loss is too low: "
        "leave duplicates out of the file"
    )


def _unread(counts: ConversationCounts) -> str:
    """What rows say that is not learned, for the line about a file."""
    listed = [f"{shown(key)} ({n:,} rows)" for key, n in counts.unread.most_common(MOST_KEYS)]
    more = " …" if len(counts.unread) > MOST_KEYS else ""
    return f"; not read: {', '.join(listed)}{more}" if listed else ""


def _encode(
    path: Path, block_size: int, counts: ConversationCounts, tokenizer: Tokenizer
) -> Iterator[tuple[list, list]]:
    """Yields (ids, learned) of conversations with a target, cut to block_size + 1 tokens."""
    for number, item in read_items(path):
        try:
            messages = messages_of(item)
            ids, learned = encode_conversation(messages, block_size + 1, tokenizer)
        except UserError as error:
            raise UserError(f"{path}: row {number}: {error}") from None
        counts.read += 1
        counts.unread.update(unread_keys(item))
        short, mask = ids[: block_size + 1], learned[: block_size + 1]
        counts.truncated += len(short) < len(ids) and any(mask)
        # An empty answer has only its end-of-text token and teaches nothing.
        teaches = any(a and b for a, b in pairwise(mask)) or (any(mask) and len(short) < len(ids))
        counts.left_out += not teaches
        counts.beyond += not teaches and any(is_learned(m) and m["content"] for m in messages)
        if teaches:
            yield short, mask


def check_eval_tokens(eval_tokens: int, datasets: list[Dataset], block_size: int) -> None:
    """Raises UserError if `eval_tokens` is too small for one whole sequence of each file."""
    at_least(int(block_size / min(d.share for d in datasets)), eval_tokens=eval_tokens)
