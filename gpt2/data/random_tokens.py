"""Shards of random tokens, for measurements without a text.

Their frequencies are as unequal as in a text (Zipf's law), so that a micro-batch has about as many
different ids: 6,700 among 65,536 tokens. Equally frequent ids would have 36,600, more than a
sampled softmax takes.
"""

from pathlib import Path

import numpy as np

from .shards import write_shard

EXPONENT = 1.3  # of Zipf's law


def random_tokens(count: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """(count,) uint16 ids below vocab_size, the same for equal seeds."""
    drawn = np.random.default_rng(seed).zipf(EXPONENT, count) % vocab_size
    return drawn.astype(np.uint16)


def write_random_shards(folder: Path, count: int, vocab_size: int) -> None:
    """A shard for validation and one for training, of so many tokens each."""
    for seed, name in enumerate(("random_val_000000.bin", "random_train_000001.bin")):
        write_shard(folder / name, random_tokens(count, vocab_size, seed))
