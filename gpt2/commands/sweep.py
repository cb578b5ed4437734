"""`gpt2 sweep`: runs each recipe with several seeds, on several devices, and compares them.

Each run is a `gpt2 train` in a process of its own, with its output in a file beside its folder. A
sweep that was stopped, however it was, goes on by the same command: finished runs are not repeated,
and a run that was cut off continues from its last checkpoint.
"""

import bisect
import contextlib
import functools
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch

from ..checkpoint import weights
from ..checkpoint.training_state import state_folders
from ..config.earlier import comparable
from ..config.options import flatten
from ..config.registry import changed_plugins
from ..config.run_paths import shortest
from ..config.sweep import Job, SweepConfig
from ..config.train import plan_batch
from ..data.datasets import identify, open_datasets, training_fingerprint
from ..distributed import signals
from ..distributed.devices import choose_device
from ..errors import UserError
from ..evaluate import tasks
from ..files import locked, write_atomically
from ..paths import check_unlinked, no_follow
from ..report import console
from ..report.metrics import METRICS
from ..report.runs import SAME_RESULT, Run, read_run
from ..train.run_folder import MODEL_NAME
from ..train.schedules import sequences_left
from ..untrusted.display import shown
from ..untrusted.parsing import load_json, read_json
from . import compare_runs
from .on_devices import on_devices

NO_TIME = {  # options whose value changes no step's duration
    *("learning_rate", "min_lr_ratio", "warmup_steps", "schedule", "cooldown", "weight_decay"),
    *("beta1", "beta2", "muon_lr", "muon_momentum", "muon_momentum_warmup", "muon_weight_decay"),
    *("embedding_lr", "head_lr", "seed"),
}
BUDGETS = "budgets.json"  # of a sweep by seconds: recipe -> what was asked, and max_steps
MEASURED = "measure.log"  # what the measurement of a recipe said
BATCH = ("batch_size", "grad_accum_steps", "total_batch_tokens", "block_size", "batch_warmup")
BUSY = "another sweep ({holder}) is working in {folder}"


def run(jobs: list[Job], config: SweepConfig) -> int:
    """Runs what is not finished, then compares all runs.

    Returns:
        Exit code: 0 when all runs are at their end, also those that diverged; 1 when one failed, or
        when all diverged; 128 + signal after a signal.

    Raises:
        UserError: a run folder of another recipe, or a device, data or weights that are not there.
    """
    out = Path(config.out_dir)
    devices = _devices(config.devices)
    with locked(out, BUSY):
        folders = [job.folder for job in jobs]
        check_unlinked(out, out / MEASURED, *folders, *map(_log_of, folders))
        processes = _Processes()
        with signals.caught(processes.stop):
            _check_sources([job for job in jobs if not _has_ended(job)])
            if config.seconds:
                jobs = _with_equal_seconds(jobs, config.seconds, devices[0], out, processes)
            else:
                jobs = _with_equal_tokens(jobs, config.tokens)
            training = functools.cache(_training_of)
            waiting = [job for job in jobs if not _is_finished(job, training)]
            if len(waiting) < len(jobs):
                console.log(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished already")
            done = len(jobs) - len(waiting)
            failed = []
            with processes.ended():
                for job, code in on_devices(waiting, devices, processes.train):
                    diverged = _divergence(job)
                    done += not code or bool(diverged)
                    if code and not diverged and not processes.signal:
                        failed.append(job)
                    if not processes.signal:
                        result = f"diverged: {diverged}" if diverged else _result(job, code)
                        console.log(f"{job.folder.name}: {result} ({done} of {len(jobs)})")
        if processes.signal:
            console.log(f"stopped with {done} of {len(jobs)} runs finished; run it again to go on")
            return 128 + processes.signal
        finished = [job.folder for job in jobs if job not in failed]
        code = int(bool(failed))
        if finished:
            console.log("")
            code |= compare_runs.run(finished, out / "compare.png")
        return code


def _check_sources(jobs: Sequence[Job]) -> None:
    """Raises UserError for data and weights of runs that are not on this machine.

    Names of the Hub are looked up when their run begins. A run that goes on has its weights.
    """
    configs = [job.config for job in jobs]
    for data_dir in dict.fromkeys(config.data.data_dir for config in configs):
        open_datasets(data_dir)
    for config in configs:
        if config.eval.eval_hellaswag_every:
            tasks.check_there(config.eval.hellaswag)
    for init in {job.config.model.init: None for job in jobs if not state_folders(job.folder)}:
        if init:
            weights.check_there(init)


class _Processes:
    """The processes of a sweep, which a signal ends."""

    def __init__(self) -> None:
        self.signal = 0  # that asked to stop
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen] = []

    def stop(self, number: int) -> None:
        """Asks all processes to save and end; no other one starts."""
        self.signal = number
        console.log("stopping: the runs are saving")
        for process in list(self._running):
            process.terminate()

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """Around their results: an error of the sweep ends the other runs, which save."""
        try:
            yield
        except BaseException:
            self.stop(signal.SIGTERM)
            with self._lock:  # none is about to start
                running = list(self._running)
            for process in running:
                process.wait()
            raise

    def train(self, job: Job, device: str, results: queue.Queue) -> None:
        """Runs a job to its end; puts (job, exit code) into the queue."""
        log = _log_of(job.folder)
        with _written(log, "ab") as output:
            if not self.signal:
                console.log(f"{job.folder.name}: begins on {device}; its output is {log}")
            code = self.call(["-m", "gpt2", "train", *job.argv, f"--device={device}"], output)
        results.put((job, code))

    def call(self, arguments: list[str], output: Any) -> int:
        """The exit code of `python ARGUMENTS`; its output goes to a file."""
        with self._lock:
            if self.signal:
                return 128 + self.signal
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            self._running.append(process)
            if self.signal:  # it came in between
                process.terminate()
        try:
            return process.wait()
        finally:
            self._running.remove(process)


