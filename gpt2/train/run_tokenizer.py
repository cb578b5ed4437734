"""The vocabulary of a run: that of its shards, or of the model that learns conversations.

GPT-2's is the default. Shards of another tokenizer name it in their manifest; a run takes the
number of rows of its network, the token between documents and the tokenizer itself from there.
"""

from dataclasses import replace
from pathlib import Path

from ..checkpoint.training_state import STATE_FILE, Resumed
from ..checkpoint.weights import Weights
from ..config.finetune import tuning_options
from ..config.train import TrainConfig
from ..data.conversations import is_chat
from ..data.datasets import parse_mix
from ..data.shards import SHARD_MANIFEST
from ..data.vocabulary import GPT2_VOCABULARY, Vocabulary, of_shards, vocabulary_of
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..huggingface.kept_tokenizer import stored_tokenizer, to_store
from ..huggingface.shard_tokenizer import tokenizer_beside
from ..tokenizer import Tokenizer


def resolve_vocabulary(config: TrainConfig) -> TrainConfig:
    """The settings with `vocab_size` of the shards, if it is not GPT-2's.

    Raises:
        UserError: shards of several tokenizers, or another `--vocab_size`.
    """
    data, given = config.data.data_dir, config.model.vocab_size
    vocabulary = data_vocabulary(config)
    if vocabulary is None:
        return config
    if given not in (0, vocabulary.size):
        raise UserError(f"vocab_size={given}: {data} has {vocabulary}; leave it out")
    if vocabulary == GPT2_VOCABULARY:
        return config
    return replace(config, model=replace(config.model, vocab_size=vocabulary.size))


def data_vocabulary(config: TrainConfig) -> Vocabulary | None:
    """The vocabulary of the run's shards; None for conversations, which have the model's.

    Raises:
        UserError: shards of several tokenizers, or a manifest that does not describe its own.
    """
    data = config.data.data_dir
    if tuning_options(config) and is_chat(data):
        return None
    found = {folder: of_shards(Path(folder) / SHARD_MANIFEST) for folder, _ in parse_mix(data)}
    first, *others = found.items()
    for folder, vocabulary in others:
        if vocabulary != first[1]:
            raise UserError(
                f"--data_dir={data}: {first[0]} has {first[1]}, and {folder} {vocabulary}; a run "
                "reads shards of one tokenizer"
            )
    return first[1]


def check_init_tokenizer(found: Weights, config: TrainConfig) -> None:
    """Compares the tokenizer of given weights with that of the data.

    Raises:
        UserError: the weights have none, or another one than the shards.
    """
    found.tokenizer.check()
    has, needs = vocabulary_of(found.tokenizer), data_vocabulary(config)
    if needs is not None and has != needs:
        raise UserError(
            f"{found.origin} has {has}, and {config.data.data_dir} {needs}; prepare the text with "
            "`gpt2 prepare --tokenizer=` and the tokenizer of the model"
        )
    given = config.model.vocab_size
    if given not in (0, has.size):
        raise UserError(f"vocab_size={given}: {found.origin} has {has}; leave it out")


def check_resumed_tokenizer(resumed: Resumed, config: TrainConfig) -> None:
    """Raises UserError if a run would continue on shards of another tokenizer."""
    stored = stored_tokenizer(
        resumed.state.get("tokenizer"), resumed.path / STATE_FILE, resumed.config.vocab_size
    )
    had, needs = vocabulary_of(stored) if stored else GPT2_VOCABULARY, data_vocabulary(config)
    if needs is not None and had != needs:
        raise UserError(
            f"{resumed.path} was trained with {had}, and {config.data.data_dir} has {needs}; use "
            "the shards of that run, another --out_dir, or --resume=never "
            "(docs/troubleshooting.md#resume-refused)"
        )


def run_tokenizer(
    config: TrainConfig, rt: Runtime, resumed: Resumed | None, init: Weights | None
) -> Tokenizer | None:
    """The tokenizer of a run, for its checkpoints and evaluations; None for GPT-2's.

    Args:
        config: the settings, resolved.
        rt: this process.
        resumed: the checkpoint to continue from.
        init: weights to begin with, on rank 0.

    Raises:
        UserError: a damaged tokenizer, or a network with fewer rows than the shards have ids.
    """
    rows, vocabulary = config.model.shape().vocab_size, data_vocabulary(config)
    if vocabulary is not None and vocabulary.size != rows:
        raise UserError(
            f"{config.data.data_dir} has {vocabulary}, and the network {rows} rows; "
            f"use --vocab_size={vocabulary.size}"
        )
    if vocabulary is None or vocabulary == GPT2_VOCABULARY:
        return _of_model(config, rt, resumed, init, rows)
    folder, _ = parse_mix(config.data.data_dir)[0]
    return tokenizer_beside(Path(folder), vocabulary.sha256, vocabulary.end_of_text)


def _of_model(
    config: TrainConfig, rt: Runtime, resumed: Resumed | None, init: Weights | None, rows: int
) -> Tokenizer | None:
    """The tokenizer that came with `--init=`, which may be GPT-2's with another chat template."""
    if resumed:
        path = resumed.path / STATE_FILE
        return stored_tokenizer(resumed.state.get("tokenizer"), path, rows)
    if not config.model.init:
        return None

    def look() -> dict | None:
        return to_store(init.own_tokenizer) if init and init.own_tokenizer else None

    return stored_tokenizer(rt.on_main(look), Path(config.model.init), rows)
