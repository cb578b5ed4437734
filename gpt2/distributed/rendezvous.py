"""How the ranks of one start find one another in a store that remembers earlier starts.

torchrun keeps its store while it restarts ranks that have died, in torch 2.13 with the addresses of
the dead in it: a rank that is quick reads them, connects to nobody, and the restart fails as well.
So every start uses names of its own, which rank 0 makes up and all agree on.
"""

import json
import time
import uuid

from .store import Store

PAUSE = 0.05  # seconds between two looks


def meet(store: Store, rank: int, world_size: int) -> str:
    """A name for this start, the same on all ranks and never used before; waits for all of them.

    Every rank says a word of its own, which rank 0 repeats beside the name; so each knows that what
    it reads is of now. It confirms the name, and rank 0 goes on repeating until all have.
    """
    word = uuid.uuid4().hex
    if rank:
        store.set(f"meet/word/{rank}", word)
        while (said := json.loads(_read(store, "meet/name") or "{}")).get(str(rank)) != word:
            time.sleep(PAUSE)
        store.set(f"meet/confirmed/{rank}", said["name"])
        return said["name"]
    others = range(1, world_size)
    while any(_read(store, f"meet/confirmed/{other}") != word for other in others):
        words = {str(other): _read(store, f"meet/word/{other}") for other in others}
        store.set("meet/name", json.dumps(words | {"name": word}))
        time.sleep(PAUSE)
    return word


def _read(store: Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None
