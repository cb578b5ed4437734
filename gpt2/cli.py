"""The command line: `gpt2 COMMAND …`. Each command imports what it needs, and only then.

Exit codes: 0 done; 1 failed; 2 wrong input (one line says what to do); 75 a rank hung or
was killed, try again; 130, 143, 138 and 129 stopped by Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP, with
everything saved. Whoever reads the output may close it, as `| head` does: the command ends then,
training after it has saved, with code 1 and without a traceback.

Longer than 400 lines because every command has its few lines here.
"""

import contextlib
import difflib
import errno
import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .config.command_line import at_home, option_name, parse, parse_with_positional
from .config.commands import (
    AverageConfig,
    ChatConfig,
    CompareConfig,
    DoctorConfig,
    EvalConfig,
    ExportConfig,
    InspectConfig,
    PlotConfig,
    PrepareConfig,
    ProfileConfig,
    PushConfig,
    SampleConfig,
    ServeConfig,
    ShowConfig,
)
from .config.finetune import FinetuneConfig
from .config.sweep import SweepConfig, jobs, split_arguments
from .config.train import TrainConfig
from .distributed.signals import ending_imports
from .errors import UserError, install_command
from .paths import for_shell
from .report.console import FULL, closed_pipes, finish, log, one_line, output_needed
from .untrusted.display import shown
from .untrusted.parsing import read_toml

USAGE = """usage: gpt2 COMMAND [OPTIONS]

begin:
  gpt2 demo      data, training, a plot and text on this machine, in a few minutes
  gpt2 doctor    what this machine has, and why something is off: for a bug report

text to shards:
  gpt2 prepare   text -> shards of tokens (FineWeb-Edu, your own files, or --source=stdlib)
  gpt2 shards    verify, info, show, merge: look into shards, join those of many machines

train:
  gpt2 train     shards -> a model; the same command again continues the run
  gpt2 finetune  a model -> one that has learned your text or conversations (also by LoRA)
  gpt2 average   the newest saved states of a run -> one model, their mean
  gpt2 plot      metrics.jsonl -> loss.png
  gpt2 profile   where the time of a training step goes

use:
  gpt2 sample    a model -> text
  gpt2 chat      talk with a model that was fine-tuned on conversations
  gpt2 serve     a model -> a chat page, and OpenAI's API
  gpt2 inspect   what a model makes of a text: probabilities, layers, attention, as a page

measure:
  gpt2 eval      a model -> validation loss, HellaSwag, LAMBADA
  gpt2 lm_eval   a model -> any task of lm-evaluation-harness
  gpt2 compare   runs side by side: curves, means over seeds, what differs, what is real
  gpt2 sweep     a recipe with several seeds and values of options, on all GPUs; then compare

pass on:
  gpt2 export    a model -> a folder for transformers, vLLM; a file for llama.cpp
  gpt2 push      a model -> the Hugging Face Hub

`gpt2 COMMAND --help` explains the daily options, `gpt2 COMMAND --help=all` every one. Options are
written --name=value; --config=FILE.toml reads them from a file. `gpt2 --version` prints the
version, and `gpt2 --completion=bash` (zsh, fish) a script that completes commands and options."""

SHARDS_USAGE = """usage: gpt2 shards COMMAND …

  gpt2 shards verify FOLDER               headers, checksums, token ids, counts
  gpt2 shards info FOLDER                 a table, and a picture of document lengths
  gpt2 shards show FOLDER|SHARD --doc=17  the text of one document
  gpt2 shards merge FOLDER                joins what `gpt2 prepare --worker=1/16`, … wrote"""

LM_EVAL_USAGE = """usage: gpt2 lm_eval CHECKPOINT --tasks=TASK,TASK [--NAME=VALUE …]

  gpt2 lm_eval out/out_ckpt.pt --tasks=lambada_openai,piqa   prints a table of scores

Options are those of lm-evaluation-harness's `lm_eval run` (--limit=100, --num_fewshot=5,
--output_path=FOLDER, …) except for --model, and --plugin=FILE.py. `gpt2 lm_eval --help=all` lists
them. `lm_eval ls tasks` lists the tasks."""

HELP = ("-h", "--help", "--help=all")

MODEL_SOURCES = (
    "an out_ckpt.pt (or a checkpoint of nanoGPT, build-nanogpt, llm.c), a folder of Hugging "
    "Face's or peft's, gpt2, OWNER/NAME of the Hub, or box and box-chat of this repository"
)


