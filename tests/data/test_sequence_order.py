"""Every sequence once per epoch, sequences at documents, mixtures in exact proportion."""

import itertools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.data.sequence_order import Mixture, SequenceOrder, document_sequences
from gpt2.data.shards import find_shards, open_shard, write_shard
from gpt2.errors import UserError
from gpt2.tokenizer import END_OF_TEXT


def write(folder, *sizes):
    for number, size in enumerate(sizes, 1):
        write_shard(folder / f"n_train_{number:06d}.bin", np.zeros(size, dtype=np.uint16))
    return find_shards(folder, "train")


def shard_of(folder, lengths, cut=0):
    """A shard of documents of these lengths, end-of-text first, without the first `cut` tokens."""
    tokens = np.concatenate([[END_OF_TEXT, *[7] * (length - 1)] for length in lengths])[cut:]
    write_shard(folder / "d_train_000001.bin", tokens.astype(np.uint16))
    return open_shard(folder / "d_train_000001.bin")


def epoch_of(order, number=0):
    first = number * order.per_epoch
    return [order.locate(n) for n in range(first, first + order.per_epoch)]


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    epoch=st.integers(0, 10**6),
    block=st.integers(1, 100),
    seed=st.integers(0, 2**62),
    shuffle=st.booleans(),
    together=st.integers(0, 700),
    at_most=st.integers(1, 4),
)
def test_each_sequence_once_per_epoch(
    tmp_path_factory, sizes, epoch, block, seed, shuffle, together, at_most
):
    shards = write(tmp_path_factory.mktemp("s"), *sizes, 101)
    with mock.patch.multiple(
        "gpt2.data.sequence_order", GROUP_TOKENS=together, GROUP_SHARDS=at_most
    ):
        found = epoch_of(SequenceOrder(shards, block, seed, shuffle), epoch)
    expected = [(s, i * block) for s in shards for i in range(max(0, (s.tokens - 1) // block))]
    shifts = {s: min(start for shard, start in found if shard is s) for s, _ in expected}
    cut = [(s, start - shifts[s]) for s, start in sorted(found, key=lambda w: (w[0].path, w[1]))]
    assert cut == expected
    assert all(start + block < s.tokens for s, start in found)
    assert (shuffle and epoch) or not any(shifts.values())
    assert shuffle or found == expected


def test_later_epochs_are_cut_elsewhere(tmp_path):
    """By up to what fills no whole sequence, differently for each shard and epoch."""
    shards = write(tmp_path, 1000, 1000, 961)
    order = SequenceOrder(shards, 64, 1, shuffle=True)

    def shifts(epoch):
        return [min(start for s, start in epoch_of(order, epoch) if s is shard) for shard in shards]

    found = np.array([shifts(epoch) for epoch in range(40)])
    assert not found[0].any()
    assert not found[:, 2].any()  # 15 sequences and nothing left over
    assert found.max() == 39  # of 999 tokens that are predicted
    assert len(set(found[1:, 0])) > 20
    assert (found[:, 0] != found[:, 1]).sum() > 30


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path):
    shards = write(tmp_path, 500, 500, 500)
    order, other = (SequenceOrder(shards, 10, seed, shuffle=True) for seed in (1, 2))
    orders = [epoch_of(order, 0), epoch_of(order, 1), epoch_of(other, 0)]
    assert all(a != b for a, b in itertools.pairwise(orders))
    within = {tuple(n for s, n in orders[0] if s == shard) for shard in shards}
    assert len(within) == 3  # shards of equal size are not shuffled alike


def test_order_is_pinned(tmp_path, monkeypatch):
    """The same on every machine and with every numpy; a change breaks runs that are under way."""
    shards = write(tmp_path, 50, 40)

    def sequences() -> str:
        order = SequenceOrder(shards, 8, seed=1337, shuffle=True)
        return " ".join(f"{shard.path.name[-5]}:{start // 8}" for shard, start in epoch_of(order))

    assert sequences() == "2:2 1:3 2:1 2:3 1:0 1:1 2:0 1:5 1:2 1:4"
    monkeypatch.setattr("gpt2.data.sequence_order.GROUP_TOKENS", 89)
    assert sequences() == "1:3 1:0 1:1 1:5 1:2 1:4 2:2 2:1 2:0 2:3"


def test_small_shards_are_shuffled_together(tmp_path, monkeypatch):
    """Any tenth of an epoch has sequences of all shards of its group; groups follow each other."""
    shards = write(tmp_path, *[101] * 20)
    whole = [shard for shard, _ in epoch_of(SequenceOrder(shards, 1, 7, shuffle=True))]
    assert all(len(set(whole[i : i + 200])) == 20 for i in range(0, 2000, 200))
    monkeypatch.setattr("gpt2.data.sequence_order.GROUP_SHARDS", 5)
    parts = [shard for shard, _ in epoch_of(SequenceOrder(shards, 1, 7, shuffle=True))]
    groups = [set(parts[i : i + 500]) for i in range(0, 2000, 500)]
    assert [len(group) for group in groups] == [5] * 4
    assert len(set.union(*groups)) == 20


def test_shards_of_the_usual_size_take_turns_alone():
    shards = [SimpleNamespace(number=n, tokens=100_000_000) for n in range(3)]
    order = SequenceOrder(shards, 1024, seed=1, shuffle=True)
    assert order.counts == [97_656] * 3
    found = [shard.number for shard, _ in epoch_of(order)]
    turns = [set(found[i : i + 97_656]) for i in range(0, 3 * 97_656, 97_656)]
    assert sorted(turns, key=min) == [{0}, {1}, {2}]


def test_too_little_text(tmp_path):
    with pytest.raises(UserError, match="20 training tokens are too few"):
        SequenceOrder(write(tmp_path, 10, 10), 16, 0, shuffle=True)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    block=st.integers(1, 25),
    cut=st.integers(0, 5),
)
def test_sequences_at_documents(tmp_path_factory, lengths, block, cut):
    cut = min(cut, sum(lengths) - 1)  # a shard may begin within a document
    shard = shard_of(tmp_path_factory.mktemp("d"), lengths, cut)
    starts = document_sequences(shard, block).tolist()
    tokens = shard.read(0, shard.tokens)
    begins = {0, *np.flatnonzero(tokens == END_OF_TEXT).tolist()}
    assert starts == sorted(set(starts))
    for before, start in zip([-block, *starts], starts, strict=False):
        in_between = [b for b in begins if before < b <= before + block]
        # at a document or, while a long one lasts, where the sequence before ended
        assert start == (max(in_between) if in_between else before + block)
    predicted = {t for start in starts for t in range(start + 1, start + block + 1)}
    covered = max(predicted, default=0)
    assert predicted == set(range(1, covered + 1))
    assert shard.tokens - 1 - covered < block
    # a document that fits is whole in some sequence
    for begin, end in itertools.pairwise([*sorted(begins), shard.tokens]):
        if end - begin <= block and end <= covered:
            assert any(start <= begin and end - 1 <= start + block for start in starts)


def test_documents_across_pieces_are_found(tmp_path, monkeypatch):
    shard = shard_of(tmp_path, [50, 1, 1, 49, 3, 200])
    whole = document_sequences(shard, 20).tolist()
    for piece in (1, 7, 50, 51):
        monkeypatch.setattr("gpt2.data.shards.CHUNK_TOKENS", piece)
        assert document_sequences(shard, 20).tolist() == whole


def test_an_epoch_of_documents(tmp_path):
    shards = [shard_of(tmp_path, [12] * 40)]
    order = SequenceOrder(shards, 16, 3, shuffle=True, sequence_start="document")
    found = epoch_of(order)
    assert sorted(start for _, start in found) == document_sequences(shards[0], 16).tolist()
    assert all(shard.read(start, 1)[0] == END_OF_TEXT for shard, start in found)
    assert order.tokens_per_epoch == 16 * len(found)


class Counting:
    """In place of a SequenceOrder: the n-th sequence of dataset d is (d, n)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def locate(self, n):
        return self.dataset, n


def mix(weights, **arguments) -> Mixture:
    shares = np.array(weights) / np.sum(weights)
    return Mixture([Counting(d) for d in range(len(weights))], shares.tolist(), **arguments)


WEIGHTS = st.lists(st.floats(1e-4, 1), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, first=st.integers(0, 10**10), count=st.integers(1, 60))
def test_a_mix_keeps_its_proportion(weights, first, count):
    mixture = mix(weights)
    before = mixture.consumed(first)
    assert sum(before) == first
    for share, consumed in zip(mixture.shares, before, strict=True):
        assert abs(consumed - first * share) <= 0.5 + len(weights) / 2 * share + 1e-3
    for dataset, number in mixture.locate(first, count):  # each in its own order, without gaps
        assert number == before[dataset]
        before[dataset] += 1
    assert mixture.consumed(first + count) == before


@settings(max_examples=50, deadline=None)
@given(weights=WEIGHTS, cuts=st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_a_mix_read_in_parts_is_the_mix(weights, cuts):
    mixture, g, parts = mix(weights), 0, []
    for cut in cuts:
        parts += mixture.locate(g, cut)
        g += cut
    assert parts == mixture.locate(0, g)


def test_a_mix_of_four_to_one():
    sequence = [dataset for dataset, _ in mix([0.8, 0.2]).locate(0, 100)]
    assert [sequence[i : i + 5].count(1) for i in range(0, 100, 5)] == [1] * 20


def test_a_mix_that_begins_later_goes_on_where_each_dataset_was():
    mixture = mix([1, 1], began=100, before=[70, 30])
    assert sorted(mixture.locate(100, 4)) == [(0, 70), (0, 71), (1, 30), (1, 31)]
    assert mixture.consumed(100) == [70, 30]
    assert mixture.consumed(110) == [75, 35]
