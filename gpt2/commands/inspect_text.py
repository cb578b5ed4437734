"""`gpt2 inspect`: a model's predictions for each token of a text, as a table and an HTML page."""

import io
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from ..api import GPT2
from ..checkpoint import weights
from ..config.commands import InspectConfig
from ..config.model import to_dict
from ..data.text_encodings import in_utf8
from ..errors import UserError
from ..evaluate.loss import Evaluation
from ..files import check_writable_file, write_atomically
from ..interpret import html_page
from ..interpret.logit_lens import Look, look
from ..interpret.patching import Patched, check_pair, patch_effects
from ..report import console
from ..tokenizer import Tokenizer, gpt2_tokenizer


def run(checkpoint: str, text: str, config: InspectConfig) -> int:
    """Prints the table and writes the HTML page.

    Args:
        checkpoint: what `weights.load` takes.
        text: the text; "-" reads it from stdin, without a line break at its end.

    Raises:
        UserError: no text, too much text, no such model, another file at `--out`, or a place where
            no file can be written; raised before the forward pass.
    """
    if config.out:
        html_page.check_page_path(Path(config.out))
        check_writable_file(Path(config.out), "--out=")
    text = _read(text, config.file)
    if not text:
        raise UserError('there is no text; write gpt2 inspect CKPT "some text", or --file=FILE')
    found = weights.load(checkpoint)
    tokenizer = found.tokenizer
    tokenizer.check()
    ids = encode(text, config.special, tokenizer)
    shape = found.config
    if len(ids) > shape.block_size:
        raise UserError(
            f"the text has {len(ids):,} tokens, and the model sees {shape.block_size:,} at once; "
            f"leave out {len(ids) - shape.block_size:,} or more"
        )
    other = _second_text(config, ids, tokenizer)
    model = GPT2.from_weights(found, config.device)
    wanted, note = _maps(shape.n_layer, shape.n_head, len(ids), bool(config.out))
    seen = look(model, ids, config.top, attention=wanted)
    patched = patch_effects(model, ids, other) if other else None
    console.log(format_table(seen, tokenizer))
    if patched:
        console.log(format_patching(patched, tokenizer))
    if config.out:
        facts = _facts(found, seen, checkpoint) | {"note": note}
        content = html_page.build(seen, facts, tokenizer, patched).encode()
        try:
            write_atomically(Path(config.out), content)
        except OSError as error:  # the disk is full, or the folder is gone meanwhile
            raise UserError(f"--out={config.out}: {error.strerror or error}") from None
        console.log(f"{config.out}: {len(content) / 1e6:.1f} MB; open it in a browser")
    return 0


def encode(text: str, special: bool, tokenizer: Tokenizer | None = None) -> list[int]:
    """Token ids of a text.

    With `special`, a literal <|endoftext|> becomes the end-of-text token; otherwise it is encoded
    as text.
    """
    tokenizer = tokenizer or gpt2_tokenizer()
    if not special:
        return tokenizer.encode(text)
    ids: list[int] = []
    for number, part in enumerate(text.split(tokenizer.end_of_text_name)):
        ids += [tokenizer.end_of_text] * bool(number) + tokenizer.encode(part)
    return ids


def evaluation(seen: Look, tokenizer: Tokenizer | None = None) -> Evaluation:
    """Loss over all tokens but the first, which has no context to be predicted from."""
    lengths = (tokenizer or gpt2_tokenizer()).bytes_per_token()
    known = [int(lengths[i]) if i < len(lengths) else 0 for i in seen.ids[1:]]
    return Evaluation(seen.nats.double().sum().item(), len(known), sum(known))


def summary(seen: Look, tokenizer: Tokenizer | None = None) -> str:
    """One line about the whole text: loss, perplexity, bits per byte."""
    if len(seen.ids) == 1:
        return "one token, so nothing was predicted; the last line says what may follow"
    e = evaluation(seen, tokenizer)
    per_byte = f"{e.bits_per_byte:.3f} bits per byte" if e.text_bytes else "no bytes of text"
    return (
        f"{e.tokens:,} tokens predicted: loss {e.nats:.2f} nats in all, {e.loss:.4f} a token "
        f"(perplexity {e.perplexity:,.2f}), {per_byte}"
    )


def format_table(seen: Look, tokenizer: Tokenizer | None = None) -> str:
    """One line per token: probability, bits, rank, and the likeliest tokens at its position."""
    width = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 100
    lines = [f"{'':>4}  {'token':<18} {'p':>8} {'bits':>6} {'rank':>6}  likeliest"]
    for at in range(len(seen.ids) + 1):
        token = _quoted(seen.ids[at], tokenizer) if at < len(seen.ids) else "what may follow"
        numbers = f"{'':>22}"
        if 0 < at < len(seen.ids):
            nats = seen.nats[at - 1].item()
            bits, rank = nats / math.log(2), seen.ranks[at - 1].item()
            numbers = f"{math.exp(-nats):>8.2%} {bits:>6.2f} {rank:>6,}"
        number = at if at < len(seen.ids) else ""
        line = f"{number:>4}  {token:<18} {numbers}  "
        rest = _likeliest(seen, at - 1, width - len(line), tokenizer) if at else "nothing before it"
        lines.append(line + rest)
    return "\n".join([*lines, summary(seen, tokenizer)])


