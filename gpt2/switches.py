"""The switches of a modern recipe: pure data and checks. Their defaults are GPT-2.

`Switches` are those of the network (`modern.py` reads them), `Recipe` those of the optimizer and
its schedules (`optim.py`, `muon.py`). A combination works, or is refused here by name.
"""

from dataclasses import dataclass, fields
from typing import Any

from .options import UserError, at_least, option

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


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What may differ from GPT-2's optimizer and schedule."""

    optimizer: str = option(
        "adamw", "muon: for the matrices of the blocks; AdamW for the rest", ("adamw", "muon")
    )
    muon_lr: float = option(0.02, "peak learning rate of Muon")
    muon_momentum: float = option(0.95, "Muon: decay of the mean of gradients")
    embedding_lr: float = option(0.0, "peak learning rate of embeddings; 0: learning_rate")
    head_lr: float = option(0.0, "peak learning rate of an untied head; 0: learning_rate")
    schedule: str = option("cosine", "wsd: warm-up, stable, then linear decay", ("cosine", "wsd"))
    cooldown: float = option(0.4, "wsd: share of max_steps in which the rate decays")
    batch_warmup: float = option(
        0.0, "share of max_steps in which a step grows from one micro-batch to all"
    )
    window_warmup: float = option(
        0.0, "share of max_steps in which the windows of window_pattern grow to their width"
    )


def chosen(values: Switches) -> dict[str, Any]:
    """All switches of a config, by name."""
    return {f.name: getattr(values, f.name) for f in fields(Switches)}


def switched(values: Switches) -> dict[str, Any]:
    """The switches that are not GPT-2's."""
    return {f.name: getattr(values, f.name) for f in fields(Switches)
            if getattr(values, f.name) != f.default}  # fmt: skip


def check_switches(  # noqa: C901 - a list
    s: Switches, n_layer: int, head_width: int, block_size: int, dropout: float
):
    """Raises UserError for switches that do not fit together, or mean nothing."""
    for f in fields(Switches):
        value, choices = getattr(s, f.name), f.metadata["choices"]
        if not isinstance(value, (int, float) if f.type is float else f.type):
            raise UserError(f"{f.name}={value!r}: use a {f.type.__name__}")
        if choices and value not in choices:
            raise UserError(f"{f.name}={value!r}: use {' or '.join(choices)}")
    at_least(0, softcap=s.softcap, window=s.window, value_embeddings=s.value_embeddings)
    if s.rope_base != DEFAULT_ROPE_BASE and s.positions != "rotary":
        raise UserError("rope_base is for positions=rotary; give both")
    if s.rope_base <= 1:
        raise UserError(f"rope_base={s.rope_base}: use a number above 1")
    if s.positions == "rotary" and head_width % 2:
        raise UserError(f"positions=rotary turns pairs, and heads are {head_width} wide; use an "
                        "even n_embd / n_head")  # fmt: skip
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


def check_recipe(r: Recipe, s: Switches, fp8: str, dtype: str):  # noqa: C901 - a list
    """Raises UserError for options of training that mean nothing here, or do not fit together."""
    at_least(0, muon_lr=r.muon_lr, embedding_lr=r.embedding_lr, head_lr=r.head_lr)
    for name in ("cooldown", "batch_warmup", "window_warmup"):
        if not 0 <= getattr(r, name) <= 1:
            raise UserError(f"{name}={getattr(r, name)}: use a share, from 0 to 1")
    if not 0 <= r.muon_momentum < 1:
        raise UserError(f"muon_momentum={r.muon_momentum}: use a number from 0 up to below 1")
    default = Recipe()
    if r.optimizer != "muon":
        for name in ("muon_lr", "muon_momentum"):
            if getattr(r, name) != getattr(default, name):
                raise UserError(f"{name} is for --optimizer=muon; give both")
    elif dtype == "float16":
        raise UserError("optimizer=muon does not work with dtype=float16; use bfloat16 or float32")
    if r.schedule != "wsd" and r.cooldown != default.cooldown:
        raise UserError("cooldown is for --schedule=wsd; give both")
    if r.head_lr and not s.untied_head:
        raise UserError("head_lr is for --untied_head; a tied head has the embedding's rate")
    if r.window_warmup and not s.window_pattern:
        raise UserError("window_warmup is for --window_pattern; give both")
    if fp8 != "none" and s.softcap:
        raise UserError(f"fp8={fp8} does not work with softcap; leave one of them out")
