"""Settings: the network's shape, the table of sizes, and every option of training.

Pure data and checks on it; nothing here imports torch or touches a file. Command lines and TOML
files become these dataclasses in `flags.py`. Units stand in names and help texts: `_tokens`,
`_steps` (optimizer steps), `_seconds`.
"""

from dataclasses import dataclass, field

from ..errors import UserError
from .model import SIZES, GPT2Config, ModernConfig
from .options import at_least, check_seed, option
from .switches import Switches, chosen, switched


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What may differ from GPT-2's optimizer and schedule."""

    optimizer: str = option(
        "adamw",
        "muon, or normuon (its rows of about equal length): for the matrices of the blocks; AdamW "
        "for the rest",
        ("adamw", "muon", "normuon"),
    )
    muon_lr: float = option(0.02, "peak learning rate of Muon")
    muon_momentum: float = option(0.95, "Muon: decay of the mean of gradients")
    muon_momentum_warmup: int = option(0, "Muon: steps in which its momentum grows from 0.85")
    muon_weight_decay: float = option(-1.0, "Muon: decay of its matrices; -1: weight_decay")
    embedding_lr: float = option(0.0, "peak learning rate of embeddings; 0: learning_rate")
    head_lr: float = option(0.0, "peak learning rate of an untied head; 0: learning_rate")
    schedule: str = option("cosine", "wsd: warm-up, stable, then linear decay", ("cosine", "wsd"))
    cooldown: float = option(0.4, "wsd: share of max_steps in which the rate decays")
    batch_warmup: float = option(
        0.0, "share of max_steps in which a step grows from an eighth of its micro-batches to all"
    )
    window_warmup: float = option(
        0.0, "share of max_steps in which the windows of window_pattern grow to their width"
    )


def check_recipe(r: Recipe, s: Switches | None):
    """Raises UserError for options of training that mean nothing here, or do not fit together.

    Args:
        r: the options.
        s: the switches of the network; None: not known before `begin.resolve_init`.
    """
    at_least(0, muon_lr=r.muon_lr, embedding_lr=r.embedding_lr, head_lr=r.head_lr)
    for name in ("cooldown", "batch_warmup", "window_warmup"):
        if not 0 <= getattr(r, name) <= 1:
            raise UserError(f"{name}={getattr(r, name)}: use a share, from 0 to 1")
    if not 0 <= r.muon_momentum < 1:
        raise UserError(f"muon_momentum={r.muon_momentum}: use a number from 0 up to below 1")
    default = Recipe()
    for name in ("muon_lr", "muon_momentum", "muon_momentum_warmup", "muon_weight_decay"):
        if r.optimizer == "adamw" and getattr(r, name) != getattr(default, name):
            raise UserError(f"{name} is for --optimizer=muon; give both")
    at_least(0, muon_momentum_warmup=r.muon_momentum_warmup)
    if r.muon_momentum_warmup and r.muon_momentum < 0.85:
        raise UserError(f"muon_momentum={r.muon_momentum}: muon_momentum_warmup begins at 0.85")
    if r.muon_weight_decay < 0 and r.muon_weight_decay != default.muon_weight_decay:
        raise UserError(f"muon_weight_decay={r.muon_weight_decay}: use 0 or more, or -1")
    if r.schedule != "wsd" and r.cooldown != default.cooldown:
        raise UserError("cooldown is for --schedule=wsd; give both")
    if s:
        check_of_switches(r, s)


def check_of_switches(r: Recipe, s: Switches):
    """Raises UserError for options of training whose switch is off."""
    if r.head_lr and not s.untied_head:
        raise UserError("head_lr is for --untied_head; a tied head has the embedding's rate")
    if r.window_warmup and not s.window_pattern:
        raise UserError("window_warmup is for --window_pattern; give both")


