"""The benchmark of `gpt2 prepare` runs on a little text, and its three contenders agree."""

import json

import pytest

from .conftest import run_python


@pytest.mark.slow
def test_a_small_comparison(tmp_path):
    done = run_python("-m", "benchmarks.prepare", f"--out_dir={tmp_path}", "--megabytes=2",
                      "--repeats=1", "--shard_tokens=100000", real=True)  # fmt: skip
    assert "same shards: True" in done.stdout
    assert len(done.stdout.splitlines()) == 3 + 2 + 3
    summary, *rows = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert summary["same_shards"] is True
    assert len({row["contender"] for row in rows}) == 3
    assert len({row["tokens"] for row in rows}) == 1
    assert all(row["peak_bytes"] > 10_000_000 for row in rows)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
