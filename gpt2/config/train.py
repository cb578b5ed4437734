"""Every option of training: network, data, optimizer, validation, output, machine.

Plain data and checks: no torch, no files. `config/command_line.py` turns command lines and TOML
files into these dataclasses. Names and help texts carry the units: `_tokens`, `_steps` (optimizer
steps), `_seconds`.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..errors import UserError
from .model import OLD_SIZES, SIZES, GPT2Config, ModernConfig, sizes_table
from .options import at_least, at_most, check_seed, option, resolve
from .registry import BUILT_IN, check_loaded, registered
from .switches import Switches, chosen, switched


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Where the optimizer and its schedule may differ from GPT-2."""

    optimizer: str = option(
        "adamw",
        "muon or normuon (Muon with rows of about equal norm) for the matrices of the blocks, and "
        "AdamW for the rest",
        BUILT_IN["optimizer"],
    )
    muon_lr: float = option(0.02, "peak learning rate of Muon")
    muon_momentum: float = option(0.95, "Muon: momentum")
    muon_momentum_warmup: int = option(0, "Muon: steps in which the momentum grows from 0.85")
    muon_weight_decay: float = option(-1.0, "Muon: weight decay; -1: as weight_decay")
    embedding_lr: float = option(0.0, "peak learning rate of embeddings; 0: learning_rate")
    head_lr: float = option(0.0, "peak learning rate of an untied head; 0: learning_rate")
    schedule: str = option(
        "cosine", "wsd: warm-up, stable, then linear decay", BUILT_IN["schedule"]
    )
    loss: str = option(
        "cross_entropy",
        "loss of training; sampled_softmax: until the last tenth of the steps a softmax over a "
        "third of the ids, targets and a sample; +second: the token after the next counts too, "
        "with a weight of 0.5 at first and 0 after 0.6 of the steps; validation: cross-entropy",
        BUILT_IN["loss"],
    )
    cooldown: float = option(0.6, "wsd: share of max_steps in which the learning rate decays")
    ema_steps: int = option(
        0,
        "validation and the exported model take the mean of the weights and their exponential "
        "moving average over about this many steps; 0: the weights",
    )
    batch_warmup: float = option(
        0.0, "share of max_steps in which a step grows from an eighth of its micro-batches to all"
    )
    window_warmup: float = option(
        0.0, "share of max_steps in which the attention windows of S layers grow to their width"
    )


ONE_SWITCH_OFF = "(docs/troubleshooting.md#one-switch-off)"


def check_recipe(r: Recipe, s: Switches | None) -> None:
    """Raises UserError for options of training without effect, or that contradict one another.

    Args:
        r: the options of the optimizer and its schedule.
        s: the switches of the network; None: not known yet, because `--init=` names the network.
    """
    at_least(0, muon_lr=r.muon_lr, embedding_lr=r.embedding_lr, head_lr=r.head_lr)
    at_least(0, ema_steps=r.ema_steps)
    at_most(10**9, ema_steps=r.ema_steps)
    for name in ("cooldown", "batch_warmup", "window_warmup"):
        if not 0 <= getattr(r, name) <= 1:
            raise UserError(f"{name}={getattr(r, name)}: use a share, from 0 to 1")
    if not 0 <= r.muon_momentum < 1:
        raise UserError(f"muon_momentum={r.muon_momentum}: use a number from 0 up to below 1")
    default = Recipe()
    for name in ("muon_lr", "muon_momentum", "muon_momentum_warmup", "muon_weight_decay"):
        if r.optimizer == "adamw" and getattr(r, name) != getattr(default, name):
            raise UserError(f"{name} is for --optimizer=muon; give both {ONE_SWITCH_OFF}")
    at_least(0, muon_momentum_warmup=r.muon_momentum_warmup)
    if r.muon_momentum_warmup and r.muon_momentum < 0.85:
        raise UserError(f"muon_momentum={r.muon_momentum}: muon_momentum_warmup begins at 0.85")
    if r.muon_weight_decay < 0 and r.muon_weight_decay != default.muon_weight_decay:
        raise UserError(f"muon_weight_decay={r.muon_weight_decay}: use 0 or more, or -1")
    if r.schedule == "cosine" and r.cooldown != default.cooldown:
        raise UserError(f"cooldown is for --schedule=wsd; give both {ONE_SWITCH_OFF}")
    if s:
        check_of_switches(r, s)


def check_of_switches(r: Recipe, s: Switches) -> None:
    """Raises UserError for options of training that need a switch which is off."""
    if r.head_lr and not s.untied_head:
        raise UserError("head_lr is for --untied_head; a tied head has the embedding's rate")
    if r.window_warmup and not s.window_pattern:
        raise UserError("window_warmup is for --window_pattern; give both")


