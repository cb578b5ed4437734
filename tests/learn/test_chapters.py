"""Chapters run as notebooks, are what their `.py` says, and are small."""

import ast
import json
import os
import re
import subprocess

import pytest

from ..conftest import ROOT

pytest.importorskip("jupytext")  # learn.notebooks needs it; extra `learn`
pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
jupyter = pytest.importorskip("jupyter_client.manager")  # nbclient needs it
from learn import notebooks  # noqa: E402

pytestmark = pytest.mark.long

SOURCES = notebooks.sources()
NAMES = [source.stem for source in SOURCES]
SETUP = re.compile(r"^# %%\n# Cell 1 .*?(?=^# %%)", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all chapters, as importing torch takes longer than some of them."""
    folder = str(tmp_path_factory.mktemp("jupyter"))
    environment = {**os.environ, "LEARN_FAST": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"IPYTHONDIR": folder, "JUPYTER_RUNTIME_DIR": folder, "MPLCONFIGDIR": folder}
    manager, client = jupyter.start_new_kernel(
        kernel_name="python3", env=environment, cwd=str(ROOT / "learn")
    )
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_chapter_runs(source, kernel):
    manager, client = kernel
    notebook = notebooks.notebook(source)
    executor = nbclient.NotebookClient(notebook, timeout=240)
    executor.km, executor.kc = manager, client
    client.execute_interactive("%reset -f", output_hook=lambda message: None)
    for at, cell in enumerate(notebook.cells):
        executor.execute_cell(cell, at)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs), "no picture"
    last = notebook.cells[-1].outputs
    printed = "".join(out.get("text", "") for out in last)
    assert "to do" in printed  # the exercises of the reader are not done yet
    assert "wrong" not in printed


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_notebook_is_made_of_its_source(source):
    """`python -m learn.notebooks` writes it."""
    path = source.with_suffix(".ipynb")
    text = path.read_text("utf-8")
    assert text == notebooks.text_of(source)
    assert len(text) < 60_000
    cells = json.loads(text)["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert cells[0]["source"][0].startswith(f"# {source.stem.split('_')[1]}. ")
    assert f"check({source.stem.split('_')[1]})" in "".join(cells[-1]["source"])


def test_each_notebook_has_a_source():
    assert [p.stem for p in sorted((ROOT / "learn").glob("*.ipynb"))] == NAMES
    assert [int(name.split("_")[1]) for name in NAMES] == list(range(1, len(NAMES) + 1))


def test_cell_1_installs_the_project_where_it_is_missing(monkeypatch):
    """The same in all chapters."""
    cells = {SETUP.search(source.read_text("utf-8"))[0] for source in SOURCES}
    (cell,) = cells
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda words, check: calls.append(words))
    monkeypatch.setattr("sys.path", [])
    exec(cell, {})
    assert not calls  # it is installed here
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(cell, {})
    assert calls[0][:3] == ["git", "clone", "--depth=1"]
    assert calls[1][1:4] == ["-m", "pip", "install"]
    assert calls[1][-1] == calls[0][-1] == "gpt2-project"


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_every_function_of_a_chapter_is_called(source):
    """No chapter shows code that does not run."""
    tree = ast.parse(source.read_text("utf-8"))
    defined = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    named |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert set(defined) - named - {"__init__", "forward"} == set()
