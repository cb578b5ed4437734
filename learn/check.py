"""Checks the exercises of a chapter: `python -m learn.check 3`.

The exercises of chapter 3 are the functions of `learn/exercises/chapter_3.py`. Fill them in there,
or define functions of these names in the notebook and call `check(3, globals())`.
`learn/solutions/` has an answer to each.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

CHAPTERS = range(1, 9)


def verdict(test: Callable, function: Callable | None) -> str:
    """ "right", "to do", or "wrong" with the reason.

    Args:
        test: takes the function, and raises an AssertionError with a message if it is wrong.
        function: of the reader; None if there is none.
    """
    if function is None:
        return "to do"
    try:
        test(function)
    except NotImplementedError:
        return "to do"
    except AssertionError as error:
        return f"wrong: {error}"
    except Exception as error:  # noqa: BLE001 - the reader's code may raise anything
        return f"wrong: {type(error).__name__}: {error}"
    return "right"


def tests_of(chapter: int) -> dict[str, Callable]:
    """The tests of a chapter, by the name of the function that each is for."""
    module = importlib.import_module(f"learn.checks.chapter_{chapter}")
    own = inspect.getmembers(module, inspect.isfunction)
    found = {name: f for name, f in own if f.__module__ == module.__name__ and name[0] != "_"}
    return dict(sorted(found.items(), key=lambda item: item[1].__code__.co_firstlineno))


def check(chapter: int, answers: Mapping[str, Any] | None = None) -> bool:
    """Prints a line for each exercise of a chapter; returns whether all are right.

    Args:
        chapter: 1 to 8.
        answers: name -> function, as `globals()` of a notebook; a name that is not there is taken
            from `learn/exercises/`.
    """
    exercises = importlib.reload(importlib.import_module(f"learn.exercises.chapter_{chapter}"))
    found = vars(exercises) | dict(answers or {})
    print(f"Chapter {chapter}: learn/exercises/chapter_{chapter}.py")
    verdicts = []
    for name, test in tests_of(chapter).items():
        verdicts.append(verdict(test, found.get(name)))
        task = inspect.getdoc(getattr(exercises, name)) or ""
        print(f"  {name}: {task.splitlines()[0]}\n      {verdicts[-1]}")
    return all(said == "right" for said in verdicts)


def main(arguments: list[str]) -> int:
    """The command line; 0: all right, 1: not yet, 2: no such chapter."""
    if len(arguments) != 1 or arguments[0] not in map(str, CHAPTERS):
        print("usage: python -m learn.check CHAPTER, with a chapter from 1 to 8", file=sys.stderr)
        return 2
    return 0 if check(int(arguments[0])) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
