"""docs/reading.md: its links lead to the lines that they name, in the order of the core.

`python -m tests.test_reading` writes today's line numbers into the page.
"""

import ast
import re

from .conftest import ROOT
from .test_architecture import CORE

PAGE = ROOT / "docs" / "reading.md"
FILE = re.compile(r"\*\*gpt2/([\w/]+)\.py\.\*\*")
LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./gpt2/([\w/]+)\.py#L(\d+)-L(\d+)\)")


def lines_of(module: str, name: str) -> tuple[int, int]:
    """First and last line of a function, class or method."""
    scope = ast.parse((ROOT / "gpt2" / f"{module}.py").read_text("utf-8"))
    for part in name.split("."):
        scope = next(node for node in scope.body if getattr(node, "name", None) == part)
    return min([scope.lineno, *(d.lineno for d in scope.decorator_list)]), scope.end_lineno


def test_the_page_walks_through_the_core():
    assert FILE.findall(PAGE.read_text("utf-8")) == list(CORE)


def test_links_lead_to_the_lines_of_what_they_name():
    links = LINK.findall(PAGE.read_text("utf-8"))
    assert {module for _, module, *_ in links} == set(CORE)
    for name, module, first, last in links:
        assert (int(first), int(last)) == lines_of(module, name), f"{module}.py: {name}"


def update() -> None:
    """Writes the line numbers; `@name@` becomes a link into the file that was named before it."""
    module, lines = "", []
    for line in PAGE.read_text("utf-8").splitlines(keepends=True):
        module = found[1] if (found := FILE.search(line)) else module

        def link(name: str, module: str = module) -> str:
            first, last = lines_of(module, name)
            return f"[`{name}`](../gpt2/{module}.py#L{first}-L{last})"

        known = LINK.sub(lambda m, link=link: link(m[1], m[2]), line)
        lines.append(re.sub(r"@([\w.]+)@", lambda m, link=link: link(m[1]), known))
    PAGE.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    update()