WORK = ("prepare", "train", "finetune", "sweep", "profile", "push", "demo")
LASTING = (*WORK, "average", "export", "plot", "serve")  # not for their output alone

ONCE = {  # options of several values, or of one that holds several -> how to give them
    "source": "name one folder or glob that holds all files",
    "data_dir": "give all in one, with commas",
    "log_to": "give all in one, with commas",
}

OTHER_PICTURE = "; name another file by --out="
NOT_WRITTEN = "the output cannot be written: "
PRINTING = ("gpt2.cli", "gpt2.config.command_line", "gpt2.commands.terminal", "gpt2.report.console")
# Errors of the system that only another path, other permissions or more room can mend.
OF_A_PATH = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):  # a console without "×" shows "?" and goes on
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if argv is None:  # plots are files, so that a backend that is not there is no mistake
        from .distributed.environment import unset

        unset("MPLBACKEND")
    arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    command = "--help" if {*HELP} & {*arguments} else arguments[0]
    try:
        code, lost = _run_and_finish(arguments, command in LASTING)
        return code if not lost or command in LASTING else _complain(NOT_WRITTEN + lost)
    except BrokenPipeError:
        closed = closed_pipes()
        if not closed:
            raise  # another pipe than the output
        nothing = os.open(os.devnull, os.O_WRONLY)
        for number in closed:  # what is left must not complain at exit
            os.dup2(nothing, number)
        if command in WORK:
            _complain(f"{command} stopped, because nobody reads its output any more")
        return 1
    except OSError as error:
        if error.errno not in FULL or not _is_of_print(error):
            raise
        return _complain(NOT_WRITTEN + os.strerror(error.errno or 0))


def _run_and_finish(arguments: list[str], lasting: bool) -> tuple[int, str]:
    """Runs one command: its exit code, and why output that it had not written yet is lost, if so.

    Args:
        arguments: of the command line.
        lasting: whether the command goes on where its output cannot be written.
    """
    code, lost = 0, ""
    try:
        with ending_imports(), contextlib.nullcontext() if lasting else output_needed():
            code = _run(arguments[0], arguments[1:])
    except SystemExit as end:
        if end.code:
            raise
    finally:
        lost = finish()
    return code, lost


def _is_of_print(error: OSError) -> bool:
    """Whether a `print` of this package raised it: the file of a plugin may be on a full disk, too.

    Files of ours are written by functions that name them.
    """
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return not error.filename and module in PRINTING


def _run(command: str, rest: list[str]) -> int:
    """Runs one command; returns the exit code."""
    if command in (*HELP, "help"):
        print(USAGE)
        return 0
    if command == "--version":
        import gpt2

        print(f"gpt2 {gpt2.__version__}")
        return 0
    try:
        if command != "lm_eval":  # the harness has rules of its own
            _check_repeats(rest)
        name, _, shell = command.partition("=")
        call = completion if name == "--completion" else _choose(command, COMMANDS)
        return call([shell, *rest] if call is completion and shell else rest)
    except UserError as error:
        return _complain(str(error))
    except OSError as error:
        if error.errno not in OF_A_PATH or not error.filename:
            raise
        return _complain(f"{shown(error.filename)}: {error.strerror}")
    except KeyboardInterrupt as stopped:
        print("interrupted", file=sys.stderr)
        return 128 + getattr(stopped, "number", signal.SIGINT)


def train(argv: list[str]) -> int:
    """`gpt2 train`."""
    return _train(parse(TrainConfig, argv, "gpt2 train"))


def finetune(argv: list[str]) -> int:
    """`gpt2 finetune`: `gpt2 train` with conversations, epochs and adapters."""
    config = parse(FinetuneConfig, argv, "gpt2 finetune")
    if not config.model.init or not config.data.data_dir:
        raise UserError(
            "say what to begin with and what to learn: "
            "gpt2 finetune --init=gpt2 --data=conversations.jsonl"
        )
    return _train(config)


def profile(argv: list[str]) -> int:
    """`gpt2 profile`."""
    config = parse(ProfileConfig, argv, "gpt2 profile")
    from .commands.profile_step import run

    return run(config)


def prepare(argv: list[str]) -> int:
    """`gpt2 prepare`."""
    config = parse(PrepareConfig, argv, "gpt2 prepare")
    from .prepare.run import run

    return run(config)


