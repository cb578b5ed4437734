"""The rules of docs/architecture.md, each as a test that fails when it is broken.

A rule is a function from a package's folder to a list of violations. The last test plants one
violation of each rule in a small package and sees it caught: a rule that checks nothing would pass.
"""

import ast
import os
import re
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from gpt2.config.command_line import parse
from gpt2.config.commands import (
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
from gpt2.config.finetune import FinetuneConfig
from gpt2.config.options import flatten
from gpt2.config.sweep import SweepConfig
from gpt2.config.train import TrainConfig

from .conftest import ROOT, run_python

PACKAGE = ROOT / "gpt2"
# A wing, or a module at the top, imports only from lines below its own, and from its own wing.
ORDER = (
    "__main__",
    "cli",
    "serve commands",
    "api",
    "train",
    "checkpoint evaluate prepare generate interpret",
    "model data huggingface report",
    "kernels distributed tokenizer files",
    "config paths",
    "untrusted",
    "errors",
)
OWNERS = {  # pattern in the code -> the modules that may hold it
    r"torch\.distributed|\bdist\.": r"distributed/.*",
    r"os\.environ|os\.getenv": r"distributed/.*",
    r"torch\.(save|load)\(": r"checkpoint/.*",
    r"\bjson\.loads?\(|tomllib\.": r"untrusted/parsing",
    r"(import|from) (tiktoken|gigatoken)\b": r"tokenizer|prepare/fast_tokenizer",
    r"\bprint\(": r"report/console|cli|commands/terminal",
    r"20240520": r"data/shards",
    r"(import|from) triton\b": r"kernels/triton_.*",
    r"os\.(replace|rename|fsync)\(": r"files",
    r"\.backward\(": r"train/step",
    r"tokens_per_step\s*=|def tokens_per_step": r"config/train",
}
PICKLES = ("weights_only=False", "pickle.load", "allow_pickle", "eval(", "exec(")
CORE = (
    "tokenizer",
    "data/shards",
    "data/sequence_order",
    "data/loader",
    "model/gpt",
    "model/kv_cache",
    "train/setup",
    "train/schedules",
    "train/optimizer",
    "train/step",
    "train/loop",
    "checkpoint/model_file",
    "generate/sampling",
    "generate/stream",
)
CORE_LINES = 2500
LONG_FILE, LONG_FUNCTION = 400, 50  # lines
WHY_LONG = "Longer than 400 lines because"  # in the docstring of such a file


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its path without the suffix, as "train/step"."""
    return {
        path.relative_to(package).with_suffix("").as_posix(): path
        for path in sorted(package.rglob("*.py"))
        if path.name != "__init__.py"
    }


@cache
def syntax(text: str) -> ast.Module:
    """The tree of a source text, which several rules read and none changes."""
    return ast.parse(text)


def imports_of(path: Path, package: Path) -> set[str]:
    """Modules of the package that a file imports, by imports of any level and at any depth."""
    found = set()
    here = path.relative_to(package.parent).parent.parts
    for node in ast.walk(syntax(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {_module(package, tuple(alias.name.split("."))) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found |= {_module(package, (*base, alias.name)) for alias in node.names}
    return found - {""}


def _module(package: Path, parts: tuple[str, ...]) -> str:
    """The module that a dotted name is, or is in; "" outside of the package."""
    if parts[:1] != (package.name,):
        return ""
    for end in range(len(parts), 1, -1):
        if package.joinpath(*parts[1:end]).with_suffix(".py").exists():
            return "/".join(parts[1:end])
    return ""


def upward_imports(package: Path, order=ORDER) -> list[str]:
    """Imports from a wing that is not below, and wings that the order does not name."""
    floor = {name: -line for line, names in enumerate(order) for name in names.split()}
    wrong = []
    for name, path in modules(package).items():
        wing = name.split("/")[0]
        if wing not in floor:
            wrong.append(f"{name}: its wing has no place in the order")
            continue
        for other in imports_of(path, package):
            theirs = other.split("/")[0]
            if theirs != wing and floor.get(theirs, 1) >= floor[wing]:
                wrong.append(f"{name} imports {other}, which is not below it")
    return wrong


def import_circles(package: Path) -> list[str]:
    """Modules that import one another, however far around."""
    graph = {name: imports_of(path, package) for name, path in modules(package).items()}
    while free := [m for m, imported in graph.items() if not imported & (set(graph) - {m})]:
        for module in free:
            del graph[module]
    return [f"{name} is in a circle of imports" for name in graph]


def strayed_concerns(package: Path, owners=OWNERS) -> list[str]:
    """Code outside of the module that owns its concern."""
    wrong = []
    for name, path in modules(package).items():
        code = _without_docstrings(path)  # comments are gone as well
        for pattern, owner in owners.items():
            if re.search(pattern, code, re.MULTILINE) and not re.fullmatch(owner, name):
                wrong.append(f"{pattern} in {name}")
    return wrong


def _without_docstrings(path: Path) -> str:
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                node.body = body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def trusted_pickles(package: Path) -> list[str]:
    """Calls that execute what a file says."""
    return [
        f"{forbidden} in {path.name}"
        for path in _sources(package)
        for forbidden in PICKLES
        if re.search(rf"(?<![\w.]){re.escape(forbidden)}", path.read_text("utf-8"))
    ]


def _sources(package: Path) -> list[Path]:
    """The package, the scripts beside it, and the benchmarks."""
    beside = [*package.parent.glob("*.py"), *(package.parent / "benchmarks").glob("*.py")]
    return sorted(package.rglob("*.py")) + sorted(beside)


def long_files(package: Path) -> list[str]:
    """Files over 400 lines that do not say why in their docstring."""
    wrong = []
    for path in _sources(package):
        text = path.read_text("utf-8")
        doc = " ".join((ast.get_docstring(syntax(text)) or "").split())
        if len(text.splitlines()) > LONG_FILE and WHY_LONG not in doc:
            wrong.append(f"{path.name} has over {LONG_FILE} lines and does not say why")
    return wrong


def long_functions(package: Path) -> list[str]:
    """Functions of over 50 lines, their docstring left out."""
    wrong = []
    for path in _sources(package):
        for node in ast.walk(syntax(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                length -= len((ast.get_docstring(node) or "").splitlines())
                if length > LONG_FUNCTION:
                    wrong.append(f"{path.name}: {node.name} has {length} lines")
    return wrong


def work_at_import_time(package: Path) -> list[str]:
    """Statements of a module that are neither definitions nor imports."""
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
    )
    wrong = []
    for path in _sources(package):
        for node in syntax(path.read_text("utf-8")).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            if not (docstring or guard or isinstance(node, allowed)):
                wrong.append(f"{path.name}:{node.lineno} runs when it is imported")
    return wrong


def crowded_top(package: Path) -> list[str]:
    """More than 8 modules at the top, or a sub-package whose `__init__` does something."""
    top = [name for name in modules(package) if "/" not in name]
    wrong = [f"{len(top)} modules at the top"] if len(top) > 8 else []
    for path in package.rglob("__init__.py"):
        if path.parent != package and path.read_text("utf-8").strip():
            wrong.append(f"{path.parent.name}/__init__.py is not empty")
    return wrong


def large_core(package: Path) -> list[str]:
    """The files that docs/reading.md walks through, when they are too many, too long or gone."""
    found = modules(package)
    gone = [f"{name} of the core is not there" for name in CORE if name not in found]
    lines = sum(len(found[n].read_text("utf-8").splitlines()) for n in CORE if n in found)
    wrong = gone + ([f"the core has {lines} lines"] if lines > CORE_LINES else [])
    return wrong + ([f"the core has {len(CORE)} files"] if len(CORE) > 14 else [])


def misplaced_tests(package: Path) -> list[str]:
    """Tests in a wing's folder that are not named after a module of that wing."""
    found = modules(package)
    tests = package.parent / "tests"
    wrong = []
    for path in sorted(tests.rglob("test_*.py")):
        wing, name = path.parent.name, path.stem.removeprefix("test_")
        of_no_wing = (package.parent / wing).is_dir() and not (package / wing).is_dir()
        if path.parent == tests or of_no_wing:  # such as learn/, which stands beside the package
            continue
        if not any(f"{wing}/{name}".startswith(module) for module in found):
            wrong.append(f"tests/{wing}/{path.name} is about no module of {wing}")
    return wrong


RULES: tuple[Callable[[Path], list[str]], ...] = (
    upward_imports,
    import_circles,
    strayed_concerns,
    long_files,
    long_functions,
    work_at_import_time,
    crowded_top,
    large_core,
    misplaced_tests,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    assert len(modules(PACKAGE)) > 60  # the rules are looking at the package
    assert rule(PACKAGE) == []


@pytest.mark.fault(11, "search of all sources for loaders that execute")
def test_pickles_are_never_trusted():
    assert trusted_pickles(PACKAGE) == []


PLANTED = {  # rule -> files that break it once, and what it says of them
    upward_imports: [
        ({"model/a.py": "from ..train.step import x"}, "model/a imports train/step"),
        ({"model/a.py": "from gpt2.train import step"}, "model/a imports train/step"),
        ({"model/a.py": "import gpt2.train.step"}, "model/a imports train/step"),
        ({"model/a.py": "def f():\n    from .. import api"}, "model/a imports api"),
        ({"model/a.py": "from ..data import loader"}, "model/a imports data/loader"),
        ({"attic/a.py": ""}, "attic/a: its wing has no place"),
    ],
    import_circles: [
        ({"train/a.py": "from . import b", "train/b.py": "from .a import x"}, "train/a is in a"),
    ],
    strayed_concerns: [
        ({"model/a.py": "import torch.distributed as d"}, "torch"),
        ({"train/a.py": "import os\nx = os.environ"}, "os"),
        ({"train/a.py": "torch.save(1, 2)"}, "torch"),
        ({"data/a.py": "import tiktoken"}, "tiktoken"),
        ({"data/a.py": "print(1)"}, "print"),
        ({"data/a.py": "json.loads(x)"}, "json"),
        ({"report/a.py": "import json\ndef f():\n    return json.load(x)"}, "json"),
        ({"config/a.py": "tomllib.load(x)"}, "tomllib"),
        ({"prepare/a.py": "MAGIC = 20240520"}, "20240520"),
        ({"model/a.py": "def f():\n    import triton.language as tl"}, "triton"),
        ({"train/a.py": "os.replace(a, b)"}, "os"),
        ({"evaluate/a.py": "loss.backward()"}, "backward"),
        ({"train/a.py": "tokens_per_step = 1"}, "tokens_per_step"),
    ],
    trusted_pickles: [({"model/a.py": f"x = {call}"}, f"{call} in a.py") for call in PICKLES],
    long_files: [({"model/a.py": "x = 1\n" * 401}, "a.py has over")],
    long_functions: [({"model/a.py": "def f():\n" + "    x = 1\n" * 50}, "a.py: f has 51")],
    work_at_import_time: [({"model/a.py": "x = 1\nx.y()"}, "a.py:2 runs")],
    crowded_top: [
        ({f"{n}.py": "" for n in "abcdefg"}, "9 modules"),
        ({"model/__init__.py": "x = 1"}, "model/__init__.py is not empty"),
    ],
    large_core: [
        ({"train/loop.py": "x = 1\n" * 2501}, "the core has 25"),
        ({"train/loop.py": None}, "train/loop of the core is not there"),
    ],
    misplaced_tests: [({"../tests/model/test_b.py": ""}, "tests/model/test_b.py is about no")],
}


def test_planted_violations_are_caught(tmp_path):
    assert {*RULES, trusted_pickles} == set(PLANTED)
    for number, (rule, cases) in enumerate(PLANTED.items()):
        for case, (files, said) in enumerate(cases):
            package = tmp_path / f"{number}_{case}" / "gpt2"
            clean = {f"{name}.py": "x = 1\n" for name in (*CORE, "api")}
            for name, text in clean.items():
                (package / name).parent.mkdir(parents=True, exist_ok=True)
                (package / name).write_text(text)
            (package / "train/__init__.py").write_text("")
            assert rule(package) == [], rule.__name__
            for name, text in files.items():
                path = package / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True) if text is None else path.write_text(text)
            found = rule(package)
            assert any(line.startswith(said) or said in line for line in found), (said, found)


CONFIGS = [TrainConfig, FinetuneConfig, ProfileConfig, PrepareConfig, SampleConfig, ShowConfig]
CONFIGS += [
    AverageConfig,
    CompareConfig,
    DoctorConfig,
    EvalConfig,
    ExportConfig,
    PushConfig,
    ChatConfig,
    ServeConfig,
    InspectConfig,
    PlotConfig,
    SweepConfig,
]


def options_never_read(package: Path, names) -> list[str]:
    """Options that no code reads: neither an attribute nor a key, their definition left out."""
    code = "\n".join(
        _without_definitions(path.read_text("utf-8")) for path in modules(package).values()
    )
    return [n for n in names if not re.search(rf"\.{n}\b|['\"]{n}['\"]", code)]


@cache
def _without_definitions(text: str) -> str:
    """Without the fields of dataclasses, and without checks, which read an option for its range."""

    class Prune(ast.NodeTransformer):
        def visit_AnnAssign(self, node):
            call = node.value
            is_option = isinstance(call, ast.Call) and ast.unparse(call.func) == "option"
            return ast.Pass() if is_option else node

        def visit_Expr(self, node):
            call = node.value
            is_check = isinstance(call, ast.Call) and ast.unparse(call.func) == "at_least"
            return ast.Pass() if is_check else node

    return ast.unparse(ast.fix_missing_locations(Prune().visit(ast.parse(text))))


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_option_is_read(cls):
    assert options_never_read(PACKAGE, flatten(cls())) == []


def test_an_option_that_is_only_defined_and_checked_is_caught(tmp_path):
    (tmp_path / "a.py").write_text(
        "class C:\n    unused: int = option(0, 'unused')\n    used: int = option(0, 'used')\n"
        "    def __post_init__(self):\n        at_least(0, unused=self.unused)\n"
        "def f(c):\n    return c.used\n"
    )
    assert options_never_read(tmp_path, ["unused", "used"]) == ["unused"]


def test_every_option_has_a_help_text():
    for cls in CONFIGS:
        for f in fields(cls):
            inner = fields(f.type) if hasattr(f.type, "__dataclass_fields__") else [f]
            assert all(len(i.metadata["help"]) > 5 for i in inner)


def test_number_of_options_stays_small():
    assert len(flatten(TrainConfig())) <= 77


WITHOUT_TORCH = [
    ["-m", "gpt2", "--help"],
    ["-m", "gpt2", "train", "--help"],
    ["-m", "gpt2", "prepare", "--help"],
    ["-m", "gpt2", "train", "--grad_acum_steps=8"],
    ["train_gpt2.py", "--help"],
    ["train_gpt2.py", "--grad_acum_steps=8"],
    ["train_gpt2.py", "--batch_size=many"],
    ["fineweb.py", "--help"],
    ["fineweb.py", "--shard_token=1"],
]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", WITHOUT_TORCH, ids=" ".join)
def test_help_and_typos_are_answered_fast_and_without_torch(arguments):
    heavy = run_python("-X", "importtime", *arguments, check=False, real=True).stderr
    imported = {line.rpartition("|")[2].strip() for line in heavy.splitlines() if "|" in line}
    assert "gpt2.cli" in imported
    assert not imported & {"torch", "numpy"}
    best = 9.0  # seconds of computing, which are all there are on an idle machine
    for _ in range(3):
        before = os.times()
        done = run_python(*arguments, check=False, real=True)
        after = os.times()
        assert done.returncode == (0 if "--help" in arguments else 2)
        used = after.children_user + after.children_system
        best = min(best, used - before.children_user - before.children_system)
        if best < 0.5:
            return
    pytest.fail(f"{best:.2f} s of computing, at best of three")


@pytest.mark.slow
@pytest.mark.parametrize("use", [
    "import gpt2.train.loop",
    "from gpt2 import GPT2; GPT2(n_layer=1, n_head=2, n_embd=8, block_size=8).generate([1], 2)",
])  # fmt: skip
def test_gpt2_imports_no_code_of_switches(use):
    code = (
        f"import sys\n{use}\n"
        "print(*(m for m in sys.modules if m.startswith(('gpt2.model', 'torch.nn.attention'))))"
    )
    imported = run_python("-c", code, real=True).stdout.split()
    assert "gpt2.model.gpt" in imported
    assert not {"gpt2.model.modern", "gpt2.model.rotary", "gpt2.model.attention_masks"} & set(
        imported
    )
    assert "torch.nn.attention.flex_attention" not in imported


def test_pt_files_go_to_git_lfs():
    assert "*.pt filter=lfs" in (ROOT / ".gitattributes").read_text()


def test_recipes_are_short_and_valid():
    recipes = sorted((ROOT / "configs").glob("*.toml"))
    assert recipes
    for path in recipes:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
        assert len(lines) <= 25, path.name
        parse(TrainConfig, [f"--config={path}"], "gpt2 train")
