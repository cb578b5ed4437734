"""The chat page in a browser without a server: a canned answer, the real page, the real headers.

What a model would have to be trained to write, such as hostile Markdown, is written here.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gpt2.serve.page import chat_page
from gpt2.serve.security import HEADERS, page_policy

URL = "http://localhost:1/"  # a secure context, as 127.0.0.1 is; nothing is sent there
CARD = {"id": "tiny", "chat": "trained", "context_length": 1024, "max_new_tokens": 1024}
# (ratio, text) of every text that is seen with less contrast than WCAG's AA asks of small text
FAINT = """() => {
  const parse = color => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return {rgb: [r, g, b], alpha: a};
  };
  const light = rgb => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const found = parse(getComputedStyle(at).backgroundColor);
      if (found.alpha === 255) return found.rgb;
    }
    return [255, 255, 255];
  };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    const shown = walk.currentNode.data.trim() && element.checkVisibility() && !element.closest("script, :disabled");
    if (!shown) continue;
    seen += 1;
    const pair = [light(parse(getComputedStyle(element).color).rgb), light(ground(element))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) found.push([ratio.toFixed(2), element.className || element.tagName, walk.currentNode.data.slice(0, 30)]);
  }
  return {found, seen};
}"""  # noqa: E501


def events(text: str, tokens: int = 20) -> str:
    """The stream of an answer, a piece for every three characters."""
    pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
    found = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    found.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    found.append({"choices": [], "usage": {"completion_tokens": tokens}})
    return "".join(f"data: {json.dumps(each)}\n\n" for each in found) + "data: [DONE]\n\n"


@contextmanager
def canned_page(
    browser, answer: Callable[[dict], str], script: str = "", **context: Any
) -> Iterator:
    """A page that is served and answered from here; it has had no problem at the end.

    Args:
        browser: of playwright.
        answer: the server-sent events for the body of a request.
        script: runs before the page's own.
        context: of the browser: its window, colours and so on.
    """
    opened = browser.new_context(**context)
    html, problems = chat_page(), []
    headers = {**HEADERS, "content-security-policy": page_policy(html)}

    def route(found) -> None:
        path = found.request.url.removeprefix(URL)
        if path == "":
            found.fulfill(body=html, headers={**headers, "content-type": "text/html"})
        elif path == "v1/models":
            found.fulfill(json={"data": [CARD]})
        else:
            body = answer(found.request.post_data_json)
            found.fulfill(body=body, headers={"content-type": "text/event-stream"})

    opened.route("**/*", route)
    opened.add_init_script(script)
    page = opened.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: m.type == "error" and problems.append(m.text))
    page.goto(URL)
    until(page, "document.title === 'tiny'")
    yield page
    opened.close()
    assert problems == []


def until(page, expression: str) -> None:
    """Asks again and again from outside: the page's policy forbids what wait_for_function does."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.02)


def say(page, text: str) -> None:
    """Sends a message and waits for the answer."""
    page.fill("#input", text)
    page.press("#input", "Enter")
    until(page, "!running && Boolean(messages.at(-1)?.stats ?? messages.at(-1)?.error)")
