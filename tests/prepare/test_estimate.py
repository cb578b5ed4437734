"""Estimates: tokens, bytes, minutes, and room on the disk."""

import json
from dataclasses import replace

import pytest

from gpt2.cli import main
from gpt2.config.commands import PrepareConfig
from gpt2.errors import UserError
from gpt2.prepare import estimate
from gpt2.prepare.estimate import (
    check_count,
    check_room,
    forecast,
    limit_text,
    make_plan,
    measure,
)
from gpt2.prepare.sources import Part, Source, find_source

GB = 10**9


class NothingHere:
    """Stands for files that are all still at the Hub."""

    def __init__(self, keep=False, here=()):
        self.keep, self.here = keep, here

    def local(self, part):
        return part.name if part.name in self.here else None


def fineweb(**how):
    parts = tuple(Part(f"{i}.parquet", (i + 1) * GB) for i in range(5))  # 15 GB
    return Source("x", "", parts, NothingHere(**how))


def plan(tmp_path, source, shards=(), **options):
    return make_plan(PrepareConfig(**options), source, tmp_path / "not" / "yet", list(shards))


def test_all_of_a_dataset(tmp_path):
    whole = plan(tmp_path, fineweb())
    assert whole.parts == 5
    assert whole.tokens == pytest.approx(15 * GB / 2.85, rel=1e-6)
    assert whole.shards == 53
    assert whole.shard_bytes == 2 * whole.tokens + 53 * 1024
    assert whole.download_bytes == 15 * GB
    assert whole.room_bytes == (4 + 5) * GB  # the two largest
    assert whole.need_bytes == whole.shard_bytes + whole.room_bytes
    assert whole.free_bytes > 0
    assert plan(tmp_path, fineweb(keep=True)).room_bytes == 15 * GB
    assert plan(tmp_path, fineweb(here=("4.parquet",))).room_bytes == (3 + 4) * GB


@pytest.mark.parametrize("options", [{"max_shards": 6}, {"max_tokens": 510_000_000}])
def test_up_to_a_limit(tmp_path, options):
    limited = plan(tmp_path, fineweb(), **options)
    assert (limited.tokens, limited.shards) == (600_000_000, 6)
    assert limited.parts == 2  # 1 + 2 GB
    assert limited.download_bytes == 3 * GB


def test_what_is_left(tmp_path):
    done = [{"tokens": 100_000_000, "next": {"part": 3}}] * 10
    rest = plan(tmp_path, fineweb(), done)
    assert (rest.first_part, rest.parts) == (3, 2)
    assert rest.download_bytes == 9 * GB
    assert plan(tmp_path, fineweb(), done, max_shards=12).tokens == 200_000_000


def test_room(tmp_path):
    enough = replace(plan(tmp_path, fineweb()), shard_bytes=60 * GB, room_bytes=9 * GB)
    check_room(replace(enough, free_bytes=69 * GB), tmp_path)
    with pytest.raises(UserError) as caught:
        check_room(replace(enough, free_bytes=69 * GB - 1), tmp_path)
    assert str(caught.value).startswith(
        f"{tmp_path} needs about 69.0 GB (60.0 GB of shards, 9.0 GB of downloads) and its disk has "
        "69.0 GB free; use another --out_dir=, or stop earlier with --max_tokens="
    )


def test_measured_on_the_files_themselves(tmp_path):
    lines = [
        json.dumps({"text": f"The number {i} is not the number {i + 1}."}) for i in range(9000)
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    source = find_source(str(path), tmp_path)
    speed, per_token = measure(source, 1, "tiktoken")
    config = PrepareConfig(source=str(path), num_workers=1)
    exact = make_plan(config, source, tmp_path, [], per_token)
    assert speed > 1000
    assert 2 < per_token < 7
    assert exact.tokens == pytest.approx(path.stat().st_size / per_token, abs=2)
    said = forecast(config, source, tmp_path / "out", [])
    assert f"tokens       about {exact.tokens:,}" in said
    assert "to download  nothing" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tokens_per_second", "said"),
    [
        (50_000, "1 second"),  # 0.9 of it
        (1_200, "37 seconds"),
        (500, "88 seconds"),
        (480, "2 minutes"),  # 92 seconds
        (100, "7 minutes"),
        (5, "2.4 hours"),
    ],
)
def test_the_time_has_a_unit_that_fits(tmp_path, monkeypatch, tokens_per_second, said):
    monkeypatch.setattr(estimate, "measure", lambda *_: (tokens_per_second, 0.0))
    source = Source("x", "", (Part("x.txt", 198_000, path=tmp_path),))  # 44,000 tokens
    text = forecast(PrepareConfig(), source, tmp_path / "out", [])
    assert f"time         about {said} to tokenise, at {tokens_per_second:,} tokens/s" in text


def test_the_limit_in_words():
    assert limit_text(PrepareConfig(max_shards=3)) == "max_shards=3"
    assert limit_text(PrepareConfig(max_tokens=1000)) == (
        "max_tokens=1,000, rounded up to 2 shards of 100,000,000 (a smaller --shard_tokens= comes "
        "closer)"
    )


def test_too_many_shards_are_refused(tmp_path):
    """A manifest of more shards could not be read back, and is written after each of them."""
    plan = make_plan(
        PrepareConfig(shard_tokens=100),
        Source("x", "", (Part("x.txt", 90_000_000, path=tmp_path),)),
        tmp_path,
        [],
    )
    with pytest.raises(
        UserError,
        match=r"^--shard_tokens=100 would make about 200,000 shards, and 20,000 is the most; "
        r"use --shard_tokens=1000 or more$",
    ):
        check_count(plan, PrepareConfig(shard_tokens=100), 0)
    check_count(replace(plan, shards=20_000), PrepareConfig(shard_tokens=100), 0)
    with pytest.raises(UserError, match="about 20,001 shards"):
        check_count(replace(plan, shards=20_000), PrepareConfig(shard_tokens=100), 1)
    with pytest.raises(UserError, match="shard_tokens=50: use 100 or more"):
        PrepareConfig(shard_tokens=50)


def test_more_tokens_than_asked_for_are_explained(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("a quiet day " * 1000)
    argv = ["prepare", f"--source={tmp_path / 'x.txt'}", f"--out_dir={tmp_path / 'out'}"]
    hint = "max_tokens=1,000, rounded up to 2 shards of 100,000,000 (a smaller --shard_tokens="
    assert main([*argv, "--max_tokens=1000"]) == 0
    assert hint in capsys.readouterr().out
    assert main([*argv, "--max_tokens=1000", "--max_shards=2"]) == 0
    assert hint in capsys.readouterr().out
    assert main([*argv, "--max_tokens=100000"]) == 0
    assert "rounded up" not in capsys.readouterr().out