def shards(argv: list[str]) -> int:
    """`gpt2 shards`, which has commands of its own."""
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in (*HELP, "help"):
        print(SHARDS_USAGE)
        return 0
    return _choose(command, SHARDS_COMMANDS, "shards ")(rest)


def shards_verify(argv: list[str]) -> int:
    """`gpt2 shards verify`: is every shard what it should be?"""
    _, (folder,) = parse_with_positional(
        _NoOptions, argv, "gpt2 shards verify", {"folder": "folder of shards"}
    )
    from .commands.inspect_shards import verify

    return verify(Path(folder))


def shards_info(argv: list[str]) -> int:
    """`gpt2 shards info`: what is in the shards of a folder?"""
    _, (folder,) = parse_with_positional(
        _NoOptions, argv, "gpt2 shards info", {"folder": "folder of shards"}
    )
    from .commands.inspect_shards import info

    return info(Path(folder))


def shards_show(argv: list[str]) -> int:
    """`gpt2 shards show`: the text of a document."""
    names = {"path": "folder of shards, or one shard"}
    config, (path,) = parse_with_positional(ShowConfig, argv, "gpt2 shards show", names)
    from .commands.inspect_shards import show

    return show(Path(path), config.doc)


def shards_merge(argv: list[str]) -> int:
    """`gpt2 shards merge`: joins the folders that several machines made."""
    names = {"out_dir": "what --out_dir= of `gpt2 prepare --worker=1/16` was"}
    _, (folder,) = parse_with_positional(_NoOptions, argv, "gpt2 shards merge", names)
    from .prepare.multi_machine import merge

    return merge(Path(folder))


def sample(argv: list[str]) -> int:
    """`gpt2 sample`."""
    names = {"checkpoint": MODEL_SOURCES}
    config, (path,) = parse_with_positional(SampleConfig, argv, "gpt2 sample", names)
    gc.disable()  # collecting while PyTorch is imported takes up to a tenth of its time
    try:
        from .commands.terminal import sample as write
    finally:
        gc.enable()
    # `--prompt=` begins a new document, unlike no prompt.
    given = any(argument.partition("=")[0] == "--prompt" for argument in argv)
    if not config.prompt and not given:
        from .commands.terminal import sample_at_keyboard as write
    return write(path, config)


def chat(argv: list[str]) -> int:
    """`gpt2 chat`."""
    config, (path,) = parse_with_positional(
        ChatConfig, argv, "gpt2 chat", {"checkpoint": MODEL_SOURCES}
    )
    from .commands.terminal import chat as talk

    return talk(path, config)


def serve(argv: list[str]) -> int:
    """`gpt2 serve`: a chat page, and OpenAI's API."""
    config, (path,) = parse_with_positional(
        ServeConfig, argv, "gpt2 serve", {"checkpoint": MODEL_SOURCES}
    )
    try:
        from .serve.server import run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("fastapi", "uvicorn", "pydantic", "starlette"):
            raise
        way_out = install_command("serve")
        raise UserError(f"{error.name} is not installed; run: {way_out}") from None
    return run(path, config)


def inspect(argv: list[str]) -> int:
    """`gpt2 inspect`."""
    names = {
        "checkpoint": MODEL_SOURCES,
        "text": "text to look at; - reads it from stdin, without its last line break",
    }
    config, (path, text) = parse_with_positional(
        InspectConfig, argv, "gpt2 inspect", names, optional=("text",)
    )
    from .commands.inspect_text import run

    return run(path, text, config)


def evaluate(argv: list[str]) -> int:
    """`gpt2 eval`."""
    config, (path,) = parse_with_positional(
        EvalConfig, argv, "gpt2 eval", {"checkpoint": MODEL_SOURCES}
    )
    from .commands.evaluate import run

    return run(path, config)


def lm_eval(argv: list[str]) -> int:
    """`gpt2 lm_eval`: lm-evaluation-harness's own command, with our model."""
    if argv and argv[0] in HELP:
        print(LM_EVAL_USAGE)
        if argv[0] != "--help=all":
            return 0
        print(flush=True)
        argv = ["CHECKPOINT", *argv]  # the harness shows its help whatever else it is given
    argv = ["--help" if argument == "--help=all" else argument for argument in argv]
    if not argv or argv[0].startswith("-"):
        raise UserError(
            "name a checkpoint first: gpt2 lm_eval out/out_ckpt.pt --tasks=…; "
            "the options after it are those of `lm_eval run --help`"
        )
    try:
        from .commands.lm_eval_harness import main
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise UserError(f"lm_eval is not installed; run: {install_command('eval')}") from None
    from .config.registry import load_plugin

    ours = [argument for argument in argv if argument.startswith("--plugin=")]
    for argument in ours:
        load_plugin(at_home(argument).partition("=")[2])
    return main(argv[0], [argument for argument in argv[1:] if argument not in ours])


