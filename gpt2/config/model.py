"""The shape of the network: GPT-2's numbers, its named sizes, and the switches beside them.

Plain data and checks: no torch, no files.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import UserError
from ..untrusted.display import shown
from .switches import Switches, check_switches, chosen, defaults, switched

GPT2_VOCAB_SIZE = 50257  # 50,000 merges + 256 bytes + end of text
# Upper limits, far above what is trained: absurd numbers are refused before memory is asked for.
LIMITS = {
    "block_size": 2**24,
    "vocab_size": 2**24,
    "n_layer": 4096,
    "n_head": 4096,
    "n_embd": 2**17,
}
MAX_PARAMETERS = 10**12
IGNORE = -1  # a target that has no loss, `ignore_index` of the cross-entropy
# Switches that earlier versions had, with the value that turns them off.
REMOVED_SWITCHES = {"bigram_rows": 0}


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Shape of the network. The defaults are GPT-2 (124M).

    Raises:
        UserError: when the numbers do not fit together.
    """

    block_size: int = 1024
    vocab_size: int = GPT2_VOCAB_SIZE
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={shown(repr(value))}: use a whole number of at least 1")
            if value > limit:
                raise UserError(f"{name}={shown(value)}: use at most {limit:,}")
        if self.least_parameters > MAX_PARAMETERS:
            raise UserError(
                f"n_layer={self.n_layer} and n_embd={self.n_embd} make a network of over "
                f"{MAX_PARAMETERS:,} parameters; use smaller ones"
            )
        if self.n_embd % self.n_head:
            near = max(1, self.n_embd // self.n_head)
            raise UserError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; "
                f"use n_embd={near * self.n_head} or {(near + 1) * self.n_head}"
            )
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise UserError(
                f"dropout={shown(repr(self.dropout))}: use a number from 0 up to, not including, 1"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the head's matmul: the next multiple of 128, for tensor cores (50,304)."""
        return -(-self.vocab_size // 128) * 128

    @property
    def least_parameters(self) -> int:
        """Token embedding and 12 C² weights for each block, which any switches leave."""
        return self.n_embd * (self.vocab_size + self.n_layer * 12 * self.n_embd)

    def switches(self) -> dict[str, Any]:
        """All switches of the network by name; GPT-2 has them at their defaults."""
        return chosen(self) if isinstance(self, Switches) else defaults()

    def changed_switches(self) -> dict[str, Any]:
        """The switches that differ from GPT-2's, by name."""
        return switched(self) if isinstance(self, Switches) else {}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GPT2Config":
        """The config that a checkpoint carries, as `to_dict` gave it.

        Returns:
            A `ModernConfig` if any switch is named; switches that are not named are GPT-2's.

        Raises:
            UserError: a key that is unknown or missing, or a value that does not fit.
            TypeError: `values` comes from a damaged file and is not a mapping.
        """
        values = {n: v for n, v in {**values}.items() if REMOVED_SWITCHES.get(n, ...) != v}
        known, switches = ({f.name for f in fields(c)} for c in (GPT2Config, Switches))
        if odd := (set(values) - switches) ^ known:
            names = shown(", ".join(sorted(map(str, odd))))
            raise UserError(f"the checkpoint's config does not describe a GPT-2: {names}")
        return (ModernConfig if set(values) & switches else GPT2Config)(**values)


@dataclass(frozen=True, kw_only=True)
class ModernConfig(Switches, GPT2Config):
    """Shape of the network in `model/modern.py`: GPT-2's numbers and the switches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        width = self.n_embd // self.n_head
        check_switches(self, self.n_layer, width, self.block_size, self.dropout)


SIZES: dict[str, dict[str, int]] = {
    # Radford et al. 2019, table 2; parameters counted in the released models.
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 355M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1,558M
    # Ours, for laptops and tests: GPT-2's network, small enough for a CPU.
    "gpt2-30m": {"n_layer": 6, "n_head": 6, "n_embd": 384},  # 30M
    "gpt2-mini": {"n_layer": 4, "n_head": 4, "n_embd": 256},  # 16M
    "gpt2-tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128},  # 7M
}

# "GPT-2 small" is the one of 124M everywhere else; earlier versions called that of 30M so.
OLD_SIZES = {"gpt2-small": "gpt2-30m"}


def sizes_table() -> str:
    """The named sizes, for `--help`."""
    lines = ["sizes:           layers  heads  width  parameters"]
    for name, numbers in SIZES.items():
        shape = GPT2Config(**numbers)
        rows = shape.vocab_size + shape.block_size
        # weights and biases of the blocks (12 C² and 13 C), embeddings, and the last LayerNorm
        width, layers = shape.n_embd, shape.n_layer
        millions = (layers * width * (12 * width + 13) + width * (rows + 2)) / 1e6
        lines.append(f"  {name:<12} {layers:>8} {shape.n_head:>6} {width:>6} {millions:>9,.0f}M")
    return "\n".join(lines)


def to_dict(config: GPT2Config) -> dict[str, Any]:
    """The config as plain values, which a checkpoint stores."""
    return asdict(config)
