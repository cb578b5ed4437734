"""Forks processes that save or train and kills them with SIGKILL; prints what it found as JSON.

    python -m tests.kills saving OUT 50
    python -m tests.kills operations OUT
    python -m tests.kills training DATA OUT 20

A program of its own, which imports torch once: a fork takes milliseconds.
"""

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from gpt2 import files
from gpt2.checkpoint import training_state
from gpt2.checkpoint.async_writer import Saver
from gpt2.config.model import GPT2Config
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.train import loop, run_folder

from .train.test_loop import config, same, weights

TRAINING = ["--max_steps=80", "--save_every=1", "--eval_every=7", "--keep_last=2", "--dropout=0.1"]


def forked(function) -> int:
    """The number of a child process that calls the function."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = function() or 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """How a child ended: its exit code, or minus the number of its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def save_for_ever(out: Path, announce, steps: int = 10**9):
    """Saves states full of their step's number, by the thread as training does."""
    model = GPT(GPT2Config(n_layer=2, n_head=2, n_embd=64, block_size=8, vocab_size=20_000))
    rest = torch.zeros(100_000)
    with Saver(sys.exit) as saver:
        for step in range(1, steps + 1):
            saver.wait()
            announce(step - 1)
            for tensor in [*model.parameters(), rest]:
                tensor.data.fill_(step)
            copies = saver.copy(step, {"model": model.state_dict(), "state": {"t": rest}})

            def write(step=step, copies=copies):
                training_state.write_state(
                    out, step, model.config, copies["model"], copies["state"], keep_last=2
                )

            saver.write_later(write)


def check(out: Path, announced: int) -> str:
    """What is wrong with the newest state, or nothing."""
    try:
        found, damaged = training_state.find_state(out, "auto")
    except UserError as error:
        return str(error)
    if damaged or (found.step if found else 0) < announced:
        return f"announced {announced}, found {found and found.step}, damaged {damaged}"
    tensors = [*found.model.values(), found.state["t"]] if found else []
    mixed = any((t != found.step).any() for t in tensors)
    return f"step {found.step} holds numbers of other steps" if mixed else ""


def saving(out: str, times: str) -> dict:
    """Kills at random moments."""
    rng, problems, steps, leftovers = random.Random(1337), [], [], 0
    for attempt in range(int(times)):
        folder, (reader, writer) = Path(out) / str(attempt), os.pipe()
        pid = forked(lambda f=folder, w=writer: save_for_ever(f, lambda s: os.write(w, b"%d " % s)))
        os.close(writer)
        time.sleep(rng.uniform(0.02, 0.5))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        with os.fdopen(reader) as file:
            announced = [0, *map(int, file.read().split())][-1]
        leftovers += bool(list(folder.rglob("*.tmp")))
        if problem := check(folder, announced):
            problems.append(problem)
        steps.append(announced)
    return {"kills": int(times), "problems": problems, "steps": steps, "leftovers": leftovers}


def operations(out: str) -> dict:
    """Kills at the first, second, … operation on files of the third save, until none is left."""
    places, problems, left = [], [], 0
    for number in range(1, 100):
        folder = Path(out) / str(number)
        code = ended(forked(partial(save_and_die, folder, number)))
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        places.append((folder / "place").read_text())
        left += bool(list(folder.rglob("*.tmp")))
        problem = check(folder, 2)
        run_folder.clean(folder)
        if problem or list(folder.rglob("*.tmp")):
            problems.append(f"{places[-1]}: {problem or 'leftovers'}")
    return {"kills": len(places), "problems": problems, "places": places, "leftovers": left}


def save_and_die(folder: Path, number: int):
    """Saves three states; ends by SIGKILL before the operation of that number of the third."""
    count = announced = 0

    def hook(owner, name):
        original = getattr(owner, name)

        def killing(*arguments, **keywords):
            nonlocal count
            count += announced == 2
            if count == number:
                (folder / "place").write_text(f"{name} {count}")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        setattr(owner, name, killing)

    def announce(step):
        nonlocal announced
        announced = step

    hooked = [
        (training_state, ("save_file", "fingerprint")),
        (training_state.torch, ("save",)),
        (files, ("sync",)),
        (files.os, ("replace",)),
        (files.shutil, ("rmtree",)),
    ]
    for owner, names in hooked:
        for name in names:
            hook(owner, name)
    save_for_ever(folder, announce, steps=3)


def training(data: str, out: str, times: str) -> dict:
    """Kills a run again and again; it is started again each time, and at last left alone."""
    whole, killed = Path(out) / "whole", Path(out) / "killed"
    assert ended(forked(lambda: quiet(data, whole))) == 0
    rng, reached = random.Random(7), []
    while len(reached) < int(times):
        pid = forked(partial(quiet, data, killed))
        time.sleep(rng.uniform(0.1, 1.2))
        os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        if code == 0:  # it was done: once more from the beginning
            reached.append("done")
            assert same(weights(whole / "out_ckpt.pt"), weights(killed / "out_ckpt.pt"))
            killed = killed.with_name(killed.name + "_")
            continue
        folders = training_state.state_folders(killed)
        reached.append(int(folders[-1].name[5:]) if folders else 0)
    assert ended(forked(partial(quiet, data, killed))) == 0
    equal = same(weights(whole / "out_ckpt.pt"), weights(killed / "out_ckpt.pt"))
    return {"kills": sum(r != "done" for r in reached), "equal": equal, "reached": reached}


def quiet(data: str, out: Path) -> int:
    """Trains without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return loop.run(config(data, out, *TRAINING))


if __name__ == "__main__":
    torch.set_num_threads(1)
    command = {"saving": saving, "operations": operations, "training": training}[sys.argv[1]]
    print(json.dumps(command(*sys.argv[2:])))
