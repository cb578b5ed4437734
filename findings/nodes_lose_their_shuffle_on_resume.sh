#!/usr/bin/env bash
# torchdata 0.11.0: a pipeline of `torchdata.nodes` that shuffles with a RandomSampler resumes in another order. Rows of
# the epoch come twice, others never. `SamplerWrapper` stores the number of rows that it has yielded. To resume, it
# asks the sampler for a new iterator and skips as many (nodes/adapters.py, `SamplerWrapper.reset`). That is right only
# if the sampler repeats its order. A RandomSampler draws a new one each time. Its generator is in no state.
#
# The documentation recommends the nodes for "first-class support for mid-epoch checkpointing", and its guide for those
# who come from DataLoader builds just this: RandomSampler, SamplerWrapper, Batcher, mapper, Prefetcher, Loader. Its
# example of resuming has no shuffle. Nothing warns. At half of an epoch a quarter of the rows is seen twice and a
# quarter never, as with two independent orders. It does not help to store and set torch's own random state. The old
# seed, or a generator with a seed, helps in the first epoch alone: later ones go on in the order of the first.
# torchdata's own RandomSampler, whose iterator has a `state_dict`, does not help: `SamplerWrapper` asks the sampler
# for one, and no iterator. `StatefulDataLoader` asks both, and is exact with it or with `shuffle=True`. A way out is a
# sampler with `set_epoch` whose order follows from the epoch, such as DistributedSampler.
#
# Seen on Python 3.11, torch 2.13.0: 1,000 rows, interrupted after 500 of an epoch, resumed by a new loader; how many
# rows of the first and of the third epoch never come (as many come twice), how many of the next are in place
#   RandomSampler: 247 and 248 never, next 3 and 1 in place; the same if the loader loads its own state
#   RandomSampler, torch's random state stored and set: 243 and 241 never, next 1 and 2 in place
#   RandomSampler with the old seed: 0 and 247 never, next 1000 and 3 in place; seeded generator: 0 and 271, 1000 and 0
#   torchdata's RandomSampler: 243 and 238 never, next 3 and 1; seeded generator: 0 and 251, 1000 and 1
#   DistributedSampler; StatefulDataLoader with torchdata's RandomSampler or shuffle=True: none, next all in place
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy torchdata==0.11.0
cat > try.py <<'PY'
import copy
import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch.utils.data import DistributedSampler, RandomSampler, Sampler, default_collate
from torchdata import nodes
from torchdata.stateful_dataloader import StatefulDataLoader, sampler

ROWS, BATCH = 1000, 10
DATA = torch.arange(ROWS) ** 2
for package in ("torch", "torchdata"):
    print(package, importlib.metadata.version(package))
torch.set_num_threads(1)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def batch(places: list[int]) -> torch.Tensor:
    return default_collate([DATA[place] for place in places])


def pipeline(order: Sampler) -> nodes.Loader:
    """As in the guide."""
    node = nodes.Batcher(nodes.SamplerWrapper(order), batch_size=BATCH, drop_last=False)
    node = nodes.ParallelMapper(node, map_fn=batch, num_workers=2, method="thread", in_order=True)
    return nodes.Loader(nodes.Prefetcher(node, prefetch_factor=4))


def stateful(**order: object) -> StatefulDataLoader:
    return StatefulDataLoader(DATA, batch_size=BATCH, **order)


def rows(batches: Iterable[torch.Tensor]) -> list[int]:
    return [row for part in batches for row in part.tolist()]


def resume(
    make: Callable[[], object], epoch: int, random_state: bool = False, again: bool | None = False
) -> tuple[int, ...]:
    """Rows twice, rows never, rows in place of the rest of this epoch and of the next one.

    The new loader begins with torch's random state as it is, with the one of the checkpoint (`random_state`) or
    with the old seed (`again`); None loads the state into the old loader.
    """
    torch.manual_seed(0)
    first = make()
    for _ in range(epoch):
        rows(first)
    going, seen = iter(first), []
    for _ in range(ROWS // BATCH // 2):
        seen += next(going).tolist()
    state, drawn = copy.deepcopy(first.state_dict()), torch.get_rng_state()
    rest, following = rows(going), rows(first)
    if again:
        torch.manual_seed(0)
    second = first if again is None else make()
    second.load_state_dict(state)
    if random_state:
        torch.set_rng_state(drawn)
    found, then = rows(second), rows(second)
    count = Counter(seen + found)
    same = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in ((rest, found), (following, then))]
    return sum(times == 2 for times in count.values()), ROWS - len(count), *same


OWN, ITS = RandomSampler, sampler.RandomSampler
cases = {
    "RandomSampler": (lambda: pipeline(OWN(DATA)), {}),
    "RandomSampler, the loader loads its own state": (lambda: pipeline(OWN(DATA)), {"again": None}),
    "RandomSampler, torch's random state stored and set": (lambda: pipeline(OWN(DATA)), {"random_state": True}),
    "torchdata's RandomSampler": (lambda: pipeline(ITS(DATA)), {}),
    "RandomSampler, the old seed": (lambda: pipeline(OWN(DATA)), {"again": True}),
    "RandomSampler, seeded generator": (lambda: pipeline(OWN(DATA, generator=seeded())), {}),
    "torchdata's RandomSampler, seeded generator": (lambda: pipeline(ITS(DATA, generator=seeded())), {}),
    "DistributedSampler": (lambda: pipeline(DistributedSampler(DATA, num_replicas=1, rank=0)), {}),
    "StatefulDataLoader, torchdata's RandomSampler": (lambda: stateful(sampler=ITS(DATA)), {}),
    "StatefulDataLoader, shuffle=True": (lambda: stateful(shuffle=True), {}),
}
EXACT = (0, 0, ROWS // 2, ROWS)
good = True
for name, (make, options) in cases.items():
    for epoch in (0, 2):
        twice, never, rest, following = found = resume(make, epoch, **options)
        print(f"{name}, epoch {epoch + 1}: {twice} twice, {never} never, in place {rest}, of the next {following}")
        if name.startswith(("Distributed", "Stateful")) or epoch == 0 and "seed" in name:
            good &= found == EXACT
        else:
            good &= twice == never > ROWS // 6 and rest < 20 and following < 20
raise SystemExit(0 if good else 1)
PY
venv/bin/python -W ignore try.py
