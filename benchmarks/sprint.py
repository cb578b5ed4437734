"""Validation loss after so many seconds of training, for a list of recipes on one machine.

    python -m benchmarks.sprint configs/speedrun.toml configs/sprint_gpt2_adamw.toml --data_dir=data
    python -m benchmarks.sprint configs/speedrun.toml --seeds=1,2,3 --data_dir=data
    python -m benchmarks.sprint --ablate=configs/speedrun.toml --seconds=60 --data_dir=data
    python -m benchmarks.sprint "slower = configs/speedrun.toml --muon_lr=0.01" --data_dir=data

A recipe is a file of `configs/`, with options behind it if it needs some, and "name =" before it if
it should have one. Each runs in a process of its own by the step of `gpt2 train`; with several
`--devices=cuda:0,cuda:1` as many run at once. The seeds of a recipe share a process, where the
recipes divide evenly among the devices: only the first one compiles. The clock counts training
only: compilation, validation and the start are left out. A first stretch of steps compiles and
measures the speed, from which `max_steps` follows, so that schedules end with the time; then
weights, optimizer and data are as they were at the beginning. After a quarter of the steps
`max_steps` follows from the speed until then, unless windows or the batch grow. Validation is all
of the folder's validation shards, in windows of at most block_size tokens; its loss is the mean
over all predicted tokens. A longer window shows a token more text, so recipes of different
block_size compare by `--val_block_size` only. GiB are the most that tensors took, those of a
recorded step included.

`--ablate=CONFIG` runs the recipe, and the recipe without each of its switches in turn.

Written to --out_dir: sprint.jsonl, sprint.md (the table, and by `gpt2 compare`'s test which
difference is larger than the seeds') and sprint.png (loss against seconds).
"""

import argparse
import gc
import inspect
import json
import queue
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from gpt2.commands.on_devices import on_devices
from gpt2.config.command_line import parse
from gpt2.config.switches import Switches
from gpt2.config.train import Recipe, TrainConfig
from gpt2.data.loader import available_eval_tokens, eval_batches
from gpt2.distributed import runtime
from gpt2.distributed.devices import wait_for
from gpt2.distributed.runtime import Runtime
from gpt2.errors import UserError
from gpt2.evaluate.loss import Evaluation, evaluate
from gpt2.train import setup
from gpt2.train import step as step_module
from gpt2.train.save import export_model
from gpt2.train.setup import resolve_init
from gpt2.train.state import TrainState
from gpt2.train.time_budget import FAR, STRETCH_SECONDS, calibrate, recalibrate
from gpt2.train.weight_average import averaged

from .arguments import amount, count, whole
from .sprint_report import draw, report
from .throughput import _late

SHORT_STRETCH_SECONDS = 0.5  # for STRETCH_SECONDS, where the run itself corrects the measurement
FEWEST_STEPS = 8  # in a quarter of the run; the speed of fewer says less than the measurement
TOGETHER = {  # switched off with the switch that they belong to
    "window_pattern": ("window", "window_warmup"),
    "positions": ("rope_base", "rope_fraction"),
    "untied_head": ("head_lr",),
    "optimizer": ("muon_lr", "muon_momentum", "muon_momentum_warmup", "muon_weight_decay"),
    "schedule": ("cooldown",),
}
NUMBERS = {  # values that are tuned, not switches
    "embedding_lr",
    *(name for names in TOGETHER.values() for name in names if name != "window_warmup"),
}


class Stopped(Exception):
    """A signal ended the training."""


@dataclass(frozen=True)
class Job:
    """A recipe to run."""

    name: str
    argv: tuple[str, ...]  # of `gpt2 train`
    seeds: tuple[int, ...]


def recipes(options: argparse.Namespace) -> list[Job]:
    """What the command line asks for; seeds apart where a device would have nothing to do.

    Raises:
        UserError: a recipe with a seed of its own, or one that cannot be trained with.
    """
    named: dict[str, list[str]] = {}
    for text in options.recipes:
        name, found, rest = text.partition(" = ")
        path, *extra = shlex.split(rest if found else text)
        name = name.strip() if found else " ".join([Path(path).stem, *extra])
        if any(given.partition("=")[0] in {"--seed", "--seeds"} for given in extra):
            raise UserError(f"{name}: --seeds is one for all recipes; take it out of this one")
        named[name] = [f"--config={path}", *extra]
    if options.ablate:
        named |= ablations(options.ablate)
    for name, argv in named.items():  # before the first one trains
        try:
            parse(TrainConfig, [f"--data_dir={options.data_dir}", *argv, *options.extra], "sprint")
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    together = len(named) % len(options.devices.split(",")) == 0
    groups = [options.seeds] if together else [(seed,) for seed in options.seeds]
    return [Job(n, (*argv, *options.extra), group) for n, argv in named.items() for group in groups]


