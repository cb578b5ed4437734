"""`gpt2.train(…)`: a run from Python, with the options of the command line, and its result."""

import contextlib
import math
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..api import GPT2, TextModel
from ..config.command_line import parse_keywords
from ..config.train import TrainConfig
from ..distributed.signals import last_signal
from ..distributed.torch_defaults import of_a_new_process
from ..errors import UserError
from ..report import console
from ..report.metrics import METRICS, join, measured, read_metrics
from ..report.plot import plot_run
from ..train.loop import run
from ..train.run_folder import MODEL_NAME

_training = threading.Lock()


@dataclass(frozen=True)
class TrainResult:
    """What a run has left in its folder. A notebook shows it as the picture of `gpt2 plot`."""

    out_dir: Path
    config: TrainConfig  # as it was asked for
    exit_code: int  # 0: finished; 128 + signal: stopped with all saved, the same call goes on
    metrics: list[dict[str, Any]]  # one for each logged step; `pandas.DataFrame` takes them

    @property
    def val_loss(self) -> float | None:
        """The last validation loss in nats per token; None before the first evaluation.

        NaN where it was NaN or infinite.
        """
        losses = self._losses()
        return losses[-1] if losses else None

    @property
    def best_val_loss(self) -> float | None:
        """The lowest validation loss in nats per token; None where none was finite."""
        return min(filter(math.isfinite, self._losses()), default=None)

    def to_pandas(self) -> Any:
        """The metrics as a `pandas.DataFrame` with the step as its index.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise UserError("pandas is not installed; run: pip install pandas") from None
        return pandas.DataFrame(self.metrics).set_index("step")

    def model(self, device: str = "auto") -> TextModel:
        """The trained model, ready for `generate`."""
        return GPT2.from_checkpoint(self.out_dir / MODEL_NAME, device)

    def plot(self) -> Path:
        """Draws loss.png into the run's folder; returns the file."""
        return plot_run(self.out_dir)

    def _losses(self) -> list[float]:
        losses = [measured(row, "val_loss") for row in self.metrics]
        return [loss for loss in losses if loss is not None]

    def _repr_png_(self) -> bytes | None:
        """For notebooks."""
        return self.plot().read_bytes() if self.metrics else None

    def __repr__(self) -> str:
        step = self.metrics[-1]["step"] if self.metrics else 0
        found = "none yet" if self.val_loss is None else f"{self.val_loss:.4f}"
        return f"<run in {self.out_dir}: step {step:,}, validation loss {found}>"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came during a run, which has saved its last step.

    Attributes:
        result: the `TrainResult` of the run so far.
    """

    def __init__(self, result: TrainResult) -> None:
        super().__init__(f"stopped by Ctrl-C: {result}")
        self.result = result


class Bar:
    """A progress bar in the place of a line for each step."""

    notice = ""

    def __init__(self, max_steps: int) -> None:
        self._bar = tqdm(total=max_steps, unit="step", desc="training")
        self._seen: dict[str, str] = {}

    def log(self, step: int, values: dict) -> None:
        """Moves the bar to a step, with the newest losses beside it."""
        names = ("loss", "val_loss")
        self._seen |= {name: f"{values[name]:.4f}" for name in names if name in values}
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(self._seen)

    def close(self, failed: bool) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def train(*, progress: bool | None = None, **options: Any) -> TrainResult:
    """Trains, or continues, a run: `gpt2 train` with its options as keywords.

    result = gpt2.train(data_dir="data/mine", size="gpt2-mini", mlp="relu2", max_steps=200)

    Args:
        progress: a bar instead of lines; None: in a notebook.
        **options: those of `gpt2 train --help`, also `config="recipe.toml"`.

    A run is one of a new process: `torch.set_default_dtype` and the like do not change it.

    Raises:
        UserError: whatever the command line answers with one line, also for a run that diverged;
            or another thread of this process trains, with which it would share random numbers.
        Interrupted: Ctrl-C, after all is saved. It is a KeyboardInterrupt, so that a loop of runs
            ends too.
    """
    config = parse_keywords(TrainConfig, options, "gpt2.train")
    bar = in_notebook() if progress is None else progress
    if not _training.acquire(blocking=False):
        raise UserError(
            "gpt2.train: another thread of this process trains, and both would draw from torch's "
            "random numbers by turns; use processes (multiprocessing, or `gpt2 sweep`)"
        )
    try:
        with of_a_new_process(), console.muted() if bar else contextlib.nullcontext():
            code = run(config, watch=Bar(config.optim.max_steps) if bar else None)
    finally:
        _training.release()
    folder = Path(config.output.out_dir)
    logged = (folder / METRICS).is_file()  # not where a signal came before the first step
    rows = rows_by_step(folder / METRICS) if logged else []
    result = TrainResult(folder, config, code, rows)
    if last_signal() == signal.SIGINT:  # also during the last step, whose exit code is 0
        raise Interrupted(result)
    return result


def rows_by_step(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, those of one step joined, in the order of steps."""
    by_step: dict[int, dict[str, Any]] = {}
    for row in read_metrics(path):
        join(by_step.setdefault(row["step"], {}), row)
    return [by_step[step] for step in sorted(by_step)]


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook; an imported IPython alone is none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config
