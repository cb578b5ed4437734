"""The data of a run: its datasets, and the order in which their sequences come."""

from dataclasses import replace
from pathlib import Path

from ..checkpoint.training_state import Resumed
from ..config.finetune import TuningOptions, tuning_options
from ..config.train import TrainConfig
from ..data.conversations import check_eval_tokens, is_chat, open_conversations
from ..data.datasets import (
    Dataset,
    MixStart,
    build_mixture,
    continue_mix,
    identify,
    open_datasets,
    parse_mix,
)
from ..data.sequence_order import Mixture
from ..data.text_files import read_items
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..evaluate.tasks import HELLASWAG, MultipleChoice, load_items
from ..report import console
from ..tokenizer import Tokenizer
from .second_token import SUFFIX


def order_data(
    config: TrainConfig, rt: Runtime, resumed: Resumed | None, tokenizer: Tokenizer | None
) -> tuple[list[Dataset], Mixture, list[str]]:
    """The datasets, the order of their sequences, and notes for the reader of the log.

    The order begins anew, or goes on where a checkpoint stopped. Conversations are encoded by
    `tokenizer`; None is GPT-2's.

    Raises:
        UserError: damaged datasets, or datasets that changed since the checkpoint was saved.
    """
    shape, seed = config.model.shape(), config.system.seed
    datasets, notes = _open_data(config, shape.block_size, tokenizer)
    identities = rt.on_main(lambda: [identify(dataset) for dataset in datasets])
    datasets = [replace(d, identity=i) for d, i in zip(datasets, identities, strict=True)]
    start = MixStart()
    if resumed and "data" in resumed.state:
        position, stored = resumed.state["position"], resumed.state["data"]
        datasets, start, more = continue_mix(datasets, stored, position, resumed.path)
        notes += more
    elif resumed:
        notes.append(
            f"{resumed.path} does not say which shards it was trained on: it is of an older "
            "version, whose order was another; what was read in this epoch may come again"
        )
    if config.data.sequence_start == "document" and rt.is_main:
        console.log("looking for the beginnings of documents in the training shards")
    return datasets, build_mixture(datasets, config.data, shape.block_size, seed, start), notes


def check_data(config: TrainConfig) -> None:
    """Raises UserError for data that are not there: weights, which may be fetched, come later."""
    if not (tuning_options(config) and is_chat(config.data.data_dir)):
        open_datasets(config.data.data_dir)
        return
    for name, _ in parse_mix(config.data.data_dir):
        if not Path(name).exists():
            next(read_items(Path(name)))  # says so


def read_hellaswag(
    config: TrainConfig, rt: Runtime, tokenizer: Tokenizer | None
) -> list[MultipleChoice]:
    """HellaSwag's items if the run evaluates on them; broadcast: other machines may lack them."""
    if not config.eval.eval_hellaswag_every:
        return []
    where = config.eval.hellaswag
    return rt.on_main(lambda: load_items(HELLASWAG, where, console.log, tokenizer))


def _open_data(
    config: TrainConfig, block_size: int, tokenizer: Tokenizer | None
) -> tuple[list[Dataset], list[str]]:
    """Folders of shards or, for `gpt2 finetune`, files of conversations; and notes on them."""
    tuning = tuning_options(config)
    if tuning is None or not is_chat(config.data.data_dir):
        if tuning is not None and tuning.val_share != TuningOptions.val_share:
            raise UserError(
                f"--val_share={tuning.val_share:g} is for conversations; shards of text have their "
                "own for validation, so leave it out"
            )
        datasets = open_datasets(config.data.data_dir)
        if tokenizer is None or not datasets[0].val[0].vocabulary.sha256:
            return datasets, []
        return datasets, [f"the shards' own tokenizer has {tokenizer.vocab_size:,} tokens"]
    if config.data.sequence_start != "anywhere":
        raise UserError("--sequence_start=document is for text; conversations are always whole")
    if config.optim.loss.endswith(SUFFIX):
        raise UserError(
            f"--loss={config.optim.loss} is for text, whose next tokens go on; conversations take "
            f"--loss={config.optim.loss.removesuffix(SUFFIX)}"
        )
    if config.model.document_mask:
        raise UserError(
            f"init={config.model.init} has document_mask: the end-of-text tokens between messages "
            "would hide them from one another; begin with another model"
        )
    data, share = config.data.data_dir, tuning.val_share
    datasets, notes = open_conversations(data, block_size, share, tokenizer)
    check_eval_tokens(config.eval.eval_tokens, datasets, block_size)
    return datasets, list(notes)
