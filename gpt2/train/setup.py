"""How a run begins: with which weights, data, network and optimizer."""

from dataclasses import replace

from ..checkpoint import model_file, weights
from ..checkpoint.training_state import Resumed
from ..checkpoint.weights import Weights
from ..config.earlier import as_begun
from ..config.finetune import tuning_options
from ..config.model import GPT2Config, ModernConfig
from ..config.registry import registered
from ..config.train import TrainConfig, check_of_switches, plan_batch
from ..data.loader import TrainLoader
from ..distributed import devices
from ..distributed.random_state import seed
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..model import lora
from ..model.checkpointing import checkpoint_activations
from ..model.gpt import GPT, LanguageModel
from ..report import console, throughput
from ..report.trackers import check_names
from . import sampled_loss, second_token
from .compilation import compile_network
from .cuda_graph import MicroBatchGraph
from .kernel_notes import kernel_notes
from .optimizer import build_optimizer
from .plugin_parts import check_parts
from .run_data import check_data, order_data, read_hellaswag
from .run_tokenizer import check_init_tokenizer, resolve_vocabulary, run_tokenizer
from .save import restore
from .schedules import check_plan
from .state import TrainState
from .tuning_plan import fit_batch


def resolve_init(
    config: TrainConfig, rt: Runtime, resumed: Resumed | None
) -> tuple[TrainConfig, Weights | None]:
    """Reads the weights that `--init` names; returns them, after the settings with their sizes.

    The settings also get the vocabulary of the shards.

    Only rank 0 reads the weights: DDP and FSDP broadcast them to the other ranks. A resumed run
    has its weights in the checkpoint, so no rank reads them.

    Raises:
        UserError: no such weights, or options that contradict them or the shards.
    """
    config = as_begun(resolve_vocabulary(config), resumed.state if resumed else {})
    options = config.model
    if not options.init:
        return config, None
    loaded: list[Weights] = []

    def look() -> GPT2Config:
        weights.check_there(options.init)
        check_data(config)
        found = weights.load(options.init)
        resolved = weights.resolve_options(options, found.config)
        check_init_tokenizer(found, config)
        found = weights.for_training(found, resolved.block_size)
        console.log(f"beginning with {found.origin}")
        for note in (*found.notes, *lora.notes_on_base(tuning_options(config), found.adapted)):
            console.log(note)
        loaded.append(found)
        return found.config

    shape = resumed.config if resumed else rt.on_main(look)
    resolved = weights.resolve_options(options, shape)
    check_of_switches(config.optim, resolved)
    return replace(config, model=resolved), next(iter(loaded), None)


def build(
    config: TrainConfig, rt: Runtime, resumed: Resumed | None, init: Weights | None = None
) -> TrainState:
    """Network, optimizer and loader, fresh or as a checkpoint left them.

    Args:
        config: the settings, resolved by `resolve_init`.
        rt: this process.
        resumed: the checkpoint to continue from.
        init: weights to begin with.

    Raises:
        UserError: everything about data, batch, network and device that can be found before the
            first step.
    """
    shape, optim = config.model.shape(), config.optim
    if config.data.batch_size:  # a mistake is said before data are read
        plan_batch(config.data, shape.block_size, rt.world_size)
    tokenizer = run_tokenizer(config, rt, resumed, init)
    datasets, mixture, data_notes = order_data(config, rt, resumed, tokenizer)
    data_options = fit_batch(config.data, mixture, rt.world_size, resumed)
    plan = plan_batch(data_options, shape.block_size, rt.world_size)
    check_plan(resumed.step if resumed else 0, optim, plan)
    check_names(config.output.log_to)
    hellaswag = read_hellaswag(config, rt, tokenizer)
    model = build_network(config, rt, init)
    model.end_of_text = tokenizer.end_of_text if tokenizer else None
    position = resumed.state["position"] if resumed else 0
    data_notes += sampled_loss.check(mixture, plan, position, model, optim.loss)
    compiled, compile_note = devices.choose_compile(config.system.compile_model, rt.device)
    if compiled:
        compile_network(model, rt.sharded)
    recorded, graph_note = devices.choose_graph(rt.device, compiled, rt.sharded)
    notes = [*data_notes, f"compile_model {compiled}: {compile_note}"]
    if rt.device.type == "cuda":
        notes += [*kernel_notes(model, plan, optim, rt), f"CUDA graph {recorded}: {graph_note}"]
    seed(config.system.seed + rt.rank)  # from here on only dropout draws
    state = TrainState(
        model=model,
        wrapped_model=model,
        optimizer=build_optimizer(model, optim, rt),
        scaler=rt.grad_scaler(),
        loader=TrainLoader(mixture, plan, rank=rt.rank, position=position, device=rt.device),
        datasets=datasets,
        plan=plan,
        clock=throughput.Throughput(),
        graph=MicroBatchGraph(model, recorded, console.warn),
        notes=tuple(notes),
        hellaswag=hellaswag,
        own_tokenizer=tokenizer,
    )
    if resumed:
        try:
            restore(state, config, resumed, rt)
        except UserError:
            state.loader.close()  # ends its thread
            raise
    # after `restore`: every rank gets the weights of rank 0
    state.wrapped_model = rt.wrap(model, recorded)
    return state


def network(config: GPT2Config) -> LanguageModel:
    """The network of a config, fresh; the one place that decides between GPT-2 and `Modern`."""
    if not isinstance(config, ModernConfig):
        return GPT(config)
    from ..model.modern import Modern  # a run of GPT-2 never imports RoPE or FlexAttention

    return Modern(config)


def build_network(config: TrainConfig, rt: Runtime, init: Weights | None) -> LanguageModel:
    """The network on its device, with given weights or fresh ones, and with LoRA's adapters.

    Raises:
        UserError: weights that do not fit; fp8 where the device has none.
    """
    model = network(config.model.shape())  # on the CPU: the same weights on every device
    check_parts(model, rt)
    if init:
        model_file.load_into(model, init.state, init.origin)
    lora.adapt(model, tuning_options(config))
    model.own_loss = registered("loss", config.optim.loss)
    model.sampled_ids = sampled_loss.begin(config.optim, model.config.vocab_size)
    rt.place(model)
    model.second_share = second_token.begin(config.optim, rt.device)
    model.fp8_head = devices.allow_fp8(config.system.fp8, rt.device, rt.dtype)
    checkpoint_activations(model, config.system.activation_checkpointing)
    return model
