"""Exercises of chapter 2. Replace each `raise NotImplementedError`; then `python -m learn.check 2`.

`learn/chapter_2_bigrams.py` explains what is needed. Shapes: `T` tokens, `V` vocabulary.
"""

from torch import Tensor


def bigram_table(ids: Tensor, vocab_size: int, add: float) -> Tensor:
    """(T,) ids -> (V, V) probabilities of the next token, with `add` added to each count."""
    raise NotImplementedError


def loss_in_nats(table: Tensor, ids: Tensor) -> float:
    """The mean of -ln p over the tokens that have a predecessor."""
    raise NotImplementedError


def bits_per_byte(nats: float, tokens: int, text_bytes: int) -> float:
    """Bits per byte of a text of `tokens` tokens, from the mean loss of a token in nats."""
    raise NotImplementedError


def gradient_of_logits(logits: Tensor, target: int) -> Tensor:
    """(V,) logits -> (V,) the gradient of -ln softmax(logits)[target], without autograd."""
    raise NotImplementedError
