"""The rules of docs/architecture.md, each as a test that fails when it is broken."""

import ast
import os
import re
from dataclasses import fields

import pytest

from gpt2.config import TrainConfig, flatten
from gpt2.tool_config import (
    ChatConfig,
    EvalConfig,
    ExportConfig,
    FinetuneConfig,
    InspectConfig,
    PrepareConfig,
    ProfileConfig,
    PushConfig,
    SampleConfig,
    ServeConfig,
    ShowConfig,
)

from .conftest import ROOT, run_python

FLOORS = {
    0: "options switches config tool_config flags modern masks rotary model ops norms products "
    "kernels cublaslt decode_kernels one_token tokenizer shards sources readers hub downloads lock "
    "commit integrity chat_format packed operation",
    1: "devices runtime data datasets order optim muon hf foreign sinks workers plan sampling "
    "conversations lora saver watchdog parallel meeting micro_batch",
    2: "checkpoint evaluate score tasks generate report plot rundir inspect_shards merge job "
    "decode batch weights export sharded lens page",
    3: "api state begin messages train profiler prepare eval_run harness terminal "
    "inspect_model "
    "engine answers guard protocol serve cli __main__",
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names.split()}
MODULES = sorted(p for p in (ROOT / "gpt2").glob("*.py") if p.stem != "__init__")
SOURCES = [*MODULES, ROOT / "gpt2/__init__.py", ROOT / "train_gpt2.py", ROOT / "fineweb.py"]
SOURCES += sorted((ROOT / "benchmarks").glob("*.py"))


def imports_of(path) -> set[str]:
    """Modules of the package that a module imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [a.name for a in node.names]
            found |= {name.split(".")[0] for name in names}
    return found


def test_every_module_has_a_floor():
    assert {p.stem for p in MODULES} == set(FLOOR_OF)


def test_imports_point_down_or_along_without_cycles():
    graph = {p.stem: imports_of(p) for p in MODULES}
    for module, imported in graph.items():
        for other in imported:
            assert FLOOR_OF[other] <= FLOOR_OF[module], f"{module} imports {other} from above"
    done: set[str] = set()
    while graph:
        free = [m for m, imported in graph.items() if imported <= done | {m}]
        assert free, f"a cycle among {sorted(graph)}"
        done |= set(free)
        graph = {m: imported for m, imported in graph.items() if m not in done}


@pytest.mark.parametrize(
    ("pattern", "owners"),
    [
        (r"torch\.distributed|^import torch\.distributed|\bdist\.", {"runtime", "parallel"}),
        (r"os\.environ|os\.getenv", {"runtime"}),
        (r"torch\.(save|load)\(", {"checkpoint"}),
        (r"(import|from) (tiktoken|gigatoken)\b", {"tokenizer"}),
        (r"\bprint\(", {"report", "cli", "terminal"}),
        (r"20240520", {"shards"}),
    ],
)
def test_one_owner_per_concern(pattern, owners):
    for path in MODULES:
        code = "\n".join(
            line
            for line in _without_docstrings(path).splitlines()
            if not line.strip().startswith("#")
        )
        if re.search(pattern, code, re.MULTILINE):
            assert path.stem in owners, f"{pattern} in {path.name}"


def _without_docstrings(path) -> str:
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            body = node.body
            if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                node.body = body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@pytest.mark.fault(11, "search of all sources for loaders that execute")
def test_pickles_are_never_trusted():
    for path in SOURCES:
        text = path.read_text("utf-8")
        for forbidden in ("weights_only=False", "pickle.load", "allow_pickle", "eval(", "exec("):
            found = re.search(rf"(?<![\w.]){re.escape(forbidden)}", text)
            assert not found, f"{forbidden} in {path.name}"


CONFIGS = [ProfileConfig, PrepareConfig, SampleConfig, ShowConfig, EvalConfig]
CONFIGS += [ExportConfig, PushConfig, FinetuneConfig, ChatConfig, ServeConfig]
CONFIGS += [ExportConfig, PushConfig, FinetuneConfig, ChatConfig, InspectConfig]


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_option_is_read_and_documented(cls):
    code = "\n".join(p.read_text("utf-8") for p in MODULES if p.stem != "config")
    code += "\n".join(  # methods and helpers of config.py itself, but not the definitions
        line for line in (ROOT / "gpt2/config.py").read_text("utf-8").splitlines()
        if "option(" not in line and "_at_least" not in line
    )  # fmt: skip
    for name in flatten(cls()):
        assert re.search(rf"\.{name}\b|\"{name}\"", code), f"{name} is never read"


def test_every_option_has_a_help_text():
    for cls in CONFIGS:
        for f in fields(cls):
            inner = fields(f.type) if hasattr(f.type, "__dataclass_fields__") else [f]
            assert all(len(i.metadata["help"]) > 5 for i in inner)


def test_number_of_options_stays_small():
    assert len(flatten(TrainConfig())) <= 70


def test_files_and_functions_stay_short():
    for path in SOURCES:
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= 350, f"{path.name} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                doc = ast.get_docstring(node) or ""
                assert length - len(doc.splitlines()) <= 50, f"{path.name}: {node.name}"


def test_nothing_but_definitions_at_import_time():
    allowed = (
        ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign,
        ast.AnnAssign,
    )  # fmt: skip
    for path in SOURCES:
        for node in ast.parse(path.read_text("utf-8")).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            assert docstring or guard or isinstance(node, allowed), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["prepare", "--help"]])
def test_help_is_fast_and_without_torch(arguments):
    code = (
        "import sys; from gpt2.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    run_python("-c", code, *arguments)
    best = 9.0  # seconds of computing, which are all there are on an idle machine
    for _ in range(3):
        before = os.times()
        run_python("-m", "gpt2", *arguments)
        after = os.times()
        used = after.children_user + after.children_system
        best = min(best, used - before.children_user - before.children_system)
    assert best < 0.5


def test_pt_files_go_to_git_lfs():
    assert "*.pt filter=lfs" in (ROOT / ".gitattributes").read_text()


def test_recipes_are_short_and_valid():
    from gpt2.flags import parse

    recipes = sorted((ROOT / "configs").glob("*.toml"))
    assert recipes
    for path in recipes:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
        assert len(lines) <= 25, path.name
        parse(TrainConfig, [f"--config={path}"], "gpt2 train")