def ablations(path: Path) -> dict[str, list[str]]:
    """The recipe of a file, and for each switch in it the same without it."""
    given = tomllib.loads(path.read_text("utf-8"))
    defaults = {f.name: f.default for f in (*fields(Switches), *fields(Recipe))}
    found = {path.stem: [f"--config={path}"]}
    for name in given:
        if name not in defaults or name in NUMBERS:
            continue
        off = {n: defaults[n] for n in (name, *TOGETHER.get(name, ())) if n in given}
        found[f"without {name}"] = [f"--config={path}", *(f"--{n}={v}" for n, v in off.items())]
    return found


def sprint(options: argparse.Namespace) -> Iterator[dict]:
    """The rows of one job: for each seed an evaluation each, the last at the end of its time."""
    for seed in options.seeds:
        argv = [f"--data_dir={options.data_dir}", f"--device={options.device}", *options.extra]
        if options.save:
            folder = options.out_dir / f"{options.only}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            argv.append(f"--out_dir={folder}")
        yield from run_of(parse(TrainConfig, [*argv, f"--seed={seed}"], "sprint"), options)
        gc.collect()  # the run, before the next one takes memory and counts its GiB
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def run_of(config: TrainConfig, options: argparse.Namespace) -> Iterator[dict]:
    """The rows of one seed."""
    with runtime.start(config.system) as rt:
        began = time.perf_counter()
        config, init = resolve_init(config, rt, None)
        context = config.model.shape().block_size
        if not 0 <= options.val_block_size <= context:
            raise UserError(
                f"--val_block_size={options.val_block_size}: use 0 to {context}, the context"
            )
        state = setup.build(config, rt, None, init)
        try:
            stretch = STRETCH_SECONDS if changing(config) else SHORT_STRETCH_SECONDS
            config, expected = calibrate(state, config, rt, options.seconds, stretch)
            row = {
                "name": options.only,
                "seed": config.system.seed,
                "device": rt.device_name,
                "torch": torch.__version__,
                "parameters": state.model.num_parameters(),
                "tokens_per_step": state.plan.tokens_per_step,
                "block_size": state.plan.block_size,
                "start_seconds": round(time.perf_counter() - began, 1),
            }
            for evaluation in timed(state, config, rt, options, row, expected):
                if options.save and evaluation["ended"]:
                    export_model(state, config, rt, "out_ckpt.pt", final=True)
                yield evaluation
        finally:
            state.loader.close()


