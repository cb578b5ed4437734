"""Answers to the exercises of chapter 5."""

import math

import torch.nn.functional as F
from torch import Tensor


def count_parameters(n_layer: int, n_embd: int, vocab_size: int, block_size: int) -> int:
    """All parameters of GPT-2, with biases."""
    C = n_embd
    attention, mlp, norms = 4 * C * C + 4 * C, 8 * C * C + 5 * C, 4 * C
    return (vocab_size + block_size) * C + n_layer * (attention + mlp + norms) + 2 * C


def embed(ids: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """The residual stream before the first block."""
    return wte[ids] + wpe[: ids.shape[1]]


def head(hidden: Tensor, wte: Tensor) -> Tensor:
    """Logits of a head that is the token embedding."""
    return hidden @ wte.T


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """() the mean loss in nats: t predicts t + 1."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def first_loss(n_embd: int, vocab_size: int, std: float) -> float:
    """The loss in nats to expect of fresh weights."""
    return math.log(vocab_size) + n_embd * std**2 / 2