PLUGIN_HELP = (
    "file of Python that runs at the start and registers parts of its own (docs/extending.md); "
    "several with commas"
)
DEFAULT_BATCH_TOKENS = 524_288  # 2**19, the "0.5M tokens" of the GPT-3 paper, table 2.1
WARMUP_FRACTION = 715 / 19_073  # GPT-3 warms up over 375M tokens; here as a share of a 10B run


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Switches):
    """The network."""

    init: str = option(
        "",
        "begin with these weights: a checkpoint (also of nanoGPT, build-nanogpt or llm.c), a "
        "Hugging Face folder, gpt2, box, or OWNER/NAME on the Hub; empty: random weights",
    )
    size: str = option("auto", "name of a size; auto: gpt2, or the size of init", ("auto", *SIZES))
    n_layer: int = option(0, "number of blocks; 0: from size")
    n_head: int = option(0, "attention heads per block; 0: from size")
    n_embd: int = option(0, "width of the residual stream; 0: from size")
    vocab_size: int = option(0, "tokens of the vocabulary; 0: those of the shards' tokenizer")
    block_size: int = option(0, "context length, in tokens; 0: 1024, or the length of init")
    dropout: float = option(0.0, "probability of dropping an activation while training")

    def __post_init__(self) -> None:
        resolve(self, size=OLD_SIZES.get(self.size, self.size))
        if not self.init:  # with init, `weights.resolve_options` reads the sizes from the weights
            size = "gpt2" if self.size == "auto" else self.size
            resolve(self, size=size, block_size=self.block_size or GPT2Config.block_size)

    def shape(self) -> GPT2Config:
        """Shape of the network: the named size, changed by the numbers that were given."""
        if switched(self):
            return ModernConfig(**self.given(), dropout=self.dropout, **chosen(self))
        return GPT2Config(**self.given(), dropout=self.dropout)

    def given(self) -> dict[str, Any]:
        """The numbers of the named size, and over them those that were given one by one."""
        names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
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
    smallest_batch: ClassVar[int] = 1  # 0, of `gpt2 finetune`: the data decide
    grad_accum_steps: int = option(
        0, "micro-batches per optimizer step and rank; 0: derived from total_batch_tokens"
    )
    total_batch_tokens: int = option(
        0, "tokens per optimizer step over all ranks; 0: 524,288, or what grad_accum_steps gives"
    )
    shuffle: bool = option(True, "visit the training sequences in random order")
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
    max_seconds: float = option(
        0.0,
        "seconds of training after which the run ends, with an evaluation and a checkpoint; the "
        "first step, which compiles, evaluations and saving do not count; 0: max_steps alone",
    )
    learning_rate: float = option(6e-4, "peak learning rate of AdamW")
    min_lr_ratio: float = option(
        -1.0, "final learning rate, as a share of the peak; -1: 0 with wsd, else 0.1"
    )
    warmup_steps: int = option(-1, "steps of linear warm-up; -1: 3.75 % of max_steps")
    weight_decay: float = option(
        0.1, "weight decay of matrices and embeddings, never of 1-D parameters"
    )
    beta1: float = option(0.9, "AdamW: decay of the first moment (mean of gradients)")
    beta2: float = option(0.95, "AdamW: decay of the second moment (mean of squared gradients)")
    grad_clip: float = option(1.0, "clip the norm of the gradient to this; 0: no clipping")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Validation."""

    eval_every: int = option(250, "steps between evaluations; 0: only at the end")
    eval_tokens: int = option(
        10_485_760, "tokens to evaluate on, whatever the batch size and the number of ranks"
    )
    early_stop_evals: int = option(
        0, "stop after this many evaluations without improvement; 0: never"
    )
    sample_prompt: str = option(
        "", "a text to continue at each evaluation, in the log (with conversations: a message)"
    )
    eval_hellaswag_every: int = option(
        0, "steps between evaluations on HellaSwag (also at the end); 0: never"
    )
    hellaswag: str = option(
        "hub", "HellaSwag's items: hub (downloaded), or a .jsonl or .parquet file"
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Output, checkpoints and logs."""

    out_dir: str = option("out", "folder for checkpoints, metrics.jsonl and plots")
    save_every: int = option(250, "steps between checkpoints; 0: only at the end")
    keep_last: int = option(2, "checkpoints to keep for resuming")
    resume: str = option(
        "auto", "auto: continue the run in out_dir; never; or a state/step_ folder"
    )
    log_every: int = option(
        1, "steps between lines in metrics.jsonl; the console has a line in 10 s after the first 20"
    )
    log_to: str = option("", "also log to these, comma-separated: wandb, tensorboard, trackio")
    run_name: str = option("", "name of the run for log_to; empty: name of out_dir")


