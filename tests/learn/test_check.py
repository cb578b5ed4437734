"""Exercises fail until they are right, and the solutions are right."""

import ast
import importlib
import math
import re
from functools import partial

import pytest
import torch

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


def adamw(state, g, t, lr, decay, *, corrected=True, l2=False):
    """An AdamW with mistakes."""
    p, m, v = state
    g = g + decay * p if l2 else g
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
    size = 1 - 0.9**t if corrected else 1.0
    squares = v / (1 - 0.95**t) if corrected else v
    return (p if l2 else p - lr * decay * p) - lr * m / size / (squares.sqrt() + 1e-8), m, v


def layer_norm(x, gain, bias, eps, correction=0):
    """A LayerNorm whose eps is outside of the root."""
    std = x.std(-1, keepdim=True, correction=correction)
    return gain * (x - x.mean(-1, keepdim=True)) / (std + eps) + bias


def unscaled(q, k, v):
    """A causal attention without 1/√D."""
    future = torch.ones(q.shape[-2], q.shape[-2]).triu(1) > 0
    return (q @ k.mT).masked_fill(future, -torch.inf).softmax(-1) @ v


MISTAKES = [  # of chapter, exercise, the reader's function, what is said
    (4, "rms_norm", lambda x, eps: x / (x**2).sum(-1, True).add(eps).sqrt(), "summed, not averag"),
    (4, "rms_norm", lambda x, eps: x / (x**2).mean(-1, True).sqrt().add(eps), "eps is outside of"),
    (4, "rms_norm", lambda x, eps: x / (x**2).mean(-1, True).add(eps), "the root is missing"),
    (4, "rms_norm", lambda x, eps: x, "the result[2, 0] is 1.467"),
    (4, "layer_norm", partial(layer_norm, correction=1), "unbiased one, which divides by C - 1"),
    (4, "layer_norm", layer_norm, "for x of deviation 0.001, the result"),
    (4, "layer_norm", layer_norm, "eps is outside of the root"),
    (4, "gelu", torch.nn.functional.gelu, "this is the exact form"),
    (4, "gelu", lambda x: x.relu(), "this is ReLU"),
    (4, "block", lambda x, a, f, b, g: x + f(a(x)) + g(b(x)), "reads x as it was before"),
    (4, "init_std", lambda name, layers: 0.02, "not 0.02; it writes into the stream"),
    (6, "adamw_step", partial(adamw, corrected=False), "m and v are not corrected"),
    (6, "adamw_step", partial(adamw, l2=True), "is part of the gradient, which is Adam with L2"),
    (6, "adamw_step", lambda s, *_: s, "in step 1, p["),
    (6, "accumulate", lambda f, x, n: sum(f(part) for part in x.chunk(n)), "the pieces are summed"),
    (6, "clip", lambda gs, limit: [g / g.norm() * limit for g in gs], "not 1.414"),
    (3, "attention", unscaled, "the scores are not scaled"),
    (3, "attention", lambda q, k, v: (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v,
     "positions see the future"),
    (5, "embed", lambda ids, wte, wpe: wte[ids] + wpe[ids], "is asked for the ids"),
]  # fmt: skip


@pytest.mark.parametrize(("chapter", "name", "function", "told"), MISTAKES)
def test_usual_mistakes_are_named(chapter, name, function, told):
    said = check.verdict(check.tests_of(chapter)[name], function)
    assert told in said
    assert re.search(r"\bis -?[\d.]+, not -?[\d.]+|\bnot -?[\d.]+|: -?[\d.]+, not", said), said


def in_place(x):
    """GELU that overwrites its argument."""
    x *= 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x


def test_right_answers_in_another_style_are_right():
    """In place, or in float64."""
    verdict = check.verdict(check.tests_of(4)["gelu"], in_place)
    assert verdict == "right"
    exact = solutions(4)["rms_norm"]
    verdict = check.verdict(check.tests_of(4)["rms_norm"], lambda x, eps: exact(x.double(), eps))
    assert verdict == "right"


@pytest.mark.parametrize(("chapter", "name", "function", "told"), [
    (4, "gelu", lambda x: None, "the result is None, not a tensor"),
    (4, "gelu", lambda x: (x, x), "the result is a tuple, not a tensor"),
    (4, "gelu", lambda x: x.long(), "the result has dtype torch.int64, not torch.float32"),
    (7, "head_loss", lambda *_: None, "wrong: the result is None, not the loss"),
])  # fmt: skip
def test_what_is_no_tensor_of_numbers_is_named(chapter, name, function, told):
    assert told in check.verdict(check.tests_of(chapter)[name], function)


def test_eps_belongs_outside_of_the_root_of_adamw():
    def inside(state, g, t, lr, decay):
        p, m, v = state
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        root = (v / (1 - 0.95**t) + 1e-8).sqrt()
        return p - lr * decay * p - lr * m / (1 - 0.9**t) / root, m, v

    assert check.verdict(check.tests_of(6)["adamw_step"], inside).startswith("wrong: in step 1, p[")


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
