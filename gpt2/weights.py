"""Weights from anywhere: a checkpoint, a folder in Hugging Face's layout, or the Hub.

Files of the Hub come through huggingface_hub's cache (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and
proxies count), all from one commit, and are compared with the sha256 under which the cache keeps
them.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from . import checkpoint, hf
from .config import GPT2_VOCAB_SIZE, GPT2Config, ModelOptions, ModernConfig, UserError
from .hub import http_library
from .switches import chosen, defaults, switched

RELEASED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names that mean OpenAI's weights
HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SHA256 = re.compile(r"[0-9a-f]{64}")
BY_POSITION = ("transformer.wpe.",)  # names of tables with a row for each position,
BY_TOKEN = ("transformer.wte.", "transformer.value_tables.", "head.")  # and for each token


@dataclass(frozen=True)
class Weights:
    """A model as it was found."""

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
        if not (path / hf.CONFIG_FILE).exists():
            inside = next(iter(sorted(path.glob("*ckpt.pt"), reverse=True)), None)
            hint = f"; use {inside}" if inside else ""
            raise UserError(f"{path}: a folder without {hf.CONFIG_FILE}, so no model{hint}")
        config, state = hf.read_folder(path)
        checkpoint.check_finite(state, path)
        return Weights(config, state, f"{path} (Hugging Face)")
    config, state, rest = checkpoint.load_model(path)
    origin = f"{path} ({rest['origin']})" if "origin" in rest else str(path)
    notes = tuple(rest.get("notes", ()))
    return Weights(config, state, origin, notes, rest.get("step"), rest.get("val_loss"))


def settle(options: ModelOptions, found: GPT2Config) -> ModelOptions:
    """The options of a run with the sizes of the network that `options.init` names.

    Raises:
        UserError: options that contradict it.
    """
    sizes = {name: getattr(found, name) for name in ("n_layer", "n_head", "n_embd")}
    switches = defaults() | (chosen(found) if isinstance(found, ModernConfig) else {})
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
            f"init={options.init} has windows of {window} positions; use --block_size={window + 1} "
            "or larger"
        )
    return replace(options, **have, block_size=options.block_size or found.block_size)


def for_training(found: Weights, block_size: int) -> Weights:
    """The same weights for shards of GPT-2's tokens and windows of block_size.

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


def check_vocabulary(config: GPT2Config, origin: str):
    """Raises UserError for a vocabulary smaller than GPT-2's, whose ids mean something else."""
    if config.vocab_size < GPT2_VOCAB_SIZE:
        raise UserError(
            f"{origin} knows {config.vocab_size:,} tokens, text and shards are GPT-2's "
            f"{GPT2_VOCAB_SIZE:,}: it can be exported, and continue token ids in Python"
        )


def download(repository: str, revision: str = "") -> Path:
    """The folder of the Hub's cache that holds config.json and the safetensors of a model.

    The first file settles the commit that the others are taken from.

    Raises:
        UserError: no such model or revision, no access, no connection, no safetensors, damage.
    """
    config = _fetch(repository, hf.CONFIG_FILE, revision)
    folder = config.parent
    hf.config_from_hf(hf.read_json(config), config)  # no gigabytes for what is no GPT-2
    commit = folder.name
    try:
        _verify(_fetch(repository, hf.WEIGHTS_FILE, commit))
    except _Missing as error:
        try:
            index = _fetch(repository, hf.INDEX_FILE, commit)
        except _Missing:
            if error.in_cache:
                raise error from None
            raise UserError(
                f"{repository} at {commit[:12]} has no safetensors (pickles are not read); "
                "save_pretrained of transformers makes them"
            ) from None
        for name in hf.index_files(index):
            _verify(_fetch(repository, name, commit))
    return folder


class _Missing(UserError):
    """The repository, or without a connection the cache, lacks this file."""

    in_cache = False


def _fetch(repository: str, name: str, revision: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _as_user_error(repository, name, revision):
        return Path(hf_hub_download(repository, name, revision=revision or None))


def _verify(path: Path):
    """Compares a file with its sha256, which is its name in the cache where links are possible."""
    kept = path.resolve()
    if SHA256.fullmatch(kept.name):
        with open(kept, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != kept.name:
                raise UserError(f"{kept} is damaged (its sha256 differs); delete it and try again")


@contextmanager
def _as_user_error(repository: str, name: str, revision: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repository}"
    try:
        yield
    except errors.GatedRepoError:
        text = f"no access to {repository}: set HF_TOKEN or run `hf auth login`, and accept the "
        raise UserError(f"{text}terms at {page}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{repository}: no such file or folder here, and no such model at {page} (a private "
            "one needs HF_TOKEN or `hf auth login`)"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repository} has no revision {revision}; see {page}") from None
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            missing = _Missing(
                f"{repository}: no such file or folder here, HF_HUB_OFFLINE is set and the cache "
                f"lacks its {name}; unset it, or download first"
            )
            missing.in_cache = True
            raise missing from None
        reason = _first_line(error.__cause__ or error)
        raise UserError(f"cannot get {name} of {page}: {reason}; try again") from None
    except errors.EntryNotFoundError:
        raise _Missing(f"{repository} has no {name}; see {page}") from None
    except (errors.HFValidationError, http_library().HTTPError, OSError) as error:
        raise UserError(f"{repository}: {_first_line(error)}; see {page}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
