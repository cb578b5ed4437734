"""A model as one GGUF file, which llama.cpp, Ollama and LM Studio read.

The layout is version 3 of the format (ggml's docs/gguf.md); names of tensors and of settings are
llama.cpp's for the architecture "gpt2". llama.cpp ties the head to the token embedding itself.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.weights import Weights
from ..config.model import GPT2_VOCAB_SIZE
from ..data.chat_template import jinja_template
from ..errors import UserError
from ..files import replacing_file
from ..huggingface.own_template import TEMPLATE_FILE, TemplatedTokenizer
from ..huggingface.own_tokenizer import SETTINGS_FILE, OwnTokenizer, files_of
from ..huggingface.tokenizer_files import tokenizer_json
from ..untrusted.parsing import load_json
from ..untrusted.templates import template_source

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # types of a setting
# Type of a tensor, and `general.file_type` of a file whose matrices have it.
TENSOR_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of a token
NAMES = {
    "transformer.wte.": "token_embd.",
    "transformer.wpe.": "position_embd.",
    "transformer.ln_f.": "output_norm.",
    "transformer.h.": "blk.",
    ".ln_1.": ".attn_norm.",
    ".attn.c_attn.": ".attn_qkv.",
    ".attn.c_proj.": ".attn_output.",
    ".ln_2.": ".ffn_norm.",
    ".mlp.c_fc.": ".ffn_up.",
    ".mlp.c_proj.": ".ffn_down.",
}
MAX_TOKENIZER_VALUES = 800_000
Setting = tuple[str, int, Any]  # name, type, value; for ARRAY: (type of the items, items)


def write_gguf(path: Path, state: dict[str, Tensor], settings: list[Setting]) -> None:
    """Writes a file of settings and tensors, as float32, float16 or bfloat16.

    Raises:
        UserError: no room, no permission.
    """
    tensors = {_name(n): t.contiguous() for n, t in state.items() if n != "lm_head.weight"}
    head = [struct.pack("<4sIQQ", MAGIC, VERSION, len(tensors), len(settings))]
    head += [
        _string(name) + struct.pack("<I", kind) + _value(kind, v) for name, kind, v in settings
    ]
    offset = 0
    for name, tensor in tensors.items():
        shape = tuple(reversed(tensor.shape))  # the innermost dimension comes first
        numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, *_type_at(tensor, offset))
        head.append(_string(name) + numbers)
        offset += _padded(tensor.nbytes)
    try:
        with replacing_file(path) as temporary, open(temporary, "wb") as file:
            content = b"".join(head)
            file.write(content + bytes(_padded(len(content)) - len(content)))
            for tensor in tensors.values():
                file.write(tensor.view(torch.uint8).numpy().data)
                file.write(bytes(_padded(tensor.nbytes) - tensor.nbytes))
    except OSError as error:
        raise UserError(f"{path} not written: {error}") from None


def settings_of(weights: Weights, title: str, dtype: torch.dtype, chat: bool) -> list[Setting]:
    """What llama.cpp must know beside the tensors: sizes, tokenizer, chat template.

    Args:
        weights: of a GPT-2.
        title: name of the model.
        dtype: of the matrices.
        chat: whether it was trained on conversations here. The file holds the template that the
            model brings, by which it was trained then; a model without one gets ours.

    Raises:
        UserError: a tokenizer that llama.cpp does not know as GPT-2's.
    """
    c = weights.config
    found: list[Setting] = [
        ("general.architecture", STRING, "gpt2"),
        ("general.name", STRING, title),
        ("general.file_type", UINT32, FILE_TYPES[dtype]),
        ("gpt2.context_length", UINT32, c.block_size),
        ("gpt2.embedding_length", UINT32, c.n_embd),
        ("gpt2.feed_forward_length", UINT32, 4 * c.n_embd),
        ("gpt2.block_count", UINT32, c.n_layer),
        ("gpt2.attention.head_count", UINT32, c.n_head),
        ("gpt2.attention.layer_norm_epsilon", FLOAT32, 1e-5),
        *_tokenizer(weights),
    ]
    if brought := weights.tokenizer.template:
        template = brought.source
    else:
        template = jinja_template(weights.tokenizer) if chat else _own_template(weights)
    return found + ([("tokenizer.chat_template", STRING, template)] if template else [])


def _own_template(weights: Weights) -> str:
    """The chat template of the model's folder; empty if there is none."""
    files = files_of(weights.folder) if weights.folder else {}
    told = load_json(files[SETTINGS_FILE], SETTINGS_FILE, dict) if SETTINGS_FILE in files else {}
    return template_source(told, files.get(TEMPLATE_FILE))


