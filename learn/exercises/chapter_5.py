"""Exercises of chapter 5. Replace each `raise NotImplementedError`; then `python -m learn.check 5`.

`learn/chapter_5_gpt2.py` explains what is needed. Shapes: `B` batch, `T` positions, `C` channels,
`L` layers, `V` vocabulary.
"""

from torch import Tensor


def count_parameters(n_layer: int, n_embd: int, vocab_size: int, block_size: int) -> int:
    """All parameters of GPT-2, with biases; the head is the token embedding and counts once."""
    raise NotImplementedError


def embed(ids: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """The residual stream before the first block: ids (B, T), (V, C), (T_max, C) -> (B, T, C)."""
    raise NotImplementedError


def head(hidden: Tensor, wte: Tensor) -> Tensor:
    """Logits of a head that is the token embedding: (B, T, C), (V, C) -> (B, T, V)."""
    raise NotImplementedError


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """() the mean loss in nats of (B, T, V) logits of the text (B, T): t predicts t + 1."""
    raise NotImplementedError


def first_loss(n_embd: int, vocab_size: int, std: float) -> float:
    """The loss in nats to expect of fresh weights ~ N(0, std²)."""
    raise NotImplementedError
