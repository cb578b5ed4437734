"""The rows that `benchmarks.scaling --measure` measures, in the order in which they begin."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

TRIED = "tiny networks stand for those of the names, processes for GPUs; no measurement of either"
RECIPE = 512  # sequences of 1,024 tokens in a step of the 124M recipe
STEPS = 14  # about as many are made of a row
# Seconds that a row takes on H100s until its steps, roughly and rather too few; a row that would
# not end in time is not begun. Tokens per second of one GPU, of which the steps' time follows.
START = {"gpt2": 25, "gpt2-medium": 30, "gpt2-xl": 50}
RATES = {"gpt2": 550e3, "gpt2-medium": 180e3, "gpt2-xl": 35e3}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A training run of a few steps, or a series of all-reduces.

    The ideal of a row is its number of GPUs times the row of one GPU with the same label, which
    has `ideal_tokens` a step.
    """

    label: str
    gpus: int
    batch_size: int = 64  # sequences per micro-batch and GPU
    micro_batches: int = 1  # per step and GPU
    block_size: int = 1024
    size: str = "gpt2"
    parallel: str = "ddp"
    ideal_tokens: int = 0  # 0: as many as this row has
    card: int | None = None  # the one that it must have
    config: str = ""
    tiny: bool = False  # on CPUs

    @property
    def tokens_per_step(self) -> int:
        """Of all GPUs together."""
        return self.gpus * self.micro_batches * self.batch_size * self.block_size

    @property
    def reduces(self) -> bool:
        """Whether it is about all-reduces alone."""
        return self.label == "all-reduce"

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again."""
        return self.label.endswith("activation checkpointing")

    @property
    def name(self) -> str:
        """For the table and for --only."""
        gpus = f"{self.gpus} GPU{'s' * (self.gpus > 1)}"
        if self.reduces:
            return f"{self.label}, {gpus}"
        how = f"{self.parallel.upper()}, " if self.gpus > 1 else ""
        return f"{self.label}, {how}{gpus}, {self.tokens_per_step:,} tokens"

    @property
    def seconds(self) -> float:
        """Roughly what it takes."""
        if self.tiny:
            return 0.0
        if self.reduces:
            return 15.0
        rate = RATES[self.size] * self.gpus
        return START[self.size] + STEPS * self.tokens_per_step / rate

    def facts(self) -> dict[str, Any]:
        """What identifies it in scaling.jsonl."""
        own = asdict(self) | {"ideal_tokens": self.ideal_tokens or self.tokens_per_step}
        del own["card"]
        more = {"name": self.name, "tokens_per_step": self.tokens_per_step}
        return more | own | {"checkpointing": self.checkpointing}

    def arguments(self) -> list[str]:
        """Of `train_gpt2.py`, without those for places."""
        own = [f"--config={self.config}"] if self.config else [f"--size={self.size}"]
        own += [f"--{n}={getattr(self, n)}" for n in ("block_size", "batch_size")]
        own += [f"--grad_accum_steps={self.micro_batches}"]
        own += [f"--total_batch_tokens={self.tokens_per_step}"]
        own += [f"--parallel={self.parallel}"]
        own += ["--activation_checkpointing=True"] if self.checkpointing else []
        if self.tiny:
            own += ["--n_layer=4", "--window=4"] if self.config else ["--n_layer=2"]
            own += ["--n_head=2", "--n_embd=8"]
        return own


def rows(gpus: int, tiny: bool = False) -> list[Row]:
    """All rows for a machine of so many GPUs, a power of two; what matters most comes first.

    The 124M row of one GPU runs on every GPU, since cards of one kind differ by some percent.
    """
    found = [of_recipe(1, RECIPE, card=card) for card in range(gpus)]
    if gpus > 1:
        found += [of_recipe(gpus, RECIPE), Row(label="all-reduce", gpus=gpus)]
    found += [of_recipe(1, 2 * RECIPE)]
    found += [of_recipe(1, RECIPE // n) for n in shared_by(gpus)]
    between = [2**i for i in range(1, int(math.log2(gpus)))]
    found += [of_recipe(n, times * RECIPE) for n in reversed(between) for times in (1, 2)]
    larger = of_larger(gpus)
    found += [row for row in larger if row.gpus == 1]
    if gpus > 1:
        found += [of_recipe(gpus, 2 * RECIPE), of_recipe(gpus, RECIPE, parallel="fsdp")]
        found += [row for row in larger if row.gpus > 1]
    return list(dict.fromkeys(map(shrunk, found))) if tiny else found


def shared_by(gpus: int) -> list[int]:
    """Numbers of GPUs of which one GPU computes a share of the recipe's step, for predictions."""
    return [n for n in (gpus, 16, 32, 64) if n > 1]


def of_recipe(gpus: int, sequences: int, **more: Any) -> Row:
    """The 124M network, with so many sequences a step over all GPUs."""
    batch_size = min(64, sequences // gpus)
    count = sequences // gpus // batch_size
    return Row(label="124M", gpus=gpus, batch_size=batch_size, micro_batches=count, **more)


def of_larger(gpus: int) -> list[Row]:
    """Medium, XL and the modern recipe on all GPUs, and on one what they are compared with.

    One micro-batch a step. Without checkpointing medium at batch 32 and XL at 16 take less than
    60 GiB of one GPU, so they fit 80 GB.
    """
    found = []
    for label, size, batch_size in (("medium", "gpt2-medium", 32), ("XL", "gpt2-xl", 16)):
        for full in (f"{label}, activation checkpointing", label):
            found.append(Row(label=full, gpus=1, size=size, batch_size=batch_size))
    recipe = {"config": "configs/speedrun.toml", "block_size": 2048, "batch_size": 32}
    modern = Row(label="speedrun.toml", gpus=1, **recipe)
    if gpus > 1:
        of_all = [replace(row, gpus=gpus, parallel="fsdp") for row in found]
        found += [replace(row, ideal_tokens=row.tokens_per_step // gpus) for row in of_all]
        of_modern = replace(modern, gpus=gpus, ideal_tokens=modern.tokens_per_step)
        found += [replace(of_modern, batch_size=32 // gpus), of_modern]  # as it is; batch 32
    return [*found, modern]


def shrunk(row: Row) -> Row:
    """The row for CPUs: 8 tokens a sequence, and a 64th of the sequences."""
    batch_size, block_size = max(1, row.batch_size // 64), 8
    ideal = row.ideal_tokens and max(1, row.ideal_tokens // 1024 // 64) * block_size
    return replace(row, batch_size=batch_size, block_size=block_size, ideal_tokens=ideal, tiny=True)
