"""A `Look` as one self-contained HTML file: data, style and script.

Text and model may come from anybody, so the page treats them as untrusted: the data is JSON without
`<`, the script inserts it as text and never as HTML, and a Content-Security-Policy in the head
forbids the browser to load anything.
"""

import base64
import codecs
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..tokenizer import Tokenizer, gpt2_tokenizer
from .logit_lens import Look
from .patching import Patched

MARK = '<meta name="generator" content="gpt2 inspect">'  # identifies our own pages
FOLDER = Path(__file__).parent / "assets"
SCRIPTS = ("inspect.js", "patching.js", "attention.js")
MOST_MAP_BYTES = 48_000_000  # of attention, before base64 makes four bytes of three


def map_bytes(layers: int, heads: int, tokens: int) -> int:
    """Bytes of all attention maps: one for each query and each key up to it."""
    return layers * heads * tokens * (tokens + 1) // 2


def pack_attention(weights: Tensor) -> bytes:
    """(H, T, T) attention of a layer -> one byte for each head, query and key up to the query.

    The byte is 255 · √weight, rounded: small weights are kept finely, and none is off by more than
    0.004. The screen shows the root as well, so that small weights are seen.
    """
    T = weights.shape[-1]
    rows, columns = torch.tril_indices(T, T)
    roots = (255 * weights[:, rows, columns].float().clamp(0, 1).sqrt()).round()
    return roots.to(torch.uint8).numpy().tobytes()


def token_name(token: int, tokenizer: Tokenizer | None = None) -> str | list[int]:
    """Text of a token; the values of its bytes where they are part of a character only."""
    tokenizer = tokenizer or gpt2_tokenizer()
    if token == tokenizer.end_of_text:
        return tokenizer.end_of_text_name
    if token >= tokenizer.vocab_size:
        return f"[{token}]"  # a vocabulary that was made larger
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def pieces(ids: Sequence[int], tokenizer: Tokenizer | None = None) -> list[str]:
    """The text of each token as it stands in the whole text.

    A character of several tokens stands whole with the first of them, and "" with the others.
    """
    texts, open_at = [], None  # open_at: where a character began that is not complete yet
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for at, token in enumerate(ids):
        name = token_name(token, tokenizer)
        text = decoder.decode(bytes(name) if isinstance(name, list) else name.encode())
        waiting = bool(decoder.getstate()[0])
        if open_at is None:
            texts.append(text)
        else:
            texts[open_at] += text
            texts.append("")
        if not waiting:
            open_at = None
        elif open_at is None:
            open_at = at
    if open_at is not None:
        texts[open_at] += decoder.decode(b"", final=True)
    return texts


def build(
    look: Look,
    facts: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    patched: Patched | None = None,
) -> str:
    """The page.

    Args:
        look: what to show.
        facts: of the model and the text as a whole, for the head of the page (see page/inspect.js).
        tokenizer: the model's; by default GPT-2's.
        patched: effects of patches from a second text; None: the page has no such panel.
    """
    used = {*look.ids, *look.top_ids.flatten().tolist(), *look.lens_ids.flatten().tolist()}
    if patched:
        used |= {*patched.other_ids, *patched.ours.tolist(), *patched.theirs.tolist()}
    data = facts | {
        "ids": look.ids,
        "pieces": pieces(look.ids, tokenizer),
        "names": {token: token_name(token, tokenizer) for token in sorted(used)},
        "nats": _short(look.nats),
        "ranks": look.ranks.tolist(),
        "topIds": look.top_ids.tolist(),
        "topProbs": _short(look.top_probs),
        "lensIds": look.lens_ids.tolist(),
        "lensProbs": _short(look.lens_probs),
        "lensActual": _short(look.lens_actual),
        "first": [layer.tolist() for layer in look.first],
        "patch": _patch_data(patched) if patched else None,
        "attention": [base64.b64encode(pack_attention(w)).decode() for w in look.attention],
    }
    page = (FOLDER / "inspect.html").read_text("utf-8")
    for name, content in (
        ("MARK", MARK),
        ("STYLE", (FOLDER / "inspect.css").read_text("utf-8")),
        ("SCRIPT", "".join((FOLDER / name).read_text("utf-8") for name in SCRIPTS)),
        ("DATA", _json_for_html(data)),
    ):
        page = page.replace(f"<!--{name}-->", content)
    return page


def _patch_data(patched: Patched) -> dict[str, Any]:
    """A `Patched` for the page's script: whole percents, none (null) where nothing changes."""
    percents = (100 * patched.effect.double()).round().clamp(-999, 999)
    effect = [
        [[None if math.isnan(value) else int(value) for value in row] for row in layer]
        for layer in percents.tolist()
    ]
    return {
        "ids": patched.other_ids,
        "ours": patched.ours.tolist(),
        "theirs": patched.theirs.tolist(),
        "probs": [[_short(row) for row in text] for text in patched.probs],
        "effect": effect,
    }


def check_page_path(path: Path) -> None:
    """Raises UserError if the page cannot be written there, or would overwrite another file."""
    if not path.resolve().parent.is_dir():
        raise UserError(f"--out={path}: no such folder; make it, or name another file")
    if path.is_dir():
        raise UserError(f"--out={path} is a folder; name a file, as in {path / 'inspect.html'}")
    if path.exists():
        if not path.is_file():  # reading a pipe or a device could wait for ever
            raise UserError(f"--out={path} is no file; name another")
        try:
            with open(path, "rb") as file:
                begin = file.read(2000)
        except OSError as error:
            raise UserError(f"--out={path}: {error.strerror or error}; name another file") from None
        if MARK.encode() not in begin:
            raise UserError(
                f"--out={path} is there and no page of `gpt2 inspect`; move it away, or name "
                "another file"
            )


def _short(values: Tensor) -> list:
    """Numbers with four digits, for JSON."""
    if values.ndim > 1:
        return [_short(row) for row in values]
    return [float(f"{value:.4g}") for value in values.tolist()]


def _json_for_html(data: dict) -> str:
    """JSON that cannot end the script element it stands in, nor begin a comment there."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.encode("utf-8", "replace").decode()  # lone surrogates
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