def _tokenizer(weights: Weights) -> Iterator[Setting]:
    """Tokens, their kinds and the merges of byte-level BPE."""
    values, rows = _tokenizer_values(weights), weights.config.vocab_size
    names = [f"[PAD{i}]" for i in range(rows)]  # rows of the embedding without a token
    kinds = [UNUSED] * rows
    for name, i in values["model"]["vocab"].items():
        names[i], kinds[i] = name, NORMAL
    for token in values.get("added_tokens", ()):
        names[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    pairs = values["model"]["merges"]
    end = weights.tokenizer.end_of_text
    ids = {"bos_token_id": end, "eos_token_id": end} | weights.special_ids
    if brought := weights.tokenizer.template:  # llama.cpp shows it the texts of these ids
        by_text = {name: i for i, name in enumerate(names) if kinds[i] == CONTROL}
        for name in ("bos_token", "eos_token"):
            if (text := brought.variables.get(name)) in by_text:
                ids[f"{name}_id"] = by_text[text]
        ids["eos_token_id"] = brought.turn_end
    yield "tokenizer.ggml.model", STRING, "gpt2"
    yield "tokenizer.ggml.pre", STRING, "gpt-2"
    yield "tokenizer.ggml.tokens", ARRAY, (STRING, names)
    yield "tokenizer.ggml.token_type", ARRAY, (INT32, kinds)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    yield "tokenizer.ggml.merges", ARRAY, (STRING, merges)
    for name in ("bos_token_id", "eos_token_id"):
        if ids.get(name) is not None:
            yield f"tokenizer.ggml.{name}", UINT32, ids[name]
    yield "tokenizer.ggml.add_bos_token", BOOL, False


def _tokenizer_values(weights: Weights) -> dict[str, Any]:
    """The tokenizer.json of a model, parsed, whose words are cut as GPT-2's.

    Raises:
        UserError: there is none, or its words are cut in another way.
    """
    own, other = weights.own_tokenizer, "; use --to=hf, and llama.cpp's own converter"
    if isinstance(own, OwnTokenizer):
        values = load_json(own.content, own.origin, dict, max_values=MAX_TOKENIZER_VALUES)
        cut = values.get("pre_tokenizer") or {}
        as_gpt2 = cut.get("type") == "ByteLevel" and not cut.get("add_prefix_space", True)
        if not as_gpt2 or not cut.get("use_regex", True) or values.get("normalizer"):
            raise UserError(f"{own.origin}: its tokenizer cuts words unlike GPT-2's{other}")
        return values
    if isinstance(own, TemplatedTokenizer):  # GPT-2's
        own = None
    if own or weights.config.vocab_size < GPT2_VOCAB_SIZE:
        raise UserError(
            f"{weights.origin}: GGUF needs a tokenizer, and its {weights.config.vocab_size:,} "
            f"tokens are not GPT-2's{other}"
        )
    end = weights.tokenizer
    added = ({"id": end.end_of_text, "content": end.end_of_text_name, "special": True},)
    return load_json(tokenizer_json(added).encode(), "GPT-2", dict, max_values=MAX_TOKENIZER_VALUES)


def _name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _type_at(tensor: Tensor, offset: int) -> tuple[int, int]:
    return TENSOR_TYPES[tensor.dtype], offset


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _string(value)
    if kind == ARRAY:
        item, values = value
        return struct.pack("<IQ", item, len(values)) + b"".join(_value(item, v) for v in values)
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}[kind], value)
