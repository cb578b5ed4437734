"""Models for other programs: a folder in Hugging Face's layout, and its way to the Hub.

The folder holds what transformers, vLLM and llama.cpp's converter read: config.json, safetensors,
the tokenizer and a model card. It is written beside its place and renamed when it is whole.
"""

import json
import os
import tempfile
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.model_file import load_into
from ..checkpoint.weights import (
    CHECKPOINT_SUFFIXES,
    HUB_ID,
    Weights,
    load,
    load_local,
    locate,
)
from ..config.model import GPT2_VOCAB_SIZE, ModernConfig, to_dict
from ..config.switches import switched
from ..data.chat_template import jinja_template
from ..data.conversations import was_chat
from ..errors import UserError
from ..files import replacing_folder
from ..huggingface import model_format
from ..huggingface.hub import http_library
from ..huggingface.own_template import TEMPLATE_FILE, TemplatedTokenizer
from ..huggingface.own_tokenizer import FILES as TOKENIZER_FILES
from ..huggingface.own_tokenizer import SETTINGS_FILE, SPECIAL_IDS, OwnTokenizer, files_of
from ..huggingface.tokenizer_files import tokenizer_files
from ..huggingface.tokenizer_json import JSON_FILE
from ..model.gpt import GPT
from ..model.unfilled import unfilled
from ..paths import check_utf8
from ..report import console
from ..untrusted.parsing import load_json
from .gguf_file import settings_of, write_gguf

# Of models in one file; `gpt2 export` writes none of them.
FILE_SUFFIXES = (".safetensors", *CHECKPOINT_SUFFIXES, ".onnx", ".h5", ".msgpack", ".tflite")
CARD_FILE, GENERATION_FILE = "README.md", "generation_config.json"
FILES = {
    model_format.CONFIG_FILE,
    GENERATION_FILE,
    model_format.WEIGHTS_FILE,
    CARD_FILE,
    *TOKENIZER_FILES,
}

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
---

# {title}