DEFAULT_BATCH_TOKENS = 524_288  # 2**19, the "0.5M tokens" of the GPT-3 paper, table 2.1
WARMUP_FRACTION = 715 / 19_073  # GPT-3 warms up over 375M tokens; here as a share of a 10B run


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Switches):
    """The network."""

    init: str = option(
        "",
        "begin with these weights: a checkpoint (also of nanoGPT, build-nanogpt or llm.c), a "
        "folder of Hugging Face's, gpt2, or OWNER/NAME of the Hub; empty: fresh ones",
    )
    size: str = option(
        "auto", "a row of the table of sizes; auto: gpt2, or that of init", ("auto", *SIZES)
    )
    n_layer: int = option(0, "number of blocks; 0: as the size says")
    n_head: int = option(0, "attention heads per block; 0: as the size says")
    n_embd: int = option(0, "width of the residual stream; 0: as the size says")
    block_size: int = option(0, "context length, in tokens; 0: 1024, or that of init")
    dropout: float = option(0.0, "probability of dropping an activation while training")

    def __post_init__(self):
        if not self.init:  # else `weights.resolve_options` does it, which knows them
            object.__setattr__(self, "size", "gpt2" if self.size == "auto" else self.size)
            object.__setattr__(self, "block_size", self.block_size or GPT2Config.block_size)

    def shape(self) -> GPT2Config:
        """The size with what was given instead of it; GPT-2's (124M) where nothing is said."""
        if switched(self):
            return ModernConfig(**self.given(), dropout=self.dropout, **chosen(self))
        return GPT2Config(**self.given(), dropout=self.dropout)

    def given(self) -> dict[str, int]:
        """The sizes that were asked for, by a name of the table or by numbers."""
        names = ("n_layer", "n_head", "n_embd", "block_size")
        numbers = {name: getattr(self, name) for name in names if getattr(self, name)}
        return SIZES.get(self.size, {}) | numbers


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data and batch."""

    data_dir: str = option(
        "fineweb",
        "folder of shards, as written by `gpt2 prepare`, or several with their weights: "
        "fineweb:0.8,code:0.2",
        alias="data",
    )
    batch_size: int = option(8, "sequences per micro-batch and rank")
    grad_accum_steps: int = option(
        0, "micro-batches per optimizer step and rank; 0: derived from total_batch_tokens"
    )
    total_batch_tokens: int = option(
        0, "tokens per optimizer step over all ranks; 0: 524,288, or what grad_accum_steps gives"
    )
    shuffle: bool = option(True, "visit the windows of the training text in random order")
    sequence_start: str = option(
        "anywhere",
        "where sequences of block_size tokens begin: anywhere (one after another), or document "
        "(with a document, unless it is longer than a sequence)",
        ("anywhere", "document"),
        alias="window_start",
    )


@dataclass(frozen=True, kw_only=True)
class OptimOptions(Recipe):
    """Optimizer and schedule."""

    max_steps: int = option(19_073, "optimizer steps; the default is 10B tokens of 0.5M each")
    learning_rate: float = option(6e-4, "peak learning rate of AdamW")
    min_lr_ratio: float = option(0.1, "last learning rate, as a share of the peak")
    warmup_steps: int = option(-1, "steps of linear warm-up; -1: 3.75 % of max_steps")
    weight_decay: float = option(0.1, "decay of matrices and embeddings; never of 1-D parameters")
    beta1: float = option(0.9, "AdamW: decay of the mean of gradients")
    beta2: float = option(0.95, "AdamW: decay of the mean of squared gradients")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no clipping")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Validation."""

    eval_every: int = option(250, "steps between evaluations; 0: only at the end")
    eval_tokens: int = option(10_485_760, "tokens to evaluate on, the same for any batch or rank")
    early_stop_evals: int = option(0, "stop after this many evaluations without gain; 0: never")
    eval_hellaswag_every: int = option(
        0, "steps between evaluations on HellaSwag (also at the end); 0: never"
    )
    hellaswag: str = option("hub", "its items: hub (downloaded), or a .jsonl or .parquet file")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Output, checkpoints and logs."""

    out_dir: str = option("out", "folder for checkpoints, metrics.jsonl and plots")
    save_every: int = option(250, "steps between checkpoints; 0: only at the end")
    keep_last: int = option(2, "checkpoints to keep for resuming")
    resume: str = option(
        "auto", "auto: go on with the run in out_dir; never; or a state/step_ folder"
    )
    log_every: int = option(1, "steps between lines on the console and in metrics.jsonl")
    log_to: str = option("", "also log to these, comma-separated: wandb, tensorboard, trackio")
    run_name: str = option("", "name of the run in those services; empty: name of out_dir")


@dataclass(frozen=True, kw_only=True)
class SystemOptions:
    """Machine."""

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option(
        "auto", "precision of the matrix products", ("auto", "float32", "bfloat16", "float16")
    )
    compile_model: str = option("auto", "torch.compile", ("auto", "True", "False"))
    fp8: str = option(
        "none",
        "head: its products in fp8, on GPUs that have it (H100, RTX 4090, …)",
        ("none", "head"),
    )
    parallel: str = option(
        "ddp",
        "with several ranks: ddp (each holds all weights) or fsdp (each holds a part of weights, "
        "gradients and moments: for models that do not fit)",
        ("ddp", "fsdp"),
    )
    activation_checkpointing: bool = option(
        False, "keep only the input of each block and compute the rest again: less memory, slower"
    )
    hang_timeout_seconds: int = option(
        300,
        "several ranks: after so long without progress the run ends and names the rank that "
        "hangs; 0: after half an hour, by PyTorch",
    )
    seed: int = option(1337, "seed of the weights, the order of the data and dropout")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that `gpt2 train` can be told."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    system: SystemOptions = field(default_factory=SystemOptions)
    tuning = None  # no field: `gpt2 finetune` has options of its own here

    def __post_init__(self):
        if not self.model.init:  # whose sizes are known when it is read
            self.model.shape()
        o = self.optim
        at_least(1, max_steps=o.max_steps, log_every=self.output.log_every)
        at_least(1, keep_last=self.output.keep_last, batch_size=self.data.batch_size)
        at_least(1, eval_tokens=self.eval.eval_tokens)
        at_least(0, eval_every=self.eval.eval_every, save_every=self.output.save_every)
        at_least(0, early_stop_evals=self.eval.early_stop_evals, grad_clip=o.grad_clip)
        at_least(0, hang_timeout_seconds=self.system.hang_timeout_seconds)
        at_least(0, eval_hellaswag_every=self.eval.eval_hellaswag_every)
        if self.eval.hellaswag != "hub" and not self.eval.eval_hellaswag_every:
            raise UserError("--hellaswag= is used with --eval_hellaswag_every=STEPS; give both")
        at_least(0, weight_decay=o.weight_decay, learning_rate=o.learning_rate)
        at_least(-1, warmup_steps=o.warmup_steps)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(o, name) < 1:
                raise UserError(f"{name}={getattr(o, name)}: use a number from 0 up to below 1")
        if not 0 <= o.min_lr_ratio <= 1:
            raise UserError(f"min_lr_ratio={o.min_lr_ratio}: use a number from 0 to 1")
        check_seed(self.system.seed)
        check_recipe(o, None if self.model.init else self.model)
        if not o.learning_rate and (o.optimizer != "adamw" or o.embedding_lr or o.head_lr):
            raise UserError("learning_rate=0: other rates follow its schedule; use one above 0")


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step is cut into micro-batches."""

    batch_size: int
    block_size: int
    grad_accum_steps: int
    world_size: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all ranks together predict in one optimizer step."""
        return self.batch_size * self.block_size * self.grad_accum_steps * self.world_size

    @property
    def sequences_per_step(self) -> int:
        """Windows of block_size tokens in one optimizer step."""
        return self.batch_size * self.grad_accum_steps * self.world_size

    def __str__(self):
        return (
            f"{self.tokens_per_step:,} tokens per step = batch_size {self.batch_size} × "
            f"block_size {self.block_size} × grad_accum_steps {self.grad_accum_steps} × "
            f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        )


def plan_batch(data: DataOptions, block_size: int, world_size: int) -> BatchPlan:
    """The only place where tokens per step are computed.

    Raises:
        UserError: when the total is not a whole number of micro-batches, or both the total and
            grad_accum_steps are given and disagree. The message names values that work.
    """
    at_least(0, grad_accum_steps=data.grad_accum_steps)
    at_least(0, total_batch_tokens=data.total_batch_tokens)
    micro = data.batch_size * block_size * world_size
    formula = f"batch_size {data.batch_size} × block_size {block_size} × {world_size} rank(s)"
    if data.grad_accum_steps:
        total = micro * data.grad_accum_steps
        if data.total_batch_tokens not in (0, total):
            raise UserError(
                f"total_batch_tokens={data.total_batch_tokens} disagrees with "
                f"grad_accum_steps={data.grad_accum_steps}: {formula} × {data.grad_accum_steps} = "
                f"{total}; leave one of them out, or use --total_batch_tokens={total}"
            )
        accum = data.grad_accum_steps
    else:
        total = data.total_batch_tokens or DEFAULT_BATCH_TOKENS
        accum, rest = divmod(total, micro)
        if rest or not accum:
            near = sorted({max(1, accum) * micro, (accum + 1) * micro})
            raise UserError(
                f"total_batch_tokens={total} is not a multiple of {micro} = {formula}; "
                f"use --total_batch_tokens={' or '.join(map(str, near))}, or another batch_size"
            )
    return BatchPlan(data.batch_size, block_size, accum, world_size)


def warmup_steps(optim: OptimOptions) -> int:
    """Steps of warm-up, with -1 resolved."""
    if optim.warmup_steps >= 0:
        return optim.warmup_steps
    return round(WARMUP_FRACTION * optim.max_steps)
