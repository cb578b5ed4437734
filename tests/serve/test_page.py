"""The chat page with canned answers: what it shows, keeps and exports."""

import json
from pathlib import Path

import pytest

from gpt2.config.model import IGNORE
from gpt2.data.conversations import open_conversations
from gpt2.tokenizer import gpt2_tokenizer

from ..browser import chromium
from .canned import FAINT, canned_page, events, say, until

FAILED = 'data: {"error": {"message": "the server is shutting down"}}\n\n'


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


def test_a_short_answer_has_no_rate(browser):
    """Two tokens that arrive together would make thousands of tokens/s."""
    tokens = iter((1, 9, 10))
    with canned_page(browser, lambda _: events("Yes", next(tokens))) as page:
        for count in ("1 token", "9 tokens", "10 tokens"):
            say(page, "Hello")
            stats = page.inner_text(".assistant:last-child .under span")
            assert stats.split(" · ")[0] == count
            assert ("tokens/s" in stats) is (count == "10 tokens")


def saved(page, button: str) -> tuple[str, str]:
    """(name, text) of the file that a button downloads."""
    with page.expect_download() as download:
        page.click(button)
    return download.value.suggested_filename, Path(download.value.path()).read_text("utf-8")


def titles(page) -> list[str]:
    return page.locator("#list .title").all_inner_texts()


def test_conversations_are_kept_renamed_deleted_and_survive_a_reload(browser):
    with canned_page(browser, lambda body: events(f"To {body['messages'][-1]['content']}")) as page:
        page.click("#to-list")
        assert page.is_visible("#none")
        say(page, "First\nquestion")
        page.click("#new")
        say(page, "Second")
        assert titles(page) == ["Second", "First"]
        page.reload()
        until(page, "messages.length === 2")
        assert page.inner_text(".assistant .text") == "To Second"
        page.click("#to-list")
        page.click("text=First >> nth=0")
        assert page.inner_text(".assistant .text") == "To First\nquestion"
        assert page.get_attribute("#list [aria-current]", "title") == "First"
        page.click("[aria-label=Rename]")
        page.fill("[aria-label=Title]", "<b>Mine</b>")
        page.press("[aria-label=Title]", "Enter")
        assert titles(page) == ["Second", "<b>Mine</b>"]
        say(page, "More")  # the newest is first, and keeps its name
        assert titles(page) == ["<b>Mine</b>", "Second"]
        page.click("[aria-label=Rename]")
        page.fill("[aria-label=Title]", "Other")
        page.press("[aria-label=Title]", "Escape")
        page.click("[aria-label=Delete]")
        assert titles(page) == ["Second"]
        assert page.is_visible("#empty")
        page.click("text=Undo")
        assert titles(page) == ["<b>Mine</b>", "Second"]
        page.click("[aria-label=Delete]")
        page.reload()
        until(page, "Boolean(model)")
        page.click("#to-list")
        assert titles(page) == ["Second"]


def test_an_exported_conversation_is_data_for_finetuning(browser, tmp_path):
    answers = iter((events("Blue, **often**."), events("Grey."), FAILED))
    with canned_page(browser, lambda _: next(answers), accept_downloads=True) as page:
        page.evaluate("settings.system = 'Be brief.'")
        say(page, "The sky: what colour?")
        say(page, "And the sea?")
        page.click("#to-list")
        name, text = saved(page, "text=JSON >> nth=0")
        assert name == "The-sky-what-colour.json"
        said = ["Be brief.", "The sky: what colour?", "Blue, **often**.", "And the sea?", "Grey."]
        roles = ["system", "user", "assistant", "user", "assistant"]
        expected = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
        assert json.loads(text) == {"messages": expected}
        name, markdown = saved(page, "text=Markdown")
        assert name == "The-sky-what-colour.md"
        assert markdown.startswith(
            "# The sky: what colour?\n\n**System**\n\nBe brief.\n\n**You**\n"
        )
        assert "**tiny**\n\nBlue, **often**.\n" in markdown
        page.click("#new")
        say(page, "Nobody hears")
        assert page.is_visible(".note.bad")
        name, every = saved(page, "#export-all")
        assert name == "conversations.jsonl"
        assert json.loads(every.splitlines()[1]) == {"messages": expected}
    data = tmp_path / "conversations.jsonl"
    data.write_text(every + 3 * text, "utf-8")  # with some for validation
    datasets, lines = open_conversations(str(data), 128, 0.2)
    assert "1 left out because nothing in them is the assistant's" in lines[0]
    assert "not read" not in lines[0]
    learned = [int(i) for i in datasets[0].train[0].sequence(0, 128)[1] if i != IGNORE]
    assert gpt2_tokenizer().decode(learned).startswith("Blue, **often**.")


