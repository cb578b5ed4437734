"""The wheel alone, in an environment of its own and in another folder: nothing of a clone."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

from .conftest import ROOT, run_python

pytestmark = pytest.mark.slow
SMALLEST = [
    *("--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=16", "--batch_size=1"),
    *("--max_steps=2", "--warmup_steps=1", "--eval_tokens=100", "--device=cpu"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The file that `pip wheel .` makes."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = ["-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--wheel-dir", folder]
    if importlib.util.find_spec("hatchling"):  # else pip downloads it
        pip.append("--no-build-isolation")
    run_python(*pip, ROOT, real=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def place(wheel, tmp_path_factory) -> tuple[Path, Path]:
    """(programs of an environment that holds the wheel, an empty folder to work in).

    The environment borrows this one's packages by a .pth file, whose folders' own .pth files Python
    does not follow: a clone that is installed with `pip install -e .` is not seen there.
    """
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    (packages,) = environment.rglob("site-packages")
    borrowed = [p for p in sys.path if p.rstrip("/\\").endswith(("site-packages", "dist-packages"))]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    folder = environment / ("Scripts" if os.name == "nt" else "bin")
    python = folder / ("python.exe" if os.name == "nt" else "python")
    run_python("-m", "pip", "--disable-pip-version-check", "--python", python, "install",
               "--no-deps", "--no-index", "--ignore-installed", wheel, real=True)  # fmt: skip
    return folder, tmp_path_factory.mktemp("elsewhere")


def start(place, *command) -> subprocess.Popen:
    """A program of the environment, begun in the other folder."""
    programs, folder = place
    program = shutil.which(command[0], path=programs)
    clean = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.Popen(
        [program, *command[1:]], cwd=folder, env=clean, text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def call(place, *command) -> str:
    """The output of a program that must succeed."""
    process = start(place, *command)
    out, _ = process.communicate(timeout=150)
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def demo(place) -> str:
    """The output of `gpt2 demo`, the smallest that there is."""
    return call(place, "gpt2", "demo", *SMALLEST)


def test_wheel_holds_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("gpt2/")}
    files = [p for p in (ROOT / "gpt2").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    package = {p.relative_to(ROOT).as_posix() for p in files}
    assert {Path(name).suffix for name in package} >= {".py", ".html", ".css", ".js", ".typed"}
    recipes = {"gpt2/recipes/demo_cpu.toml", "gpt2/recipes/demo_cuda.toml"}
    assert held == package | recipes


def test_version_is_that_of_the_wheel(place, wheel):
    assert call(place, "gpt2", "--version") == f"gpt2 {wheel.name.split('-')[1]}\n"


def test_hints_fit_a_wheel(place):
    code = "from gpt2.errors import install_command; print(install_command('track'))"
    assert call(place, "python", "-c", code) == 'pip install "gpt2-from-scratch[track]"\n'


def test_the_clone_is_not_seen(place):
    found = Path(call(place, "python", "-c", "import gpt2; print(gpt2.__file__)").strip())
    assert found.is_relative_to(place[0].parent)


def test_models_of_a_clone_are_one_line(place):
    process = start(place, "gpt2", "sample", "box", "--prompt=Hello")
    out, _ = process.communicate(timeout=150)
    assert process.returncode == 2
    assert out.startswith("gpt2: error: box is not part of the installed package: clone the ")
    assert out.count("\n") == 1


def test_demo_trains_and_writes(demo, place):
    out = place[1] / "out/demo"
    assert {p.name for p in out.iterdir()} >= {"out_ckpt.pt", "metrics.jsonl", "loss.png"}
    assert "$ gpt2 sample" in demo
    assert "def main(" in demo.rpartition("$ gpt2 sample")[2].partition("\n")[2]


def test_inspect_writes_its_page(demo, place):
    call(place, "gpt2", "inspect", "out/demo/out_ckpt.pt", "def main(self):", "--device=cpu")
    page = (place[1] / "inspect.html").read_text("utf-8")
    assert page.count("<script") >= 2
    assert "<style" in page


def test_serve_gives_its_page(demo, place):
    process = start(place, "gpt2", "serve", "out/demo/out_ckpt.pt", "--port=0", "--device=cpu")
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if address := re.search(r"http://[\w.]+:\d+", line):
                break
        else:
            pytest.fail("".join(lines))
        with urllib.request.urlopen(f"{address[0]}/", timeout=30) as answer:
            page = answer.read().decode()
        assert answer.status == 200
        assert "<textarea" in page
    finally:
        process.terminate()
        process.communicate(timeout=30)
