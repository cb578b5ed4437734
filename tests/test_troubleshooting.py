"""docs/troubleshooting.md quotes messages that the sources hold, and messages name its headings.

A message is put together from f-strings and constants, some of them nested. `Messages.holds` finds
out whether a quoted line can come about so: the fixed text of a template must stand in the line,
and whatever fills a placeholder must be one word, or `…`, or again such a text.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from .conftest import ROOT
from .test_readme import FENCE, anchors, read

PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = sorted((ROOT / "gpt2").rglob("*.py"))
POINTER = re.compile(r"docs/troubleshooting\.md#([\w-]*)")
WHOLE, PART = 10, 2  # letters of fixed text that a message has at least, and that a filling has
FIELD = re.compile(r"\{\w+\}")  # of str.format
Template = tuple[str, ...]  # the fixed texts around the placeholders


def templates(source: str) -> Iterator[Template]:
    """Every string of a program but its docstrings."""
    tree = ast.parse(source)
    not_alone = {id(part) for node in ast.walk(tree) for part in _no_messages(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [""]
            for part in node.values:
                if isinstance(part, ast.Constant):
                    parts[-1] += part.value
                else:
                    parts.append("")
            yield tuple(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from () if id(node) in not_alone else (tuple(FIELD.split(node.value)),)


def _no_messages(node: ast.AST) -> list[ast.expr]:
    """Strings below a node that are its docstring, or only a piece of it."""
    if isinstance(node, ast.JoinedStr):
        return node.values
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
        return [node.body[0].value] if isinstance(node.body[0], ast.Expr) else []
    return []


def letters(template: Template) -> int:
    return sum(map(str.isalpha, "".join(template)))


class Messages:
    """The texts that the strings of some programs can make."""

    def __init__(self, sources: list[str]):
        found = {template for source in sources for template in templates(source)}
        self.templates = {t: letters(t) for t in found if letters(t) >= PART}
        self.holds = functools.cache(self._holds)

    def _holds(self, text: str, least: int = WHOLE) -> bool:
        """Whether a text can come about by a template with so many letters of its own."""
        return any(
            count >= least and all(part in text for part in template) and self._fits(template, text)
            for template, count in self.templates.items()
        )

    def _fits(self, template: Template, text: str) -> bool:
        """Whether the placeholders of a template can be filled so that it becomes the text."""
        first, *rest = template
        if not text.startswith(first):
            return False
        text = text[len(first) :]
        if not rest:
            return not text
        ends = [m.start() for m in re.finditer(f"(?={re.escape(rest[0])})", text)]
        ends = [len(text) - len(rest[0])] if len(rest) == 1 and text.endswith(rest[0]) else ends
        return any(
            self._is_filling(text[:end]) and self._fits(tuple(rest), text[end:]) for end in ends
        )

    def _is_filling(self, text: str) -> bool:
        return not re.search(r"\s", text) or self.holds(text, PART)


def quoted(page: str) -> list[str]:
    """The messages of a page: lines of its blocks of text, as they are without what `warn` adds."""
    lines = "".join(block for name, block in FENCE.findall(page) if name == "text").splitlines()
    return [line.removeprefix("warning: ") for line in lines]


def lost_anchors(sources: list[str], page: Path) -> set[str]:
    """Headings that the sources send a reader to, and that the page lacks."""
    return {a for source in sources for a in POINTER.findall(source)} - anchors(page)


def test_quoted_messages_are_printed_by_the_sources():
    messages = Messages([read(path) for path in SOURCES])
    found = quoted(read(PAGE))
    assert len(found) > 25
    assert [line for line in found if not messages.holds(line)] == []


def test_a_message_that_nothing_prints_is_found():
    messages = Messages(['''
def f(path, n, busy="the folder {folder} is in use by {holder}"):
    """The disk has too little space."""
    needs = f"needs {n} GiB, " if n else ""
    return f"checkpoint {path} not written: {'the disk is full'} ({needs}{n} GiB free)"
''', "x = f'{a} {b}'"])  # fmt: skip
    good = "checkpoint out/x not written: the disk is full (needs 2 GiB, 1 GiB free)"
    assert messages.holds(good)
    assert messages.holds("checkpoint … not written: … (1 GiB free)")
    assert messages.holds("the folder out is in use by me")
    for old, new in [("full", "filled"), ("not ", ""), ("needs 2", "need 2"), ("free)", "free")]:
        assert not messages.holds(good.replace(old, new))
    assert not messages.holds("The disk has too little space.")
    assert not messages.holds("some words")


def test_pointers_of_messages_lead_to_headings(tmp_path):
    sources = [read(path) for path in SOURCES]
    pointers = [anchor for source in sources for anchor in POINTER.findall(source)]
    assert len(set(pointers)) >= 6
    assert lost_anchors(sources, PAGE) == set()
    page = tmp_path / "a.md"
    page.write_text("## Disk full\n", "utf-8")
    assert lost_anchors(["x (docs/troubleshooting.md#disk-full)"], page) == set()
    assert lost_anchors(["x (docs/troubleshooting.md#disk)"], page) == {"disk"}


def test_every_entry_is_named_by_a_message():
    """But for those on a system or a place, of which no message is."""
    named = {anchor for path in SOURCES for anchor in POINTER.findall(read(path))}
    headings = re.findall(r"^## (.*)$", read(PAGE), re.MULTILINE)
    entries = {heading.lower().replace(" ", "-") for heading in headings}
    assert entries - named == {"windows", "notebooks"}


def test_messages_with_a_pointer_are_on_the_page():
    pointers = {anchor for line in quoted(read(PAGE)) for anchor in POINTER.findall(line)}
    named = {anchor for path in SOURCES for anchor in POINTER.findall(read(path))}
    assert named == pointers
