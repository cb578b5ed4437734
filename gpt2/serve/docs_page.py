"""/docs: the API on a page, made from its OpenAPI document, that loads nothing."""

import json
from html import escape
from typing import Any

from .page import assemble, read

CHAT = {"messages": [{"role": "user", "content": "What is the sea?"}], "max_tokens": 32}
TEXT = {"prompt": "Once upon a time", "max_tokens": 32}
PYTHON = {  # examples for OpenAI's client, with {model} for the model's name
    "/v1/chat/completions": "examples/chat_completions.txt",
    "/v1/completions": "examples/completions.txt",
    "/v1/models": "examples/models.txt",
}
BODIES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}


def template() -> str:
    """The page without its content: what the Content-Security-Policy is about."""
    return assemble(
        "docs.html", ["theme.css", "docs.css"], ("common.js", "theme.js", "docs.js")
    )  # fmt: skip


def docs_page(document: dict[str, Any], url: str, name: str) -> str:
    """The HTML of /docs.

    Args:
        document: of OpenAPI.
        url: of the server as the browser calls it, without a path; any text.
        name: of the model.
    """
    sections = [
        _section(document, path, method, found, _examples(path, url, name))
        for path, methods in document["paths"].items()
        for method, found in methods.items()
    ]
    links = "".join(f'<li><a href="#{_anchor(p)}">{escape(p)}</a></li>' for p in document["paths"])
    info = document["info"]
    content = (
        f"<h1>{escape(info['title'])}</h1><p>{escape(info['description'])} It is sent as "
        "<code>Authorization: Bearer KEY</code>; the examples take it from the environment, as "
        f"<code>GPT2_API_KEY</code>. Paths below <code>/v1</code> want it, this page does not.</p>"
        f'<ul class="links">{links}<li><a href="/openapi.json">openapi.json</a></li>'
        f'<li><a href="/">chat page</a></li></ul>{"".join(sections)}'
    )
    return template().replace("<main></main>", f"<main>{content}</main>")


def _examples(path: str, url: str, name: str) -> str:
    shown = url + path.replace("{model}", name)
    made = _example("curl", _curl(shown, BODIES.get(path), path != "/health"))
    if path not in PYTHON:
        return made
    client = read("examples/client.txt").format(url=json.dumps(f"{url}/v1"))
    return made + _example("python", client + read(PYTHON[path]).format(model=json.dumps(name)))


def _section(
    document: dict[str, Any], path: str, method: str, found: dict[str, Any], examples: str
) -> str:
    parts = [
        f'<section id="{_anchor(path)}"><h2><b>{method.upper()}</b> {escape(path)}</h2>',
        f"<p>{escape(found['summary'])}.</p>",
        examples,
    ]
    if "requestBody" in found:
        reference = found["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = document["components"]["schemas"][reference.rpartition("/")[2]]
        required = schema.get("required", ())
        rows = "".join(
            f"<tr><td><code>{escape(field)}</code>{' (required)' * (field in required)}</td>"
            f"<td>{escape(_kind(one))}</td><td>{escape(one['description'])}</td></tr>"
            for field, one in schema["properties"].items()
        )
        parts.append(
            '<details><summary>Fields</summary><div class="table" tabindex="0"><table><tr>'
            f"<th>Field</th><th>Value</th><th></th></tr>{rows}</table></div></details>"
        )
    return "".join(parts) + "</section>"


def _example(kind: str, code: str) -> str:
    return (
        f'<div class="code"><div class="code-head">{kind}</div><pre class="{kind}" tabindex="0" '
        f'role="region" aria-label="Example, {kind}"><code>{escape(code.strip())}</code></pre>'
        "</div>"
    )


def _curl(url: str, body: dict[str, Any] | None, key: bool) -> str:
    """A command of a shell; single quotes keep the shell from reading what is inside."""
    lines = ["curl -s " + _quoted(url)]
    if key:
        lines.append('-H "Authorization: Bearer $GPT2_API_KEY"')
    if body:
        lines += ["-H 'Content-Type: application/json'", "-d " + _quoted(json.dumps(body))]
    return " \\\n  ".join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _anchor(path: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in path).strip("-")


def _kind(field: dict[str, Any]) -> str:
    """A field's type and limits in words, without null and "none", which nearly all fields take."""
    if "enum" in field:
        return ", ".join(json.dumps(value) for value in field["enum"] if value is not None)
    if "anyOf" in field:
        return " or ".join(
            filter(None, (_kind(one) for one in field["anyOf"] if "const" not in one))
        )
    kind = field.get("type", "object" if "$ref" in field else "any")
    if kind == "array":
        return f"list of ({_kind(field['items'])})"
    if kind not in {"integer", "number"}:
        return "" if kind == "null" else kind
    low, high = field.get("minimum"), field.get("maximum")
    if low == -(2**63):
        return f"{kind} of 64 bits"
    return kind + f" from {low}" * (low is not None) + f" to {high}" * (high is not None)
