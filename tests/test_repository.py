"""Files around the code agree with pyproject.toml and with one another."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gpt2 import errors
from gpt2.errors import install_command
from gpt2.report.versions import NEWEST_TORCH

from .conftest import LONG, ROOT
from .lower_bounds import bounds, not_reached

PROJECT_FILE = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PROJECT_FILE["project"]
PATH = os.environ.get("PATH", "").split(os.pathsep)
SYSTEMS = {"ubuntu-latest": "Linux", "macos-latest": "MacOS", "windows-latest": "Windows"}
OURS = {"benchmarks", "gpt2", "learn", "tests"}
EVERYWHERE = {  # our dependencies, the extra `serve`, pytest, transformers, and what they need
    "fastapi", "gigatoken", "h11", "httpx", "huggingface_hub", "hypothesis", "jinja2",
    "matplotlib", "numpy", "packaging", "psutil", "pyarrow", "pydantic", "pytest", "safetensors",
    "starlette", "tiktoken", "tokenizers", "torch", "tqdm", "transformers", "uvicorn", "yaml",
}  # fmt: skip
FORM_ITEMS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def read(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


def workflow() -> dict:
    """`on` is True in YAML 1.1, which PyYAML reads."""
    return yaml.safe_load(read(".github/workflows/tests.yml"))


def jobs_of(matrix: dict) -> set[tuple[str, str, str]]:
    """(system, Python, torch) of each job, with those that `include` adds."""
    names = ("os", "python", "torch")
    assert set(matrix) == {*names, "include"}
    jobs = {(o, p, t) for o in matrix["os"] for p in matrix["python"] for t in matrix["torch"]}
    return jobs | {tuple(job[name] for name in names) for job in matrix["include"]}


def not_tested(matrix: dict, project: dict, newest_torch: tuple[int, int]) -> list[str]:
    """What is promised and the matrix leaves out, or the other way round."""
    wrong = []
    classifiers = "\n".join(project["classifiers"])
    pythons = re.findall(r"Python :: (3\.\d+)$", classifiers, re.MULTILINE)
    lowest = project["requires-python"].removeprefix(">=")
    if pythons[0] != lowest:
        wrong.append(f"classifiers begin at {pythons[0]}, requires-python at {lowest}")
    (torch,) = (d for d in project["dependencies"] if d.startswith("torch"))
    oldest = re.fullmatch(r"torch>=(2\.\d+)", torch)[1]  # a newer one gives a warning, no refusal
    newest = ".".join(map(str, newest_torch))
    wanted = {(os, python, newest) for os in SYSTEMS for python in pythons}
    wanted |= {(os, lowest, oldest) for os in SYSTEMS}
    jobs = jobs_of(matrix)
    wrong += [f"no job for {job}" for job in sorted(wanted - jobs)]
    wrong += [f"nothing promises {job}" for job in sorted(jobs - wanted)]
    return wrong + [f"no classifier {name}" for name in SYSTEMS.values() if name not in classifiers]


def test_workflow_tests_what_pyproject_promises():
    matrix = workflow()["jobs"]["tests"]["strategy"]["matrix"]
    assert not_tested(matrix, PROJECT, NEWEST_TORCH) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m, p: m["python"].remove("3.12"), "no job for"),
        (lambda m, p: m["os"].remove("macos-latest"), "no job for"),
        (lambda m, p: m["include"].clear(), "no job for"),
        (lambda m, p: m["python"].append("3.10"), "nothing promises"),
        (lambda m, p: p.update(dependencies=["torch>=2.10"]), "no job for"),
        (lambda m, p: m.update(torch=["2.13"]), "no job for"),
        (lambda m, p: p.update({"requires-python": ">=3.10"}), "requires-python at 3.10"),
        (lambda m, p: p["classifiers"].remove("Operating System :: MacOS"), "no classifier"),
    ],
)
def test_a_gap_between_workflow_and_pyproject_is_seen(change, said):
    matrix = workflow()["jobs"]["tests"]["strategy"]["matrix"]
    project = PROJECT | {"classifiers": list(PROJECT["classifiers"])}
    change(matrix, project)
    assert said in "\n".join(not_tested(matrix, project, NEWEST_TORCH))


def test_workflow_runs_what_make_runs():
    found = workflow()
    assert set(found) == {"name", True, "permissions", "concurrency", "jobs"}
    assert set(found[True]) == {"push", "pull_request"}
    steps = [step.get("run", "") for job in found["jobs"].values() for step in job["steps"]]
    assert {"make lint", "make docs"} <= set(steps)
    makefile = read("Makefile").replace("$(PYTEST_FLAGS)", "--durations=20")
    pytest_of_make = re.search(
        r"^test:.*\n\t\$\(BIN\)/python (-m pytest .*)", makefile, re.MULTILINE
    )
    assert f"python {pytest_of_make[1]}" in steps
    assert {"make newest", "make lowest", "docker build -t gpt2 ."} <= set(steps)
    (newest,) = re.findall(r"-e '\.\[([\w,]+)\]'\n\t\$\(VENV\)-newest", makefile)
    assert newest == "dev,clients"  # litellm is nowhere else


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_are_as_github_reads_them(name):
    form = yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{name}.yml"))
    assert {"name", "description", "body"} <= set(form)
    asked = [item for item in form["body"] if item["type"] != "markdown"]
    assert {item["type"] for item in form["body"]} <= FORM_ITEMS
    assert len({item["id"] for item in asked}) == len(asked) > 0
    assert all(item["attributes"]["label"] for item in asked)
    assert any(item.get("validations", {}).get("required") for item in asked)


@functools.cache
def packages_behind(path: Path, skipped: bool) -> set[str]:
    """Packages without which this file cannot be imported, through modules of ours as well.

    Those that it names to `pytest.importorskip` before are left out if `skipped`.
    """
    found, named, text = set(), set(), path.read_text("utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        else:
            modules = []
            statement = ast.get_source_segment(text, node) if "importorskip" in text else ""
            named |= set(re.findall(r"importorskip\(['\"](\w+)", statement))
        for module in modules:
            top, file = module.partition(".")[0], ROOT / f"{module.replace('.', '/')}.py"
            lacking = {top} - OURS - EVERYWHERE - sys.stdlib_module_names
            if top in OURS and file.exists():
                lacking |= packages_behind(file, skipped=False)
            found |= lacking - named if skipped else lacking
    return found


def test_one_missing_package_leaves_out_its_tests_alone():
    """`pytest -m gpu` ended on a GPU machine without `openai`, though no such test needs it."""
    assert "jupytext" in packages_behind(ROOT / "learn" / "notebooks.py", skipped=False)
    wrong = []
    for path in (ROOT / "tests").rglob("*.py"):
        lacking = packages_behind(path, skipped=True)
        wrong += [f"{path}: pytest.importorskip({name!r})" for name in lacking]
    assert not wrong


def test_version_is_one():
    version = PROJECT["version"]
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == version
    assert citation["license"] == PROJECT["license"]
    released = re.findall(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$", read("CHANGELOG.md"), re.M)
    assert released[0] == (version, citation["date-released"])
    assert read("CHANGELOG.md").index("## Unreleased") < read("CHANGELOG.md").index(f"## {version}")


def test_hooks_format_as_make_lint():
    """The hook's ruff is one that pyproject.toml allows."""
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    found = {hook["id"]: repo["rev"] for repo in hooks for hook in repo["hooks"]}
    assert {"ruff-check", "ruff-format", "codespell", "end-of-file-fixer"} <= set(found)
    (wanted,) = (d for d in PROJECT["optional-dependencies"]["dev"] if d.startswith("ruff>="))
    numbers = [[int(n) for n in text.split(".")] for text in (found["ruff-check"][1:], wanted[6:])]
    assert numbers[0] >= numbers[1]


