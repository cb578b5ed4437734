"""Text as Windows and old programs write it, lists of JSON, files that nobody meant."""

import gzip
import json
import os

import numpy as np
import pytest

from gpt2 import GPT2, cli
from gpt2.commands.inspect_text import _read
from gpt2.data.shards import find_shards, write_shard
from gpt2.data.text_encodings import garbled
from gpt2.data.text_files import Repaired, read_items, read_rows
from gpt2.errors import UserError
from gpt2.tokenizer import gpt2_tokenizer

TEXT = "A quiet harbour – größer, 静か, 🙂.\n"
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"]


def encoded(text, encoding):
    mark = (
        b"" if encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32") else "\ufeff".encode(encoding)
    )
    return mark + text.encode(encoding)


def prepare(source, tmp_path):
    return ["prepare", f"--source={tmp_path / source}", f"--out_dir={tmp_path / 'out'}"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_reader_knows_the_byte_order_mark(encoding, tmp_path, capsys):
    long = TEXT * 2000  # longer than a buffer
    (tmp_path / "a.txt").write_bytes(encoded(long, encoding))
    assert [text for text, _ in read_rows(tmp_path / "a.txt")] == [long]
    rows = [f"{n} {TEXT}" for n in range(9)]
    lines = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_bytes(encoded(lines, encoding))
    assert [text for text, _ in read_rows(tmp_path / "a.jsonl", 4)] == rows[4:]
    assert [item["text"] for _, item in read_items(tmp_path / "a.jsonl")][8] == f"8 {TEXT}"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(encoded(TEXT, encoding)))
    assert [text for text, _ in read_rows(tmp_path / "a.txt.gz")] == [TEXT]
    (tmp_path / "b.txt").write_bytes(encoded(TEXT, encoding))
    assert _read("", str(tmp_path / "b.txt")) == TEXT.removesuffix("\n")
    assert cli.main(prepare("a.txt", tmp_path)) == 0
    ids = find_shards(tmp_path / "out", "train")[0].read(0, 20).tolist()
    assert gpt2_tokenizer().decode(ids[1:]) in long
    assert "no UTF-8" not in capsys.readouterr().err


def test_a_damaged_utf_16_is_repaired_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(("\ufeff" + TEXT).encode("utf-16-le") + b"\xd8")
    ((text, _),) = read_rows(tmp_path / "a.txt")
    assert isinstance(text, Repaired)
    assert text.startswith(TEXT)
    assert text.endswith("\ufffd")


def test_a_text_in_another_encoding_is_named(tmp_path, capsys):
    (tmp_path / "cp1251.txt").write_bytes(("Тихая гавань. " * 50).encode("cp1251"))
    (tmp_path / "utf16.txt").write_bytes(("A quiet harbour. " * 50).encode("utf-16-le"))
    (tmp_path / "good.txt").write_text(TEXT * 50, encoding="utf-8")
    assert cli.main(["prepare", f"--source={tmp_path}", f"--out_dir={tmp_path / 'out'}"]) == 0
    told = capsys.readouterr().err
    assert "cp1251.txt, row 0: 79% of it is no UTF-8" in told
    assert "utf16.txt, row 0: 50% of it is the null character" in told
    assert "good.txt" not in told
    model = tmp_path / "m.pt"
    GPT2(n_layer=1, n_head=1, n_embd=8, block_size=8).save(model)
    assert cli.main(["eval", str(model), f"--text={tmp_path / 'cp1251.txt'}"]) == 2
    assert "79% of it is no UTF-8" in capsys.readouterr().err
    assert not garbled("a few \ufffd in a text are repaired" * 3)


def test_hidden_files_are_left_out_and_counted(tmp_path, capsys):
    for name in ("a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "._a.txt", "__MACOSX/a.txt"):
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_text(TEXT * 50, encoding="utf-8")
    assert cli.main(["prepare", f"--source={tmp_path / 't'}", f"--out_dir={tmp_path / 'out'}"]) == 0
    assert "3 hidden files are left out" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert list(manifest["files"]) == ["a.txt"]
    named = f"--source={tmp_path / 't/._a.txt'}"
    assert cli.main(["prepare", named, f"--out_dir={tmp_path / 'named'}"]) == 0


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
def test_one_list_of_texts(name, tmp_path):
    rows = [{"text": f"{n} {TEXT}"} for n in range(50)] + [{"other": 1}, None, "x"]
    data = json.dumps(rows, indent=2).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    found = [text for text, _ in read_rows(tmp_path / name)]
    assert found[:50] == [row["text"] for row in rows[:50]]
    assert found[50:] == [None] * 3
    source = f"--source={tmp_path / name}"
    assert cli.main(["prepare", source, f"--out_dir={tmp_path / 'out'}"]) == 0
    with pytest.raises(UserError, match="row 52 is not a JSON object"):
        list(read_items(tmp_path / name))


def test_a_long_list_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps([{"text": "x" * 900}] * 9))
    with pytest.raises(UserError, match="is one JSON list of more than 2,000 bytes"):
        list(read_rows(tmp_path / "a.jsonl", limit=2000))


def test_shards_without_a_number_and_nanogpts_files(tmp_path):
    write_shard(tmp_path / "tiny_shakespeare_train.bin", np.arange(9, dtype=np.uint16))
    assert find_shards(tmp_path, "train")[0].tokens == 9
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano/train.bin").write_bytes(b"\1\0" * 99)
    with pytest.raises(UserError, match="as nanoGPT writes it: token ids without a header"):
        find_shards(tmp_path / "nano", "train")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_objects_over_several_lines_are_told(encoding, tmp_path):
    path = tmp_path / "pretty.jsonl"
    path.write_text("\n".join(json.dumps({"text": TEXT}, indent=1) for _ in "ab"), encoding)
    for read in (read_rows, read_items):
        with pytest.raises(UserError, match="go over several lines; write each in one: jq -c"):
            list(read(path))


def test_a_text_that_is_no_string_is_told(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"text": {"en": "a"}}\n{"text": 5}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"none of its 2 rows .* `text` that is a string"):
        list(read_rows(path))
    path.write_text('{"text": null}\n{"text": ""}\n', encoding="utf-8")
    assert [text for text, _ in read_rows(path)] == [None, None]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_file(tmp_path):
    """Nobody writes into it: reading it would wait for ever."""
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="not a file"):
        next(read_items(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="not a file; - in the place of the text reads from stdin"):
        _read("", str(tmp_path / "a.jsonl"))
