"""The chat page with canned answers: what it shows, keeps and exports."""

import pytest

from ..browser import chromium
from .canned import canned_page, events, say


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
