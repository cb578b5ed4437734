"""The hooks of `make docs`, and its links. The build itself runs beside the tests."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import yaml

from .conftest import ROOT

spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site_hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)


def in_nav(entry) -> set[str]:
    if isinstance(entry, str):
        return {entry}
    return set().union(*map(in_nav, entry.values() if isinstance(entry, dict) else entry))


def test_every_page_of_docs_is_in_the_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert site["strict"]
    assert site["theme"]["font"] is False
    wanted = {path for path in hooks.pages() if path.startswith("docs/") and path.count("/") == 1}
    wanted |= {f"learn/{p.name}{hooks.CODE}" for p in (ROOT / "learn").glob("chapter_*.ipynb")}
    assert len(wanted) > 20
    assert wanted <= in_nav(site["nav"])


def lost_links(page: str, text: str) -> set[str]:
    """What a page with this text links to in the repository and the site does not have."""
    found = hooks.linked_paths(page, text) - set(hooks.pages())
    return {p for p in found if p.endswith(".md") or not (ROOT / p).is_file()}


@pytest.mark.parametrize("page", hooks.pages())
def test_links_lead_to_something_on_the_site(page):
    assert lost_links(page, (ROOT / page).read_text("utf-8")) == set()


def test_a_link_to_nothing_on_the_site_is_found():
    text = "[a](data.md) [b](gone.md) [c](../findings/) [d](../models/box/README.md) [e](https://f)"
    assert lost_links("docs/a.md", text) == {"docs/gone.md", "findings", "models/box/README.md"}


def test_the_build_counts_warnings():
    """MkDocs counts the warnings that it logs: `--quiet` would turn `--strict` off."""
    lines = (ROOT / "Makefile").read_text("utf-8").splitlines()
    (build,) = [line for line in lines if "mkdocs build" in line]
    assert build.endswith("mkdocs build --strict")


def test_links_to_code_lead_to_its_page():
    text = "[a](../gpt2/cli.py#L12-L30) [b](x.md#y) ![c](d.png) [e](f.ipynb) [g](https://h/i.py)"
    told = "[a](../gpt2/cli.py.code.md#L-12) [b](x.md#y) ![c](d.png) [e](f.ipynb.code.md)"
    assert hooks.rewritten(text) == f"{told} [g](https://h/i.py)"
    in_code = "`[a](b.py)`\n\n```text\n[a](b.py)\n```\n"
    assert hooks.rewritten(in_code) == in_code
    assert "gpt2/train/step.py" in hooks.linked_files("docs/reading.md")
    assert "docs/results/demo-cpu/loss.png" in hooks.linked_files("README.md")


def test_a_line_of_code_has_an_anchor():
    page = hooks.code_page("gpt2/errors.py")
    lines = (ROOT / "gpt2/errors.py").read_text("utf-8").splitlines()
    assert f'id="L-{len(lines)}"' in page
    assert f'id="L-{len(lines) + 1}"' not in page
    assert "search: {exclude: true}" in page


def test_a_notebook_becomes_a_page(tmp_path, monkeypatch):
    pytest.importorskip("latex2mathml", reason="comes with the extra `docs`")
    cells = [
        {"cell_type": "markdown", "source": ["# T\n", "$a_1$, `$b$` and\n", "$$c$$\n"]},
        {"cell_type": "code", "source": ["d = '$e$'"]},
    ]
    (tmp_path / "x.ipynb").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    page = hooks.notebook_page("x.ipynb")
    assert page.count("<math") == 2
    assert "<msub>" in page
    assert "`$b$`" in page
    assert "```python\nd = '$e$'\n```" in page


@pytest.mark.parametrize(("html", "found"), [
    ('<script src="https://a/b.js"></script>', True),
    ("<script src=//a/b.js></script>", True),
    ('<link rel="stylesheet" href="https://a/b.css">', True),
    ('<img alt="" src="http://a/b.png">', True),
    ("<style>a{background:url(https://a/b.png)}</style>", True),
    ('<a href="https://a/b">c</a> <script src="../d.js"></script>', False),
])  # fmt: skip
def test_what_is_loaded_from_elsewhere_is_found(html, found, tmp_path, caplog):
    (tmp_path / "x.html").write_text(html)
    hooks.on_post_build(SimpleNamespace(site_dir=str(tmp_path)))
    assert ("loads from elsewhere" in caplog.text) is found
