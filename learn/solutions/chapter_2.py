"""Answers to the exercises of chapter 2."""

import math

import torch
from torch import Tensor


def bigram_table(ids: Tensor, vocab_size: int, add: float) -> Tensor:
    """(T,) ids -> (V, V) probabilities of the next token."""
    counts = torch.full((vocab_size, vocab_size), add)
    for a, b in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True):
        counts[a, b] += 1
    return counts / counts.sum(1, keepdim=True)


def loss_in_nats(table: Tensor, ids: Tensor) -> float:
    """The mean of -ln p over the tokens that have a predecessor."""
    return -table[ids[:-1], ids[1:]].log().mean().item()


def bits_per_byte(nats: float, tokens: int, text_bytes: int) -> float:
    """Bits per byte of a text, from the mean loss of a token in nats."""
    return nats / math.log(2) * tokens / text_bytes


def gradient_of_logits(logits: Tensor, target: int) -> Tensor:
    """(V,) logits -> (V,) the gradient of -ln softmax(logits)[target]."""
    gradient = logits.softmax(-1)
    gradient[target] -= 1
    return gradient
