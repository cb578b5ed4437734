"""HellaSwag and LAMBADA on items made here, against transformers and plain loops."""

import gzip
import io
import json
import lzma
import math
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from gpt2.distributed.runtime import Runtime
from gpt2.errors import UserError
from gpt2.evaluate.tasks import HELLASWAG, LAMBADA, load_items
from gpt2.tokenizer import gpt2_tokenizer

from ..conftest import ROOT, run_python
from ..fake_hub import fake_hub
from .test_scoring import by_transformers, in_transformers, small_model

RT = Runtime(torch.device("cpu"), torch.float32)
REVISION = "c0ffee" + 34 * "1"
NOUNS = ["cat", "dog", "old bicycle", "neighbour's piano", "river", "well-known café"]
VERBS = ["sleeps", "runs away", "is painted", "falls over loudly", "waits", "sings a song"]


def hellaswag_items(count: int) -> list[dict]:
    return [
        {
            "ind": i,
            "ctx": f"In the morning of day {i}, the {NOUNS[i % 6]}" + " stands there." * (i % 4),
            "endings": [f"{VERBS[(i + j) % 6]}{' again and again' * (j % 2)}." for j in range(4)],
            "label": str(i % 4) if i % 2 else i % 4,  # the Hub's file has strings
        }
        for i in range(count)
    ]


def lambada_items(count: int) -> list[dict]:
    return [{"text": f"the {NOUNS[i % 6]} {VERBS[i % 6]} at {i}"} for i in range(count)]


