"""`gpt2 eval`: evaluates a checkpoint on validation shards, a text, HellaSwag and LAMBADA."""

import contextlib
import math
import re
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..api import GPT2, TextModel
from ..checkpoint import weights
from ..config.commands import EvalConfig
from ..config.run_paths import CONFIG_FILE
from ..config.train import EvalOptions, SystemOptions
from ..data.conversations import is_chat
from ..data.datasets import Dataset, odd_shares, open_datasets, parse_mix, split_eval_tokens
from ..data.loader import available_eval_tokens, eval_batches
from ..data.shards import SequenceReader
from ..data.text_encodings import garbled
from ..data.text_files import DOCUMENT_BYTES, TooLong, Unusable, read_marked_rows
from ..data.vocabulary import vocabulary_of
from ..distributed import runtime
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..evaluate.loss import Evaluation, combine, evaluate
from ..evaluate.scoring import BATCH_TOKENS
from ..evaluate.tasks import HELLASWAG, LAMBADA, Task, check_there, load_items
from ..files import check_replaceable, check_writable_file, write_atomically
from ..prepare.sources import ACCEPTED
from ..report import console
from ..tokenizer import Tokenizer
from ..untrusted.parsing import to_json
from .run_data import check_held_out, folder_of_run, open_eval_conversations, settings_of_run

