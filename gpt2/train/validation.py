"""Evaluation during a run: the validation loss of each dataset, and HellaSwag."""

from ..config.train import TrainConfig
from ..data.datasets import split_eval_tokens
from ..data.loader import eval_batches
from ..distributed.runtime import Runtime
from ..evaluate.loss import combine, evaluate
from ..evaluate.tasks import HELLASWAG
from ..report import metrics
from .messages import log_evaluation, log_hellaswag
from .run_folder import BEST_NAME
from .save import export_model
from .state import TrainState


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
        result = evaluate(state.model, state.progress.over(batches, total, "validation: batch"), rt)
        if result is None:
            state.stop = True
            return
        parts[dataset.name] = result
    if state.note_evaluation(combine(parts.values()).loss):
        export_model(state, config, rt, BEST_NAME, final=False)
    log_evaluation(parts, state, rt, log)


def evaluate_hellaswag(state: TrainState, rt: Runtime, log: metrics.RunLog) -> None:
    """Evaluates on HellaSwag and logs; after a signal the next run evaluates instead."""
    results = HELLASWAG.ask(state.model, state.hellaswag, rt)
    if results is None:
        state.stop = True
        return
    state.hellaswag_at = state.step
    log_hellaswag(results, state, rt, log)
