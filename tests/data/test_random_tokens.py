"""Random tokens in place of a text."""

import numpy as np

from gpt2.config.model import GPT2_VOCAB_SIZE
from gpt2.data.random_tokens import random_tokens, write_random_shards
from gpt2.data.shards import open_shard
from gpt2.kernels.sampled_softmax import sampled_size


def test_a_sampled_softmax_takes_their_micro_batches():
    """As it takes those of a text, which repeats its words."""
    tokens = random_tokens(1 << 18, GPT2_VOCAB_SIZE)
    for size in (1 << 14, 1 << 16, 1 << 17):
        assert len(np.unique(tokens[:size])) < sampled_size(GPT2_VOCAB_SIZE)
    assert tokens.max() < GPT2_VOCAB_SIZE
    assert len(np.unique(tokens)) > 10_000


def test_equal_seeds_equal_tokens(tmp_path):
    write_random_shards(tmp_path, 1000, 300)
    val, train = (
        np.concatenate(list(open_shard(path).chunks()))
        for path in (tmp_path / "random_val_000000.bin", tmp_path / "random_train_000001.bin")
    )
    assert np.array_equal(train, random_tokens(1000, 300, seed=1))
    assert np.array_equal(val, random_tokens(1000, 300))
    assert not np.array_equal(val, train)
    assert train.max() < 300
