"""Optimizer steps that fill a number of seconds of training, measured on the device.

Compilation and first allocations are left out of the measurement: the clock of a run that is given
equal seconds counts training only.

`python -m gpt2.train.time_budget SECONDS …`, with options of `gpt2 train`, ends with the number as
JSON: `gpt2 sweep --seconds=` measures in a process of its own.
"""

import json
import statistics
import sys
import time
from dataclasses import replace

from ..config.command_line import parse
from ..config.train import OptimOptions, TrainConfig
from ..data.loader import TrainLoader
from ..distributed import runtime
from ..distributed.devices import wait_for
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..report import console
from . import setup
from .sampled_loss import WHOLE
from .schedules import attention_window_at, sequences_left
from .setup import resolve_init
from .state import TrainState
from .step import train_step

FAR = 10**9  # steps, while the speed is measured
STRETCH_SECONDS = 2.0  # of each of three measurements of the speed; no longer than the budget
SLOWER = 0.015  # by which cards get slower as they warm up; H100s did by 0.2 to 1.8 %
SLOWER_LATER = 0.003  # after a part of the run


def steps_for(config: TrainConfig, seconds: float) -> int:
    """`max_steps` of a run with these settings that trains for so many seconds.

    Raises:
        UserError: settings that cannot be trained with.
    """
    with runtime.start(config.system) as rt:
        config, init = resolve_init(config, rt, None)
        state = setup.build(config, rt, None, init)
        try:
            return calibrate(state, config, rt, seconds)[0].optim.max_steps
        finally:
            state.loader.close()


def calibrate(
    state: TrainState,
    config: TrainConfig,
    rt: Runtime,
    seconds: float,
    stretch: float = STRETCH_SECONDS,
) -> tuple[TrainConfig, float]:
    """The settings whose `max_steps` fill the time, and seconds per token at the beginning.

    All else is as it was before.
    """
    weights = state.model.state_dict().items()
    before = {name: w.to("cpu", copy=True) for name, w in weights}  # no part of the GiB
    options, stretch = config.optim, min(stretch, seconds)
    still = replace(options, max_steps=FAR, batch_warmup=0, window_warmup=0)
    compiling = replace(config, optim=still)
    many, full = replace(options, max_steps=1000), state.plan.block_size
    costs, mean = [], 0.0  # seconds per token: along a line in the width while windows grow
    for width, share in shares_of_ends(many, full).items():
        if options.window_warmup:
            state.model.limit_attention_window(width)
        costs.append(seconds_per_token(state, compiling, rt, stretch))
        mean += share * costs[-1]
    if state.model.sampled_ids is not None:  # the last steps take the whole softmax
        state.step = FAR - 1
        whole = seconds_per_token(state, compiling, rt, stretch)
        mean += WHOLE * (whole - mean)
    # while the batch grows, a step has fewer tokens
    tokens = sequences_left(0, many, state.plan) / many.max_steps * full
    steps = max(1, int((1 - SLOWER) * seconds / mean / tokens))
    state.model.load_state_dict(before)
    state.optimizer.state.clear()
    state.step = 0
    state.loader.close()
    order, plan = state.loader.order, state.plan
    state.loader = TrainLoader(order, plan, rank=rt.rank, position=0, device=rt.device)
    return replace(config, optim=replace(options, max_steps=steps)), costs[0]


def recalibrate(
    config: TrainConfig, seconds: float, expected: float, found: float, lost: float
) -> TrainConfig:
    """The settings with `max_steps` by the speed of the run itself, once it is under way.

    Args:
        config: as `calibrate` gave it.
        seconds: that the run is to train.
        expected: seconds per token at the beginning, as `calibrate` measured them.
        found: seconds per token of the run.
        lost: seconds that the first steps took beyond that, as for recording a CUDA graph.
    """
    share = expected / found * ((1 - SLOWER_LATER) * seconds - lost) / ((1 - SLOWER) * seconds)
    steps = max(1, int(config.optim.max_steps * share))
    return replace(config, optim=replace(config.optim, max_steps=steps))


def shares_of_ends(options: OptimOptions, full: int) -> dict[int, float]:
    """The first and the last width of windows, with what each counts in the mean over all steps."""
    widths = [attention_window_at(step, options, full) for step in range(options.max_steps)]
    first = widths[0]
    of_last = (statistics.mean(widths) - first) / (full - first) if first < full else 0.0
    return {first: 1 - of_last} | ({full: of_last} if of_last else {})


def seconds_per_token(state: TrainState, config: TrainConfig, rt: Runtime, stretch: float) -> float:
    """As the median of stretches of so many seconds, after what the first steps compile."""
    for _ in range(3):
        train_step(state, config, rt).read()
    steps = 1 + int(stretch * speed(state, config, rt, 3) / state.plan.tokens_per_step)
    return 1 / statistics.median(speed(state, config, rt, steps) for _ in range(3))


def speed(state: TrainState, config: TrainConfig, rt: Runtime, steps: int) -> float:
    """Tokens per second over some steps."""
    wait_for(rt.device)
    began = time.perf_counter()
    for _ in range(steps):
        train_step(state, config, rt)
    wait_for(rt.device)
    return steps * state.plan.tokens_per_step / (time.perf_counter() - began)


def main(argv: list[str]) -> int:
    """Measures; returns the exit code."""
    try:
        steps = steps_for(parse(TrainConfig, argv[1:], "gpt2 sweep"), float(argv[0]))
    except UserError as error:
        console.error(str(error))
        return 2
    console.log(json.dumps({"max_steps": steps}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
