"""The chat page in a real browser, headless, as a person uses it."""

import json
import time

import httpx
import pytest

from gpt2.config.model import GPT2Config
from gpt2.serve.page import chat_page
from gpt2.serve.security import page_policy

from ..browser import chromium
from .running import SHAPE, Server, save_model

ENDLESS = 8000  # tokens: some ten seconds, time enough to stop an answer that is being written
EVIL = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script>&amp;'


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "m.pt"
    save_model(path, GPT2Config(**{**SHAPE, "block_size": 8192}))
    running = Server(path, "--name=tiny", "--chat=True", fork=True)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    opened = context.new_page()
    opened.problems = []
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.on("console", lambda m: m.type == "error" and opened.problems.append(m.text))
    opened.requested = []
    opened.on("request", lambda request: opened.requested.append(request.url))
    opened.goto(server.url)
    until(opened, "document.title === 'tiny'")
    yield opened
    context.close()


def say(page, text: str, tokens: int = 24):
    page.evaluate(f"settings.max_tokens = {tokens}; settings.temperature = 0")
    page.fill("#input", text)
    page.press("#input", "Enter")


def until(page, expression: str):
    """Asks again and again from outside: the page's policy forbids what wait_for_function does."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.02)


def wait_for_answer(page):
    until(page, "!running && Boolean(messages.at(-1)?.stats)")


def test_the_page_comes_with_strict_headers_and_nothing_from_elsewhere(server):
    answer = httpx.get(server.url)
    policy = answer.headers["content-security-policy"]
    assert policy == page_policy(chat_page())
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("sha256-") == 2
    assert answer.headers["x-content-type-options"] == "nosniff"
    html = answer.text
    assert " src=" not in html
    assert "innerHTML" not in html
    assert " style=" not in html


def test_a_message_is_answered_and_answered_again(page, server):
    say(page, "Hello")
    wait_for_answer(page)
    first = page.evaluate("messages[1].content")
    assert first
    assert page.inner_text(".assistant .text").strip() == first.strip()
    assert "tokens/s" in page.inner_text(".assistant .under")
    page.evaluate("settings.temperature = 2; settings.top_k = 0")
    page.click("[aria-label='Another answer']")
    wait_for_answer(page)
    assert page.evaluate("messages.length") == 2
    assert page.evaluate("messages[1].content") != first
    page.reload()  # history is kept in the page
    page.wait_for_selector(".assistant .text")
    page.click("[aria-label='Edit']")
    assert page.input_value("#input") == "Hello"
    page.click("#new")
    page.wait_for_selector("#empty")
    assert page.problems == []
    assert all(url.startswith((server.url, "data:")) for url in page.requested)


def test_an_answer_streams_and_stops(page, server):
    say(page, "Hello", tokens=ENDLESS)
    until(page, "messages.at(-1).content.length > 5 && Boolean(running)")  # while it is written
    page.press("body", "Escape")
    wait_for_answer(page)
    assert page.evaluate("messages.at(-1).stats") == "stopped"
    server.wait_until_idle()
    say(page, "And again", tokens=ENDLESS)
    page.wait_for_selector("#stop:visible")
    page.click("#stop")
    page.wait_for_selector("#send:visible")
    server.wait_until_idle()
    assert server.health()["requests"]["cancelled"] >= 1


def test_text_of_person_and_model_never_becomes_html(page):
    """The answer comes from the network, so it can be whatever a model could write."""
    events = [
        {"choices": [{"index": 0, "delta": {"content": EVIL}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"completion_tokens": 9}},
    ]
    body = "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        body=body, headers={"content-type": "text/event-stream"}))  # fmt: skip
    say(page, EVIL)
    wait_for_answer(page)
    assert page.inner_text(".user .text") == EVIL
    assert page.inner_text(".assistant .text") == EVIL
    assert page.locator("#log img, #log script").count() == 0
    assert page.evaluate("window.harmed") is None
    # and if it did, the policy would keep it from running
    page.evaluate(f"document.getElementById('log').innerHTML = {json.dumps(EVIL)}")
    page.wait_for_timeout(300)
    assert page.evaluate("window.harmed") is None


def test_on_a_phone_nothing_is_too_wide_and_settings_are_a_sheet(browser, server):
    context = browser.new_context(viewport={"width": 360, "height": 640}, has_touch=True,
                                  is_mobile=True, color_scheme="dark")  # fmt: skip
    page = context.new_page()
    page.goto(server.url)
    until(page, "document.title === 'tiny'")
    page.evaluate("settings.max_tokens = 8")
    page.fill("#input", "A_long_word_without_a_space" * 10)
    page.tap("#send")
    wait_for_answer(page)
    page.tap("#gear")
    assert page.is_visible("#temperature")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    sheet = page.locator("#settings").bounding_box()
    assert sheet["width"] == 360
    assert sheet["y"] > 100
    page.mouse.click(180, 40)  # beside the sheet
    assert page.is_hidden("#settings")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(22, 25, 23)"
    context.close()


def test_settings_are_sent_and_kept_and_a_text_is_continued(page):
    bodies = []
    page.on("request", lambda r: r.method == "POST" and bodies.append(json.loads(r.post_data)))
    page.click("#gear")
    page.fill("#system", "Be brief.")
    page.fill("#seed", "7")
    page.fill("#max_tokens", "16")
    page.fill("#temperature", "0.5")
    page.fill("#input", "Hi")
    page.click("#send")
    wait_for_answer(page)
    sent = bodies[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["seed"], sent["max_tokens"], sent["temperature"]) == (7, 16, 0.5)
    page.reload()
    until(page, "document.title === 'tiny'")
    page.click("#to-text")
    page.fill("#paper", "Once upon a time")
    page.press("#paper", "Control+Enter")
    until(page, "!running && pieces.length === 1")
    assert bodies[1]["max_tokens"] == 16
    written = page.input_value("#paper")
    assert written.startswith("Once upon a time")
    assert len(written) > len("Once upon a time")
    page.click("#undo")
    assert page.input_value("#paper") == "Once upon a time"


def test_errors_are_said_and_tried_again(page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "Hello", tokens=8)
    page.wait_for_selector(".note.bad")
    assert "does not answer" in page.inner_text(".note.bad")
    page.unroute("**/v1/chat/completions")
    page.click("text=Try again")
    wait_for_answer(page)
    assert page.evaluate("messages.length") == 2


def test_the_page_asks_for_a_key_and_says_that_a_model_cannot_chat(browser, server, tmp_path):
    save_model(tmp_path / "base.pt")
    other = Server(tmp_path / "base.pt", key="secret", fork=True)
    try:
        page = browser.new_page()
        page.goto(other.url)
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        until(page, "document.title === 'base'")
        assert page.is_visible("#paper")  # a model without conversations continues texts
        page.click("#to-chat")
        assert "not been trained on conversations" in page.inner_text("#base")
        page.close()
    finally:
        other.stop()
