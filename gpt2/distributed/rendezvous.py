"""A fresh key prefix in torchrun's store for each start of the ranks.

torchrun keeps its store when it restarts ranks. In torch 2.13 the store then still holds the
addresses of the dead ranks: a quick rank reads them, connects to nobody, and the restart fails too.
Each start therefore uses keys of its own, under a name that rank 0 makes up and all ranks agree on.
"""

import json
import time
import uuid

from ..untrusted.parsing import load_json
from .store import Store

PAUSE = 0.05  # seconds between two looks


def meet(store: Store, rank: int, world_size: int) -> str:
    """A new name for this start, equal on all ranks; waits until every rank has it.

    Each rank posts a random word. Rank 0 publishes its name together with all words, so a rank can
    tell a fresh answer from one of an earlier start. A rank confirms the name, and rank 0 publishes
    again until all ranks have confirmed.
    """
    word = uuid.uuid4().hex
    if rank:
        store.set(f"meet/word/{rank}", word)
        while (said := _said(store)).get(str(rank)) != word:
            time.sleep(PAUSE)
        store.set(f"meet/confirmed/{rank}", said["name"])
        return said["name"]
    others = range(1, world_size)
    while any(_read(store, f"meet/confirmed/{other}") != word for other in others):
        words = {str(other): _read(store, f"meet/word/{other}") for other in others}
        store.set("meet/name", json.dumps(words | {"name": word}))
        time.sleep(PAUSE)
    return word


def _said(store: Store) -> dict[str, str]:
    """What rank 0 has published last."""
    return load_json((_read(store, "meet/name") or "{}").encode(), "the store of ranks", dict)


def _read(store: Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None
