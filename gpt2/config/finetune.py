"""Options of `gpt2 finetune`: the options of training with other defaults, epochs and LoRA."""

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from ..errors import UserError
from .options import at_least, at_most, option, resolve
from .switches import Switches
from .train import (
    ONE_SWITCH_OFF,
    DataOptions,
    EvalOptions,
    OptimOptions,
    OutputOptions,
    TrainConfig,
)

LORA_TARGETS = ("c_attn", "c_proj", "c_fc")  # matrices of a block; two are called c_proj


def targets_of(text: str) -> list[str]:
    """The names in a value of lora_targets."""
    return [name.strip() for name in text.split(",")]


@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """Fine-tuning."""

    epochs: float = option(
        0.0,
        "passes over the data; max_steps may end the run earlier; 0: as many as make 100 steps, "
        "from 3 to 30",
    )
    val_share: float = option(0.05, "share of the conversations held out for validation")
    lora_rank: int = option(
        0, "train LoRA adapters of this rank (8, 16, …) instead of all weights; 0: no"
    )
    lora_alpha: float = option(16.0, "LoRA: adapters are scaled by lora_alpha / lora_rank")
    lora_targets: str = option(
        ",".join(LORA_TARGETS), "LoRA: matrices that get adapters; c_attn alone is peft's default"
    )

    def __post_init__(self) -> None:
        at_least(0, lora_rank=self.lora_rank)
        at_most(2**16, lora_rank=self.lora_rank)
        self.targets()
        for name, low, high in (("epochs", 0, 1e6), ("val_share", 0, 1), ("lora_alpha", 0, 1e6)):
            value = getattr(self, name)
            if not low < value < high and not (name == "epochs" and value == 0):
                use = "use 0, or" if name == "epochs" else "use"
                raise UserError(f"{name}={value}: {use} a number above {low} and below {high:g}")

    def targets(self) -> list[str]:
        """The names in lora_targets; raises UserError for one that no block has."""
        names = targets_of(self.lora_targets)
        for name in names:
            if name not in LORA_TARGETS:
                raise UserError(
                    f"lora_targets={self.lora_targets}: {name!r} is none of "
                    f"{', '.join(LORA_TARGETS)}"
                )
        return names


@dataclass(frozen=True, kw_only=True)
class TuningData(DataOptions):
    """Data and batch."""

    data_dir: str = option(
        "",
        "a .jsonl (also .gz, .xz, .zst), .json or .parquet file of conversations (OpenAI's, "
        "ShareGPT's, Alpaca's, Dolly's, prompt and completion), or a folder of shards; several as "
        "a.jsonl:0.8,b.jsonl:0.2",
        alias="data",
    )
    batch_size: int = option(
        0, "rows per micro-batch and rank; 0: 8, 4, 2 or 1, so that an epoch has 16 steps"
    )
    smallest_batch: ClassVar[int] = 0
    grad_accum_steps: int = option(
        0, "micro-batches per optimizer step and rank; 0: 1, or derived from total_batch_tokens"
    )


@dataclass(frozen=True, kw_only=True)
class TuningOptim(OptimOptions):
    """Optimizer and schedule."""

    max_steps: int = option(1_000_000, "upper limit of optimizer steps")
    learning_rate: float = option(0.0, "peak learning rate of AdamW; 0: 2e-4, or 1e-3 with LoRA")


@dataclass(frozen=True, kw_only=True)
class TuningEval(EvalOptions):
    """Validation."""

    eval_every: int = option(50, "steps between evaluations; 0: only at the end")


@dataclass(frozen=True, kw_only=True)
class TuningOutput(OutputOptions):
    """Output, checkpoints and logs."""

    out_dir: str = option("out/finetuned", "folder for checkpoints, metrics.jsonl and plots")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """All options of `gpt2 finetune`: those of `gpt2 train`, epochs and LoRA."""

    DAILY: ClassVar[tuple[str, ...]] = (
        *("init", "data_dir", "out_dir", "epochs", "lora_rank", "learning_rate", "batch_size"),
        *("grad_accum_steps", "block_size", "max_steps", "eval_every", "val_share", "dropout"),
        *("device", "dtype"),
    )
    HELP_END: ClassVar[str] = """examples:
  gpt2 finetune --init=gpt2 --data=conversations.jsonl
  gpt2 finetune --init=gpt2-large --data=conversations.jsonl --lora_rank=8
  gpt2 finetune --init=out/out_ckpt.pt --data=data/mine --out_dir=out/mine"""
    # The network is that of init: these options are refused, or can only repeat what it has.
    HIDDEN: ClassVar[tuple[str, ...]] = (
        *("size", "n_layer", "n_head", "n_embd"),
        *(f.name for f in fields(Switches)),
    )

    data: TuningData = field(default_factory=TuningData)
    optim: TuningOptim = field(default_factory=TuningOptim)
    eval: TuningEval = field(default_factory=TuningEval)
    output: TuningOutput = field(default_factory=TuningOutput)
    tuning: TuningOptions = field(default_factory=TuningOptions)

    def __post_init__(self) -> None:
        if not self.optim.learning_rate:
            rate = 1e-3 if self.tuning.lora_rank else 2e-4  # of docs/results/chat
            resolve(self, optim=replace(self.optim, learning_rate=rate))
        super().__post_init__()
        for name in ("lora_alpha", "lora_targets"):
            value = getattr(self.tuning, name)
            if not self.tuning.lora_rank and value != getattr(TuningOptions, name):
                raise UserError(
                    f"{name}={value} is for adapters; give lora_rank as well {ONE_SWITCH_OFF}"
                )
        if self.tuning.lora_rank and self.optim.optimizer != "adamw":
            raise UserError(
                f"optimizer={self.optim.optimizer} is for whole matrices; leave it or lora_rank out"
            )
        if self.tuning.lora_rank and (self.optim.embedding_lr or self.optim.head_lr):
            raise UserError(
                "embedding_lr and head_lr are for weights that lora_rank leaves as they are; leave "
                "them or lora_rank out"
            )
        data = self.data
        if not data.total_batch_tokens and not data.grad_accum_steps:
            resolve(self, data=replace(data, grad_accum_steps=1))
        elif not data.batch_size and (data.total_batch_tokens or data.grad_accum_steps > 1):
            # a part of a step whose size was chosen
            resolve(self, data=replace(data, batch_size=DataOptions.batch_size))


def tuning_options(config: TrainConfig) -> TuningOptions | None:
    """The options that only `gpt2 finetune` has; None for a run of `gpt2 train`."""
    return config.tuning if isinstance(config, FinetuneConfig) else None
