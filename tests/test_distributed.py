"""torchrun on two CPU processes (gloo): the same run, cut in another way.

Ranks are forks with the variables of torchrun, but in `two_ranks` and where processes are stopped.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gpt2 import files
from gpt2.checkpoint import training_state
from gpt2.data.shards import SAMPLE_TOKENS, write_shard

from .conftest import ROOT, TINY, TORCHRUN, run_python
from .models import reference, write_nanogpt
from .train.test_loop import metrics, same, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv on Windows"),
]


def command(ranks: int, data_dir, out, *arguments) -> list[str]:
    return [
        *TORCHRUN,
        f"--nproc_per_node={ranks}",
        "train_gpt2.py",
        f"--data_dir={data_dir}",
        f"--out_dir={out}",
        *TINY,
        *arguments,
    ]


THREAD_IN_PYTHON = """
import time, torch
import torch.distributed as dist
from gpt2.config.train import SystemOptions
from gpt2.distributed.environment import leave
from gpt2.distributed.runtime import start

def run():
    with start(SystemOptions(device="cpu", dtype="float32")) as rt:
        model = rt.wrap(torch.nn.Linear(1, 1))  # DDP holds the process group
        work = dist.all_reduce(torch.ones(1), async_op=True)
        work.get_future().then(lambda _: time.sleep(2))  # in a thread of gloo
    return 0

leave(run())
"""


def test_a_run_ends_while_a_thread_of_gloo_is_in_python():
    """It hung where the last reference to the process group was dropped: see runtime.py."""
    run_python(*TORCHRUN, "--nproc_per_node=2", "-c", THREAD_IN_PYTHON, timeout=60)


@pytest.fixture(scope="module")
def two_ranks(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    done = run_python(*command(2, data_dir, out, "--max_steps=10", "--eval_every=5"), real=True)
    return out, done.stdout


def test_two_ranks_equal_one_with_twice_the_accumulation(two_ranks, data_dir, tmp_path):
    """Tolerances: 2e-6 in loss, 2e-5 in weights, after 10 steps in float32."""
    out, stdout = two_ranks
    assert stdout.count("tokens per step") == 1  # one rank speaks
    assert "grad_accum_steps 2 × 2 ranks" in stdout
    run_python(
        "train_gpt2.py", f"--data_dir={data_dir}", f"--out_dir={tmp_path}", *TINY,
        "--max_steps=10", "--eval_every=5", "--grad_accum_steps=4",
    )  # fmt: skip
    one, two = metrics(tmp_path), metrics(out)
    assert list(one) == list(two) == list(range(1, 11))
    assert two == pytest.approx(one, abs=2e-6)
    assert metrics(out, "val_loss") == pytest.approx(metrics(tmp_path, "val_loss"), abs=2e-6)
    assert metrics(out, "val_tokens") == metrics(tmp_path, "val_tokens") == {5: 500, 10: 500}
    assert metrics(out, "tokens") == metrics(tmp_path, "tokens")
    ours, theirs = weights(out / "out_ckpt.pt"), weights(tmp_path / "out_ckpt.pt")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=0)
    assert not any("module" in name for name in ours)


@pytest.mark.fault(23, "two ranks")
def test_killed_ranks_continue_with_the_same_bits(two_ranks, data_dir, tmp_path):
    whole = weights(two_ranks[0] / "out_ckpt.pt")
    arguments = ["--max_steps=10", "--eval_every=5", "--save_every=3"]
    run_python(*command(2, data_dir, tmp_path, *arguments, "--keep_last=9"))
    for folder in training_state.state_folders(tmp_path)[1:]:
        folder.rename(tmp_path / folder.name)
    done = run_python(*command(2, data_dir, tmp_path, *arguments))
    assert "continuing from" in done.stdout
    assert same(weights(tmp_path / "out_ckpt.pt"), whole)
    assert metrics(tmp_path) == metrics(two_ranks[0])


@pytest.mark.fault(24, "two ranks, then one")
def test_run_goes_on_with_another_number_of_ranks(two_ranks, data_dir, tmp_path):
    """Two ranks up to step 6, one from there: the same tokens in the same steps."""
    arguments = ["--max_steps=10", "--save_every=6", "--eval_every=5"]
    run_python(*command(2, data_dir, tmp_path, *arguments))
    files.discard(training_state.state_folders(tmp_path)[-1])
    done = run_python(
        "train_gpt2.py", f"--data_dir={data_dir}", f"--out_dir={tmp_path}", *TINY, *arguments,
        "--grad_accum_steps=4",
    )  # fmt: skip
    assert "continuing from" in done.stdout
    assert metrics(tmp_path) == pytest.approx(metrics(two_ranks[0]), abs=2e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_sent_on_the_last_micro_batch_only(tmp_path, checkpointing):
    """The all-reduces of three micro-batches on two ranks, and what they give, in two steps."""
    script = tmp_path / "count.py"
    script.write_text(
        f"""
import torch
from gpt2.config.model import GPT2Config
from gpt2.config.train import SystemOptions
from gpt2.distributed import runtime
from gpt2.model.gpt import GPT

