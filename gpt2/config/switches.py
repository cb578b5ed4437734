"""The switches of the network in `model/modern.py`. The defaults are GPT-2.

Plain data and checks: no torch, no files. `check_switches` refuses combinations that do not work,
naming the switches. The switches of the optimizer and its schedule are in `config/train.py`.
"""

from dataclasses import dataclass, fields
from typing import Any

from ..errors import UserError
from ..untrusted.display import shown
from .options import at_least, choices_of, option, type_of
from .registry import BUILT_IN

LARGEST = 1e12  # of a number among the switches
DEFAULT_ROPE_BASE = 10_000.0  # Su et al. 2021, section 3.3.2


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Where the network may differ from GPT-2."""

    positions: str = option(
        "learned",
        "position encoding: learned embeddings, or rotary (RoPE)",
        ("learned", "rotary"),
    )
    rope_base: float = option(DEFAULT_ROPE_BASE, "RoPE: base of the wavelengths")
    rope_fraction: float = option(1.0, "RoPE: share of each head's dimensions that are rotated")
    window_pattern: str = option(
        "",
        "attention windows of the layers, repeated: S = the last `window` positions, L = all, as "
        "in SSSL; empty: L",
    )
    window: int = option(0, "attention window of S layers, in positions, the query's own included")
    document_mask: bool = option(
        False, "attention stays within a document; an end-of-text token begins one"
    )
    qk_norm: bool = option(False, "RMSNorm over each head's queries and keys")
    attention_scale: float = option(
        0.0, "factor of the attention scores; 0: 1 / √(n_embd / n_head)"
    )
    norm: str = option(
        "layernorm", "normalisation; rmsnorm has neither gain nor bias", BUILT_IN["norm"]
    )
    norm_embedding: bool = option(False, "RMSNorm over the token embeddings")
    mlp: str = option("gelu", "activation of the MLP", BUILT_IN["mlp"])
    bias: bool = option(True, "biases in the linear layers and LayerNorms")
    softcap: float = option(0.0, "logit softcapping: softcap × tanh(logits / softcap); 0: none")
    untied_head: bool = option(
        False, "an output head with weights of its own, not the token embedding's"
    )
    value_embeddings: int = option(
        0,
        "number of value-embedding tables; table i is for the i-th layer and the i-th from the end",
    )
    value_projection: int = option(
        0,
        "number of layers at either end whose values also get a gated projection of the embedding",
    )
    attention_gate: bool = option(
        False, "the output of each attention head times a gate that reads the layer's input"
    )
    zero_init: bool = option(
        False, "initialise projections into the residual stream, and an untied head, with zeros"
    )
    skips: str = option(
        "none",
        "unet: the layers of the second half also get the outputs of the first half, in reverse "
        "order; unet+input: and every layer gets the embedding",
        ("none", "unet", "unet+input"),
    )


SWITCH_NAMES = frozenset(f.name for f in fields(Switches))


def defaults() -> dict[str, Any]:
    """The switches of GPT-2: name -> value."""
    return chosen(Switches())


def chosen(values: Switches) -> dict[str, Any]:
    """All switches of a config: name -> value."""
    return {f.name: getattr(values, f.name) for f in fields(Switches)}


def switched(values: Switches) -> dict[str, Any]:
    """The switches of a config that differ from GPT-2: name -> value."""
    return {name: value for name, value in chosen(values).items() if value != defaults()[name]}


def check_switches(
    s: Switches, n_layer: int, head_width: int, block_size: int, dropout: float
) -> None:
    """Raises UserError for switches without effect, or that contradict one another."""
    _check_kinds(s)
    at_least(0, softcap=s.softcap, window=s.window, value_embeddings=s.value_embeddings)
    at_least(0, attention_scale=s.attention_scale, value_projection=s.value_projection)
    _check_rotary(s, head_width)
    if set(s.window_pattern) - set("SL"):
        raise UserError(
            f"window_pattern={shown(s.window_pattern)}: use the letters S and L, as in SSSL"
        )
    if ("S" in s.window_pattern) != (s.window > 0):
        raise UserError(
            "window is the width of the layers S of window_pattern; give both, or neither: "
            "--window_pattern= --window=0"
        )
    if s.window >= block_size:
        smaller = f"a smaller one, as --window={max(1, block_size // 4)}, or " * (block_size > 1)
        raise UserError(
            f"window={s.window} is the whole context of {block_size}; use {smaller}none: "
            "--window_pattern= --window=0"
        )
    if dropout and (s.window_pattern or s.document_mask):
        raise UserError("dropout does not work with window_pattern or document_mask; leave it out")
    for name in ("value_embeddings", "value_projection"):
        if getattr(s, name) > n_layer // 2:
            raise UserError(f"{name}={getattr(s, name)}: use at most n_layer // 2")
    if s.value_embeddings and s.value_projection:
        raise UserError("value_embeddings and value_projection serve one purpose; use one of them")
    if s.skips != "none" and n_layer < 2:
        raise UserError(f"skips={s.skips} needs two layers or more")


def _check_kinds(s: Switches) -> None:
    for f in fields(Switches):
        value, kind, choices = getattr(s, f.name), type_of(f), choices_of(f)
        if not isinstance(value, (int, float) if kind is float else kind):
            raise UserError(f"{f.name}={shown(repr(value))}: use a {kind.__name__}")
        if choices and value not in choices:
            raise UserError(f"{f.name}={shown(repr(value))}: use {' or '.join(choices)}")
        if isinstance(value, int | float) and not abs(value) <= LARGEST:  # also NaN
            raise UserError(f"{f.name}={shown(value)}: use a number up to {LARGEST:.0e}")


def _check_rotary(s: Switches, head_width: int) -> None:
    if s.rope_base != DEFAULT_ROPE_BASE and s.positions != "rotary":
        raise UserError("rope_base is for positions=rotary; give both")
    if s.rope_fraction != 1 and s.positions != "rotary":
        raise UserError("rope_fraction is for positions=rotary; give both")
    if not 0 < s.rope_fraction <= 1:
        raise UserError(f"rope_fraction={s.rope_fraction}: use a number above 0 and up to 1")
    if s.rope_base <= 1:
        raise UserError(f"rope_base={s.rope_base}: use a number above 1")
    if s.positions == "rotary" and head_width % 2:
        raise UserError(
            f"positions=rotary rotates pairs of channels, and heads are {head_width} wide; "
            "use an even n_embd / n_head"
        )
    if s.positions == "rotary" and not round(head_width // 2 * s.rope_fraction):
        raise UserError(
            f"rope_fraction={s.rope_fraction}: no pair of the {head_width} channels of a "
            "head would be rotated; use a larger one"
        )
