"""Writing while training goes on: the same bits, one after the other, and never half."""

import contextlib
import signal
import threading
import time

import pytest
import torch

from gpt2 import files
from gpt2.checkpoint import training_state
from gpt2.checkpoint.async_writer import Saver
from gpt2.errors import UserError
from gpt2.files import locked
from gpt2.report import metrics as metrics_module
from gpt2.train import loop, run_folder, save
from gpt2.train import step as step_module

from ..train.test_loop import config, metrics, same, weights


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def saver(warnings):
    with Saver(warnings.append) as saver:
        yield saver


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_no_thread_is_left(error):
    """At Python's shutdown its tensors would be freed beside it, which may abort the process."""
    before = set(threading.enumerate())
    with contextlib.suppress(RuntimeError, KeyboardInterrupt), Saver(print) as saver:
        copies = saver.copy(1, {"a": torch.ones(5)})
        saver.write_later(copies["a"].sum)
        saver.wait()
        (thread,) = set(threading.enumerate()) - before
        if error:
            raise error
    if error is KeyboardInterrupt:  # which does not wait for it
        thread.join(10)
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs a signal to one thread")
def test_an_interrupt_while_it_waits_does_not_wait_for_the_thread():
    """The second Ctrl-C, while the end of the block waits for a disk that hangs."""
    go, began = threading.Event(), time.monotonic()
    main = threading.main_thread().ident
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def block():
        with Saver(print) as saver:
            saver.write_later(lambda: go.wait(20))
            timer.start()

    try:
        with pytest.raises(KeyboardInterrupt):
            block()
        assert time.monotonic() - began < 10
    finally:
        timer.join()
        go.set()
        signal.signal(signal.SIGINT, before)


def test_copies_do_not_change_with_the_tensors(saver):
    tensor, pair = torch.arange(6.0).view(2, 3), (torch.ones(2, dtype=torch.float16), 5)
    copies = saver.copy(1, {"a": tensor, "b": [pair, "text", None]})
    tensor.zero_()
    pair[0].zero_()
    assert torch.equal(copies["a"], torch.arange(6.0).view(2, 3))
    assert torch.equal(copies["b"][0][0], torch.ones(2, dtype=torch.float16))
    assert copies["b"][0][1] == 5
    assert copies["b"][1:] == ["text", None]


def test_tensors_are_copied_once_a_step(saver):
    tensor = torch.ones(3)
    first = saver.copy(1, {"model": {"a": tensor}, "optimizer": {}})["model"]["a"]
    assert saver.copy(1, {"model": {"a": tensor}})["model"]["a"] is first
    other = saver.copy(1, {"merged": {"a": tensor}})["merged"]["a"]
    assert other is not first
    tensor.fill_(2)
    again = saver.copy(2, {"model": {"a": tensor}})["model"]["a"]
    assert again is first  # the memory is used again
    assert again.tolist() == [2, 2, 2]
    assert saver.copy(3, {"model": {"a": torch.ones(5)}})["model"]["a"].shape == (5,)


def test_next_copy_waits_for_the_writer_and_training_does_not(saver):
    written, go = [], threading.Event()
    copies = saver.copy(1, {"a": torch.ones(1)})

    def write():
        assert go.wait(10)
        written.append(copies["a"].item())

    saver.write_later(write)  # returns at once
    threading.Timer(0.2, go.set).start()
    saver.copy(2, {"a": torch.full((1,), 2.0)})
    assert written == [1.0]


def test_failed_write_is_told_and_the_next_one_comes(saver, warnings):
    def fail():
        raise UserError("checkpoint x not written: the disk is full")

    done = []
    saver.write_later(fail)
    saver.write_later(lambda: done.append(1))
    saver.wait()
    assert done == [1]
    assert warnings == [
        "checkpoint x not written: the disk is full; training goes on, and what was saved before "
        "is kept"
    ]


def test_a_save_that_waited_goes_into_no_folder_of_another_run(tmp_path, saver, warnings):
    """Where the run's folder was moved meanwhile; into a new one, if nobody has taken its place."""
    out, done = tmp_path / "out", []
    asked = config("data", out)
    with locked(out) as lock:
        saver.check = lambda: run_folder.hold_on(asked, [lock])
        saver.write_later(lambda: done.append(1))
        saver.wait()
        out.rename(tmp_path / "old")
        with locked(out):
            saver.write_later(lambda: done.append(2))
            saver.wait()
        saver.write_later(lambda: done.append(3))
        saver.wait()
        assert (out / "config.toml").exists()
    assert done == [1, 3]
    assert [line.partition(" while")[0] for line in warnings] == [f"{out} was moved or deleted"]