with runtime.start(SystemOptions(device="cpu", dtype="float32")) as rt:
    model = GPT(GPT2Config(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100))
    model.checkpoint_activations = {checkpointing}
    idx = torch.randint(0, 100, (3, 2, 1, 16))  # micro-batch, rank, B, T
    loss = sum(model(part.flatten(0, 1), part.flatten(0, 1)) for part in idx)
    alone = torch.autograd.grad(loss, tuple(model.parameters()))
    forward = rt.wrap(model)
    sent = []
    def hook(_, bucket):
        sent.append(micro)
        future = torch.futures.Future()
        future.set_result(rt.all_sum(bucket.buffer()) / 2)
        return future
    forward.register_comm_hook(None, hook)
    for step in range(2):
        for micro, part in enumerate(idx[:, rt.rank]):
            with rt.gradient_sync(forward, last=micro == 2):
                forward(part, part).backward()
        assert sent and set(sent) == {{2}}, sent
        for parameter, wanted in zip(model.parameters(), alone, strict=True):
            torch.testing.assert_close(parameter.grad, wanted, atol=1e-6, rtol=1e-5)
        model.zero_grad(set_to_none=True)
        sent.clear()
    print("ok")
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run_python(*TORCHRUN, "--nproc_per_node=2", script, env=environment)
    assert done.stdout.count("ok") == 2


def test_gradients_beside_a_graph_equal_those_of_ddp(tmp_path):
    """Without DDP, as with a CUDA graph: rank 0's weights, and gradients averaged after the last.

    The sum of two ranks does not depend on who adds: the bits are DDP's.
    """
    script = tmp_path / "average.py"
    script.write_text(
        """
import torch
from gpt2.config.model import GPT2Config
from gpt2.config.train import SystemOptions
from gpt2.distributed import runtime
from gpt2.model.gpt import GPT

with runtime.start(SystemOptions(device="cpu", dtype="float32")) as rt:
    found = []
    for recorded in (False, True):
        torch.manual_seed(rt.rank)  # other weights on each rank, until they are wrapped
        model = GPT(GPT2Config(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100))
        forward = rt.wrap(model, recorded)
        assert (forward is model) == recorded
        torch.manual_seed(7)
        idx = torch.randint(0, 100, (3, 2, 1, 16))  # micro-batch, rank, B, T
        for micro, part in enumerate(idx[:, rt.rank]):
            with rt.gradient_sync(forward, last=micro == 2):
                forward(part, part).backward()
        rt.average_gradients(forward)
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    print("ok")
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run_python(*TORCHRUN, "--nproc_per_node=2", script, env=environment)
    assert done.stdout.count("ok") == 2


def test_activation_checkpointing_on_two_ranks(two_ranks, data_dir, tmp_path):
    arguments = ["--max_steps=10", "--eval_every=5", "--activation_checkpointing=True"]
    run_python(*command(2, data_dir, tmp_path, *arguments))
    assert metrics(tmp_path) == metrics(two_ranks[0])


@pytest.mark.fault(19, "SIGTERM to rank 1 only")
def test_signal_to_one_rank_stops_all_at_the_same_step(data_dir, tmp_path):
    process = subprocess.Popen(
        [sys.executable, *command(2, data_dir, tmp_path, "--max_steps=100000", "--save_every=0")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    try:
        for line in process.stdout:
            if line.startswith("step") and " 3/" in line:
                break
        ranks = _children(process.pid)
        assert len(ranks) == 2
        os.kill(max(ranks), signal.SIGTERM)  # the last one is not rank 0
        started = time.monotonic()
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - started < 30
    stopped = re.search(r"stopped at step (\d+)", rest)
    assert stopped, rest
    found, _ = training_state.find_state(tmp_path, "auto")
    assert found.step == int(stopped[1])
    assert len(found.state["rng"]) == 2


@pytest.mark.fault(20, "a token that only rank 1 reads is invalid")
def test_error_on_one_rank_is_told(data_dir, tmp_path):
    """A bad token that only rank 1 reads: in windows 4 to 7 of an unshuffled step of eight.

    It lies beyond the first of the samples that rank 0 reads before the first step.
    """
    tokens = np.full(4 * SAMPLE_TOKENS, 5, dtype=np.uint16)
    step = SAMPLE_TOKENS // (8 * 32) + 1
    first = (step * 8 + 5) * 32
    tokens[first : first + 32] = 60000
    write_shard(tmp_path / "bad_train_000001.bin", tokens)
    shutil.copy(data_dir / "text_val_000000.bin", tmp_path / "bad_val_000000.bin")
    arguments = [f"--max_steps={step + 2}", "--shuffle=False"]
    arguments += ["--batch_size=4", "--grad_accum_steps=1"]
    done = run_python(*command(2, tmp_path, tmp_path / "out", *arguments), check=False)
    assert done.returncode != 0
    assert "error: [rank 1]" in done.stderr
    assert "token 60000 at offset" in done.stderr


def _children(pid: int) -> list[int]:
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def test_mistake_is_told_once(data_dir, tmp_path):
    done = run_python(*command(2, data_dir, tmp_path, "--grad_acum_steps=2"), check=False)
    assert done.returncode != 0
    assert done.stderr.count("did you mean --grad_accum_steps") == 1


def test_given_weights_reach_all_ranks(gpt2_data_dir, tmp_path):
    """Read by one rank and sent to the other: the losses are those of one process."""
    source = write_nanogpt(tmp_path / "ckpt.pt", reference())
    arguments = [f"--init={source}", "--max_steps=3"]
    run_python(*command(2, gpt2_data_dir, tmp_path / "two", *arguments))
    run_python(*command(1, gpt2_data_dir, tmp_path / "one", *arguments, "--grad_accum_steps=4"))
    assert metrics(tmp_path / "two") == pytest.approx(metrics(tmp_path / "one"), abs=1e-5)
    two, one = (weights(tmp_path / n / "out_ckpt.pt") for n in ("two", "one"))
    assert all(torch.allclose(two[n], one[n], atol=1e-4) for n in one)
