"""What ranks see together, exact position, faults; validation's tokens."""

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.config.train import BatchPlan
from gpt2.data.loader import TrainLoader, available_eval_tokens, eval_batches
from gpt2.data.sequence_order import Mixture, SequenceOrder
from gpt2.data.shards import find_shards, write_shard
from gpt2.errors import UserError


def write(folder, split, *sizes):
    """Shards whose tokens are 0, 1, 2, … throughout, so that a token tells its place."""
    first = 0
    for number, size in enumerate(sizes):
        tokens = np.arange(first, first + size, dtype=np.uint16)
        write_shard(folder / f"n_{split}_{number:06d}.bin", tokens)
        first += size
    return find_shards(folder, split)


@pytest.fixture
def shards(tmp_path):
    return write(tmp_path, "train", 1000, 333, 777)


def load(shards, plan, seed=0, shuffle=True, **arguments) -> TrainLoader:
    order = SequenceOrder(shards, plan.block_size, seed, shuffle)
    return TrainLoader(Mixture([order]), plan, **arguments)


def collect(shards, plan, steps, position=0, shuffle=True, seed=1):
    """First tokens of all sequences that all ranks see, step by step."""
    seen = [[] for _ in range(steps)]
    for rank in range(plan.world_size):
        loader = load(shards, plan, seed=seed, shuffle=shuffle, rank=rank, position=position)
        for step in range(steps):
            for x, y in loader.next_step():
                assert x.shape == y.shape == (plan.batch_size, plan.block_size)
                assert torch.equal(x[:, 1:], y[:, :-1])
                assert torch.equal(y, x + 1)  # numbered tokens: the next one is one more
                seen[step] += x[:, 0].tolist()
        loader.close()
    return seen


def starts_of(shards, block_size):
    starts, first = [], 0
    for shard in shards:
        starts += [first + i * block_size for i in range((shard.tokens - 1) // block_size)]
        first += shard.tokens
    return starts


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("batch", "accum"), [(1, 1), (2, 3), (3, 1)])
def test_each_sequence_once_per_epoch(shards, shuffle, batch, accum):
    all_starts = starts_of(shards, 10)
    plan = BatchPlan(batch, 10, accum, 1)
    steps = 2 * len(all_starts) // plan.sequences_per_step + 1
    seen = [w for step in collect(shards, plan, steps, shuffle=shuffle) for w in step]
    one, two = seen[: len(all_starts)], seen[len(all_starts) : 2 * len(all_starts)]
    assert sorted(one) == all_starts
    # the second time they begin up to a sequence later, see `test_later_epochs_are_cut_elsewhere`
    two = [max(start for start in all_starts if start <= later) for later in two]
    assert sorted(two) == all_starts
    assert (one == all_starts) is not shuffle
    assert (one == two) is not shuffle


@settings(max_examples=15, deadline=None)
@given(
    block=st.integers(1, 40),
    legs=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 20)),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 2**62),
)
def test_order_is_one_for_any_stops_and_ranks(tmp_path_factory, block, legs, seed):
    """A run in several legs, each with another batch, accumulation and number of ranks."""
    shards = write(tmp_path_factory.mktemp("s"), "train", 300, 2, 90)
    order = SequenceOrder(shards, block, seed, shuffle=True)
    position = 0
    for batch, accum, world, steps in legs:
        plan = BatchPlan(batch, block, accum, world)
        for step in collect(shards, plan, steps, position, seed=seed):
            due = range(position, position + plan.sequences_per_step)
            assert sorted(step) == sorted(first_token(*order.locate(g)) for g in due)
            position += plan.sequences_per_step


def first_token(shard, start) -> int:
    return int(shard.read(start, 1)[0])


def test_ranks_and_micro_batches_cut_the_same_steps(shards):
    """Any split of 12 sequences a step sees the same sequences in the same steps."""
    splits = [(12, 1, 1), (3, 4, 1), (3, 2, 2), (2, 2, 3), (1, 3, 4)]
    steps = [
        [sorted(step) for step in collect(shards, BatchPlan(b, 16, a, w), 15)] for b, a, w in splits
    ]
    assert all(s == steps[0] for s in steps)


def test_position_continues_exactly(shards):
    plan = BatchPlan(2, 16, 3, 1)
    whole = collect(shards, plan, 40)
    loader = load(shards, plan, seed=1)
    for _ in range(17):
        loader.next_step()
    position = loader.position
    loader.close()
    assert collect(shards, plan, 23, position=position) == whole[17:]


def test_bad_token_reaches_the_caller(tmp_path):
    write_shard(tmp_path / "b_train_000001.bin", np.full(100, 50300, dtype=np.uint16))
    loader = load(find_shards(tmp_path, "train"), BatchPlan(1, 16, 1, 1))
    with pytest.raises(UserError, match="50300"):
        loader.next_step()
    loader.close()


def test_any_error_of_the_thread_reaches_the_caller(shards, monkeypatch):
    def broken(*_):
        raise MemoryError("too large")

    monkeypatch.setattr(TrainLoader, "_read", broken)
    loader = load(shards, BatchPlan(1, 16, 1, 1))
    with pytest.raises(MemoryError, match="too large"):
        loader.next_step()
    loader.close()


def test_shard_cut_short_during_the_run(tmp_path):
    shards = write(tmp_path, "train", 1000)
    path = shards[0].path
    path.write_bytes(path.read_bytes()[:1100])
    loader = load(shards, BatchPlan(4, 16, 1, 1))
    with pytest.raises(UserError, match="ends early"):
        collections.deque((loader.next_step() for _ in range(100)), maxlen=0)
    loader.close()


@pytest.mark.parametrize("asked", [1, 50, 64, 100, 499, 10**9])
@pytest.mark.parametrize(("batch", "world"), [(1, 1), (3, 1), (2, 2), (4, 5), (100, 3)])
def test_validation_predicts_the_same_tokens_for_any_split(tmp_path, asked, batch, world):
    shards = write(tmp_path, "val", 200, 1, 300, 7)
    predicted = []
    for rank in range(world):
        for x, y in eval_batches(
            shards, block_size=32, batch_size=batch, eval_tokens=asked, rank=rank, world_size=world
        ):
            assert x.shape == (batch, 32)
            predicted += y[y >= 0].tolist()
            context = torch.where(y >= 0, y - 1, x)
            assert torch.equal(context, x)
    # every token but the first of each shard can be predicted
    possible = [t for t in range(508) if t not in (0, 200, 201, 501)]
    assert sorted(predicted) == possible[:asked]
    assert len(predicted) == available_eval_tokens(shards, asked) == min(asked, 504)
