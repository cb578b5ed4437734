"""The switches of a modern recipe: pure data and checks. Their defaults are GPT-2.

`Switches` are those of the network (`modern.py` reads them), `Recipe` those of the optimizer and
its schedules (`optim.py`, `muon.py`). A combination works, or is refused here by name.
"""

from dataclasses import dataclass, fields
from typing import Any

from ..errors import UserError
from .options import at_least, option

DEFAULT_ROPE_BASE = 10_000.0  # Su et al. 2021, section 3.3.2


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What may differ from GPT-2's network."""

    positions: str = option(
        "learned",
        "how a position is known: a learned vector each, or rotary",
        ("learned", "rotary"),
    )
    rope_base: float = option(DEFAULT_ROPE_BASE, "rotary positions: base of the wavelengths")
    rope_fraction: float = option(1.0, "rotary positions: share of each head's pairs that turn")
    window_pattern: str = option(
        "",
        "attention of the layers in turn, repeated: S sees the last `window` positions, L all, as "
        "in SSSL; empty: all see all",
    )
    window: int = option(0, "positions that an S layer sees, itself included")
    document_mask: bool = option(
        False, "no position sees another document; an end-of-text token begins one"
    )
    qk_norm: bool = option(False, "RMSNorm over each head's queries and keys")
    attention_scale: float = option(
        0.0, "queries times keys are multiplied by it; 0: by 1 / √(n_embd / n_head)"
    )
    norm: str = option("layernorm", "rmsnorm has neither gain nor bias", ("layernorm", "rmsnorm"))
    norm_embedding: bool = option(False, "RMSNorm over the embedding of each token")
    mlp: str = option("gelu", "what the MLP does between its layers", ("gelu", "relu2", "swiglu"))
    bias: bool = option(True, "biases in the linear layers and LayerNorms")
    softcap: float = option(0.0, "limit of the logits by softcap × tanh(logits / softcap); 0: none")
    untied_head: bool = option(False, "a head of its own instead of the token embedding")
    value_embeddings: int = option(
        0, "tables of token vectors mixed into the values of so many first and so many last layers"
    )
    zero_init: bool = option(
        False, "projections into the residual stream, and an untied head, begin at zero"
    )
    skips: str = option(
        "none",
        "unet: the last half of the layers also get the outputs of the first, in reverse order; "
        "unet+input: and every layer the embedding",
        ("none", "unet", "unet+input"),
    )


SWITCH_NAMES = frozenset(f.name for f in fields(Switches))


def defaults() -> dict[str, Any]:
    """GPT-2's switches, by name."""
    return chosen(Switches())


def chosen(values: Switches) -> dict[str, Any]:
    """All switches of a config, by name."""
    return {f.name: getattr(values, f.name) for f in fields(Switches)}


def switched(values: Switches) -> dict[str, Any]:
    """The switches that are not GPT-2's."""
    return {f.name: getattr(values, f.name) for f in fields(Switches)
            if getattr(values, f.name) != f.default}  # fmt: skip


def check_switches(s: Switches, n_layer: int, head_width: int, block_size: int, dropout: float):
    """Raises UserError for switches that do not fit together, or mean nothing."""
    for f in fields(Switches):
        value, choices = getattr(s, f.name), f.metadata["choices"]
        if not isinstance(value, (int, float) if f.type is float else f.type):
            raise UserError(f"{f.name}={value!r}: use a {f.type.__name__}")
        if choices and value not in choices:
            raise UserError(f"{f.name}={value!r}: use {' or '.join(choices)}")
    at_least(0, softcap=s.softcap, window=s.window, value_embeddings=s.value_embeddings)
    at_least(0, attention_scale=s.attention_scale)
    _check_rotary(s, head_width)
    if set(s.window_pattern) - set("SL"):
        raise UserError(f"window_pattern={s.window_pattern}: use the letters S and L, as in SSSL")
    if ("S" in s.window_pattern) != (s.window > 0):
        raise UserError("window is the width of the layers S of window_pattern; give both")
    if s.window >= block_size:
        raise UserError(
            f"window={s.window} is the whole context of {block_size}; use a smaller one"
        )
    if dropout and (s.window_pattern or s.document_mask):
        raise UserError("dropout does not work with window_pattern or document_mask; leave it out")
    if s.value_embeddings > n_layer // 2:
        raise UserError(f"value_embeddings={s.value_embeddings}: use at most n_layer // 2")
    if s.skips != "none" and n_layer < 2:
        raise UserError(f"skips={s.skips} needs two layers or more")


def _check_rotary(s: Switches, head_width: int):
    if s.rope_base != DEFAULT_ROPE_BASE and s.positions != "rotary":
        raise UserError("rope_base is for positions=rotary; give both")
    if s.rope_fraction != 1 and s.positions != "rotary":
        raise UserError("rope_fraction is for positions=rotary; give both")
    if not 0 < s.rope_fraction <= 1:
        raise UserError(f"rope_fraction={s.rope_fraction}: use a number above 0 and up to 1")
    if s.rope_base <= 1:
        raise UserError(f"rope_base={s.rope_base}: use a number above 1")
    if s.positions == "rotary" and head_width % 2:
        raise UserError(f"positions=rotary turns pairs, and heads are {head_width} wide; use an "
                        "even n_embd / n_head")  # fmt: skip
    if s.positions == "rotary" and not round(head_width // 2 * s.rope_fraction):
        raise UserError(
            f"rope_fraction={s.rope_fraction}: no pair of heads {head_width} wide would turn; use "
            "a larger one"
        )
