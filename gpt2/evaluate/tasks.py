"""HellaSwag and LAMBADA: reading their items, scoring them, and computing the metrics."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..data.text_files import read_items
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..huggingface.downloads import Downloads
from ..huggingface.hub import OFFLINE, WAY_OUT, HubDataset
from ..model.gpt import LanguageModel
from ..tokenizer import Tokenizer, gpt2_tokenizer
from .scoring import Continuation, score

HUB = "hub"  # instead of the name of a file
DOWNLOADS = Path("data/downloads")


class MultipleChoice(NamedTuple):
    """An item of HellaSwag."""

    endings: list[Continuation]  # each possible ending after the context
    label: int  # index of the right ending


@dataclass(frozen=True)
class Task:
    """A benchmark: its file on the Hub, how a row becomes an item, how a model is scored.

    Args:
        name: in options and metrics.
        repository: dataset on the Hub.
        file: path in the repository.
        read: (row, tokenizer) -> item; raises if the row is none.
        needs: the fields of a row, for the error message.
        ask: (model, items, runtime) -> metrics, or None if a signal asked to stop.
    """

    name: str
    repository: str
    file: str
    read: Callable[[dict[str, Any], Tokenizer], Any]
    needs: str
    ask: Callable[[LanguageModel, list[Any], Runtime], dict[str, float] | None]


def load_items(
    task: Task, spec: str, log: Callable[[str], None], tokenizer: Tokenizer | None = None
) -> list[Any]:
    """Reads the items of a task and encodes them as token ids.

    Args:
        task: HELLASWAG or LAMBADA.
        spec: a .jsonl (also .gz, .xz, .zst) or .parquet file, or "hub" for the one on the Hub,
            which is verified and kept in data/downloads.
        log: gets messages about the download.
        tokenizer: the model's; by default GPT-2's.

    Raises:
        UserError: no such file, a row that is no item, no items, or the download failed.
    """
    path = _download(task, log) if spec == HUB else Path(spec)
    items = []
    for number, fields in read_items(path):
        try:
            items.append(task.read(fields, tokenizer or gpt2_tokenizer()))
        except (AttributeError, KeyError, TypeError, ValueError):  # JSON values of any type
            raise UserError(f"{path}: row {number} is no item; it needs {task.needs}") from None
    if not items:
        raise UserError(f"{path}: holds no items")
    return items


def check_there(spec: str) -> None:
    """Raises UserError for a file of items that does not exist; "hub" is looked up when read."""
    if spec and spec != HUB and not Path(spec).is_file():
        raise UserError(f"{spec}: No such file; or use hub")


def _download(task: Task, log: Callable[[str], None]) -> Path:
    dataset = HubDataset(task.repository, "main", log)
    folder, _, _ = task.file.rpartition("/")
    downloads = Downloads(dataset, DOWNLOADS / task.repository, keep=True, log=log)
    way_out = f"or give a file: --{task.name}=FILE"
    try:
        found = [file for file in dataset.find(folder) if file.name == task.file]
        if not found:
            raise UserError(f"{dataset.page} has no file {task.file}")
        with downloads.open(found[0]) as path:
            log(f"{task.name}: {path}, commit {dataset.revision[:12]} of {task.repository}")
            return path
    except UserError as error:
        text = str(error).removesuffix(WAY_OUT).removesuffix(OFFLINE).rstrip("; ")
        raise UserError(f"--{task.name}={HUB}: {text}; {way_out}") from None
    finally:
        downloads.close()


def _read_multiple_choice(fields: dict[str, Any], tokenizer: Tokenizer) -> MultipleChoice:
    context, endings, label = fields["ctx"], fields["endings"], int(fields["label"])
    if not context.strip() or not isinstance(endings, list) or len(endings) < 2 or not all(endings):
        raise ValueError
    ids = tokenizer.encode(context)
    continuations: list[Continuation] = [(ids, tokenizer.encode(" " + e)) for e in endings]
    if not 0 <= label < len(continuations):
        raise ValueError
    return MultipleChoice(continuations, label)


def _ask_hellaswag(
    model: LanguageModel, items: list[MultipleChoice], rt: Runtime
) -> dict[str, float] | None:
    """HellaSwag (Zellers et al. 2019) in the completion style of build-nanogpt and llm.c.

    Each ending, with a space before it, is scored as the continuation of the unchanged `ctx`. `acc`
    picks the ending with the smallest sum of nats, `acc_norm` the smallest mean per token.

    The hellaswag task of lm-evaluation-harness reports different numbers: it cleans the context,
    prepends the activity label, and its acc_norm divides by the characters of an ending.
    """
    scores = score(model, [ending for item in items for ending in item.endings], rt, "HellaSwag")
    if scores is None:
        return None
    right = right_norm = first = 0
    for item in items:
        of_item = scores[first : first + len(item.endings)]
        first += len(item.endings)
        sums = [s.nats for s in of_item]
        means = [s.nats / s.tokens for s in of_item]
        right += sums.index(min(sums)) == item.label
        right_norm += means.index(min(means)) == item.label
    return {
        "hellaswag_acc_norm": right_norm / len(items),
        "hellaswag_acc": right / len(items),
        "hellaswag_items": len(items),
    }


def _read_last_word(fields: dict[str, Any], tokenizer: Tokenizer) -> Continuation:
    context, space, word = fields["text"].rstrip().rpartition(" ")
    if not space or not context.strip():
        raise ValueError
    return tokenizer.encode(context), tokenizer.encode(" " + word)


def _ask_lambada(
    model: LanguageModel, items: list[Continuation], rt: Runtime
) -> dict[str, float] | None:
    """LAMBADA (Paperno et al. 2016), like lambada_openai of lm-evaluation-harness.

    The last word of `text`, with the space before it, is the continuation of the rest. `acc` counts
    words of which greedy decoding generates every token. `perplexity` is exp of the mean nats per
    word, not per token.
    """
    scores = score(model, items, rt, "LAMBADA")
    if scores is None:
        return None
    mean_nats = sum(s.nats for s in scores) / len(scores)
    return {
        "lambada_acc": sum(s.greedy for s in scores) / len(scores),
        "lambada_perplexity": math.exp(mean_nats) if mean_nats < 700 else math.inf,
        "lambada_items": len(scores),
    }


HELLASWAG = Task(
    name="hellaswag",
    repository="Rowan/hellaswag",
    file="data/validation-00000-of-00001.parquet",
    read=_read_multiple_choice,
    needs="`ctx`, a list `endings`, and the number of the right one as `label`",
    ask=_ask_hellaswag,
)
LAMBADA = Task(
    name="lambada",
    repository="EleutherAI/lambada_openai",
    file="data/lambada_test_en.jsonl",
    read=_read_last_word,
    needs="a `text` of two words or more",
    ask=_ask_lambada,
)