def test_paths_in_contributing_exist():
    text = read("CONTRIBUTING.md")
    named = set(re.findall(r"`((?:gpt2|tests|docs|benchmarks|configs|dev)/[\w/.*]*)`", text))
    assert len(named) > 20
    for name in named:
        assert list(ROOT.glob(name.rstrip("/"))), name
    packages = {p.parent.name for p in (ROOT / "gpt2").glob("*/__init__.py")}
    assert packages == set(re.findall(r"^\| `gpt2/(\w+)/` \|", text, re.MULTILINE))


def test_files_of_long_tests_are_there():
    assert all((ROOT / f"tests/{name}.py").exists() for name in LONG)


# ---- what is installed ---------------------------------------------------------------------------


def loose_actions(text: str) -> list[str]:
    """Actions of a workflow that are not pinned to a commit, with the version in a comment."""
    uses = re.findall(r"^\s*-? *uses: *(.*)$", text, re.MULTILINE)
    assert uses
    return [line for line in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}  # v\d[\d.]*", line)]


def test_actions_are_pinned_to_commits():
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        assert loose_actions(path.read_text("utf-8")) == []
    assert loose_actions("- uses: actions/checkout@v4\n") == ["actions/checkout@v4"]


def loose_pins(text: str, wanted: list[str]) -> list[str]:
    """What is wrong with a file of pinned packages, for these requirements of pyproject.toml."""
    pins: dict[str, list[str]] = {}
    wrong = []
    for block in re.split(r"\n(?=[^\s])", text):
        if block.startswith("#"):
            continue
        first, _, rest = block.partition("\n")
        match = re.fullmatch(r"([\w.-]+)==([\w.+!-]+)( ; [^\\]+)? \\", first)
        hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}\b", rest)
        if not match or not hashes or rest.count("--hash") != len(hashes):
            wrong.append(f"not pinned by sha256: {first}")
        else:
            pins.setdefault(canonicalize_name(match[1]), []).append(match[2])
    for requirement in map(Requirement, wanted):
        found = pins.get(canonicalize_name(requirement.name), [])
        if not found or not all(requirement.specifier.contains(version) for version in found):
            wrong.append(f"{requirement} is pinned to {found}")
    return wrong


