"""Pretrained weights: from a checkpoint file, a folder, the clone of this project, or the Hub."""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from torch import Tensor

from ..config.model import GPT2_VOCAB_SIZE, GPT2Config
from ..config.run_paths import CONFIG_FILE as RUN_FILE
from ..config.run_paths import find_beside
from ..config.switches import switched
from ..config.train import ModelOptions
from ..errors import UserError, first_line
from ..huggingface import model_format
from ..huggingface.kept_tokenizer import stored_tokenizer
from ..huggingface.model_download import download
from ..huggingface.own_tokenizer import SPECIAL_IDS, NoTokenizer, OwnTokenizer, tokenizer_of
from ..paths import check_utf8, for_shell
from ..tokenizer import Tokenizer, gpt2_tokenizer
from ..untrusted.display import shown
from ..untrusted.parsing import read_json
from . import adapters, model_file

RELEASED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names of OpenAI's weights on the Hub
IN_CLONE = ("box", "box-chat")  # names of the models that come with a clone, below models/
BARE = {"distilgpt2": "distilbert/distilgpt2"}  # old names without an owner
BARE_NAME = re.compile(r"[A-Za-z][\w-]*")
HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
HUB_PAGE = re.compile(
    r"(?:https?://)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/tree/([\w.-]+))?/?"
)
# config of a folder -> files beside it that stand for the folder
PARTS = {
    model_format.CONFIG_FILE: model_format.FILES_OF_WEIGHTS,
    adapters.ADAPTER_CONFIG: (adapters.ADAPTER_FILE,),
}
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
OUT_ADAPTER = "out_adapter"  # beside out_ckpt.pt in the folder of a run with --lora_rank=
BY_POSITION = ("transformer.wpe.",)  # prefixes of tables with one row per position
BY_TOKEN = ("transformer.wte.", "transformer.value_tables.", "head.")  # with one row per token


@dataclass(frozen=True)
class Weights:
    """A model's config and weights, and their origin."""

    config: GPT2Config
    state: dict[str, Tensor]  # GPT-2's names, (out, in) matrices, on the CPU
    origin: str  # file, folder or repository, for messages
    notes: tuple[str, ...] = ()  # a line for each change made while reading
    step: int | None = None  # optimizer steps done, if known
    val_loss: float | None = None  # nats, if known
    own_tokenizer: Tokenizer | None = None  # None: GPT-2's, if its vocabulary fits
    folder: Path | None = None  # in Hugging Face's layout
    special_ids: dict[str, Any] = field(default_factory=dict)  # of its config.json
    adapted: bool = False  # adapters are merged into the weights of their base

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model; see `tokenizer_for`."""
        return self.own_tokenizer or tokenizer_for(self.config.vocab_size, self.origin)


def load(source: str | Path, revision: str = "") -> Weights:
    """Reads weights from an existing file or folder, else from the Hub.

    Args:
        source: gpt2, gpt2-medium, gpt2-large or gpt2-xl (OpenAI's weights; write `./gpt2` for a
            folder), a path, OWNER/NAME, or box or box-chat of a clone of this repository. A name
            of the Hub may end in `@REVISION`, and be the address of its page. A `Path` is never a
            name of the Hub or of the clone.
        revision: commit, tag or branch of the Hub.

    Raises:
        UserError: the source is missing, inaccessible, damaged, or not a GPT-2.
    """
    source = source if isinstance(source, Path) else _name_on_page(source)
    name, _, behind = str(source).partition("@")
    name = BARE.get(name, name) if not isinstance(source, Path) else name
    local = locate(source)
    released = name in RELEASED and not isinstance(source, Path)
    if local != Path(source) and revision:
        raise UserError(f"{source} comes with the clone; leave revision={revision} out")
    if not released and (local.exists() or not HUB_ID.fullmatch(name)):
        if not isinstance(source, Path):
            check_there(source)
        return load_local(local)
    if local.suffix in CHECKPOINT_SUFFIXES:
        raise UserError(f"{source}: no such checkpoint")
    if behind and revision:
        raise UserError(f"{source} names a revision already; leave revision={revision} out")
    repository = f"openai-community/{name}" if released else name
    # OpenAI's weights have GPT-2's tokenizer, which is here already.
    folder = download(repository, behind or revision, with_tokenizer=not released)
    found = load_local(folder)
    return replace(found, origin=f"{repository} of the Hub at {folder.name[:12]}")


def _name_on_page(source: str) -> str:
    """OWNER/NAME of a model's page on the Hub, or with a slash behind; else the source."""
    if Path(source).exists():
        return source
    if page := HUB_PAGE.fullmatch(source):
        return "@".join(filter(None, page.groups()))
    short = source.removesuffix("/")
    return short if HUB_ID.fullmatch(short) else source


