"""The protocol between a network and whatever stands in its attention.

A network calls `start` once per forward pass, `attend` once per layer in order, and `advance` once
after the last layer. Three classes follow the protocol: `kv_cache.KVCache` stores keys and values
for generation, `packed_documents.Packed` separates the documents of one sequence, and
`interpret.logit_lens.Recorder` records attention weights. A network without a cache computes plain
causal attention.

Shapes: `B` batch, `T` new positions, `H` heads, `D` head width.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class AttentionCache(Protocol):
    """Positions and attention of one forward pass of `gpt.GPT`."""

    def start(self) -> int | Tensor:
        """Offset to add to 0 … T - 1 to get the positions of the new tokens.

        An int holds for all rows. A tensor, (B, 1) or (B, T), holds an offset per row or token.
        """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of the new positions of one layer.

        Args:
            layer: its number, from 0; layers come in order.
            q: (B, H, T, D) queries; k and v have the same shape.
            k: keys of the new positions.
            v: values of the new positions.

        Returns:
            (B, H, T, D), the attention output of each head.
        """

    def advance(self, count: int) -> None:
        """Counts `count` new positions as seen; called after the last layer."""


@runtime_checkable
class MaskedAttentionCache(AttentionCache, Protocol):
    """What `modern.Modern` needs for attention windows and documents."""

    def add_documents(self, begins: Tensor, positions: Tensor) -> Tensor:
        """Numbers the documents of the new tokens; called once, before the first layer.

        Args:
            begins: (B, T) bool, True for the first token of a document.
            positions: (T,) or (B, T) positions of the new tokens.

        Returns:
            (B, T) int64, the document of each token; numbers never fall along a row.
        """

    def attend_masked(  # noqa: PLR0917 - what attention has
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: Tensor | None,
        positions: Tensor,
        documents: Tensor | None,
    ) -> Tensor:
        """Like `attend`, limited to an attention window and to the query's own document.

        Args:
            layer: see `attend`.
            q: see `attend`.
            k: see `attend`.
            v: see `attend`.
            window: () int64, positions that a query sees, itself included; None: all.
            positions: (T,) or (B, T) positions of the new tokens.
            documents: (B, T) from `add_documents`; None: all tokens are one document.
        """
