"""Weights from anywhere: a checkpoint, a folder in Hugging Face's layout, or the Hub."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..config.model import GPT2_VOCAB_SIZE, GPT2Config
from ..config.switches import switched
from ..config.train import ModelOptions
from ..errors import UserError
from ..huggingface import model_format
from ..huggingface.model_download import download
from . import model_file

RELEASED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names that mean OpenAI's weights
HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
BY_POSITION = ("transformer.wpe.",)  # names of tables with a row for each position,
BY_TOKEN = ("transformer.wte.", "transformer.value_tables.", "head.")  # and for each token


@dataclass(frozen=True)
class Weights:
    """A model's config and weights as read, and where they come from."""

    config: GPT2Config
    state: dict[str, Tensor]  # under GPT-2's names, (out, in), on the CPU
    origin: str  # where it is from, for people
    notes: tuple[str, ...] = ()  # what had to be changed
    step: int | None = None  # optimizer steps behind it, if known
    val_loss: float | None = None  # nats, if known


def load(source: str | Path, revision: str = "") -> Weights:
    """Reads weights: a file or folder that is there, else a name of the Hub.

    Args:
        source: gpt2, gpt2-medium, gpt2-large or gpt2-xl (always OpenAI's; `./gpt2` is a folder); a
            path (a `Path` always is); or OWNER/NAME. `@REVISION` may follow a name of the Hub.
        revision: commit, tag or branch of the Hub, given separately.

    Raises:
        UserError: nothing there, no access, damaged, or no GPT-2.
    """
    name, _, behind = str(source).partition("@")
    local = Path(source)
    released = name in RELEASED and not isinstance(source, Path)
    if not released and (local.exists() or not HUB_ID.fullmatch(name)):
        return load_local(local)
    if local.suffix in CHECKPOINT_SUFFIXES:
        raise UserError(f"{source}: no such checkpoint")
    if behind and revision:
        raise UserError(f"{source} names a revision already; leave revision={revision} out")
    repository = f"openai-community/{name}" if released else name
    folder = download(repository, behind or revision)
    found = load_local(folder)
    return replace(found, origin=f"{repository} of the Hub at {folder.name[:12]}")


def load_local(path: str | Path) -> Weights:
    """Reads a checkpoint file of any kind that `checkpoint.load_model` knows, or a folder.

    Raises:
        UserError: as `load`.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / model_format.CONFIG_FILE).exists():
            inside = next(iter(sorted(path.glob("*ckpt.pt"), reverse=True)), None)
            hint = f"; use {inside}" if inside else ""
            raise UserError(
                f"{path}: a folder without {model_format.CONFIG_FILE}, so no model{hint}"
            )
        config, state = model_format.read_folder(path)
        model_file.check_finite(state, path)
        return Weights(config, state, f"{path} (Hugging Face)")
    if path.exists() and not path.is_file():  # opening a FIFO waits until somebody writes into it
        raise UserError(f"{path} is neither a file nor a folder; give the path of a checkpoint")
    config, state, rest = model_file.load_model(path)
    origin = f"{path} ({rest['origin']})" if "origin" in rest else str(path)
    notes = tuple(rest.get("notes", ()))
    return Weights(config, state, origin, notes, rest.get("step"), rest.get("val_loss"))


def resolve_options(options: ModelOptions, found: GPT2Config) -> ModelOptions:
    """The options of a run with the sizes of the network that `options.init` names.

    Raises:
        UserError: options that contradict it.
    """
    sizes = {name: getattr(found, name) for name in ("n_layer", "n_head", "n_embd")}
    switches = found.switches()
    have, asked = sizes | switches, options.given() | switched(options)
    wrong = [f"{n}={have[n]}, not {asked[n]}" for n in have if asked.get(n, have[n]) != have[n]]
    if wrong:
        leave_out = "leave --size, --n_layer, --n_head and --n_embd out"
        if not all(asked.get(n, have[n]) == have[n] for n in switches):
            leave_out = "its switches are taken over; leave them out"
        raise UserError(f"init={options.init} has {', '.join(wrong)}; {leave_out}")
    if options.block_size > found.block_size:
        raise UserError(
            f"block_size={options.block_size}: init={options.init} knows {found.block_size} "
            f"positions; use --block_size={found.block_size} or smaller"
        )
    window = have["window"]
    if 0 < options.block_size <= window:
        raise UserError(
            f"init={options.init} has attention windows of {window} positions; use "
            f"--block_size={window + 1} or larger"
        )
    return replace(options, **have, block_size=options.block_size or found.block_size)


def for_training(found: Weights, block_size: int) -> Weights:
    """The weights cut to GPT-2's vocabulary and to `block_size` positions.

    Rows of positions and tokens that training cannot meet are cut off.

    Raises:
        UserError: a vocabulary smaller than GPT-2's.
    """
    config = found.config
    assert block_size <= config.block_size, (block_size, config.block_size)
    check_vocabulary(config, found.origin)
    state, notes = dict(found.state), list(found.notes)
    for key in found.state:
        if key.startswith(BY_POSITION):
            rows, have = block_size, config.block_size
        elif key.startswith(BY_TOKEN):
            rows, have = GPT2_VOCAB_SIZE, config.vocab_size
        else:
            continue
        if rows < have:
            state[key] = state[key][:rows].clone()
            name = key.removeprefix("transformer.").removesuffix(".weight")
            notes.append(f"{name}: the first {rows:,} of {have:,} rows are used")
    config = replace(config, vocab_size=GPT2_VOCAB_SIZE, block_size=block_size)
    return replace(found, config=config, state=state, notes=tuple(notes))


def check_vocabulary(config: GPT2Config, origin: str) -> None:
    """Raises UserError for a vocabulary smaller than GPT-2's, whose ids mean something else."""
    if config.vocab_size < GPT2_VOCAB_SIZE:
        raise UserError(
            f"{origin} knows {config.vocab_size:,} tokens, text and shards are GPT-2's "
            f"{GPT2_VOCAB_SIZE:,}: it can be exported, and continue token ids in Python"
        )
