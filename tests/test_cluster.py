"""The recipes for clusters: their commands run here, one task after the other."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from gpt2.commands.inspect_shards import verify
from gpt2.config.command_line import parse
from gpt2.config.commands import PrepareConfig
from gpt2.prepare.multi_machine import Worker, merge

from . import forks
from .conftest import ROOT
from .prepare.test_run import make_texts, write_jsonl

SLURM = ROOT / "configs/cluster/prepare.slurm"
SKY = ROOT / "configs/cluster/prepare.sky.yaml"


@pytest.fixture
def place(tmp_path):
    """A folder with a corpus of three files, and an environment in which `gpt2` is a command."""
    if sys.platform == "win32" or not shutil.which("bash"):
        pytest.skip("no bash here")
    for number in range(3):
        write_jsonl(tmp_path / "corpus" / f"{number}.jsonl", make_texts(60, seed=number))
    command = tmp_path / "bin/gpt2"
    command.parent.mkdir()
    python = forks.server(ROOT).python if forks.AVAILABLE else sys.executable
    command.write_text(f'#!/bin/sh\nexec "{python}" -m gpt2 "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    return tmp_path, {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def bash(*arguments, place, **variables):
    folder, env = place
    done = subprocess.run(["bash", *map(str, arguments)], cwd=folder, env=env | variables,
                          capture_output=True, text=True, check=False, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_slurm_array_and_the_job_that_joins(place):
    folder, _ = place
    for task in ("2", "3"):
        bash(SLURM, "--source=corpus", "--num_workers=1", place=place,
             SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_COUNT="3")  # fmt: skip
    bash(SLURM, "--source=corpus", "--num_workers=1", place=place,  # the one that failed, alone
         SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_TASK_COUNT="1", WORKERS="3")  # fmt: skip
    then = re.search(r'--wrap="(.*)"', SLURM.read_text("utf-8"))[1]
    assert "180 documents" in bash("-c", then, place=place)
    assert verify(folder / "fineweb") == 0


def test_slurm_tasks_count_from_1():
    text = SLURM.read_text("utf-8")
    assert re.search(r"^#SBATCH --array=1-16$", text, re.MULTILINE)
    assert text.startswith("#!/bin/bash\n")


def test_sky_nodes(place):
    yaml = pytest.importorskip("yaml")
    folder, _ = place
    task = yaml.safe_load(SKY.read_text("utf-8"))
    assert task["num_nodes"] == 4
    (bucket,) = task["file_mounts"]
    script = task["run"].replace(f"{bucket}/", str(folder / "bucket"))
    script = script.replace("gpt2 prepare", "gpt2 prepare --source=corpus --num_workers=1")
    (folder / "bucket").mkdir()
    for rank in ("0", "1", "2"):
        bash("-c", script, place=place, SKYPILOT_NODE_RANK=rank, SKYPILOT_NUM_NODES="3")
        shutil.rmtree(folder / "fineweb")  # each machine has a disk of its own
    assert merge(folder / "bucket") == 0
    assert verify(folder / "bucket") == 0


@pytest.mark.parametrize("path", [SLURM, SKY], ids=lambda path: path.name)
def test_commands_are_those_of_our_parser(path):
    """Also where there is no bash and no yaml."""
    (command,) = re.findall(r"^ *gpt2 prepare (.*)$", path.read_text("utf-8"), re.MULTILINE)
    command = re.sub(r"\$\(\(SKYPILOT_NODE_RANK \+ 1\)\)|\$SLURM_ARRAY_TASK_ID", "3", command)
    command = re.sub(r"\$\{WORKERS:-.*?\}|\$SKYPILOT_NUM_NODES", "16", command)
    config = parse(PrepareConfig, shlex.split(command.removesuffix('"$@"')), "gpt2 prepare")
    assert Worker.parse(config.worker) == Worker(3, 16)
    assert config.out_dir == "fineweb"