def test_tests_of_the_lower_bounds_are_there():
    found = re.search(r"^LOWEST_TESTS := ((?:.*\\\n)*.*)$", read("Makefile"), re.MULTILINE)[1]
    names = found.replace("\\", "").split()
    assert len(names) > 10
    assert all((ROOT / name).exists() for name in names)


def test_a_lower_bound_that_nobody_can_test_is_seen():
    """One below what the other packages allow, and one that was forgotten."""
    project = {
        "dependencies": ["torch>=2.11", "numpy>=1.26"],
        "optional-dependencies": {"a": ["Some_thing[x]>=0.2,<3", "us"], "b": ["some-thing>=0.3"]},
    }
    pins = "torch==2.11.0+cpu\nnumpy==1.26.0\n    # via torch\nsome-thing==0.3\n"
    assert not_reached(pins, project) == []
    assert not_reached(pins.replace("0.3", "0.4"), project) == [
        "some-thing>=0.3 is in pyproject.toml, 0.4 was installed"
    ]
    assert "nothing was installed" in not_reached("torch==2.11.0\n", project)[0]
    assert len(bounds(PROJECT)) > 30


FAKE_PYTHON = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in *torch==*) [ -n "$OFFERED" ] ;; *"-m uv"*) [ -n "$UV" ] ;; esac
"""


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(
    ("given", "offered", "uv", "gpu", "asked", "code"),
    [
        ([], "yes", "yes", False, "torch==2.13.0+cpu", 0),
        ([], "yes", "", False, "torch==2.13.0+cpu", 0),  # uv does not know the index: pip installs
        ([], "", "yes", False, "torch==2.13.0+cpu", 0),  # the index lacks the CPU build: uv chooses
        ([], "yes", "yes", True, "", 0),
        (["TORCH=2.14.1"], "yes", "yes", False, "torch==2.14.1", 0),
        (["TORCH=2.14.*"], "yes", "yes", True, "torch==2.14.*", 0),
        (["TORCH=2.99"], "", "yes", False, "torch==2.99", 2),  # what was asked for is not there
        (["TORCH="], "yes", "yes", False, "", 0),
    ],
)
def test_make_asks_for_the_cpu_build(given, offered, uv, gpu, asked, code, tmp_path):
    tools, venv = tmp_path / "tools", tmp_path / "venv"
    for program in (venv / "bin/python", *([tools / "nvidia-smi"] if gpu else [])):
        program.parent.mkdir(parents=True)
        program.write_text(FAKE_PYTHON, "utf-8")
        program.chmod(0o755)
    path = os.pathsep.join([str(tools), *(p for p in PATH if not Path(p, "nvidia-smi").exists())])
    env = {"PATH": path, "LOG": str(tmp_path / "log"), "OFFERED": offered, "UV": uv}
    made = subprocess.run(
        ["make", f"VENV={venv}", *given, f"{venv}/installed-dev"],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == code, made.stderr
    calls = (tmp_path / "log").read_text("utf-8").splitlines()
    wanted = [f"-m pip install --quiet --no-compile {asked}"] if asked else []
    if code == 0:
        wanted.append(f"-m uv pip install --quiet --python {venv}/bin/python -e .[dev]")
        wanted += [] if uv else ["-m pip install --quiet --no-compile -e .[dev]"]
    assert calls == wanted
    assert ("\nno torch 2.13" in made.stdout) == (asked != "" and not offered and not given)


def loose_in_image(dockerfile: str, ignore: str) -> list[str]:
    """What is wrong with a Dockerfile and its .dockerignore, as far as reading them can tell."""
    lines = re.sub(r"\\\n", " ", dockerfile).splitlines()
    steps = [line.split(None, 1) for line in lines if line.strip() and line[0] != "#"]
    copied = [name for key, rest in steps if key == "COPY" for name in rest.split()[:-1]]
    sent = {line[1:] for line in ignore.splitlines() if line.startswith("!")}
    wrong = [f"{name} is not sent" for name in copied if name not in sent]
    wrong += [f"{name} is not there" for name in copied if not (ROOT / name).exists()]
    base = steps[0][1]
    wrong += [] if re.fullmatch(r"python:3\.\d+-slim", base) else [f"loose base {base}"]
    users = [rest for key, rest in steps if key == "USER"]
    wrong += [] if users and users[-1] != "root" else ["it runs as root"]
    for extra in re.findall(r"\.\[([\w,]+)\]", dockerfile):
        gone = set(extra.split(",")) - set(PROJECT["optional-dependencies"])
        wrong += [f"no extra {name}" for name in sorted(gone)]
    return wrong


def test_image_of_docker():
    """A build is for the workflow: here it is only read."""
    image, ignore = read("Dockerfile"), read(".dockerignore")
    assert loose_in_image(image, ignore) == []
    assert loose_in_image(image, ignore.replace("!configs\n", "")) == ["configs is not sent"]
    assert loose_in_image(image.replace("USER user", "USER root"), ignore) == ["it runs as root"]
    assert loose_in_image(image.replace("3.12-slim", "latest"), ignore) == [
        "loose base python:latest"
    ]
    assert loose_in_image(image.replace("serve,", "serv,"), ignore) == ["no extra serv"]
    build = PROJECT_FILE["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {PROJECT["readme"], *PROJECT["license-files"], *build["packages"]}
    needed |= {Path(name).parts[0] for name in build["force-include"]}
    assert needed <= {line[1:] for line in ignore.splitlines()}


def wanted_by(extras: list[str]) -> list[str]:
    found = list(PROJECT["dependencies"])
    for extra in extras:
        found += PROJECT["optional-dependencies"][extra]
    return [line for line in found if not line.startswith(PROJECT["name"])]


@pytest.mark.parametrize(("name", "extras"), [
    ("run", []), ("dev", ["dev", "docs", "eval", "fast", "learn", "serve", "track"]),
])  # fmt: skip
def test_every_package_is_pinned_by_hash(name, extras):
    text, wanted = read(f"requirements/{name}.txt"), wanted_by(extras)
    assert loose_pins(text, wanted) == []
    assert "://" not in text
    assert f"requirements/{name}.txt" in read("CONTRIBUTING.md") + read("README.md")
    torch = re.search(r"^torch==.*\n", text, re.MULTILINE)[0]
    assert loose_pins(text.replace(torch, "torch==2.0.0 \\\n"), wanted)
    assert loose_pins(text.replace(torch, "torch>=2.0 \\\n"), wanted)
    assert loose_pins(text.replace("    --hash=sha256:", "    --hash=md5:", 1), wanted)
    assert loose_pins(text, [*wanted, "nobody-has-this>=1"])


def test_hints_name_our_own_package(tmp_path, monkeypatch):
    """And not gpt2, which is another project on the package index."""
    assert PROJECT["name"] == errors.DISTRIBUTION
    assert install_command("track") == 'pip install -e ".[track]"'
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "gpt2/errors.py"))  # as in a wheel
    assert install_command("track") == f'pip install "{PROJECT["name"]}[track]"'
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "gpt2").rglob("*.py"))
    for extra in re.findall(r"install_command\(['\"](\w+)['\"]\)", sources):
        assert extra in PROJECT["optional-dependencies"]
    documents = [read("README.md"), *(p.read_text("utf-8") for p in (ROOT / "docs").glob("*.md"))]
    for text in (sources, *documents):
        assert not re.search(r"pip install ['\"]?gpt2\b(?!-)", text)
    for text in documents:
        for extra in re.findall(r'pip install -e "\.\[(\w+)\]"', text):
            assert extra in PROJECT["optional-dependencies"]


def test_make_clean_takes_caches_and_the_environment_only():
    """`out/`, `data/` and `fineweb/` are the user's work."""
    (command,) = re.findall(r"^clean:\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE)
    assert command.split() == [
        *("rm", "-rf", "$(VENV)", "$(VENV)-lowest", "$(VENV)-newest"),
        *("site", ".pytest_cache", ".ruff_cache", ".mypy_cache"),
    ]  # fmt: skip
