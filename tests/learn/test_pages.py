"""The pages of learn/: links lead to files, and tables leave nothing out."""

import re

import pytest

from learn import check

from ..conftest import ROOT

PAGES = sorted((ROOT / "learn").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text("utf-8"))
    assert len(links) > 5
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_table_has_every_chapter():
    text = (ROOT / "learn/README.md").read_text("utf-8")
    named = re.findall(r"^\| \[(\d)\. .*\]\((chapter_\d_\w+\.ipynb)\)", text, re.MULTILINE)
    assert [int(number) for number, _ in named] == list(check.CHAPTERS)
    assert all(path.startswith(f"chapter_{number}_") for number, path in named)


def test_paths_between_backticks_exist():
    for page in PAGES:
        spans = re.findall(
            r"`((?:learn|tests|configs|docs|gpt2)/[\w./-]*)`", page.read_text("utf-8")
        )
        assert [span for span in spans if not (ROOT / span).exists()] == []


@pytest.mark.parametrize("number", check.CHAPTERS)
def test_chapters_name_papers_and_exercises(number):
    (source,) = (ROOT / "learn").glob(f"chapter_{number}_*.py")
    text = source.read_text("utf-8")
    assert re.search(r"^# Papers?: ", text, re.MULTILINE)
    assert f"`learn/exercises/chapter_{number}.py`" in text
    assert f"`python -m learn.check {number}`" in text
    assert f"`check({number}, globals())`" in text  # `check({number})` sees no cell
    exercises = (ROOT / f"learn/exercises/chapter_{number}.py").read_text("utf-8")
    assert f"`learn/{source.name}` explains" in exercises