def plot(argv: list[str]) -> int:
    """`gpt2 plot`."""
    config, (folder,) = parse_with_positional(
        PlotConfig, argv, "gpt2 plot", {"out_dir": "folder of a run"}
    )
    from .report.plot import plot_run

    target = Path(config.out) if config.out else None
    log(shown(plot_run(Path(folder), target, OTHER_PICTURE), limit=0))
    return 0


def compare(argv: list[str]) -> int:
    """`gpt2 compare`: runs side by side."""
    names = {"run": "folders of runs, several seeds of each recipe; or a folder around them"}
    config, (folders,) = parse_with_positional(
        CompareConfig, argv, "gpt2 compare", names, several="run"
    )
    from .commands.compare_runs import run

    return run([Path(folder) for folder in folders], Path(config.out), OTHER_PICTURE)


def sweep(argv: list[str]) -> int:
    """`gpt2 sweep`: a grid of options, each with several seeds, and their comparison."""
    own, texts, rest = split_arguments(argv)
    if {*HELP} & {*argv}:
        parse_with_positional(SweepConfig, ["--help"], "gpt2 sweep", {"recipe": "TOML file"})
    if not rest or rest[0].startswith("-"):
        raise UserError("name the recipe first: gpt2 sweep RECIPE.toml --set muon_lr=0.01,0.02")
    config = parse(SweepConfig, own, "gpt2 sweep")
    # Each run reads the file as its --config=, which nobody typed here.
    read_toml(Path(rest[0]), f"recipe {rest[0]}")
    found = jobs(rest[0], config, texts, rest[1:])
    from .commands.sweep import run

    return run(found, config)


def average(argv: list[str]) -> int:
    """`gpt2 average`: the mean of saved states as one model."""
    names = {"out_dir": "folder of a run"}
    config, (folder,) = parse_with_positional(AverageConfig, argv, "gpt2 average", names)
    from .checkpoint.average import average_states

    log(shown(average_states(Path(folder), config.last, config.out), limit=0))
    return 0


def export(argv: list[str]) -> int:
    """`gpt2 export`: a model for other programs."""
    names = {"checkpoint": MODEL_SOURCES, "folder": "what to make: a folder, or for gguf a file"}
    config, (source, folder) = parse_with_positional(ExportConfig, argv, "gpt2 export", names)
    from .checkpoint.weights import load, locate
    from .commands.export import check_export_file, check_export_folder, export_gguf, export_hf
    from .data.conversations import was_chat

    if config.to == "gguf" or folder.lower().endswith(".gguf"):
        check_export_file(Path(folder))
        chat = was_chat(locate(source))
        export_gguf(load(source), Path(folder), config.dtype, chat=chat)
        log(shown(folder, limit=0))
        return 0
    check_export_folder(Path(folder))
    chat = was_chat(locate(source))
    names_made = export_hf(load(source), Path(folder), config.dtype, chat=chat)
    log(shown(f"{folder}: {', '.join(names_made)}", limit=0))
    return 0


def push(argv: list[str]) -> int:
    """`gpt2 push`: a model to the Hub."""
    names = {
        "checkpoint": "a folder that `gpt2 export` wrote, or what it takes",
        "repository": "OWNER/NAME on the Hub",
    }
    config, (source, repository) = parse_with_positional(PushConfig, argv, "gpt2 push", names)
    from .commands.export import push as upload

    log(shown(upload(source, repository, config.private), limit=0))
    return 0


def doctor(argv: list[str]) -> int:
    """`gpt2 doctor`: versions, device, compiler, disk and network, for a bug report."""
    config = parse(DoctorConfig, argv, "gpt2 doctor")
    from .commands.doctor import run

    return run(config)


def completion(argv: list[str]) -> int:
    """`gpt2 --completion=bash`: a script for the shell."""
    from .config.completion import script

    print(script(" ".join(argv), OPTIONS, tuple(COMMANDS), tuple(SHARDS_COMMANDS)))
    return 0