def test_a_browser_that_keeps_nothing_or_is_full_says_so(browser):
    with canned_page(browser, lambda _: events("Yes")) as page:
        page.evaluate("local.setItem('gpt2-conversation-large', 'x'.repeat(MOST_CHARACTERS))")
        say(page, "Hello")
        assert page.inner_text("#storage").startswith("The browser has no room left")
        page.evaluate("local.removeItem('gpt2-conversation-large')")
        say(page, "Hello")
        assert page.is_hidden("#storage")
        page.evaluate("local.setItem('other', 'x'.repeat(5.23e6 - JSON.stringify(local).length))")
        say(page, "Too much " * 5000)
        assert page.inner_text("#storage").startswith("The browser has no room left")
    blocked = "for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name, {get() { throw new DOMException('no', 'SecurityError'); }});"  # noqa: E501
    with canned_page(browser, lambda _: events("Yes"), script=blocked) as page:
        say(page, "Hello")
        assert page.inner_text("#storage").startswith("This browser keeps nothing")
        page.click("#to-list")
        assert titles(page) == ["Hello"]


def test_what_another_page_left_in_the_storage_is_no_conversation(browser):
    with canned_page(browser, lambda _: events("Yes")) as page:
        for text in (
            *("", "{", "null", "[]", "7", '{"messages": 7}', '{"messages": [null]}'),
            '{"messages": [{"role": "system", "content": "x"}]}',
            '{"id": "y", "messages": []}',
            '{"id": "x", "messages": [{"role": "user", "content": {}}]}',
        ):
            page.evaluate("text => local.setItem('gpt2-conversation-x', text)", text)
            assert page.evaluate("keptConversations()") == []
        page.reload()
        until(page, "Boolean(model)")
        say(page, "Hello")


MARKDOWN = "# H\n[a](https://a.org) `b`\n> c\n\n- d\n\n```py\ne\n```\n| f |\n|---|\n| g |"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(browser, scheme):
    answers = iter((events(MARKDOWN), FAILED))
    with canned_page(browser, lambda _: next(answers), color_scheme=scheme) as page:
        say(page, "Hello")
        say(page, "Again")
        page.click("#to-list")
        page.click("[aria-label=Delete]")
        page.click("text=Undo")
        page.click("#gear")
        page.evaluate("for (const id of ['base', 'storage', 'deleted']) $(id).hidden = false")
        result = page.evaluate(FAINT)
        assert result["found"] == []
        assert result["seen"] > 40
        page.click("#to-text")
        assert page.evaluate(FAINT)["found"] == []


def test_colours_follow_the_system_until_a_choice_is_made_and_kept(browser):
    light, dark = "rgb(251, 250, 248)", "rgb(22, 25, 23)"

    with canned_page(browser, lambda _: "", color_scheme="dark") as page:

        def ground() -> str:
            return page.evaluate("getComputedStyle(document.body).backgroundColor")

        assert ground() == dark
        page.emulate_media(color_scheme="light")
        assert ground() == light
        page.click("[aria-label='Dark colours']")
        assert ground() == dark
        page.reload()
        assert ground() == dark
        page.click("[aria-label='Light colours']")
        page.emulate_media(color_scheme="dark")
        assert ground() == light
        page.click("#gear")
        page.click("#settings >> text=System")
        assert ground() == dark
        assert page.get_attribute("#theme-system", "aria-pressed") == "true"


def test_the_page_is_used_by_the_keyboard_and_read_aloud(browser):
    with canned_page(browser, lambda _: events("Blue.")) as page:
        unnamed = """[...document.querySelectorAll("button, input, textarea")].filter(
          e => !(e.ariaLabel || e.labels?.length || e.textContent.trim())).map(e => e.id)"""
        assert page.evaluate(unnamed) == []
        say(page, "Colour?")
        assert page.inner_text("#said").startswith("Blue. (20 tokens")
        assert page.get_attribute("#log", "aria-live") == "off"  # pieces are not read one by one
        assert page.get_by_role("article", name="Answer").inner_text().startswith("Blue.")
        active = "document.activeElement.id"
        page.focus("#to-list")
        page.keyboard.press("Enter")
        assert page.evaluate(active) == "close-list"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "title"
        assert page.evaluate(unnamed) == []
        page.keyboard.press("Escape")
        assert page.evaluate(active) == "to-list"
        assert page.is_hidden("#conversations")
        page.focus("#gear")
        page.keyboard.press("Space")
        assert page.evaluate(active) == "close"
        page.keyboard.press("Space")
        assert page.evaluate(active) == "gear"
        outlined = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outlined) == "solid"