def write_jsonl(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@torch.no_grad()
def hellaswag_by_transformers(theirs: GPT2LMHeadModel, items: list[dict]) -> tuple[int, int]:
    """(right, right by the mean per token): four rows at a time, padded, with a mask."""
    encode = gpt2_tokenizer().encode
    right = right_norm = 0
    for item in items:
        context = encode(item["ctx"])
        endings = [encode(" " + ending) for ending in item["endings"]]
        length = len(context) + max(map(len, endings))
        tokens = torch.zeros(len(endings), length, dtype=torch.int64)
        mask = torch.zeros(len(endings), length)
        for row, ending in enumerate(endings):
            tokens[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[row, len(context) : len(context) + len(ending)] = 1
        logits = theirs(tokens).logits[:, :-1]
        nats = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        sums = (nats * mask[:, 1:]).sum(1)
        right += int(sums.argmin()) == int(item["label"])
        right_norm += int((sums / mask[:, 1:].sum(1)).argmin()) == int(item["label"])
    return right, right_norm


def test_hellaswag_equals_transformers(tmp_path):
    items = hellaswag_items(60)
    model = small_model(window=64)
    loaded = load_items(HELLASWAG, str(write_jsonl(tmp_path / "h.jsonl", items)), print)
    found = HELLASWAG.ask(model, loaded, RT)
    right, right_norm = hellaswag_by_transformers(in_transformers(model), items)
    assert found == {
        "hellaswag_acc_norm": right_norm / 60,
        "hellaswag_acc": right / 60,
        "hellaswag_items": 60,
    }
    assert right != right_norm  # the two can be told apart


def test_lambada_equals_transformers(tmp_path):
    """Every second item ends with what the model would write, where that is a word."""
    items, model = lambada_items(60), small_model(window=64)
    theirs, encode = in_transformers(model), gpt2_tokenizer().encode
    for item in items[::2]:
        context = item["text"].rpartition(" ")[0]
        with torch.no_grad():
            likeliest = theirs(torch.tensor([encode(context)])).logits[0, -1].argmax()
        word = gpt2_tokenizer().decode([int(likeliest)])
        if word.startswith(" ") and word[1:].isalpha():
            item["text"] = context + word
    found = LAMBADA.ask(
        model, load_items(LAMBADA, str(write_jsonl(tmp_path / "l.jsonl", items)), print), RT
    )
    parts = [item["text"].rpartition(" ") for item in items]
    rows = [(encode(context), encode(" " + word)) for context, _, word in parts]
    wanted = [by_transformers(theirs, *row) for row in rows]
    assert found["lambada_acc"] == sum(greedy for _, _, greedy in wanted) / 60
    assert 0.05 < found["lambada_acc"] <= 0.5
    mean = sum(nats for nats, _, _ in wanted) / 60
    assert math.log(found["lambada_perplexity"]) == pytest.approx(mean, rel=1e-5)
    assert found["lambada_items"] == 60


def parquet(items: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(items), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.xz", "parquet"])
def test_the_same_items_from_every_kind_of_file(tmp_path, kind):
    items = [{**item, "label": str(item["label"])} for item in hellaswag_items(9)]
    plain = write_jsonl(tmp_path / "h.jsonl", items)
    data = plain.read_bytes()
    packed = {"jsonl.gz": gzip.compress, "jsonl.xz": lzma.compress}
    path = tmp_path / f"h.{kind}"
    path.write_bytes(parquet(items) if kind == "parquet" else packed[kind](data))
    assert load_items(HELLASWAG, str(path), print) == load_items(HELLASWAG, str(plain), print)


GOOD = json.dumps(hellaswag_items(1)[0])


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        (HELLASWAG, f"{GOOD}\n{{", "x.jsonl: row 2 is not JSON"),
        (HELLASWAG, f"{GOOD}\n[1]", "x.jsonl: row 2 is not a JSON object"),
        (HELLASWAG, '{"ctx": "a", "endings": ["b", "c"]}', "row 1 is no item; it needs `ctx`, a"),
        (HELLASWAG, '{"ctx": "a", "endings": ["b", "c"], "label": ""}', "row 1 is no item"),
        (HELLASWAG, '{"ctx": "a", "endings": ["b", "c"], "label": 2}', "row 1 is no item"),
        (HELLASWAG, '{"ctx": "a", "endings": "bc", "label": 1}', "row 1 is no item"),
        (HELLASWAG, '{"ctx": "", "endings": ["b", "c"], "label": 1}', "row 1 is no item"),
        (HELLASWAG, "\n", "x.jsonl: holds no items"),
        (LAMBADA, '{"text": "alone"}', "row 1 is no item; it needs a `text` of two words"),
        (LAMBADA, '{"text": 5}', "row 1 is no item"),
        (LAMBADA, "caf\xe9", "row 1 is not JSON in UTF-8"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, task, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        load_items(task, str(path), print)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.xz", "x.jsonl.zst", "x.parquet"])
def test_damaged_and_missing_files(tmp_path, name):
    with pytest.raises(UserError, match="No such file"):
        load_items(LAMBADA, str(tmp_path / name), print)
    (tmp_path / name).write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"after row 0"):
        load_items(LAMBADA, str(tmp_path / name), print)


HUB = """
import sys
from gpt2.errors import UserError
from gpt2.evaluate.tasks import DOWNLOADS, HELLASWAG, load_items
kept = DOWNLOADS / HELLASWAG.repository / HELLASWAG.file
try:
    for _ in range(int(sys.argv[1])):
        print(len(load_items(HELLASWAG, "hub", print)))
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    print(len(load_items(HELLASWAG, "hub", print)))
except UserError as error:
    print("error:", error)
"""


def test_items_from_the_hub_are_verified_and_kept(tmp_path):
    files = {HELLASWAG.file: parquet(hellaswag_items(0) + [
        {**item, "label": str(item["label"])} for item in hellaswag_items(5)
    ]), "data/train-00000-of-00001.parquet": b"not asked for"}  # fmt: skip
    with fake_hub(files, HELLASWAG.repository, REVISION) as hub:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **hub.environment(tmp_path / "home")}
        done = run_python("-c", HUB, 2, cwd=tmp_path, env=environment)
        assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["5"] * 3
        assert REVISION[:12] in done.stdout
        assert hub.downloads() == [HELLASWAG.file] * 2  # again only when its sha256 differed
        del files[HELLASWAG.file]
        done = run_python("-c", HUB, 1, cwd=tmp_path, env=environment)
        assert f"has no file {HELLASWAG.file}; or give a file: --hellaswag=FILE" in done.stdout


def test_offline_is_one_line(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
                   "HF_HOME": str(tmp_path)}  # fmt: skip
    done = run_python("-c", HUB, 1, cwd=tmp_path, env=environment)
    assert done.stdout.startswith("error: --hellaswag=hub: HF_HUB_OFFLINE is set and the cache")
    assert done.stdout.endswith("or give a file: --hellaswag=FILE\n")
    assert done.stdout.count("\n") == 1