def test_mistake_of_ours_is_not_swallowed(warnings):
    with pytest.raises(ZeroDivisionError), Saver(warnings.append) as saver:
        saver.write_later(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), Saver(warnings.append) as saver:  # noqa: PT012
        saver.write_later(lambda: 1 / 0)
        saver.copy(1, {})


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_end_of_the_run_waits_for_the_writer(error, warnings):
    """But not after a second Ctrl-C."""
    written, go = [], threading.Event()

    def run():
        with Saver(warnings.append) as saver:
            saver.write_later(lambda: (go.wait(10), written.append(1)))
            if error is not KeyboardInterrupt:
                threading.Timer(0.1, go.set).start()
            if error:
                raise error

    if error:
        with pytest.raises(error):
            run()
    else:
        run()
    assert written == ([] if error is KeyboardInterrupt else [1])
    go.set()


def test_files_are_those_of_a_save_that_waits(data_dir, tmp_path, monkeypatch):
    """Every file of every checkpoint, byte for byte; the run is the same too."""
    arguments = ["--max_steps=7", "--save_every=2", "--eval_every=3", "--keep_last=9"]
    arguments += ["--dropout=0.1"]
    assert loop.run(config(data_dir, tmp_path / "later", *arguments)) == 0
    original, monkey = save.write, []

    def now(state, rt, tensors, function, final):
        monkey.append(final)
        original(state, rt, tensors, function, True)

    monkeypatch.setattr(save, "write", now)
    assert loop.run(config(data_dir, tmp_path / "now", *arguments)) == 0
    assert monkey.count(False) >= 6
    assert metrics(tmp_path / "later") == metrics(tmp_path / "now")
    for folder in training_state.state_folders(tmp_path / "now"):
        a, b = (tmp_path / n / "state" / folder.name for n in ("later", "now"))
        assert files.fingerprint(a / "model.safetensors") == files.fingerprint(
            b / "model.safetensors"
        )
        ours, theirs = training_state.load_state(a).state, training_state.load_state(b).state
        for each in (ours, theirs):  # what differs between any two runs
            del each["seconds"], each["first_steps"], each["settings"]["out_dir"]
        assert_same(ours, theirs)
    for name in ("out_ckpt.pt", "best_ckpt.pt"):
        assert same(weights(tmp_path / "later" / name), weights(tmp_path / "now" / name))


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    else:
        assert a == b


def test_training_goes_on_while_a_checkpoint_is_written(data_dir, tmp_path, monkeypatch):
    """Steps are taken before the checkpoint of step 2 is there, which holds step 2 all the same."""
    original, taken, step = training_state.torch.save, [], step_module.train_step
    slow = threading.Event()

    def counted(state, config, rt):
        taken.append(state.step)
        if state.step == 5:
            slow.set()
        return step(state, config, rt)

    def delayed(content, path):
        if "step_00000002" in str(path):
            assert slow.wait(30), "training waited for the checkpoint"
        original(content, path)

    monkeypatch.setattr(training_state.torch, "save", delayed)
    monkeypatch.setattr(loop, "train_step", counted)
    due = loop.due
    monkeypatch.setattr(loop, "due", lambda n, every: n == 2 if every == 77 else due(n, every))
    loop.run(config(data_dir, tmp_path / "a", "--max_steps=6", "--save_every=77", "--keep_last=9"))
    assert taken == [0, 1, 2, 3, 4, 5]
    found = training_state.load_state(tmp_path / "a/state/step_00000002")
    monkeypatch.undo()
    loop.run(config(data_dir, tmp_path / "b", "--max_steps=2"))
    assert same(found.model, weights(tmp_path / "b/out_ckpt.pt"))
    assert metrics_module.read_metrics(tmp_path / "a/metrics.jsonl")[-1]["step"] == 6


def test_waiting_takes_no_time_when_nothing_is_written(saver):
    started = time.monotonic()
    saver.wait()
    assert time.monotonic() - started < 0.1