def format_patching(patched: Patched, tokenizer: Tokenizer | None = None) -> str:
    """One line per layer about the last prediction: the place whose patch moves most of it."""
    last = len(patched.ids) - 1
    names = [_quoted(int(t[last]), tokenizer) for t in (patched.ours, patched.theirs)]
    if patched.effect[0, 0, last].isnan():
        return "patching: the last prediction is the same after both texts; the page has the others"
    of_a, of_b = patched.probs[:, :, last].tolist()
    lines = [
        f"patching: {names[0]} {of_a[0]:.1%}, {names[1]} {of_a[1]:.1%} after the text; "
        f"{of_b[0]:.1%}, {of_b[1]:.1%} after the second text"
    ]
    for layer, effects in enumerate(patched.effect[:, :, last]):
        at = int(effects.argmax())
        name = "embedding" if layer == 0 else f"layer {layer - 1}"
        token = _quoted(patched.other_ids[at], tokenizer)
        lines.append(f"  {name:<9} {effects[at].item():>5.0%} moves with token {at}, {token}")
    return "\n".join(lines)


def _second_text(config: InspectConfig, ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Ids of the text to patch from; none if none is asked for.

    Raises:
        UserError: an edited token that is not one token or has no place; texts that cannot be
            compared.
    """
    if not config.patch and not config.patch_token:
        return []
    if config.patch:
        other = encode(config.patch, config.special, tokenizer)
    else:
        place, colon, text = config.patch_token.partition(":")
        if not colon or not place.isdecimal() or int(place) >= len(ids):
            raise UserError(
                f"--patch_token={config.patch_token}: use PLACE:TOKEN, as in "
                f"--patch_token='4: Rome'; the places of this text are 0 to {len(ids) - 1}"
            )
        token = encode(text, config.special, tokenizer)
        if len(token) != 1:
            raise UserError(
                f"--patch_token={config.patch_token}: {text!r} is {len(token)} tokens; use one, "
                "with its space before it, or give the second text as --patch="
            )
        other = [*ids[: int(place)], *token, *ids[int(place) + 1 :]]
    check_pair(ids, other)
    return other


def _likeliest(seen: Look, at: int, room: int, tokenizer: Tokenizer | None) -> str:
    """The likeliest tokens after position `at`: as many as fit into `room`, at least one."""
    text = ""
    for token, p in zip(seen.top_ids[at].tolist(), seen.top_probs[at].tolist(), strict=True):
        more = f"{'  ' if text else ''}{_quoted(token, tokenizer)} {p:.1%}"
        if text and len(text + more) > room:
            break
        text += more
    return text


def _quoted(token: int, tokenizer: Tokenizer | None) -> str:
    """A token as a Python literal: spaces, line ends and control characters are visible."""
    name = html_page.token_name(token, tokenizer)
    quoted = repr(name) if isinstance(name, str) else str(bytes(name))
    return quoted if len(quoted) <= 18 else f"{quoted[:17]}…"


def _read(text: str, file: str) -> str:
    """The text of the argument, or of a file or stdin without a line break at its end."""
    if bool(text) and bool(file):
        raise UserError("give a text or --file=, not both")
    if file and Path(file).exists() and not Path(file).is_file():  # a pipe, or a folder
        raise UserError(f"--file={file}: not a file; - in the place of the text reads from stdin")
    try:
        if not file and text != "-":
            return text
        raw = Path(file).read_bytes() if file else sys.stdin.buffer.read()
        # Windows' editors begin a file with a byte order mark
        text = in_utf8(io.BufferedReader(io.BytesIO(raw))).read().decode("utf-8-sig")
        # Editors and `echo` add one, and what may follow it is another question.
        return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
    except OSError as error:
        raise UserError(f"--file={file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file or 'stdin'} is not UTF-8 (byte {error.start})") from None


def _maps(layers: int, heads: int, tokens: int, page_wanted: bool) -> tuple[bool, str]:
    """Whether the page gets attention maps, and if they are too large, a note that says so."""
    size = html_page.map_bytes(layers, heads, tokens)
    if not page_wanted or size <= html_page.MOST_MAP_BYTES:
        return page_wanted, ""
    fit = int(math.sqrt(2 * html_page.MOST_MAP_BYTES / (layers * heads)))
    note = (
        f"the attention maps of {layers * heads:,} heads over {tokens:,} tokens would make the "
        f"page {size * 4 / 3e6:,.0f} MB larger and are left out; up to {fit:,} tokens have them"
    )
    console.warn(note)
    return False, note


def _facts(found: weights.Weights, seen: Look, checkpoint: str) -> dict[str, Any]:
    """Facts for the head of the page: model, shape, and loss of the text."""
    c, e = found.config, evaluation(seen, found.tokenizer)
    switches = c.changed_switches()
    shape = {name: to_dict(c)[name] for name in ("n_layer", "n_head", "n_embd", "block_size")}
    return {
        # box is named as it was asked for: pages are passed on, paths of a machine are not
        "model": found.origin.replace(str(weights.locate(checkpoint)), checkpoint),
        "name": Path(checkpoint).name if Path(checkpoint).exists() else checkpoint,
        "shape": shape,
        "step": found.step,
        "switches": {name: str(value) for name, value in switches.items()},
        "vocabulary": c.vocab_size,
        "predicted": e.tokens,
        "bytes": e.text_bytes,
        "loss": e.loss if e.tokens else None,
        "total": e.nats,
        "bitsPerByte": e.bits_per_byte if e.text_bytes else None,
    }