def timed(  # noqa: PLR0917
    state: TrainState,
    config: TrainConfig,
    rt: Runtime,
    options: argparse.Namespace,
    row: dict,
    expected: float,
) -> Iterator[dict]:
    """Trains to the end of the time; a row, which begins with `row`, at each evaluation.

    Args:
        state: fresh, compiled.
        config: its settings.
        rt: this process.
        options: of the command line.
        row: what is known before.
        expected: seconds per token at the beginning, of `calibrate`.
    """
    quarter, done = config.optim.max_steps // 4, 0
    corrects = quarter >= FEWEST_STEPS and not changing(config)
    validate(state, rt, options.val_tokens)  # compiles
    step = _late(lambda: step_module.train_step(state, config, rt).read, rt.steps_ahead)
    seconds, early, ended = 0.0, (0.0, 0), False
    wait_for(rt.device)
    began = time.perf_counter()
    while not ended:
        read = step()
        if rt.stop_signal:
            raise Stopped
        if corrects and state.step in (quarter // 4, quarter):
            wait_for(rt.device)
            now = seconds + time.perf_counter() - began
            if state.step == quarter:  # the first steps record a graph, and tell no speed
                per_token = (now - early[0]) / (state.tokens - early[1])
                lost = now - per_token * state.tokens
                config = recalibrate(config, options.seconds, expected, per_token, lost)
            early = now, state.tokens
        max_steps = config.optim.max_steps
        over = seconds + time.perf_counter() - began > options.seconds
        ended = over or state.step >= max_steps
        if not ended and state.step < round(max_steps * (done + 1) / options.evaluations):
            continue
        loss = read()
        wait_for(rt.device)
        seconds += time.perf_counter() - began
        more = {"max_steps": max_steps, "seconds": seconds, "train_loss": loss, "ended": ended}
        yield row | more | evaluated(state, rt, options, seconds, ended)
        done += 1
        wait_for(rt.device)
        began = time.perf_counter()


def changing(config: TrainConfig) -> bool:
    """Whether windows or the batch grow, and a token therefore costs more or less at the end."""
    return bool(config.optim.window_warmup or config.optim.batch_warmup)


def evaluated(
    state: TrainState, rt: Runtime, options: argparse.Namespace, seconds: float, ended: bool
) -> dict:
    """The part of a row that is read off the state, and what validation finds."""
    found = validate(state, rt, options.val_tokens)
    row = {
        "step": state.step,
        "tokens": state.tokens,
        "tokens_per_second": state.tokens / seconds,
        "val_loss": found.loss,
        "val_tokens": found.tokens,
        "bits_per_byte": found.bits_per_byte,
        "peak_gib": rt.peak_gib(),
    }
    if ended and options.val_block_size:
        with torch.compiler.set_stance("force_eager"):  # for one pass compiling does not pay
            found = validate(state, rt, options.val_tokens, options.val_block_size)
        row |= {"val_block_size": options.val_block_size, "val_loss_there": found.loss}
    return row


def validate(state: TrainState, rt: Runtime, tokens: int, block_size: int = 0) -> Evaluation:
    """The loss over so many tokens of the validation shards.

    Args:
        state: of the run.
        rt: this process.
        tokens: how many at most.
        block_size: tokens of a window; 0: the model's.

    Raises:
        Stopped: after a signal.
    """
    shards = [shard for dataset in state.datasets for shard in dataset.val]
    batches = eval_batches(
        shards,
        block_size=block_size or state.plan.block_size,
        batch_size=state.plan.batch_size,
        eval_tokens=available_eval_tokens(shards, tokens),
        device=rt.device,
    )
    with averaged(state.model, state.optimizer):
        found = evaluate(state.model, batches, rt, state.own_tokenizer)
    if found is None:
        raise Stopped
    return found


def run_all(jobs: list[Job], options: argparse.Namespace) -> Iterator[dict]:
    """The rows of all jobs, as they come; on each device one job after the other."""
    yield from on_devices(
        jobs, options.devices.split(","), lambda *of_job: run_one(*of_job[:2], options, of_job[2])
    )


def run_one(job: Job, device: str, options: argparse.Namespace, rows: queue.Queue):
    """One job in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.sprint",
        f"--only={job.name}",
        f"--device={device}",
        f"--seeds={','.join(map(str, job.seeds))}",
        f"--seconds={options.seconds}",
        f"--data_dir={options.data_dir}",
        f"--evaluations={options.evaluations}",
        f"--val_tokens={options.val_tokens}",
        f"--val_block_size={options.val_block_size}",
        f"--out_dir={options.out_dir}",
        *job.argv,
    ]
    if options.save:
        command.append("--save")
    left = list(job.seeds)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            row = json.loads(line)
            rows.put(row)
            if row["ended"]:
                left.remove(row["seed"])
    for seed in left:
        rows.put({"name": job.name, "seed": seed, "failed": process.returncode or 1})


def whole_numbers(text: str) -> tuple[int, ...]:
    """Of a list with commas."""
    return tuple(whole(part) for part in text.split(","))


def parser() -> argparse.ArgumentParser:
    """The command line; what it does not know goes to `gpt2 train`."""
    made = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("recipes", nargs="*", help="files of configs/, see above")
    made.add_argument("--ablate", type=Path, help="a file of configs/: also without each switch")
    made.add_argument("--data_dir", required=True, help="folder of shards")
    made.add_argument("--seconds", type=amount, default=200.0, help="of training")
    made.add_argument("--seeds", type=whole_numbers, default=(1337,), help="comma-separated")
    made.add_argument("--evaluations", type=int, default=8, help="on the way, the last included")
    made.add_argument("--val_tokens", type=count, default=FAR, help="at most; as a rule all")
    also = "at the end, the loss in windows of so many tokens too; 0: in the recipe's alone"
    made.add_argument("--val_block_size", type=int, default=0, help=also)
    default = "cuda:0" if torch.cuda.is_available() else "cpu"
    made.add_argument("--devices", default=default, help="comma-separated, a job each")
    made.add_argument("--out_dir", type=Path, default=Path("out/sprint"))
    kept = "keep the models, as NAME-SEED/out_ckpt.pt"
    made.add_argument("--save", action="store_true", help=kept)
    for name in ("--only", "--device"):
        made.add_argument(name, help=argparse.SUPPRESS)
    made.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    return made


def main() -> int:
    """Runs all jobs, or with --only one of them."""
    options, options.extra = parser().parse_known_args()
    try:
        if options.only:
            for row in sprint(options):
                print(json.dumps(row), flush=True)
            return 0
        if options.evaluations < 1:
            raise UserError(f"--evaluations={options.evaluations}: use 1 or more")
        if options.seed is not None or options.device:
            raise UserError("--seed and --device: use --seeds and --devices")
        return run_and_report(recipes(options), options)
    except UserError as error:
        print(f"{options.only}: {error}" if options.only else error, file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Stopped):  # the processes of the jobs get the signal too
        return 130


def run_and_report(jobs: list[Job], options: argparse.Namespace) -> int:
    """Runs all jobs, and writes what they found."""
    options.out_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    with (options.out_dir / "sprint.jsonl").open("a", encoding="utf-8") as log:
        for row in run_all(jobs, options):
            rows.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
            said = "failed, see above"
            if "val_loss" in row:
                said = f"{row['seconds']:6.1f} s  step {row['step']}  loss {row['val_loss']:.4f}"
            if "val_block_size" in row:
                said += f", {row['val_loss_there']:.4f} in windows of {row['val_block_size']}"
            print(f"{row['name']} (seed {row['seed']}): {said}", flush=True)
    if any("val_loss" in row for row in rows):  # else what an earlier call wrote stays
        (options.out_dir / "sprint.md").write_text(report(rows), encoding="utf-8")
        draw(rows, options.out_dir / "sprint.png")
    print("\n" + report(rows))
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