def locate(source: str | Path) -> Path:
    """The path of a source: for box and box-chat the folder in the clone, unless a path is there.

    Raises:
        UserError: a name of the clone, and the package does not lie in one.
    """
    path = Path(source)
    if isinstance(source, Path) or source not in IN_CLONE or path.exists():
        return path
    root = Path(__file__).parents[2]
    folder = root / "models" / source
    if not (root / "pyproject.toml").is_file() or not folder.is_dir():  # in site-packages
        raise UserError(
            f"{source} is not part of the installed package: clone the repository and give the "
            f"folder models/{source} of the clone, or run `pip install -e .` in it"
        )
    return folder


def check_there(source: str) -> None:
    """Raises UserError for a checkpoint that is not here and has no name of the Hub."""
    name, local = _name_on_page(source).partition("@")[0], locate(source)
    at_hub = name in {*RELEASED, *BARE} or HUB_ID.fullmatch(name)
    if local.exists() or (at_hub and local.suffix not in CHECKPOINT_SUFFIXES):
        return
    if BARE_NAME.fullmatch(name):
        raise UserError(
            f"{source}: no such file or folder here; models of the Hub are named OWNER/NAME, "
            f"or {', '.join((*RELEASED, *BARE, *IN_CLONE))}"
        )
    raise UserError(f"{source}: no such checkpoint")


def load_local(path: str | Path) -> Weights:
    """Reads a checkpoint file (see `model_file.load_model`), or a folder of Hugging Face or peft.

    Raises:
        UserError: the source is missing, damaged, or not a GPT-2.
    """
    check_utf8(Path(path))
    if str(path) in IN_CLONE and not Path(path).exists():
        raise UserError(
            f"{path}: no such checkpoint; the model of that name is loaded by "
            f'GPT2.from_pretrained("{path}")'
        )
    path = folder_of(Path(path))
    if path.is_dir():
        return _load_folder(path)
    if path.exists() and not path.is_file():  # opening a FIFO waits until somebody writes into it
        raise UserError(f"{path} is neither a file nor a folder; give the path of a checkpoint")
    config, state, rest = model_file.load_model(path)
    origin = f"{path} ({rest['origin']})" if "origin" in rest else str(path)
    notes = tuple(rest.get("notes", ()))
    if isinstance(val_loss := rest.get("val_loss"), float) and math.isnan(val_loss):
        notes += ("its validation loss is NaN: training has diverged; use an earlier checkpoint",)
    own = stored_tokenizer(rest.get("tokenizer"), path, config.vocab_size)
    end = own.end_of_text if own else -1
    ids = {"eos_token_id": end, "bos_token_id": end} if end >= 0 else {}
    return Weights(
        config,
        state,
        origin,
        notes,
        rest.get("step"),
        rest.get("val_loss"),
        own_tokenizer=own,
        special_ids=ids,
    )


def folder_of(path: Path) -> Path:
    """The folder, for a file of Hugging Face's layout: its config says what the tensors are.

    Raises:
        UserError: safetensors without a config.
    """
    for config, names in PARTS.items():
        if path.name in (config, *names) and path.is_file() and (path.parent / config).exists():
            return path.parent
    if path.suffix == ".safetensors" and path.is_file():
        raise UserError(
            f"{path}: weights without a config; name a folder that has {model_format.WEIGHTS_FILE} "
            f"and {model_format.CONFIG_FILE}"
        )
    return path


