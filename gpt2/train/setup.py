"""How a run begins: with which weights, data, network and optimizer."""

import bisect
import functools
import math
from dataclasses import replace

from ..checkpoint import model_file, weights
from ..checkpoint.training_state import Resumed
from ..checkpoint.weights import Weights
from ..config.model import GPT2Config, ModernConfig
from ..config.train import TrainConfig, check_of_switches, plan_batch
from ..data.conversations import check_eval_tokens, is_chat, open_conversations
from ..data.datasets import (
    Dataset,
    MixStart,
    build_mixture,
    continue_mix,
    identify,
    open_datasets,
)
from ..data.loader import TrainLoader
from ..data.sequence_order import Mixture
from ..distributed import devices, runtime
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..evaluate.tasks import HELLASWAG, load
from ..model import lora
from ..model.gpt import GPT
from ..model.modern import Modern
from ..report import console, throughput
from ..report.trackers import check_names
from .cuda_graph import MicroBatches
from .optimizer import build_optimizer
from .save import restore
from .schedules import check_plan, sequences_left
from .state import TrainState
from .step import forward_backward


def resolve_init(
    config: TrainConfig, rt: Runtime, resumed: Resumed | None
) -> tuple[TrainConfig, Weights | None]:
    """The settings with the sizes of the weights that `--init` names, and these weights.

    A run that goes on does not read them again. They are loaded on rank 0 only: DDP gives its
    weights to the other ranks.

    Raises:
        UserError: no such weights, or options that contradict them.
    """
    options = config.model
    if not options.init:
        return config, None
    loaded: list[Weights] = []

    def look() -> GPT2Config:
        found = weights.load(options.init)
        settled = weights.resolve_options(options, found.config)
        found = weights.for_training(found, settled.block_size)
        console.log(f"beginning with {found.origin}")
        for note in found.notes:
            console.log(note)
        loaded.append(found)
        return found.config

    shape = resumed.config if resumed else rt.on_main(look)
    settled = weights.resolve_options(options, shape)
    check_of_switches(config.optim, settled)
    return replace(config, model=settled), next(iter(loaded), None)


def order_data(
    config: TrainConfig, rt: Runtime, resumed: Resumed | None
) -> tuple[list[Dataset], Mixture]:
    """The datasets, and the order of their windows: from the beginning or as a checkpoint goes on.

    Raises:
        UserError: what is wrong with the datasets, or not as it was when the checkpoint was saved.
    """
    shape, seed = config.model.shape(), config.system.seed
    datasets = _open_data(config, shape.block_size, rt)
    identities = rt.on_main(lambda: [identify(dataset) for dataset in datasets])
    datasets = [replace(d, identity=i) for d, i in zip(datasets, identities, strict=True)]
    start = MixStart()
    if resumed and "data" in resumed.state:
        position = resumed.state["position"]
        stored = resumed.state["data"]
        datasets, start, notes = continue_mix(datasets, stored, position, resumed.path)
        rt.notes.extend(notes)
    elif resumed:
        rt.notes.append(
            f"{resumed.path} does not say which shards it was trained on: it is of an older "
            "version, whose order was another; what was read in this epoch may come again"
        )
    if config.data.sequence_start == "document" and rt.is_main:
        console.log("looking for the beginnings of documents in the training shards")
    return datasets, build_mixture(datasets, config.data, shape.block_size, seed, start)


def _open_data(config: TrainConfig, block_size: int, rt: Runtime) -> list[Dataset]:
    """Folders of shards or, for `gpt2 finetune`, files of conversations."""
    if config.tuning is None or not is_chat(config.data.data_dir):
        return open_datasets(config.data.data_dir)
    if config.data.sequence_start != "anywhere":
        raise UserError("--window_start=document is for text; conversations are always whole")
    if config.model.document_mask:
        raise UserError(
            f"init={config.model.init} has document_mask: the end-of-text tokens between messages "
            "would hide them from one another; begin with another model"
        )
    share = config.tuning.val_share
    datasets, notes = open_conversations(config.data.data_dir, block_size, share)
    check_eval_tokens(config.eval.eval_tokens, datasets, block_size)
    rt.notes.extend(notes)
    return datasets


def resolve_steps(config: TrainConfig, state: TrainState) -> TrainConfig:
    """The settings with the steps that `--epochs=` takes, if these are fewer than max_steps."""
    if config.tuning is None:
        return config
    rows = sum(order.per_epoch for order in state.loader.order.orders)
    wanted = config.tuning.epochs * rows
    steps = max(1, math.ceil(wanted / state.plan.sequences_per_step))
    if config.optim.batch_warmup:  # steps are smaller at first, by no more than half on the average
        steps = bisect.bisect_left(
            range(2 * steps), wanted, lo=steps,
            key=lambda n: sequences_left(0, replace(config.optim, max_steps=n), state.plan),
        )  # fmt: skip
    max_steps = min(config.optim.max_steps, steps)
    return replace(config, optim=replace(config.optim, max_steps=max_steps))


def network(config: GPT2Config) -> GPT:
    """The network of a config; the one place that decides which."""
    return Modern(config) if isinstance(config, ModernConfig) else GPT(config)


def build(
    config: TrainConfig, rt: Runtime, resumed: Resumed | None, init: Weights | None = None
) -> TrainState:
    """Model, optimizer and loader, fresh or as a checkpoint left them; checks all that can be."""
    shape = config.model.shape()
    plan = plan_batch(config.data, shape.block_size, rt.world_size)
    check_plan(resumed.step if resumed else 0, config.optim, plan)
    datasets, mixture = order_data(config, rt, resumed)
    check_names(config.output.log_to)
    hellaswag = []
    if config.eval.eval_hellaswag_every:  # broadcast: other machines may lack the file
        hellaswag = rt.on_main(lambda: load(HELLASWAG, config.eval.hellaswag, console.log))
    model = network(shape)  # on the CPU: the same weights on every device
    if init:
        model_file.load_into(model, init.state, init.origin)
    lora.adapt(model, config.tuning)
    rt.place(model)
    model.fp8_head = devices.allow_fp8(config.system.fp8, rt.device, rt.dtype)
    model.checkpoint_activations = config.system.activation_checkpointing
    compiled, reason = devices.choose_compile(config.system.compile_model, rt.device)
    if compiled:
        rt.compile(model)
    rt.notes.append(f"compile_model {compiled}: {reason}")
    runtime.seed(config.system.seed + rt.rank)  # from here on only dropout draws
    loader = TrainLoader(
        mixture,
        plan,
        rank=rt.rank,
        position=resumed.state["position"] if resumed else 0,
        device=rt.device,
    )
    state = TrainState(
        model=model,
        forward=model,
        optimizer=build_optimizer(model, config.optim, rt),
        scaler=rt.grad_scaler(),
        loader=loader,
        datasets=datasets,
        plan=plan,
        clock=throughput.Throughput(),
        hellaswag=hellaswag,
    )
    if resumed:
        restore(state, resumed, rt)
    state.forward = rt.wrap(model)
    state.micro_batches = micro_batches(state, rt, compiled)
    return state


def micro_batches(state: TrainState, rt: Runtime, compiled: bool) -> MicroBatches:
    """Runs `forward_backward`, as a CUDA graph where that is chosen."""
    graph, reason = devices.choose_graph(rt.device, compiled, rt.world_size)
    if rt.device.type == "cuda":
        rt.notes.append(f"CUDA graph {graph}: {reason}")
    run = functools.partial(forward_backward, state, rt)
    return MicroBatches(state.model, run, graph, console.warn)
