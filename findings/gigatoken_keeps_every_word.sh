#!/usr/bin/env bash
# gigatoken 0.10.0: a tokenizer keeps every different word that it has encoded, without a bound and
# without a method that empties it. Its memory grows by 96 bytes a word, however small the batches
# are, and stays when they are gone. Text that is read again adds nothing. Only deleting the tokenizer
# gives the memory back. A corpus with many different words (numbers, hashes, addresses, names) thus
# takes gigabytes in each thread that has a tokenizer. `tokenizers` 0.23.3 does not grow: once it has
# encoded a million words, a million others add nothing. The README of gigatoken calls caching hard;
# it names no growth.
#
# Seen on Python 3.11, a small byte-level BPE, batches of 250,000 words
#   tokenizers, 1 million words more than 1 million 0 MB
#   1 million words 95 MB
#   2 million words 191 MB
#   4 million words 384 MB
#   the 4 million again 384 MB
#   tokenizer deleted -19 MB
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet gigatoken==0.10.0 tokenizers==0.23.3 numpy
cat > try.py <<'PY'
import ctypes
import gc
import random
from pathlib import Path

import gigatoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BATCH = 250_000


def megabytes() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def words(batch: int) -> str:
    draw = random.Random(batch)
    return " ".join(f"{draw.getrandbits(52):013x}".translate(LETTERS) for _ in range(BATCH))


LETTERS = str.maketrans("0123456789", "ghijklmnop")  # words of letters alone
theirs = Tokenizer(models.BPE())
theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
theirs.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
theirs.train_from_iterator([words(-1)[:100_000]], trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet))
fast = gigatoken.Tokenizer.from_json(theirs.to_str())

sample = words(-2)[:5000]
assert fast.encode(sample).tolist() == theirs.encode(sample).ids
for batch in range(4):  # its cache is full early
    theirs.encode(words(batch))
begin = megabytes()
for batch in range(4, 8):
    theirs.encode(words(batch))
more = megabytes() - begin
print(f"tokenizers, 1 million words more than 1 million {more:.0f} MB")

begin, grown = megabytes(), {}
for batch in range(16):
    fast.encode(words(batch))
    grown[batch + 1] = megabytes() - begin
for batch in range(16):
    fast.encode(words(batch))
again = megabytes() - begin
del fast
deleted = megabytes() - begin
for batches in (4, 8, 16):
    print(f"{batches * BATCH // 10**6} million words {grown[batches]:.0f} MB")
print(f"the 4 million again {again:.0f} MB\ntokenizer deleted {deleted:.0f} MB")
linear = grown[16] > 1.6 * grown[8] > 2 * grown[4] > 0 and grown[16] > 150
kept_until_deleted = again < 1.1 * grown[16] and deleted < 0.3 * grown[16]
raise SystemExit(0 if more < 20 and linear and kept_until_deleted else 1)
PY
venv/bin/python try.py
