"""The cluster files for training: checked by the launchers' own schemas, their commands run here.

`srun` and `scontrol` are stand-ins of a line each; torchrun, bash and the training are real, but
Python is forked (tests/forks.py), by torchrun as well.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from . import forks
from .conftest import ROOT
from .test_elastic import BATCH
from .train.test_loop import metrics

CLUSTER = ROOT / "configs/cluster"
SMALL = [*BATCH, "--eval_every=0", "--save_every=2"]
COMMANDS = {
    "torchrun": 'exec "$PYTHON" -m torch.distributed.run "$@"',
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >> scontrol.log; fi',
}


@pytest.fixture
def place(tmp_path, data_dir):
    """A folder with shards and the recipe, and an environment with the launchers' commands."""
    if sys.platform == "win32" or not shutil.which("bash"):
        pytest.skip("no bash here")
    shutil.copytree(data_dir, tmp_path / "fineweb")
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs/gpt2_124m.toml", tmp_path / "configs")
    for name, script in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    python = str(forks.server(ROOT).python) if forks.AVAILABLE else sys.executable
    return tmp_path, {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHON": python}


def read_yaml(name):
    return pytest.importorskip("yaml").safe_load((CLUSTER / name).read_text("utf-8"))


@pytest.mark.parametrize("name", ["train.slurm", "train.sky.yaml", "train.k8s.yaml"])
def test_files_are_short(name):
    assert len((CLUSTER / name).read_text("utf-8").splitlines()) <= 30


@pytest.mark.slow
def test_slurm_job_saves_queues_again_and_goes_on(place):
    folder, env = place
    env |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2",
            "SLURM_JOB_NODELIST": "here"}  # fmt: skip
    command = ["bash", str(CLUSTER / "train.slurm"), *SMALL]
    log = folder / "log.txt"
    with open(log, "w") as file:
        job = subprocess.Popen([*command, "--max_steps=100000"], cwd=folder, env=env, stdout=file,
                               stderr=subprocess.STDOUT)  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while " 3/" not in log.read_text("utf-8"):
                assert time.monotonic() < deadline, log.read_text("utf-8")
                time.sleep(0.1)
            job.send_signal(signal.SIGUSR1)  # as `--signal=B:USR1@120` does, to the shell alone
            assert job.wait(timeout=60) == 0, log.read_text("utf-8")
        finally:
            job.kill()
    assert "stopped at step" in log.read_text("utf-8")
    assert (folder / "scontrol.log").read_text() == f"requeue {os.getpid()}\n"
    last = max(metrics(folder / "out/slurm"))
    done = subprocess.run([*command, f"--max_steps={last + 2}"], cwd=folder, env=env, check=False,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step_{last:08d}" in done.stdout
    assert len((folder / "scontrol.log").read_text().splitlines()) == 1  # finished: not again


def test_sky_task_is_valid():
    """By SkyPilot itself, where it is installed; it brings a hundred packages along."""
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(CLUSTER / "train.sky.yaml"))
    assert task.num_nodes == 1


@pytest.mark.slow
def test_sky_command_runs(place):
    folder, env = place
    script = read_yaml("train.sky.yaml")["run"].strip().replace("/bucket/run", "out")
    script = script.replace("/bucket/fineweb", "fineweb") + " " + " ".join(SMALL)
    done = subprocess.run(["bash", "-c", f"{script} --max_steps=2"], cwd=folder, check=False,
                          env=env | {"SKYPILOT_NUM_GPUS_PER_NODE": "2"}, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks by gloo" in done.stdout


def check_fields(values, kind: str, models, where="job"):
    """Every key of a mapping is a field of the model of that name, all the way down."""
    if kind.startswith("dict("):
        inner = kind.removeprefix("dict(str, ").removesuffix(")")
        for key, value in values.items():
            check_fields(value, inner, models, f"{where}.{key}")
    elif kind.startswith("list["):
        assert isinstance(values, list), where
        for value in values:
            check_fields(value, kind[5:-1], models, where)
    elif isinstance(values, dict) and hasattr(models, kind):
        model = getattr(models, kind)
        types = {model.attribute_map[name]: t for name, t in model.openapi_types.items()}
        for key, value in values.items():
            assert key in types, f"{where} has no {key}"
            check_fields(value, types[key], models, f"{where}.{key}")
    else:
        known = {"str": str, "int": int, "bool": bool, "object": object}
        assert isinstance(values, known.get(kind, str)), f"{where} is no {kind}"


def test_kubernetes_job_is_valid():
    """By the models of Kubeflow's and Kubernetes' own clients."""
    job = read_yaml("train.k8s.yaml")
    models = pytest.importorskip("kubeflow.training").models
    check_fields(job, "KubeflowOrgV1PyTorchJob", models)
    spec = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    spec["containers"][0]["volumeMount"] = []
    with pytest.raises(AssertionError, match="has no volumeMount"):
        check_fields(job, "KubeflowOrgV1PyTorchJob", models)


@pytest.mark.slow
def test_kubernetes_command_runs(place):
    """With the environment that the operator gives the first of its pods."""
    folder, env = place
    spec = read_yaml("train.k8s.yaml")["spec"]
    container = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    command = [*container["command"], *container["args"], *SMALL, "--max_steps=2"]
    command = [word.replace("/data/", "") for word in command]
    env |= {"PET_NNODES": "1:4", "PET_NPROC_PER_NODE": "2", "PET_RDZV_ENDPOINT": "localhost:0",
            "PET_RDZV_BACKEND": "c10d", "PET_MAX_RESTARTS": "3", "PET_RDZV_ID": "gpt2",
            "PET_RDZV_CONF": "last_call_timeout=1"}  # fmt: skip
    command[0] = str(folder / "bin" / command[0])
    done = subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "run/out_ckpt.pt").exists()
    assert "2 ranks by gloo" in done.stdout
