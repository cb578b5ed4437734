"""`benchmarks.libraries`: who works is measured, and who does not is named with the reason."""

import importlib.util
import json
import sys

import pytest
import torch

from benchmarks import libraries
from benchmarks.libraries import Subject, measure, relative_error
from gpt2.distributed.runtime import Runtime

from .conftest import run_python

SMALL = ["--tokens=48", "--width=32", "--vocab=200", "--layers=1", "--heads=2"]
SMALL += ["--warmup=1", "--repeats=2"]
ON_CPU = Runtime(torch.device("cpu"), torch.float32)


def rows_of(name: str, rt: Runtime = ON_CPU, *more: str) -> dict[str, dict]:
    options = libraries.parser().parse_args([*SMALL, *more])
    return {row["contender"]: row for row in measure(name, options, rt)}


def test_on_a_cpu_ours_and_pytorch_are_measured(tmp_path):
    path = tmp_path / "rows.jsonl"
    done = run_python("-m", "benchmarks.libraries", *SMALL, "--device=cpu", f"--json={path}")
    rows = {(r["subject"], r["contender"]): r for r in map(json.loads, path.open())}
    measured = {key for key, row in rows.items() if row["ms"] is not None}
    assert measured == {
        ("mlp", "ours, cuBLASLt"), ("mlp", "PyTorch"),
        ("head", "ours, in chunks"), ("head", "PyTorch"),
        ("muon", "ours, batched"), ("muon", "torch.optim.Muon"),
    }  # fmt: skip
    for key, row in rows.items():
        assert row["tokens"] == 48
        assert row["device"] == "cpu"
        if key in measured:
            assert row["result"] == "right"
            assert row["ms"] > 0 and row["wall_ms"] > 0  # noqa: PT018
            assert 0 <= row["error"] < (0.35 if key[0] == "muon" else 1e-5)
        else:
            reasons = "measured on a GPU only", "not installed", "needs a CUDA GPU"
            assert row["result"] in reasons
            assert row["error"] is None
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(rows)
    assert all(line.count("|") == 8 for line in table)


def test_a_contender_that_fails_or_is_wrong_costs_no_other_its_row(monkeypatch):
    exact = [torch.ones(4)]

    def broken():
        raise RuntimeError("no such kernel\nand more")

    subject = Subject(
        {
            "broken": lambda: broken,
            "never made": broken,
            "wrong": lambda: lambda: [torch.full((4,), 1.03)],
            "not a number": lambda: lambda: [torch.full((4,), torch.nan)],
            "right": lambda: lambda: [torch.full((4,), 1.01)],
        },
        lambda found: relative_error(found, exact),
        2e-2,
    )
    monkeypatch.setitem(libraries.SUBJECTS, "mlp", lambda options, rt: subject)
    rows = rows_of("mlp")
    assert {name: row["result"] for name, row in rows.items()} == {
        "broken": "no such kernel",
        "never made": "no such kernel",
        "wrong": "wrong",
        "not a number": "wrong",
        "right": "right",
    }
    assert rows["broken"]["ms"] is None
    assert rows["right"]["ms"] > 0
    assert rows["right"]["error"] == pytest.approx(0.01, rel=1e-3)


def test_the_largest_error_counts_and_nan_is_the_largest():
    one = torch.ones(2)
    assert relative_error([one, 1.5 * one], [one, one]) == pytest.approx(0.5)
    found = relative_error([one, torch.nan * one, 2 * one], [one] * 3)
    assert found != found  # noqa: PLR0124 - only not-a-number differs from itself


def test_a_wrong_gradient_of_ours_would_be_seen(monkeypatch):
    original = libraries.add_mlp

    def steeper(residual, x, fc, proj):
        return original(residual, x, fc, proj) + (x - x.detach())

    assert rows_of("mlp")["ours, cuBLASLt"]["result"] == "right"
    monkeypatch.setattr(libraries, "add_mlp", steeper)
    assert rows_of("mlp")["ours, cuBLASLt"]["result"] == "wrong"


def test_a_library_that_is_not_installed_is_named_so(monkeypatch):
    find = importlib.util.find_spec
    missing = "nvmath", "liger_kernel"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in missing else find(name, *a)
    )
    rows = rows_of("mlp") | rows_of("head")
    found = [row for name, row in rows.items() if name.startswith(("nvmath", "Liger"))]
    assert len(found) == 5
    assert {row["result"] for row in found} == {"not installed"}


def test_without_a_gpu_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["libraries"])
    assert libraries.main() == 2
    assert capsys.readouterr().err == (
        "benchmarks.libraries needs a CUDA GPU, and there is none here\n"
    )
    monkeypatch.setattr(sys, "argv", ["libraries", "--only=mlp,mpl"])
    assert libraries.main() == 2
    assert capsys.readouterr().err == "--only=mpl: use mlp, head, muon\n"


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["mlp", "head", "muon"])
def test_on_a_gpu_everybody_installed_is_right(name):
    rt = Runtime(torch.device("cuda", 0), torch.bfloat16)
    sizes = ["--tokens=2048", "--width=128", "--vocab=1000"]
    for row in rows_of(name, rt, *sizes).values():
        assert row["result"] in ("right", "not installed"), row
        if row["result"] == "right":
            assert row["ms"] > 0
            assert row["peak_mib"] > 0
