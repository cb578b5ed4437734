"""Hooks of mkdocs.yml: pages from the whole repository, and source files as pages with lines.

MkDocs reads one folder. Here a page has its path in the repository, so that the links of README.md,
docs/ and learn/ lead to one another as they are. A file of code that a page links to becomes a page
too, and a notebook a page with its formulas in MathML. Nothing is loaded from elsewhere.
"""

import json
import logging
import posixpath
import re
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

ROOT = Path(__file__).parent.parent
PAGES = ("*.md", "docs/**/*.md", "learn/**/*.md", "models/*.md", "dev/*.md")
COPIED = (".png", ".jsonl")
CODE = ".code.md"  # added to the name of a file whose page it is
# Messages are long lines. Line numbers are not copied with their code.
STYLE = ".language-text code { white-space: pre-wrap } "
STYLE += ".highlight .linenos { padding-right: 1.5em; opacity: 0.5; user-select: none }"
UNLINKED = ("learn/gpt2_in_one_file.py",)
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
FORMULA = re.compile(r"(\$\$?)([^$]+)\1")
CODE_SPAN = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
REMOTE = re.compile(r"<(?:script|img|iframe)\b[^>]*\bsrc=\W?(?:https?:)?//|"
                    r"<link\b[^>]*\bhref=\W?(?:https?:)?//|url\(\W?(?:https?:)?//|"
                    r"@import\W+(?:url\W+)?(?:https?:)?//")  # fmt: skip
log = logging.getLogger("mkdocs.hooks")


def pages() -> list[str]:
    """Paths of all pages from the root of the repository."""
    found = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def linked_paths(page: str, markdown: str) -> set[str]:
    """Paths from the root of the repository that a page with this text links to."""
    links = LINK.finditer(CODE_SPAN.sub("", markdown))
    return {posixpath.normpath(posixpath.join(page, "..", link[2])) for link in links}


def linked_files(page: str) -> set[str]:
    """Paths of the files of the repository that a page links to, other pages left out."""
    links = linked_paths(page, (ROOT / page).read_text("utf-8"))
    return {path for path in links if not path.endswith(".md") and (ROOT / path).is_file()}


def rewritten(markdown: str) -> str:
    """Markdown whose links to code lead to its page: `x.py#L3-L9` to `x.py.code.md#L-3`."""

    def link(match: re.Match) -> str:
        before, path, anchor, after = match.groups()
        if path.endswith((".md", *COPIED)):
            return match[0]
        line = re.match(r"#L(\d+)", anchor or "")
        return f"{before}{path}{CODE}{f'#L-{line[1]}' if line else ''}{after}"

    return _outside_code(markdown, lambda text: LINK.sub(link, text))


def code_page(path: str) -> str:
    """A file of code as a page; line 3 has the anchor `L-3`."""
    try:
        lexer = get_lexer_for_filename(path)
    except ClassNotFound:
        lexer = TextLexer()
    look = HtmlFormatter(cssclass="highlight", linenos="inline", lineanchors="L", wrapcode=True)
    code = highlight((ROOT / path).read_text("utf-8"), lexer, look)
    return (
        f"---\nsearch: {{exclude: true}}\n---\n\n# {posixpath.basename(path)}\n\n`{path}`\n\n{code}"
    )


def notebook_page(path: str) -> str:
    """The cells of a notebook as a page."""
    cells = []
    for cell in json.loads((ROOT / path).read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        is_code = cell["cell_type"] == "code"
        cells.append(f"```python\n{text}\n```" if is_code else _outside_code(text, with_mathml))
    return "\n\n".join(cells)


def with_mathml(text: str) -> str:
    """A text with its LaTeX formulas as MathML, which browsers show by themselves."""
    from latex2mathml.converter import convert

    def formula(match: re.Match) -> str:
        display = "block" if match[1] == "$$" else "inline"
        return convert(match[2].strip(), display=display)

    return FORMULA.sub(formula, text)


def _outside_code(text: str, change) -> str:
    """Applies a change to what is neither a code block nor a code span."""
    parts = CODE_SPAN.split(text)
    return "".join(part if n % 2 else change(part) for n, part in enumerate(parts))


def anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def on_config(config):
    """Gives headings the anchors that GitHub gives them, and leaves formulas in their lines."""
    from markdown.extensions import Extension

    class FormulasInLines(Extension):
        def extendMarkdown(self, md):
            md.block_level_elements.remove("math")

    config.mdx_configs["toc"]["slugify"] = lambda heading, _: anchor(heading)
    config.markdown_extensions.append(FormulasInLines())
    return config


def on_files(files, config):
    """Replaces the files of docs/ by pages, pictures and code of the whole repository."""
    from mkdocs.structure.files import File

    for file in [f for f in files if f.src_dir == config.docs_dir]:
        files.remove(file)
    files.append(File.generated(config, "site.css", content=STYLE))
    linked = set(UNLINKED).union(*map(linked_files, pages()))
    for path in [*pages(), *(p for p in linked if p.endswith(COPIED))]:
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    for path in sorted(p for p in linked if not p.endswith(COPIED)):
        content = notebook_page(path) if path.endswith(".ipynb") else code_page(path)
        files.append(File.generated(config, path + CODE, content=content))
    return files


def on_page_markdown(markdown, page, **_):
    """Lets links to code lead to its page."""
    return markdown if page.file.src_uri.endswith(CODE) else rewritten(markdown)


def on_post_build(config):
    """Warns, which fails a strict build, where the site would load something from elsewhere."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css") and (m := REMOTE.search(path.read_text("utf-8"))):
            log.warning("%s loads from elsewhere: %s", path.relative_to(config.site_dir), m[0])