# ---- budgets ------------------------------------------------------------------------------------


def _with_equal_tokens(jobs: list[Job], tokens: int) -> list[Job]:
    """The jobs with `max_steps` for equal numbers of tokens, to within a step.

    Without a number, and with one batch for all, or with max_steps among the swept options, the
    jobs stay as they are.
    """
    batches = {tuple(flatten(job.config)[name] for name in BATCH) for job in jobs}
    swept = len({job.config.optim.max_steps for job in jobs}) > 1
    if not tokens and (len(batches) == 1 or swept):
        return jobs
    wanted = tokens or _tokens(jobs[0], jobs[0].config.optim.max_steps)
    return [job.with_steps(_steps(job, wanted)) for job in jobs]


def _tokens(job: Job, steps: int) -> int:
    """Tokens that a job trains on in so many steps."""
    model = job.config.model
    if model.init and not model.block_size:
        raise UserError("equal tokens need the length of a sequence: give --block_size= with init")
    plan = plan_batch(job.config.data, model.block_size or model.shape().block_size, 1)
    return sequences_left(0, replace(job.config.optim, max_steps=steps), plan) * plan.block_size


def _steps(job: Job, tokens: int) -> int:
    """Steps in which a job trains on so many tokens, rounded up."""
    high = 1
    while _tokens(job, high) < tokens:
        high *= 2
    return bisect.bisect_left(range(high), tokens, lo=1, key=lambda steps: _tokens(job, steps))


def _is_measured(entry: Any) -> bool:
    """Whether an entry of a budgets.json has what was asked for, and `max_steps`.

    Earlier versions stored the arguments, which do not tell what a recipe's file said.
    """
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("asked"), dict)
        and isinstance(entry.get("max_steps"), int)
    )


def _speed(asked: dict) -> dict:
    """What was asked for a recipe, without what takes no time."""
    return {name: value for name, value in asked.items() if name not in NO_TIME}


def _with_equal_seconds(
    jobs: list[Job], seconds: float, device: str, out: Path, processes: _Processes
) -> list[Job]:
    """The jobs with `max_steps` for equal seconds; each recipe is measured once, on one device.

    Recipes that differ in `NO_TIME` alone get one number: two measurements of one speed differ. The
    clock ends a run that turns out to be slower than it was measured.
    """
    path = out / BUDGETS
    found = read_json(path) if path.is_file() else {}
    known = {recipe: entry for recipe, entry in found.items() if _is_measured(entry)}
    for job in {job.recipe: job for job in reversed(jobs)}.values():
        settings = comparable(shortest(flatten(job.config)))
        asked = {n: value for n, value in settings.items() if n not in SAME_RESULT}
        asked["seconds"] = seconds
        if job.recipe in known and known[job.recipe]["asked"] == asked:
            continue
        alike = [entry for entry in known.values() if _speed(entry["asked"]) == _speed(asked)]
        if alike:
            known[job.recipe] = alike[0] | {"asked": asked}
            continue
        console.log(f"measuring {job.recipe} on {device}")
        log = out / MEASURED
        arguments = ["-m", "gpt2.train.time_budget", str(seconds), *job.argv]
        with _written(log, "wb") as output:
            code = processes.call([*arguments, f"--device={device}"], output)
        if processes.signal:
            return jobs
        if code:
            raise UserError(f"{job.recipe}: cannot be measured: {_last_line(log)}")
        steps = load_json(log.read_bytes().splitlines()[-1], log, dict)["max_steps"]
        known[job.recipe] = {"asked": asked, "max_steps": steps}
        _write(path, json.dumps(known, indent=1).encode())
    return [job.with_steps(known[job.recipe]["max_steps"], seconds) for job in jobs]