def demo(argv: list[str]) -> int:
    """`gpt2 demo`: prepares the embedded corpus, trains, plots and samples.

    Options are those of `gpt2 train` and change its recipe.
    """
    config = parse(TrainConfig, argv, "gpt2 demo")  # a mistake is found before the work begins
    out_dir = config.output.out_dir if config.output.out_dir != "out" else "out/demo"
    from .data.shards import read_manifest
    from .distributed.devices import choose_device

    device = choose_device("auto").type
    recipes = Path(__file__).with_name("recipes")  # a wheel has them there
    recipes = recipes if recipes.is_dir() else Path(__file__).parent.parent / "configs"
    recipe = recipes / ("demo_cuda.toml" if device == "cuda" else "demo_cpu.toml")
    steps: list[tuple[Callable, list[str]]] = [
        (prepare, ["--source=stdlib"]),
        (train, [f"--config={recipe}", *argv, f"--out_dir={out_dir}"]),
        (plot, [out_dir]),
        (sample, [f"{out_dir}/out_ckpt.pt", "--prompt=def main(", "--seed=1"]),
    ]
    if (read_manifest(Path("data/stdlib")) or {}).get("complete"):
        del steps[0]  # perhaps of another version of Python, which is as good
    for command, arguments in steps:
        log(f"\n$ gpt2 {command.__name__} {' '.join(map(for_shell, arguments))}")
        if code := command(arguments):
            return code
    return 0


@dataclass(frozen=True)
class _NoOptions:
    """No options but those named above."""


def _train(config: TrainConfig | FinetuneConfig) -> int:
    from .distributed.environment import leave
    from .train.loop import run

    try:
        return leave(run(config))
    # The second, or a signal while waiting for a network: a checkpoint that is being written is
    # not waited for.
    except KeyboardInterrupt as stopped:
        print("interrupted", file=sys.stderr)
        return leave(128 + getattr(stopped, "number", signal.SIGINT), at_once=True)


def _choose(name: str, commands: dict[str, Callable], group: str = "") -> Callable:
    """The command of that name; raises UserError with the one that was probably meant."""
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        listed = ", ".join(commands)
        raise UserError(f"unknown command {group + name!r}; use one of {listed}{hint}")
    return commands[name]


def _check_repeats(arguments: list[str]) -> None:
    """Raises UserError for two values of an option that a person gives twice to mean both.

    Of other options the last value counts, as scripts put a person's options behind their own.
    """
    given: dict[str, str] = {}
    for number, argument in enumerate(arguments):
        name = option_name(argument)
        if argument.startswith("--") and name in ONCE:
            _, equals, value = argument.partition("=")
            value = value if equals else "".join(arguments[number + 1 : number + 2])
            if given.setdefault(name, value) != value:
                raise UserError(f"--{name}= is given twice; {ONCE[name]}")


def _complain(text: str) -> int:
    """One line; under torchrun, where every rank finds the same mistakes, from the first."""
    from .distributed.environment import is_first_rank

    if is_first_rank():
        print(f"gpt2: error: {one_line(text)}", file=sys.stderr, flush=True)
    return 2


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "prepare": prepare,
    "shards": shards,
    "train": train,
    "finetune": finetune,
    "profile": profile,
    "sample": sample,
    "chat": chat,
    "serve": serve,
    "inspect": inspect,
    "eval": evaluate,
    "lm_eval": lm_eval,
    "plot": plot,
    "compare": compare,
    "sweep": sweep,
    "average": average,
    "export": export,
    "push": push,
    "demo": demo,
    "doctor": doctor,
}

SHARDS_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "verify": shards_verify,
    "info": shards_info,
    "show": shards_show,
    "merge": shards_merge,
}

OPTIONS: dict[str, type] = {  # of commands that have some, for `--completion`
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "finetune": FinetuneConfig,
    "profile": ProfileConfig,
    "sample": SampleConfig,
    "chat": ChatConfig,
    "serve": ServeConfig,
    "inspect": InspectConfig,
    "eval": EvalConfig,
    "average": AverageConfig,
    "plot": PlotConfig,
    "compare": CompareConfig,
    "sweep": SweepConfig,
    "export": ExportConfig,
    "push": PushConfig,
    "demo": TrainConfig,
    "doctor": DoctorConfig,
}
