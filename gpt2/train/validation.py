"""Evaluation during a run: the validation loss of each dataset, and HellaSwag."""

import contextlib

from ..config.train import TrainConfig
from ..data.chat_template import Message, encode_prompt, turn_end
from ..data.datasets import split_eval_tokens
from ..data.loader import eval_batches
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..evaluate.loss import combine, evaluate
from ..evaluate.tasks import HELLASWAG
from ..generate.stream import stream
from ..model.evaluation_mode import in_evaluation_mode, without_compiled_code
from ..report import console, metrics
from ..tokenizer import gpt2_tokenizer
from .messages import log_evaluation, log_hellaswag
from .run_folder import BEST_NAME
from .save import export_model
from .state import TrainState
from .tuning_plan import learns_conversations
from .weight_average import averaged

SAMPLE_TOKENS = 40  # of --sample_prompt=


def validate(state: TrainState, config: TrainConfig, rt: Runtime, log: metrics.RunLog) -> None:
    """Evaluates, logs and exports the best model; after a signal the next run evaluates instead."""
    parts = {}
    counts = split_eval_tokens(state.datasets, config.eval.eval_tokens)
    for dataset, eval_tokens in zip(state.datasets, counts, strict=True):
        batches = eval_batches(
            dataset.val,
            block_size=state.plan.block_size,
            batch_size=state.plan.batch_size,
            eval_tokens=eval_tokens,
            rank=rt.rank,
            world_size=rt.world_size,
            device=rt.device,
        )
        sequences = -(-eval_tokens // state.plan.block_size)
        total = -(-sequences // (state.plan.batch_size * rt.world_size))
        shown = state.progress.over(batches, total, "validation: batch")
        with averaged(state.model, state.optimizer):
            result = evaluate(state.model, shown, rt, state.own_tokenizer)
        if result is None:
            state.stop = True
            return
        parts[dataset.name] = result
    if state.note_evaluation(combine(parts.values()).loss):
        export_model(state, config, rt, BEST_NAME, final=False)
    log_evaluation(parts, state, rt, log)
    if config.eval.sample_prompt:
        log_sample(state, config, rt, log)


def log_sample(state: TrainState, config: TrainConfig, rt: Runtime, log: metrics.RunLog) -> None:
    """Continues `--sample_prompt=`, on the console and in metrics.jsonl.

    The run does not notice: tokens are drawn by a generator of their own, no compiled code is used
    or made, and no KV cache or CUDA graph. Under FSDP all ranks compute, since each holds a part.
    """
    if not rt.is_main and not rt.sharded:
        return
    prompt, tokenizer = config.eval.sample_prompt, state.own_tokenizer or gpt2_tokenizer()
    chat = learns_conversations(config)
    messages: list[Message] = [{"role": "user", "content": prompt}]
    ids = encode_prompt(messages, tokenizer) if chat else tokenizer.encode(prompt)
    model, tokens, lost = state.model, [], ""
    try:
        others_wait = contextlib.nullcontext() if rt.sharded else rt.alone()
        eager, mode = without_compiled_code(model), in_evaluation_mode(model)
        with averaged(state.model, state.optimizer), eager, rt.autocast(), others_wait, mode:
            if rt.sharded:  # generation calls parts of the network, not the whole that gathers them
                model.unshard()  # type: ignore[operator] # of FSDPModule
            for (token,) in stream(
                model,
                [ids],
                SAMPLE_TOKENS,
                seed=config.system.seed,
                stop_token=turn_end(tokenizer) if chat else tokenizer.end_of_text,
                use_cache=False,
                temperature=0.8,
                top_k=50,
            ):
                tokens += [] if token is None else [token]
    except UserError as error:  # its logits are not finite; whether the run ends is not ours to say
        lost = str(error)
    finally:
        if rt.sharded:
            model.reshard()  # type: ignore[operator]
    if lost:
        if rt.is_main:
            console.warn(f"step {state.step:,} | no sample: {lost}")
        return
    text = tokenizer.decode(tokens)
    log.record(state.step, sample=text)
    if rt.is_main:
        console.log(f"step {state.step:,} | sample: {prompt}{' -> ' if chat else ''}{text}")


def evaluate_hellaswag(state: TrainState, rt: Runtime, log: metrics.RunLog) -> None:
    """Evaluates on HellaSwag and logs; after a signal the next run evaluates instead."""
    with averaged(state.model, state.optimizer):
        results = HELLASWAG.ask(state.model, state.hellaswag, rt)
    if results is None:
        state.stop = True
        return
    state.hellaswag_at = state.step
    log_hellaswag(results, state, rt, log)