A GPT-2 with {parameters:,} parameters: {n_layer} layers, {n_head} heads, width {n_embd}, context
{block_size} tokens, vocabulary {vocab_size:,}. {trained}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # or the name of this repository
model = AutoModelForCausalLM.from_pretrained(folder)
{use}
```

Write here what it was trained on, for what it is meant, and under which licence it may be used.
"""
USE_TEXT = """tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("Hello world,", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))"""
USE_CHAT = """tokenizer = AutoTokenizer.from_pretrained(folder)
messages = [{"role": "user", "content": "Who are you?"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt",
                                    return_dict=True)
answer = model.generate(**ids, max_new_tokens=50)[0, ids["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
USE_IDS = "# its vocabulary is not GPT-2's: it takes and gives token ids, without a tokenizer"


def check_export_folder(folder: Path) -> None:
    """Raises UserError, before the work, unless a folder is new or empty."""
    check_utf8(folder)
    if folder.is_symlink():
        raise UserError(f"{folder} is a symbolic link; name the folder itself")
    of_a_file = folder.suffix.lower() in FILE_SUFFIXES  # which may be somebody's model
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        way = "" if of_a_file else ", or delete it first"
        raise UserError(f"{folder} is there already; name a new folder{way}")
    if of_a_file:
        raise UserError(
            f"{folder} is the name of a file, and --to=hf makes a folder; name it "
            f"{folder.with_suffix('')}, or {folder.with_suffix('.gguf')} for one file"
        )


def export_hf(
    weights: Weights, folder: Path, dtype: str = "float32", *, chat: bool = False
) -> list[str]:
    """Writes a model for transformers, vLLM and llama.cpp's converter.

    A folder's own tokenizer files and special ids stay as they are. Without them, and without
    GPT-2's vocabulary, there are no tokenizer files, since its ids would mean something else.

    Args:
        weights: of a GPT-2.
        folder: what to make; new or empty.
        dtype: float32, bfloat16 or float16, to which the tensors are rounded.
        chat: whether it was trained on conversations; then the tokenizer gets their template.

    Returns:
        Names of the files.

    Raises:
        UserError: the folder is not empty, no room, no permission, a weight beyond float16.
    """
    check_export_folder(folder)
    model = _network(weights)
    for note in weights.notes:
        console.log(f"{weights.origin}: {note}")
    folder = folder.absolute()
    try:
        with replacing_folder(folder) as temporary:
            tensors = model_format.to_hf(model.state_dict())
            del tensors["lm_head.weight"]  # the readers tie it themselves
            tensors = {name: _cast(tensor, name, dtype) for name, tensor in tensors.items()}
            path = temporary / model_format.WEIGHTS_FILE
            save_file(tensors, path, metadata={"format": "pt"})
            for name, content in _texts(weights, folder.name, dtype, chat).items():
                (temporary / name).write_bytes(content)
            # safetensors gives its file to the owner alone; others must read it like the rest
            os.chmod(path, (temporary / CARD_FILE).stat().st_mode)
            if folder.exists():
                folder.rmdir()  # fails if somebody has put something there meanwhile
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder} not written: {error}") from None
    return sorted(path.name for path in folder.iterdir())


def export_gguf(
    weights: Weights, path: Path, dtype: str = "float32", *, chat: bool = False
) -> None:
    """Writes a model as one GGUF file, for llama.cpp and Ollama.

    Vectors and the position embedding stay float32, as in the files of llama.cpp's own converter.

    Args:
        weights: of a GPT-2.
        path: what to write; new.
        dtype: float32, bfloat16 or float16, to which the matrices are rounded.
        chat: whether it was trained on conversations; then the file has their template.

    Raises:
        UserError: the file is there, no room, no permission, a weight beyond float16, a tokenizer
            that llama.cpp does not know as GPT-2's.
    """
    check_export_file(path)
    state = _network(weights).state_dict()
    for note in weights.notes:
        console.log(f"{weights.origin}: {note}")
    exact = {name for name, t in state.items() if t.dim() == 1 or ".wpe." in name}
    tensors = {n: _cast(t, n, "float32" if n in exact else dtype) for n, t in state.items()}
    write_gguf(path, tensors, settings_of(weights, path.stem, getattr(torch, dtype), chat))


def check_export_file(path: Path) -> None:
    """Raises UserError, before the work, unless a file is new, in a folder that is there."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} is there already; name a new file, as model.gguf")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder; make it first")


def push(source: str, repository: str, private: bool) -> str:
    """Uploads a model to the Hub in one commit; creates the repository if need be.

    A folder in Hugging Face's layout goes there as it is (the card may have been edited); anything
    else that `weights.load` reads is exported first.

    Returns:
        The address where a browser shows it.

    Raises:
        UserError: no model, a wrong name, not logged in, no access, no connection.
    """
    if not HUB_ID.fullmatch(repository):
        raise UserError(f"{repository!r}: name the repository as OWNER/NAME")
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set; unset it to upload")
    if not get_token():
        raise UserError("not logged in to the Hub: set HF_TOKEN, or run `hf auth login`")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(source)
        if (folder / model_format.CONFIG_FILE).exists():
            _network(load_local(folder))  # whole, and a GPT-2
        else:
            folder = Path(made) / repository.partition("/")[2]
            export_hf(load(source), folder, chat=was_chat(locate(source)))
        return _upload(folder, repository, private)


def _upload(folder: Path, repository: str, private: bool) -> str:
    from huggingface_hub import HfApi, constants, errors

    api = HfApi()
    try:
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[*sorted(FILES), model_format.INDEX_FILE, "*.safetensors"],
            commit_message="gpt2 push",
        )
    except (http_library().HTTPError, errors.HFValidationError, ValueError, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        status = getattr(getattr(error, "response", None), "status_code", 0)
        denied = status in (401, 403)
        raise UserError(
            f"{repository} not uploaded: {lines[-1] if lines else type(error).__name__}; "
            + ("use a token that may write there" if denied else "the same command tries again")
        ) from None
    return f"{constants.ENDPOINT}/{repository}"


def _network(weights: Weights) -> GPT:
    """The network with these weights; UserError unless every tensor is there, and none too many."""
    if isinstance(weights.config, ModernConfig):
        names = ", ".join(f"{n}={value}" for n, value in switched(weights.config).items())
        raise UserError(
            f"{weights.origin} is not GPT-2's network ({names}), which other programs do not "
            "know; it can be sampled, evaluated and continued here"
        )
    with unfilled():
        model = GPT(weights.config)
    load_into(model, weights.state, weights.origin)
    return model


def _cast(tensor: Tensor, name: str, dtype: str) -> Tensor:
    """The tensor in another precision, contiguous; UserError if a finite number would overflow."""
    cast = tensor.to(getattr(torch, dtype)).contiguous()
    if not cast.isfinite().all():
        raise UserError(
            f"{name} has numbers up to {tensor.abs().max().item():.3g}, and {dtype} ends at "
            f"{torch.finfo(cast.dtype).max:.3g}; use --dtype=bfloat16 or float32"
        )
    return cast


def _texts(weights: Weights, title: str, dtype: str, chat: bool) -> dict[str, bytes]:
    """Everything but the tensors, by name."""
    config = weights.config
    settings = model_format.config_to_hf(config, dtype)
    tokenizer_texts = _tokenizer_texts(weights)
    template = weights.tokenizer.template
    if SETTINGS_FILE in tokenizer_texts and (template or chat):
        told = load_json(tokenizer_texts[SETTINGS_FILE], SETTINGS_FILE, dict)
        if not template or (TEMPLATE_FILE not in tokenizer_texts and "chat_template" not in told):
            told["chat_template"] = (
                template.source if template else jinja_template(weights.tokenizer)
            )
            tokenizer_texts[SETTINGS_FILE] = json.dumps(told, indent=1).encode()
    if weights.own_tokenizer or weights.special_ids:
        settings |= dict.fromkeys(SPECIAL_IDS[:2]) | weights.special_ids
    speaks = bool(tokenizer_texts)
    ends = {name: settings[name] for name in SPECIAL_IDS if settings.get(name) is not None}
    if template and template.turn_end != ends.get("eos_token_id", template.turn_end):
        ends["eos_token_id"] = [ends["eos_token_id"], template.turn_end]
    trained = f"It was trained for {weights.step:,} steps" if weights.step else ""
    if trained and weights.val_loss is not None:
        trained += f"; last measured validation loss {weights.val_loss:.4f} nats per token"
    card = CARD.format(
        title=title,
        parameters=sum(t.numel() for n, t in weights.state.items() if n != "lm_head.weight"),
        trained=f"{trained}." if trained else "",
        use=(USE_CHAT if chat or template else USE_TEXT) if speaks else USE_IDS,
        **to_dict(config),
    )
    return {
        model_format.CONFIG_FILE: json.dumps(settings, indent=1).encode(),
        GENERATION_FILE: json.dumps(ends, indent=1).encode(),
        CARD_FILE: card.encode(),
        **tokenizer_texts,
    }


def _tokenizer_texts(weights: Weights) -> dict[str, bytes]:
    """The files of the tokenizer: the folder's own, or GPT-2's where its vocabulary fits."""
    own = weights.own_tokenizer
    if weights.folder and (found := files_of(weights.folder)):
        return found
    if isinstance(own, OwnTokenizer):  # of a checkpoint
        end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), own.end_of_text_name)
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
        length = {"model_max_length": weights.config.block_size}
        told = {**end, **kind}
        if SETTINGS_FILE in own.files:
            told = load_json(own.files[SETTINGS_FILE], SETTINGS_FILE, dict)
        settings = json.dumps(told | length, indent=1).encode()
        return {**own.files, JSON_FILE: own.content, SETTINGS_FILE: settings}
    fits = own is None or isinstance(own, TemplatedTokenizer)
    fits = fits and weights.config.vocab_size >= GPT2_VOCAB_SIZE
    return tokenizer_files(weights.config.block_size) if fits else {}