def _load_folder(path: Path) -> Weights:
    """Reads a folder of Hugging Face's layout, of adapters, or of a run."""
    if is_adapter(path):
        return _load_adapter(path)
    if not (path / model_format.CONFIG_FILE).exists():
        if (path / "out_ckpt.pt").is_file():  # the folder of a run
            return load_local(path / "out_ckpt.pt")
        if is_adapter(path / OUT_ADAPTER):  # of a run whose merged model was deleted
            return load_local(path / OUT_ADAPTER)
        if (path / "train_state.pt").is_file():
            run = path.absolute().parent.parent
            model = run / "out_ckpt.pt"
            raise UserError(
                f"{path}: a saved state, to resume from; use "
                + (f"{for_shell(model)}, or " if model.is_file() else "")
                + f"a model of it by `gpt2 average {for_shell(run)} --last=1`"
            )
        if (path / RUN_FILE).is_file() and not any(path.glob("*ckpt.pt")):
            saved = any(path.glob("state/step_*"))
            way = f"; make one by `gpt2 average {for_shell(path)} --last=1`" if saved else ""
            raise UserError(f"{path}: the folder of a run that has written no model yet{way}")
        inside = next(iter(sorted(path.glob("*ckpt.pt"), reverse=True)), None)
        hint = f"; use {inside}" if inside else ""
        raise UserError(f"{path}: a folder without {model_format.CONFIG_FILE}, so no model{hint}")
    config, state = model_format.read_folder(path)
    model_file.check_finite(state, path)
    values = read_json(path / model_format.CONFIG_FILE)
    own = tokenizer_of(path, values, config.vocab_size)
    told = f"its own tokenizer is used, of {own.vocab_size:,} tokens" if own else ""
    of_tokenizer = [told] if isinstance(own, OwnTokenizer) else []
    if own and own.template:
        of_tokenizer.append("its own chat template is used for conversations")
    notes = (*of_tokenizer, *model_format.notes_on(values))
    return Weights(
        config,
        state,
        f"{path} (Hugging Face)",
        notes,
        own_tokenizer=own,
        folder=path,
        special_ids={n: values[n] for n in SPECIAL_IDS if values.get(n) is not None},
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds LoRA adapters and no whole model."""
    whole = (folder / model_format.CONFIG_FILE).exists()
    return not whole and (folder / adapters.ADAPTER_CONFIG).exists()


def _load_adapter(folder: Path) -> Weights:
    """Reads LoRA adapters and their base; returns the merged weights.

    The base is what `--init=` was: a known name, OWNER/NAME of the Hub, or a path from the current
    folder or from one above the adapters. A base of the clone is looked for beside them first.

    Raises:
        UserError: base or adapters are missing, damaged, or do not fit one another.
    """
    settings = adapters.read_settings(folder)
    base: str | Path = settings["base_model_name_or_path"]
    if PureWindowsPath(base).drive.startswith("\\\\"):  # opening it would log in to a stranger
        raise UserError(f"{folder}: its base {shown(base)} lies on another machine; copy it here")
    if base in IN_CLONE and (folder.parent / base / model_format.CONFIG_FILE).exists():
        base = folder.parent / base
    try:
        above = Path(find_beside(str(base), folder))
        if len(Path(base).parts) > 1 and (above.is_file() or (above / "config.json").is_file()):
            base = above
        if is_adapter(locate(base)):
            raise UserError(
                f"{base} holds adapters as well, not whole weights; use the run's out_ckpt.pt, or "
                "train adapters on the merged model (gpt2 export) of the first ones"
            )
        found = load(base)
    except (OSError, ValueError) as error:  # also a name that no file can have
        reason = str(error) if isinstance(error, UserError) else first_line(error)
        raise UserError(f"{folder}: its base is {shown(base)}: {reason}") from None
    state = adapters.merged(folder, settings, found.config, found.state, found.origin)
    origin = f"{folder} (adapters on {found.origin})"
    return replace(found, state=state, origin=origin, step=None, val_loss=None, adapted=True)


def resolve_options(options: ModelOptions, found: GPT2Config) -> ModelOptions:
    """Fills sizes and switches of the weights of `--init=` into a run's options.

    Raises:
        UserError: an option contradicts the weights.
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
    own = found.vocab_size != GPT2_VOCAB_SIZE
    vocab_size = found.vocab_size if own else options.vocab_size
    length = options.block_size or found.block_size
    return replace(options, **have, block_size=length, vocab_size=vocab_size)


def for_training(found: Weights, block_size: int) -> Weights:
    """Cuts the weights to the vocabulary of their tokenizer and to `block_size` positions.

    Training never reads the removed rows.

    Raises:
        UserError: the vocabulary is smaller than GPT-2's, and there is no tokenizer for it.
    """
    config = found.config
    assert block_size <= config.block_size, (block_size, config.block_size)
    found.tokenizer.check()
    vocab_size = found.tokenizer.vocab_size
    state, notes = dict(found.state), list(found.notes)
    for key in found.state:
        if key.startswith(BY_POSITION):
            rows, have = block_size, config.block_size
        elif key.startswith(BY_TOKEN):
            rows, have = vocab_size, config.vocab_size
        else:
            continue
        if rows < have:
            state[key] = state[key][:rows].clone()
            name = key.removeprefix("transformer.").removesuffix(".weight")
            notes.append(f"{name}: the first {rows:,} of {have:,} rows are used")
    config = replace(config, vocab_size=vocab_size, block_size=block_size)
    return replace(found, config=config, state=state, notes=tuple(notes))


def tokenizer_for(vocab_size: int, origin: str = "the model") -> Tokenizer:
    """GPT-2's tokenizer; for a vocabulary smaller than GPT-2's, whose ids mean other text, none."""
    if vocab_size >= GPT2_VOCAB_SIZE:
        return gpt2_tokenizer()
    return NoTokenizer(
        f"{origin} knows {vocab_size:,} tokens, text and shards are GPT-2's "
        f"{GPT2_VOCAB_SIZE:,}: it can be exported, and continue token ids in Python"
    )