# ---- the state of a run -------------------------------------------------------------------------


def _is_finished(job: Job, training: Callable[[str], str]) -> bool:
    """Whether the run of a job is at its end.

    Args:
        job: a run of the sweep.
        training: `_training_of`.

    Raises:
        UserError: the folder holds a run with other options, another plugin or other data.
    """
    if not _has_begun(job):
        return False
    found = read_run(job.folder)
    asked, theirs = comparable(shortest(flatten(job.config))), found.settings
    model = job.config.model
    filled_in = [*flatten(model)] if model.init else [] if model.vocab_size else ["vocab_size"]
    differ = [
        f"{name} {shown(theirs.get(name))} instead of {value}"
        for name, value in asked.items()
        if name not in SAME_RESULT and name not in filled_in and theirs.get(name) != value
    ]
    if differ:
        raise UserError(
            f"{job.folder} is of a run with other options: {', '.join(differ)}; use another "
            "--out_dir= for this sweep"
        )
    now = training(job.config.data.data_dir) if found.training else ""
    changed = changed_plugins(found.plugins)
    if now and now != found.training:
        changed.append(f"the training tokens in {job.config.data.data_dir}")
    if changed:
        raise UserError(
            f"{' and '.join(changed)} changed since the run in {job.folder} began, so the runs of "
            "this sweep would not compare; use another --out_dir= for it"
        )
    return _is_at_its_end(found)


def _training_of(data_dir: str) -> str:
    """Fingerprint of the training tokens; "" if they are not here, as finished runs allow."""
    try:
        return training_fingerprint((d.share, identify(d)) for d in open_datasets(data_dir))
    except UserError:
        return ""


def _has_ended(job: Job) -> bool:
    """Whether the folder of a job has a run that came to its end, or diverged."""
    return _has_begun(job) and _is_at_its_end(read_run(job.folder))


def _is_at_its_end(run: Run) -> bool:
    ended = bool(run.diverged) or (run.folder / MODEL_NAME).is_file()
    return ended and not run.unfinished()


def _has_begun(job: Job) -> bool:
    return (job.folder / "config.toml").is_file() and (job.folder / METRICS).is_file()


def _divergence(job: Job) -> str:
    """Where the losses of a run became NaN or infinite; "" if they did not, or it is to go on."""
    if not _has_begun(job):
        return ""
    found = read_run(job.folder)
    return "" if found.unfinished() else found.diverged


def _result(job: Job, code: int) -> str:
    if code:
        log = _log_of(job.folder)
        return f"failed with exit code {code}: {_last_line(log)}"
    found = read_run(job.folder)
    step, loss = found.evaluations[-1]
    asked = job.config.optim.max_steps
    early = f" of {asked:,}: its {job.config.optim.max_seconds:g} seconds were over"
    return f"validation loss {loss:.4f} after {step:,} steps" + early * found.time_was_up


def _log_of(folder: Path) -> Path:
    """The file that has the output of a run."""
    return folder.with_name(folder.name + ".log")


def _written(log: Path, mode: str) -> IO[bytes]:
    """A log, opened for writing; raises UserError where that is impossible."""
    try:
        return open(log, mode, opener=no_follow)
    except OSError as error:
        raise UserError(f"{log}: {error.strerror or error}; move it away") from None


def _write(path: Path, content: bytes) -> None:
    """Writes a whole file; raises UserError where that is impossible."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; move it away") from None


def _last_line(log: Path) -> str:
    """The last line of a log, for a message."""
    lines = log.read_bytes()[-4000:].decode(errors="replace").strip().splitlines()
    return shown(lines[-1]) if lines else "it said nothing"


def _devices(text: str) -> list[str]:
    """The devices by name; each is there.

    Raises:
        UserError: a device that is not there.
    """
    if text == "auto":
        gpus = torch.cuda.device_count()
        return [f"cuda:{i}" for i in range(gpus)] if gpus else [str(choose_device("auto"))]
    names = [name.strip() for name in text.split(",")]
    return [str(choose_device(name)) for name in names]
