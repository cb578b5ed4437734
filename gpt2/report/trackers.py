"""Services that can follow a run: wandb, TensorBoard, trackio.

Each is imported only when it is named. A new one is a class with `log` and `close` and a line in
`SINKS`; `report.RunLog` sees to it that a failing one does not stop the training.
"""

import difflib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from ..errors import UserError, install_command
from ..files import write_atomically

PROJECT = "gpt2"


class Sink(Protocol):
    """A service that `RunLog` forwards values to."""

    notice: str  # what to tell the person once it is open; may be empty

    def log(self, step: int, values: dict) -> None:
        """Sends the values of a step; the same step may come twice with other names."""

    def close(self, failed: bool) -> None:
        """Sends what is left; nothing is logged afterwards."""


class Wandb:
    """Weights & Biases; without an account the run is kept offline, below out_dir/wandb."""

    notice = ""

    def __init__(self, out_dir: Path, config: dict, run_name: str, resume_step: int | None):
        import wandb

        settings = wandb.setup().settings  # after WANDB_* variables and settings files
        mode: Literal["offline"] | None = None  # None: as the settings say
        if settings.mode == "online" and not wandb.login(prompt=False):
            mode = "offline"
            self.notice = "wandb: no API key (`wandb login` sets one), so the run is kept offline"
        id_file = out_dir / "wandb_id.txt"
        resumes = resume_step is not None and id_file.exists()
        self._run = wandb.init(
            project=settings.project or PROJECT,
            name=run_name,
            config=config,
            dir=str(out_dir),
            id=id_file.read_text(encoding="utf-8").strip() if resumes else None,
            resume="allow",
            mode=mode,
        )
        if not self._run.disabled:
            write_atomically(id_file, self._run.id.encode())
        # As an x axis of our own the step may go back; wandb's step would drop repeated ones.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict) -> None:
        """See Sink."""
        self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        """See Sink."""
        self._run.finish(exit_code=int(failed))


class TensorBoard:
    """Event files below out_dir/tensorboard."""

    notice = ""

    def __init__(self, out_dir: Path, config: dict, run_name: str, resume_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(out_dir / "tensorboard"),
            purge_step=None if resume_step is None else resume_step + 1,
            flush_secs=30,
        )
        table = "\n".join(f"| {name} | {value} |" for name, value in config.items())
        self._writer.add_text("config", f"| option | value |\n|---|---|\n{table}")

    def log(self, step: int, values: dict) -> None:
        """See Sink."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """See Sink."""
        self._writer.close()


class Trackio:
    """trackio's database on this machine, or the Space that TRACKIO_SPACE_ID names."""

    notice = ""

    def __init__(self, out_dir: Path, config: dict, run_name: str, resume_step: int | None):
        import trackio

        self._run = trackio.init(
            project=PROJECT,
            name=run_name,
            config=config,
            resume="never" if resume_step is None else "allow",
        )

    def log(self, step: int, values: dict) -> None:
        """See Sink."""
        self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        """See Sink."""
        self._run.finish()


SINKS: dict[str, Callable[[Path, dict, str, int | None], Sink]] = {
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}


def check_names(text: str) -> list[str]:
    """The sinks in a comma-separated list, each once.

    Raises:
        UserError: for an unknown name, or one whose package is not installed.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in SINKS:
            close = difflib.get_close_matches(name, SINKS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"use {', '.join(SINKS)}"
            raise UserError(f"--log_to={name}: unknown; {hint}")
        if importlib.util.find_spec(name) is None:
            way_out = install_command("track")
            raise UserError(f"--log_to={name} needs the package {name}; run: {way_out}")
    return names


def open_sink(
    name: str, *, out_dir: Path, config: dict, run_name: str, resume_step: int | None
) -> Sink:
    """Opens one of SINKS for a run; may raise whatever the service raises."""
    return SINKS[name](out_dir, config, run_name, resume_step)
