"""Ranks agree on a name for this start, whatever earlier starts have left in the store."""

import json
import random
import threading
import time

from gpt2.distributed.rendezvous import meet


class Memory:
    """A store as torch's, in this process."""

    def __init__(self):
        self.values: dict[str, bytes] = {}

    def set(self, key, value):
        time.sleep(random.random() / 100)
        self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)


def start(store, world_size) -> list[str]:
    names = [""] * world_size

    def run(rank):
        time.sleep(random.random() / 5)
        names[rank] = meet(store, rank, world_size)

    threads = [
        threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return names


def test_every_start_has_a_name_of_its_own():
    """Also with another number of ranks, and with what ranks that died have left."""
    store, seen = Memory(), set()
    for world_size in (3, 3, 2, 4):
        names = start(store, world_size)
        assert names[0]
        assert set(names) == {names[0]}
        assert names[0] not in seen
        seen.add(names[0])
        store.set("meet/word/1", "of a rank that died")
        store.set("meet/confirmed/2", names[0])


def test_a_name_of_an_earlier_start_is_not_believed():
    store = Memory()
    store.set("meet/name", json.dumps({"1": "old word", "name": "old"}))
    assert start(store, 2) != ["old", "old"]


def test_one_rank_waits_for_nobody():
    assert len(meet(Memory(), 0, 1)) == 32