@dataclass(frozen=True, kw_only=True)
class SystemOptions:
    """Machine."""

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option("auto", "precision of matmuls", ("auto", "float32", "bfloat16", "float16"))
    compile_model: str = option("auto", "torch.compile", ("auto", "True", "False"))
    fp8: str = option(
        "none",
        "head: matmuls of the head in fp8, on GPUs that have it (H100, RTX 4090, …)",
        ("none", "head"),
    )
    parallel: str = option(
        "ddp",
        "with several ranks: ddp (each rank holds everything) or fsdp (each rank holds a part of "
        "weights, gradients and optimizer state: for models that do not fit)",
        ("ddp", "fsdp"),
    )
    activation_checkpointing: str = option(
        "False",
        "True: keep only the input of each block and recompute the rest, for the least memory; "
        "mlp: recompute only the inner layer of each MLP, which is faster and keeps more",
        ("False", "True", "mlp"),
    )
    hang_timeout_seconds: int = option(
        300,
        "several ranks: end the run after this time without progress, and name the rank that "
        "hangs; 0: leave it to PyTorch, which ends it after half an hour",
    )
    seed: int = option(1337, "seed of the weights, the order of the data and dropout")
    plugin: str = option("", PLUGIN_HELP)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All options of `gpt2 train`."""

    BEGINS_A_RUN: ClassVar[bool] = True  # or goes on with one, in out_dir
    DAILY: ClassVar[tuple[str, ...]] = (
        *("data_dir", "out_dir", "size", "init", "block_size", "batch_size", "grad_accum_steps"),
        *("total_batch_tokens", "max_steps", "learning_rate", "eval_every", "save_every", "device"),
        *("dtype", "compile_model"),
    )
    HELP_END: ClassVar[str] = f"""examples:
  gpt2 train --data_dir=data/mine --size=gpt2-mini --block_size=256 --grad_accum_steps=1
  gpt2 train --config=configs/gpt2_124m.toml --out_dir=out/first
  gpt2 train --out_dir=out/first                          the same command continues the run
  torchrun --standalone --nproc_per_node=8 -m gpt2 train  on 8 GPUs

{sizes_table()}"""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    system: SystemOptions = field(default_factory=SystemOptions)

    def __post_init__(self) -> None:
        if not self.model.init:  # with init, the sizes are known when the weights are read
            self.model.shape()
        o = self.optim
        at_least(1, max_steps=o.max_steps, log_every=self.output.log_every)
        at_least(self.data.smallest_batch, batch_size=self.data.batch_size)
        at_least(1, eval_tokens=self.eval.eval_tokens, keep_last=self.output.keep_last)
        at_most(2**16, batch_size=self.data.batch_size)
        at_most(2**20, grad_accum_steps=self.data.grad_accum_steps)
        at_most(2**40, total_batch_tokens=self.data.total_batch_tokens)
        at_most(10**15, eval_tokens=self.eval.eval_tokens)
        at_most(10**7, hang_timeout_seconds=self.system.hang_timeout_seconds)
        at_least(0, eval_every=self.eval.eval_every, save_every=self.output.save_every)
        at_least(0, early_stop_evals=self.eval.early_stop_evals, grad_clip=o.grad_clip)
        at_least(0, hang_timeout_seconds=self.system.hang_timeout_seconds)
        at_least(0, eval_hellaswag_every=self.eval.eval_hellaswag_every, max_seconds=o.max_seconds)
        if self.eval.early_stop_evals and not self.eval.eval_every:
            raise UserError(f"early_stop_evals is for --eval_every=; give both {ONE_SWITCH_OFF}")
        if self.eval.hellaswag != "hub" and not self.eval.eval_hellaswag_every:
            raise UserError("--hellaswag= is used with --eval_hellaswag_every=STEPS; give both")
        at_least(0, weight_decay=o.weight_decay, learning_rate=o.learning_rate)
        at_least(-1, warmup_steps=o.warmup_steps)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(o, name) < 1:
                raise UserError(f"{name}={getattr(o, name)}: use a number from 0 up to below 1")
        if not 0 <= o.min_lr_ratio <= 1 and o.min_lr_ratio != -1:
            raise UserError(f"min_lr_ratio={o.min_lr_ratio}: use a number from 0 to 1, or -1")
        check_seed(self.system.seed)
        check_loaded(self.system.plugin)
        check_recipe(o, None if self.model.init else self.model)
        if self.system.parallel == "fsdp" and registered("optimizer", o.optimizer):
            raise UserError(
                f"optimizer={o.optimizer} is a plugin's, which gets whole matrices; use "
                "--parallel=ddp"
            )
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
        """Sequences of block_size tokens in one optimizer step, over all ranks."""
        return self.batch_size * self.grad_accum_steps * self.world_size

    def __str__(self) -> str:
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


def with_floor(optim: OptimOptions) -> OptimOptions:
    """The options with their `min_lr_ratio`; the default -1 becomes 0 for wsd, 0.1 for others."""
    if optim.min_lr_ratio >= 0:
        return optim
    return replace(optim, min_lr_ratio=0.0 if optim.schedule == "wsd" else 0.1)


def warmup_steps(optim: OptimOptions) -> int:
    """Steps of linear warm-up; the default -1 becomes a share of max_steps."""
    if optim.warmup_steps >= 0:
        return optim.warmup_steps
    return round(WARMUP_FRACTION * optim.max_steps)
