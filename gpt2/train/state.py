"""The state of a training run: network, optimizer, data and counters."""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from ..checkpoint.async_writer import Saver
from ..config.train import BatchPlan, OptimOptions
from ..data.datasets import Dataset
from ..data.loader import TrainLoader
from ..evaluate.tasks import MultipleChoice
from ..model.gpt import LanguageModel
from ..report import console, throughput
from ..tokenizer import Tokenizer
from .cuda_graph import MicroBatchGraph
from .progress import Progress


@dataclass
class TrainState:
    """All that changes while training; `save.py` writes it to a checkpoint and restores it."""

    model: LanguageModel
    wrapped_model: nn.Module  # the model, or DistributedDataParallel around it
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    loader: TrainLoader
    datasets: list[Dataset]
    plan: BatchPlan
    clock: throughput.Throughput
    graph: MicroBatchGraph
    notes: tuple[str, ...] = ()  # what was chosen when the run was set up, and why
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # of training before this process
    first_steps: float = 0.0  # of these, in the first step of each process
    time_was_up: float = 0.0  # the max_seconds that ended the run; 0: none yet
    skipped: int = 0  # steps in a row whose gradient was not finite
    val_loss: float | None = None
    best_val_loss: float = math.inf
    evals_without_gain: int = 0
    evaluated_at: int = -1  # the step of the last evaluation
    own_tokenizer: Tokenizer | None = None  # None: GPT-2's
    stop: bool = False  # agreed by all ranks
    hellaswag: list[MultipleChoice] = field(default_factory=list)  # items, if it is evaluated
    hellaswag_at: int = -1  # the step of its last evaluation
    progress: Progress = field(default_factory=Progress)
    saver: Saver = field(default_factory=lambda: Saver(console.warn))

    @property
    def tokens(self) -> int:
        """Tokens that all ranks have trained on, whatever the batch was at each step."""
        return self.loader.position * self.plan.block_size

    def is_complete(self, optim: OptimOptions) -> bool:
        """Whether the steps or the seconds of the run are used up."""
        return self.step >= optim.max_steps or 0 < optim.max_seconds <= self.time_was_up

    def note_evaluation(self, loss: float) -> bool:
        """Records the validation loss of this step, in nats; True when it is the best so far."""
        improved = loss < self.best_val_loss
        self.val_loss, self.evaluated_at = loss, self.step
        self.best_val_loss = loss if improved else self.best_val_loss
        self.evals_without_gain = 0 if improved else self.evals_without_gain + 1
        return improved
