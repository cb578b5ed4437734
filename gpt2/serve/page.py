"""The chat page: one HTML file, put together from its parts, that loads nothing."""

from pathlib import Path

ASSETS = Path(__file__).with_name("assets")
SCRIPTS = ("common.js", "theme.js", "markdown.js", "api.js", "conversations.js", "chat.js")


def chat_page() -> str:
    """The HTML of the chat page."""
    return assemble("chat.html", ["theme.css", "chat.css"], SCRIPTS)


def assemble(name: str, styles: list[str], scripts: tuple[str, ...]) -> str:
    """A page with its styles and scripts inside, in the order given.

    Args:
        name: the page, with an empty `<style>` and an empty `<script>`.
        styles: files of CSS.
        scripts: files of JavaScript; together they are one script, so they share their names.
    """
    html = read(name)
    for tag, files in (("style", styles), ("script", scripts)):
        inside = "\n".join(map(read, files))
        html = html.replace(f"<{tag}></{tag}>", f"<{tag}>\n{inside}</{tag}>")
    return html


def read(name: str) -> str:
    """The text of a file of the pages."""
    return (ASSETS / name).read_text("utf-8")
