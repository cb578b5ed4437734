"""A rank that dies, other numbers of ranks, a host that is cut off: the curve stays the same."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from . import forks
from .conftest import ROOT, TINY, TORCHRUN, run_python
from .test_distributed import _children, command
from .train.test_loop import metrics, same, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="pgrep and network namespaces"),
]
BATCH = [a for a in TINY if not a.startswith("--grad_accum")] + ["--total_batch_tokens=256"]
ELASTIC = ["--rdzv_backend=c10d", "--max_restarts=3"]


def arguments(data_dir, out, *more) -> list[str]:
    return ["train_gpt2.py", f"--data_dir={data_dir}", f"--out_dir={out}", *BATCH, "--eval_every=0",
            *more]  # fmt: skip


def wait_for(process: subprocess.Popen, text: str):
    """Reads a process's output up to a text."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    pytest.fail("".join(seen))


@pytest.mark.timeout(400)
@pytest.mark.fault(20, "SIGKILL of a rank under torchrun --max_restarts")
def test_killed_rank_restarts_from_the_last_checkpoint(data_dir, tmp_path):
    """kill -9 of one of two: torchrun starts both again, losses and weights to the last bit."""
    steps = ["--max_steps=12", "--save_every=2"]
    run_python(*command(2, data_dir, tmp_path / "calm", *steps, "--eval_every=0"))
    options = ["--nnodes=1:4", "--nproc_per_node=2", *ELASTIC, "--rdzv_endpoint=localhost:0"]
    torchrun = ["-m", "torch.distributed.run", *options, "--rdzv_conf=last_call_timeout=1"]
    process = subprocess.Popen(
        [sys.executable, *torchrun, *arguments(data_dir, tmp_path / "hit", *steps)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        wait_for(process, " 5/")
        os.kill(max(_children(process.pid)), signal.SIGKILL)
        rest, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, rest
    assert "another rank has ended (Connection " in rest
    assert "Traceback" not in rest
    assert "continuing from" in rest
    assert metrics(tmp_path / "hit") == metrics(tmp_path / "calm")
    names = [tmp_path / name / "out_ckpt.pt" for name in ("hit", "calm")]
    assert same(*map(weights, names))


def test_two_ranks_then_one_then_two(data_dir, tmp_path):
    """The tokens per step and their order stay; losses to 2e-6, as sums are cut in another way."""
    options = ["--max_steps=9", "--save_every=3", "--keep_last=9", "--parallel=fsdp"]
    out, states = tmp_path / "out", tmp_path / "out/state"
    for ranks, done in ((2, 3), (1, 6), (2, 9)):
        torchrun = [*TORCHRUN, f"--nproc_per_node={ranks}"]
        text = run_python(*torchrun, *arguments(data_dir, out, *options)).stdout
        assert "256 tokens per step" in text
        for folder in states.iterdir():
            if int(folder.name[-8:]) > done:
                shutil.rmtree(folder)
        if done == 3:
            calm = metrics(out), metrics(out, "tokens")
        else:
            assert f"continuing from {states / f'step_{done - 3:08d}'}" in text
    assert metrics(out) == pytest.approx(calm[0], abs=2e-6)
    assert metrics(out, "tokens") == calm[1]


@pytest.fixture
def hosts():
    """Two network namespaces joined by a cable; skipped, with the reason, where not permitted."""
    names = [f"gpt2-{os.getpid()}-{i}" for i in "ab"]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ends = [arg for n in names for arg in ("name", "cable", "netns", n)]
        ip("link", "add", *ends[:4], "type", "veth", "peer", *ends[4:])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)
        reason = getattr(error, "stderr", "") or str(error)
        pytest.skip(f"network namespaces cannot be made here: {reason.strip()}")
    yield names
    for name in names:
        ip("netns", "del", name)


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def host(name: str, address: str, script: list[str], log):
    """torchrun in a namespace, started anew when it fails, as a cluster's loop does."""
    python = forks.server(ROOT).python  # forks, in the namespace of who asks for them
    torchrun = [
        *(str(python), "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"),
        *(*ELASTIC, "--rdzv_endpoint=10.77.0.1:29400", f"--local_addr={address}"),
        f"--rdzv_conf=is_host={int(address.endswith('.1'))},read_timeout=10,keep_alive_interval=1",
        *script,
    ]
    loop = 'for attempt in 1 2 3 4 5; do "$@" && exit 0; sleep 1; done; exit 1'
    process = subprocess.Popen(
        ["ip", "netns", "exec", name, "bash", "-c", loop, "loop", *torchrun],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "cable"}, cwd=ROOT,
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.timeout(400)
def test_two_hosts_one_is_cut_off_and_comes_back(hosts, data_dir, tmp_path):
    """Over TCP; the cable is pulled after step 4, and put back ten seconds later."""
    steps = ["--max_steps=12", "--save_every=2", "--hang_timeout_seconds=5"]
    run_python(*command(2, data_dir, tmp_path / "calm", *steps, "--eval_every=0"))
    out = tmp_path / "out"
    script = arguments(data_dir, out, *steps)
    with (
        open(tmp_path / "a.log", "w") as log_a,
        open(tmp_path / "b.log", "w") as log_b,
        host(hosts[0], "10.77.0.1", script, log_a) as first,
        host(hosts[1], "10.77.0.2", script, log_b),
    ):
        deadline = time.monotonic() + 120
        while not (out / "state/step_00000004").exists():
            assert time.monotonic() < deadline, (tmp_path / "a.log").read_text()
            time.sleep(0.05)
        ip("-n", hosts[1], "link", "set", "cable", "down")
        time.sleep(10)
        assert not (out / "state/step_00000012").exists()
        ip("-n", hosts[1], "link", "set", "cable", "up")
        code = first.wait(timeout=200)
    text = (tmp_path / "a.log").read_text("utf-8")
    assert code == 0, text
    assert "continuing from" in text
    assert metrics(out) == metrics(tmp_path / "calm")
    assert same(*(weights(folder / "out_ckpt.pt") for folder in (out, tmp_path / "calm")))
