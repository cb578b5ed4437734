"""Exercises fail until they are right, and the solutions are right."""

import ast
import importlib

import pytest

from learn import check

from ..conftest import ROOT

FOUND = [n for n in check.CHAPTERS if (ROOT / f"learn/exercises/chapter_{n}.py").exists()]


def solutions(chapter: int) -> dict:
    return vars(importlib.import_module(f"learn.solutions.chapter_{chapter}"))


def functions(folder: str, chapter: int) -> dict[str, str]:
    """name -> arguments, of the public functions and classes of a file."""
    text = (ROOT / f"learn/{folder}/chapter_{chapter}.py").read_text("utf-8")
    return {
        node.name: ast.unparse(node.args)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


def test_every_chapter_has_exercises():
    assert len(list(check.CHAPTERS)) == len(FOUND)
    for folder in ("solutions", "checks"):
        names = sorted(p.stem for p in (ROOT / "learn" / folder).glob("chapter_*.py"))
        assert names == [f"chapter_{n}" for n in FOUND]


@pytest.mark.parametrize("chapter", FOUND)
def test_solutions_are_right(chapter, capsys):
    assert check.check(chapter, solutions(chapter)), capsys.readouterr().out


@pytest.mark.parametrize("chapter", FOUND)
def test_unfilled_exercises_are_to_do(chapter, capsys):
    assert not check.check(chapter)
    out = capsys.readouterr().out
    assert out.count("to do") == len(functions("exercises", chapter)) >= 3
    assert "wrong" not in out


@pytest.mark.parametrize("chapter", FOUND)
def test_exercises_solutions_and_tests_fit(chapter):
    """The same functions in the same order with the same arguments; each has a test."""
    asked = functions("exercises", chapter)
    assert functions("solutions", chapter) == asked
    assert list(check.tests_of(chapter)) == list(asked)


@pytest.mark.parametrize("chapter", FOUND)
def test_wrong_answers_are_seen(chapter):
    """None, the first argument, a constant, and a solution of another exercise are wrong."""
    answers = solutions(chapter)
    for name, test in check.tests_of(chapter).items():
        for wrong in (lambda *_, **__: None, lambda first, *_, **__: first, lambda *_, **__: 1.0):
            assert check.verdict(test, wrong).startswith("wrong"), name
        assert check.verdict(test, answers[name]) == "right"


def test_command(capsys):
    assert check.main(["3"]) == 1
    assert "causal_mask" in capsys.readouterr().out
    for wrong in ([], ["9"], ["x"], ["1", "2"]):
        assert check.main(wrong) == 2
        assert "a chapter from 1 to 8" in capsys.readouterr().err


def test_answers_of_a_notebook_come_first(capsys):
    answers = solutions(1)
    assert check.check(1, answers)
    assert not check.check(1, {**answers, "merge": lambda *_: []})
    assert "merge([1, 1, 1], (1, 1), 9) is [9, 1], not []" in capsys.readouterr().out
