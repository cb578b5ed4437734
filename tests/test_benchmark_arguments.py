"""Numbers on the command lines of benchmarks."""

import argparse
import importlib
from pathlib import Path

import pytest

from benchmarks import arguments

from .conftest import ROOT

FREE = {"seed", "temperature", "rounds", "evaluations", "val_block_size"}  # some are checked later
PROGRAMS = [
    path.stem
    for path in sorted(Path(ROOT / "benchmarks").glob("*.py"))
    if "\ndef parser()" in path.read_text("utf-8")
]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (arguments.whole, "0", 0),
        (arguments.count, "7", 7),
        (arguments.counts, "1,32", [1, 32]),
        (arguments.counts_as_text, "1, 32", "1,32"),
        (arguments.amount, "0.5", 0.5),
    ],
)
def test_numbers_are_read(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (arguments.whole, "-1", "-1 is too few; use 0 or more"),
        (arguments.count, "0", "0 is too few; use 1 or more"),
        (arguments.count, "1.5", "'1.5' is not a whole number"),
        (arguments.counts, "8,,16", "'' is not a whole number"),
        (arguments.counts_as_text, "8,0", "0 is too few; use 1 or more"),
        (arguments.amount, "0", "0 is not above 0 and finite"),
        (arguments.amount, "nan", "nan is not above 0 and finite"),
        (arguments.amount, "ten", "'ten' is not a number"),
    ],
)
def test_what_is_no_number_of_things_is_refused(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{message}$"):
        kind(text)


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_benchmark_measures_a_negative_number_of_things(program, capsys):
    parser = importlib.import_module(f"benchmarks.{program}").parser()
    numbers = [action for action in parser._actions if action.type not in {None, Path}]
    for action in numbers:
        option = action.option_strings[0]
        if action.dest in FREE or action.dest in {"sizes", "ablate"}:  # names
            continue
        if (program, action.dest) == ("scaling", "seconds"):  # see tests/test_scaling_measure.py
            continue
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([f"{option}=-1"])
        assert stopped.value.code == 2
        assert f"argument {option}: -1 is " in capsys.readouterr().err


def test_programs_are_found():
    assert {"masks", "throughput", "generate", "serve", "sprint"} <= set(PROGRAMS)