Results = dict[str, Any]
Measurement = Callable[[TextModel, Runtime], Results | None]  # None: a signal asked to stop
TABLE = re.compile(r"\.(csv|tsv|arrow|feather|orc|xlsx?)(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)
LABELS = {  # result -> (its label in the table, number format, result with its sample count)
    "val_loss": ("validation loss (nats per token)", ".4f", "val_tokens"),
    "val_perplexity": ("validation perplexity", ",.2f", "val_tokens"),
    "val_bpb": ("validation bits per byte", ".4f", "val_tokens"),
    "text_loss": ("loss on the text (nats per token)", ".4f", "text_tokens"),
    "text_perplexity": ("perplexity on the text", ",.2f", "text_tokens"),
    "text_bpb": ("bits per byte of the text", ".4f", "text_tokens"),
    "hellaswag_acc_norm": ("HellaSwag acc_norm", ".4f", "hellaswag_items"),
    "hellaswag_acc": ("HellaSwag acc", ".4f", "hellaswag_items"),
    "lambada_acc": ("LAMBADA acc", ".4f", "lambada_items"),
    "lambada_perplexity": ("LAMBADA perplexity (per last word)", ",.2f", "lambada_items"),
}


class TokensInMemory(SequenceReader):
    """Tokens in memory with the interface of a shard."""

    def __init__(self, ids: np.ndarray):
        self._ids, self.tokens = ids, len(ids)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count)."""
        return self._ids[start : start + count]


def run(checkpoint: str, config: EvalConfig) -> int:
    """Evaluates on all ranks of torchrun; prints a table and writes `--json=`.

    Returns:
        Exit code: 0, or 128 + signal when a signal asked to stop.

    Raises:
        UserError: nothing to evaluate on, or unusable input; raised before the model is built.
    """
    started = time.perf_counter()
    if config.json and not Path(config.json).resolve().parent.is_dir():
        raise UserError(f"--json={config.json}: no such folder; make it, or name another file")
    if config.json:
        check_replaceable(Path(config.json), b'{\n  "checkpoint"', "result of `gpt2 eval`")
        check_writable_file(Path(config.json), "--json=")
    system = SystemOptions(device=config.device, dtype=config.dtype)
    with runtime.start(system, console.error, lambda number: console.warn("stopping")) as rt:
        _check_sources(checkpoint, config)
        found = weights.load(checkpoint)
        found.tokenizer.check()
        place = _place(checkpoint)
        config = replace(config, block_size=_resolve_window(place, config.block_size, found))
        measurements = list(_measurements(place, config, rt, found))
        model = GPT2.from_weights(found, str(rt.device))
        results = _describe(checkpoint, found.step, model, config.block_size, rt)
        for measure in measurements:
            part = None if rt.stop_requested() else measure(model, rt)
            if part is None:
                return 128 + (rt.stop_signal or signal.SIGTERM)
            results |= part
        results["seconds"] = round(time.perf_counter() - started, 1)
        if rt.is_main:
            console.log(format_table(results))
            if config.json:
                _write_json(Path(config.json), results)
    return 0


def _check_sources(checkpoint: str, config: EvalConfig) -> None:
    """Raises UserError, before gigabytes of weights are read, for what cannot be evaluated on."""
    if config.text:
        _check_text(config.text)
    for spec in (config.hellaswag, config.lambada):
        check_there(spec)
    if config.data_dir and not is_chat(config.data_dir):
        open_datasets(config.data_dir, with_training=False)
    asked = any((config.data_dir, config.text, config.hellaswag, config.lambada))
    if not asked and not _data_of_run(checkpoint):
        weights.check_there(checkpoint)
        raise UserError(
            "nothing to evaluate on; give one or more of --data_dir=FOLDER, --text=FILE, "
            "--hellaswag=FILE, --lambada=FILE (or hub instead of the last two files)"
        )
    if asked and not (config.data_dir or config.text):
        for name in ("block_size", "eval_tokens"):
            if value := getattr(config, name):
                raise UserError(
                    f"--{name}={value}: for the losses of --data_dir= and --text=; HellaSwag and "
                    "LAMBADA take whole items; leave it out"
                )


def _data_of_run(checkpoint: str) -> str:
    """The `--data_dir=` of a checkpoint's run, which is there; "" if nothing tells it.

    Raises:
        UserError: a file or folder of the run's data is missing.
    """
    place = _place(checkpoint)
    data = str(settings_of_run(place).get("data_dir", ""))
    missing = [name for name, _ in parse_mix(data) if not Path(name).exists()] if data else []
    # A clone brings box-chat, adapters with their config.toml, and without their conversations.
    passed_on = weights.is_adapter(place) and (place / CONFIG_FILE).is_file()
    if missing and not passed_on:
        weights.check_there(checkpoint)
        raise UserError(
            f"{missing[0]} is not here, and the run in {folder_of_run(place)} was trained on it; "
            "put it back, name its new place by --data_dir=, or evaluate on --text=FILE"
        )
    return "" if missing else data


def _place(checkpoint: str) -> Path:
    """Where a checkpoint lies; for a file of a folder that is one model, that folder."""
    return weights.folder_of(weights.locate(checkpoint))


def _resolve_window(place: Path, asked: int, found: weights.Weights) -> int:
    """Tokens of a window of data_dir and of text: `--block_size=`, or as the run had it.

    Adapters bring the context of their base, which may be longer than their run's block_size.

    Raises:
        UserError: more than the model's context is asked for.
    """
    context = found.config.block_size
    if asked > context:
        raise UserError(f"--block_size={asked}: use at most the context, {context}")
    settings = settings_of_run(place)
    of_run = settings.get("block_size") if settings.get("lora_rank") else 0
    if isinstance(of_run, int) and 0 < of_run < context:
        return asked or of_run
    return asked or context


def _check_text(text: str) -> None:
    """Raises UserError for a `--text=` that is missing, or a table whose text it is not."""
    if not Path(text).is_file():
        what = "a folder; name a file" if Path(text).is_dir() else "no such file"
        what += "; standard input is not read: write it into a file first" * (text == "-")
        raise UserError(f"--text={text}: {what}")
    if TABLE.search(text):
        raise UserError(
            f"--text={text}: a table, whose text is in a column; give plain text or a "
            f"{ACCEPTED} file"
        )


def _measurements(
    place: Path, config: EvalConfig, rt: Runtime, found: weights.Weights
) -> Iterator[Measurement]:
    """The measurements that the options ask for; their input is read and checked here."""
    asked = any((config.data_dir, config.text, config.hellaswag, config.lambada))
    tokenizer, of_run = found.tokenizer, {} if asked else settings_of_run(place)
    data_dir = config.data_dir or of_run.get("data_dir", "")
    eval_tokens = config.eval_tokens or of_run.get("eval_tokens") or EvalOptions.eval_tokens
    if data_dir:
        datasets = _open(data_dir, place, replace(config, eval_tokens=eval_tokens), found)
        if not config.data_dir:
            rt.on_main(partial(check_held_out, place, data_dir, datasets))
        counts = split_eval_tokens(datasets, eval_tokens)
        if odd := "; ".join(odd_shares(datasets, counts)):
            rt.on_main(partial(console.warn, f"{data_dir}: {odd}"))
        parts = [(d.name, d.val, n) for d, n in zip(datasets, counts, strict=True)]
        yield partial(_loss, "val", data_dir, parts, config.block_size)
    if config.text:
        shard = TokensInMemory(
            rt.on_main(lambda: _encode(Path(config.text), eval_tokens, tokenizer))
        )
        yield partial(_loss, "text", config.text, [("", [shard], eval_tokens)], config.block_size)
    for task, spec in ((HELLASWAG, config.hellaswag), (LAMBADA, config.lambada)):
        if spec:
            # broadcast: the other ranks may be on machines without the file
            items = rt.on_main(partial(load_items, task, spec, console.log, tokenizer))
            yield partial(_ask, task, spec, items)


def _open(data_dir: str, place: Path, config: EvalConfig, found: weights.Weights) -> list[Dataset]:
    """Folders of shards, or conversations; see `open_eval_conversations`."""
    if not is_chat(data_dir):
        datasets, has = open_datasets(data_dir, with_training=False), vocabulary_of(found.tokenizer)
        for dataset in datasets:
            if dataset.val[0].vocabulary != has:
                raise UserError(
                    f"{dataset.folder} has {dataset.val[0].vocabulary}, and {found.origin} {has}; "
                    "use --text=FILE, or shards of that tokenizer"
                )
        return datasets
    return open_eval_conversations(data_dir, place, config, found)


def _texts(path: Path) -> Generator[str, None, None]:
    """The texts of a file; says in the end how many of the rows that were read have none."""
    left_out, number, first = 0, 0, ""
    try:
        for number, (text, _) in enumerate(read_marked_rows(path), 1):
            if isinstance(text, Unusable):
                left_out, first = left_out + 1, first or f"{text.place}: {text.why}"
            elif isinstance(text, TooLong):
                too_long = f"row {number}: over {DOCUMENT_BYTES // 10**6} MB"
                left_out, first = left_out + 1, first or too_long
            elif text:
                yield text
    finally:
        if left_out:
            console.warn(f"--text={path}: {left_out:,} of {number:,} rows are left out; {first}")


def _encode(path: Path, limit: int, tokenizer: Tokenizer) -> np.ndarray:
    """The first `limit` + 1 token ids of a file, joined like `gpt2 prepare` does."""
    parts, have = [], 0
    with contextlib.closing(_texts(path)) as texts:
        while have < limit and (text := next(texts, None)):
            if why := garbled(text):
                raise UserError(f"--text={path}: {why}")
            parts.append(tokenizer.encode_documents([text])[0])
            have += len(parts[-1])
    if not parts:
        raise UserError(f"--text={path}: holds no text")
    return np.concatenate(parts)[: limit + 1]


def _loss(  # noqa: PLR0917
    kind: str,
    source: str,
    parts: list[tuple[str, Sequence[SequenceReader], int]],
    block_size: int,
    model: TextModel,
    rt: Runtime,
) -> Results | None:
    """Loss over datasets (name, shards, tokens), computed like the validation loss of training."""
    found: dict[str, Evaluation] = {}
    for name, shards, tokens in parts:
        rows = BATCH_TOKENS[rt.device.type] // block_size
        # A short batch is padded, and padding takes time like text.
        needed = math.ceil(available_eval_tokens(shards, tokens) / block_size / rt.world_size)
        batches = eval_batches(
            shards,
            block_size=block_size,
            batch_size=max(1, min(rows, needed)),
            eval_tokens=tokens,
            rank=rt.rank,
            world_size=rt.world_size,
            device=rt.device,
        )
        result = evaluate(model, batches, rt, model.tokenizer)
        if result is None:
            return None
        found[name] = result
    whole = combine(found.values())
    several = found if len(found) > 1 else {}
    return {
        f"{kind}_loss": whole.loss,
        f"{kind}_perplexity": whole.perplexity,
        f"{kind}_bpb": whole.bits_per_byte,
        f"{kind}_tokens": whole.tokens,
        f"{kind}_source": source,
        **{f"{kind}_loss_{name}": part.loss for name, part in several.items()},
        **{f"{kind}_tokens_{name}": part.tokens for name, part in several.items()},
    }


def _ask(task: Task, spec: str, items: list[Any], model: TextModel, rt: Runtime) -> Results | None:
    results = task.ask(model, items, rt)
    return results and results | {f"{task.name}_source": spec}


def _describe(
    checkpoint: str, step: int | None, model: TextModel, block_size: int, rt: Runtime
) -> Results:
    return {
        "checkpoint": checkpoint,
        "step": step,
        "parameters": model.num_parameters(),
        "block_size": block_size,
        "device": rt.device_name,
        "dtype": str(rt.dtype).removeprefix("torch."),
        "ranks": rt.world_size,
    }


def format_table(results: Results) -> str:
    """The results as text: a line about the checkpoint, then one for each metric."""
    step = "" if results["step"] is None else f"step {results['step']:,}, "
    head = (
        f"{results['checkpoint']}: {step}{results['parameters']:,} parameters; "
        f"{results['device']}, {results['dtype']}, {results['seconds']:,} s"
    )
    lines = [head]
    for name, (label, form, count) in LABELS.items():
        if name in results:
            number, unit = results[count], count.partition("_")[2]
            lines.append(f"  {label:<36}{results[name]:>12{form}}  over {number:,} {unit}")
    for name in (n for n in results if n.startswith("val_loss_")):
        dataset = name.removeprefix("val_loss_")
        number = results[f"val_tokens_{dataset}"]
        lines.append(f"  {f'loss on {dataset}':<36}{results[name]:>12.4f}  over {number:,} tokens")
    return "\n".join(lines)


def _write_json(path: Path, results: Results) -> None:
    plain = {  # JSON has no infinity
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in results.items()
    }
    try:
        write_atomically(path, to_json(plain, indent=2, allow_nan=False), b"\n")
    except OSError as error:
        raise UserError(f"--json={path}: {error.strerror or error}") from None
