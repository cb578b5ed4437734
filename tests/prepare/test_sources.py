"""Sources: which files, in which order, under which names; and the rows that they hold."""

import gzip
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2.data.text_files import read_rows
from gpt2.errors import UserError
from gpt2.prepare.sources import (
    FINEWEB_FOLDERS,
    FINEWEB_REPOSITORY,
    FINEWEB_REVISION,
    default_folder,
    find_source,
    prefix_of,
)

from ..conftest import run_python
from ..fake_hub import fake_hub

TEXTS = ["one", "two\nlines", "drei Äpfel", "四 🦄", "<|endoftext|>"]


def compress(ending, data):
    if ending == "gz":
        return gzip.compress(data)
    if ending == "xz":
        return lzma.compress(data)
    return pa.compress(data, "zstd", asbytes=True) if ending == "zst" else data


def texts_of(path, start=0):
    return [text for text, _ in read_rows(path, start)]


def jsonl(texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def find(spec, tmp_path):
    return find_source(str(spec), tmp_path / "downloads")


@pytest.mark.parametrize("ending", ["", "gz", "xz", "zst"])
def test_jsonl(tmp_path, ending):
    path = tmp_path / f"x.jsonl.{ending}".rstrip(".")
    path.write_bytes(compress(ending, jsonl(TEXTS)))
    assert texts_of(path) == TEXTS
    assert texts_of(path, 2) == TEXTS[2:]
    assert texts_of(path, 5) == []
    assert [done for _, done in read_rows(path)][-1] == path.stat().st_size


@pytest.mark.parametrize("ending", ["", "gz", "xz", "zst"])
def test_txt_is_one_document(tmp_path, ending):
    path = tmp_path / f"x.TXT.{ending}".rstrip(".")
    path.write_bytes(compress(ending, "\ufeffa\r\n\nb\n".encode() + b"\xff"))
    assert texts_of(path) == ["a\r\n\nb\n\ufffd"]
    assert texts_of(path, 1) == []


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet(tmp_path, kind):
    path = tmp_path / "x.parquet"
    table = pa.table({"id": range(5), "text": pa.array(TEXTS).cast(kind)})
    pq.write_table(table, path, row_group_size=2)
    assert texts_of(path) == TEXTS
    assert texts_of(path, 3) == TEXTS[3:]
    assert [done for _, done in read_rows(path)][-1] == path.stat().st_size


def test_start_in_a_later_batch_of_parquet(tmp_path):
    texts = [f"row {i}" for i in range(3000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    for start in (1023, 1024, 1025, 2999, 3000):
        assert texts_of(tmp_path / "x.parquet", start) == texts[start:]


def test_bad_rows_keep_their_numbers(tmp_path):
    lines = [
        b'{"text": "good"}', b'{"text": null}', b'{"text": ""}', b'{"text": 3}', b'{"other": "x"}',
        b"[1]", b"{broken", b"", b"   ", b'{"text": "\\ud800 half a pair"}', b"[" * 100_000,
        b'{"text": "bad utf-8 \xff"}', b'{"text": "cut of',
    ]  # fmt: skip
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    expected = ["good", None, None, None, None, None, None]
    expected += ["\ufffd half a pair", None, "bad utf-8 \ufffd", None]
    assert texts_of(path) == expected
    assert texts_of(path, 4) == expected[4:]


def test_bad_rows_of_parquet(tmp_path):
    rows = pa.array([b"good", None, b"", b"bad utf-8 \xff"]).cast(pa.binary())
    pq.write_table(pa.table({"text": rows}), tmp_path / "x.parquet")
    assert texts_of(tmp_path / "x.parquet") == ["good", None, None, "bad utf-8 \ufffd"]


def damaged_files():
    many = jsonl(str(i) * 50 for i in range(20_000))
    for ending in ("gz", "xz", "zst"):
        yield f"cut.jsonl.{ending}", compress(ending, many)[:-20], "damaged or unreadable after row"
        yield f"noise.txt.{ending}", b"no such format" * 50, "damaged or unreadable after row 0"
    flipped = bytearray(gzip.compress(many))
    flipped[len(flipped) // 2] ^= 0xFF
    yield "flipped.jsonl.gz", bytes(flipped), "damaged or unreadable after row"
    yield "noise.parquet", b"no such format" * 50, "damaged or unreadable after row 0"
    yield "empty.parquet", b"", "damaged or unreadable after row 0"
    yield "other.jsonl", b'{"content": "x"}\n' * 3, "none of its 3 rows is a JSON object"
    yield "noise.jsonl", bytes(range(256)) * 50, "rows is a JSON object with a `text`"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [*damaged_files()],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_damaged_files_give_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts_of(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_and_flipped_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [str(i) * 50 for i in range(5000)]}), path, compression="gzip")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"x\.parquet: damaged"):
        texts_of(path)
    path.write_bytes(whole[:2000] + bytes(2000) + whole[4000:])
    with pytest.raises(UserError, match=r"x\.parquet: damaged"):
        texts_of(path)


def test_parquet_without_texts(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), path)
    with pytest.raises(UserError, match="no column `text`; its columns are body, id"):
        texts_of(path)
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match="int64"):
        texts_of(path)


def test_folder_is_read_recursively_in_order(tmp_path):
    folder = tmp_path / "my corpus"
    for name in ("b.txt", "a/z.txt", "a/b/c.txt.gz", "A.txt", "a.md", "x.jsonl.bz2", "y.txt~"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(compress(name[-2:], b"text"))
    source = find(folder, tmp_path)
    assert [part.name for part in source.parts] == ["A.txt", "a/b/c.txt.gz", "a/z.txt", "b.txt"]
    assert source.identity()["files"]["b.txt"] == 4
    assert [text for i in range(4) for text, _ in source.rows(i)] == ["text"] * 4
    assert source.prefix == "my-corpus"


def names_and_lines(folder, tmp_path):
    lines = []
    source = find_source(str(folder), tmp_path / "downloads", log=lines.append)
    return [part.name for part in source.parts], lines


def test_links_to_folders_are_followed(tmp_path):
    """Each real folder is read once, under its own name if it lies in the source."""
    for name in ("elsewhere/a.txt", "elsewhere/deep/b.txt", "s/c.txt", "s/own/d.txt", "s/.e/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    assert names_and_lines(tmp_path / "s", tmp_path)[0] == ["c.txt", "own/d.txt"]
    for name, target in {
        **{"sub": "../elsewhere", "twice": "../elsewhere", "loop": ".", "alias": "own"},
        **{"own/up": "..", "own/sub": "../../elsewhere/deep", "shown": ".e"},
    }.items():
        (tmp_path / "s" / name).symlink_to(target)
    names, lines = names_and_lines(tmp_path / "s", tmp_path)
    assert names == ["c.txt", "own/d.txt", "own/sub/b.txt", "shown/e.txt", "sub/a.txt"]
    assert not lines
    (tmp_path / "s/gone").symlink_to("nowhere")
    (tmp_path / "s/itself").symlink_to("itself")
    names, (line,) = names_and_lines(tmp_path / "s", tmp_path)
    assert len(names) == 5
    assert line.startswith("2 folders or links cannot be read and are left out, such as ")
    assert line.endswith("s/gone")


def test_files_of_other_kinds_are_told(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    for name in ("a.csv", "b.txt", "c.md", "d.py", "e.txt.bz2", ".DS_Store"):
        (folder / name).write_text("text")
    for spec in (folder, folder / "*"):
        names, (line,) = names_and_lines(spec, tmp_path)
        assert names == ["b.txt"]
        assert line == (
            f"4 files of other kinds are left out, such as {folder / 'a.csv'}; "
            "`gpt2 prepare` reads .txt, .jsonl (both also .gz, .xz, .zst) and .parquet"
        )
    assert names_and_lines(folder / "*.txt", tmp_path) == (["b.txt"], [])


@pytest.mark.parametrize("ending", ["", "gz"])
def test_ndjson_is_jsonl(tmp_path, ending):
    path = tmp_path / "s" / f"x.ndjson.{ending}".rstrip(".")
    path.parent.mkdir()
    path.write_bytes(compress(ending, jsonl(TEXTS)))
    source = find(path.parent, tmp_path)
    assert [text for text, _ in source.rows(0)] == TEXTS
    assert find(path, tmp_path).prefix == "x"


def test_glob(tmp_path, monkeypatch):
    for name in ("c/x1.txt", "c/x2.txt", "c/y.txt", "c/d/x3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    source = find(tmp_path / "c" / "x*.txt", tmp_path)
    assert [part.name for part in source.parts] == ["x1.txt", "x2.txt"]
    assert source.prefix == "c"
    deep = find(tmp_path / "c" / "**" / "x*.txt", tmp_path)
    assert [part.name for part in deep.parts] == ["d/x3.txt", "x1.txt", "x2.txt"]
    monkeypatch.chdir(tmp_path / "c")
    assert [part.name for part in find("x*.txt", tmp_path).parts] == ["x1.txt", "x2.txt"]
    assert prefix_of("x*.txt") == "c"


def test_file_whose_name_looks_like_a_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("text")
    assert [p.name for p in find(tmp_path / "a[1].txt", tmp_path).parts] == ["a[1].txt"]


@pytest.mark.parametrize(
    ("spec", "prefix"),
    [
        ("fineweb-edu", "edufineweb"),
        ("stdlib", "stdlib"),
        ("somewhere/train-000.jsonl.xz", "train-000"),
        ("my corpus/", "my-corpus"),
        ("a_b_train_1.txt", "a-b-train-1"),
        ("v1.5.parquet", "v1.5"),
        ("日本語.txt", "text"),
        ("fineweb-edu/sample-100BT", "edufineweb"),
        ("hf:owner/some_Data.set/folder", "some-Data.set"),
    ],
)
def test_prefix(spec, prefix):
    assert prefix_of(spec) == prefix


@pytest.mark.parametrize(
    ("spec", "folder"),
    [
        ("fineweb-edu", "fineweb"),
        ("fineweb-edu/sample-10BT", "fineweb"),
        ("fineweb-edu/default", "data/fineweb-edu-default"),
        ("hf:owner/name", "data/name"),
        ("hf:owner/name@v1.0", "data/name"),
        ("hf:owner/name@v1.0/data/train-*", "data/name-data-train"),
        ("somewhere/x.jsonl.xz", "data/x"),
    ],
)
def test_default_folder(spec, folder):
    assert default_folder(spec) == folder


@pytest.mark.parametrize(
    "spec",
    [
        "hf:",
        "hf:name",
        "hf:owner/name@",
        "hf:owner/name@a@b",
        "hf://datasets/owner/name",
        "hf:a b/c",
    ],
)
def test_wrong_spelling_of_a_dataset(spec, tmp_path):
    with pytest.raises(UserError, match="write hf:OWNER/NAME, hf:OWNER/NAME/FOLDER or") as caught:
        find(spec, tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_part_of_fineweb_edu(tmp_path):
    with pytest.raises(UserError, match="use one of fineweb-edu, fineweb-edu/sample-100BT, "):
        find("fineweb-edu/sample-1T", tmp_path)


COMMIT = "c" * 40
LIST = """
import json, sys
from pathlib import Path
from gpt2.errors import UserError
from gpt2.prepare.sources import find_source

def names(spec):
    try:
        source = find_source(spec, Path("downloads"))
    except UserError as error:
        return str(error)
    return [source.revision, *(part.name for part in source.parts)]

print(json.dumps([names(spec) for spec in sys.argv[1:]]))
"""


def parts_at_the_hub(tmp_path, files, *specs, repository="o/n", revision=COMMIT):
    with fake_hub(dict.fromkeys(files, b"text"), repository, revision) as hub:
        env = {**os.environ, **hub.environment(tmp_path)}
        return json.loads(run_python("-c", LIST, *specs, env=env).stdout)


@pytest.mark.long
def test_files_of_a_dataset(tmp_path):
    files = ["README.md", "a.txt", "data/train-1.parquet", "data/test.parquet", "data/more/x.jsonl"]
    parquet = [COMMIT, "data/test.parquet", "data/train-1.parquet"]
    cases = {
        "hf:o/n": parquet,
        "hf:o/n/": parquet,
        "hf:o/n@main/data": parquet,
        f"hf:o/n@{COMMIT}": parquet,
        "hf:o/n/data/train-*": [COMMIT, "data/train-1.parquet"],
        "hf:o/n/data/test.parquet": [COMMIT, "data/test.parquet"],
        "hf:o/n/data/more": [COMMIT, "data/more/x.jsonl"],
    }
    assert parts_at_the_hub(tmp_path, files, *cases) == list(cases.values())
    (error,) = parts_at_the_hub(tmp_path, ["README.md"], "hf:o/n")
    assert error.startswith(
        "--source=hf:o/n: no parquet files and no .jsonl files in o/n; see http"
    )


@pytest.mark.long
def test_fineweb_edu_at_its_revision(tmp_path):
    folders = ["sample/10BT", "sample/100BT", "sample/350BT", "data/CC-MAIN-2013-20"]
    specs = ["fineweb-edu/sample-10BT", *(s for s in FINEWEB_FOLDERS if "/" in s)]
    found = parts_at_the_hub(
        tmp_path, [f"{folder}/0.parquet" for folder in folders], *specs,
        repository=FINEWEB_REPOSITORY, revision=FINEWEB_REVISION,
    )  # fmt: skip
    assert found == [[FINEWEB_REVISION, f"{folder}/0.parquet"] for folder in folders]


def test_nothing_usable(tmp_path):
    (tmp_path / "a.md").write_text("text")
    for spec in (tmp_path, tmp_path / "a.md", tmp_path / "*.md"):
        with pytest.raises(UserError, match=r"nothing to read; give \.txt, \.jsonl .*\.parquet"):
            find(spec, tmp_path)
    for spec in (tmp_path / "nowhere", ""):
        with pytest.raises(UserError, match="no such file, folder or glob; or use fineweb-edu"):
            find(spec, tmp_path)


@pytest.mark.long
def test_standard_library(tmp_path):
    source = find("stdlib", tmp_path)
    names = [part.name for part in source.parts]
    assert {"argparse.py", "json/decoder.py", "builtin/builtins"} < set(names)
    assert not [n for n in names if {"test", "site-packages", "encodings"} & set(n.split("/"))]
    assert source == find("stdlib", tmp_path)
    texts = [text for index in range(len(names)) for text, _ in source.rows(index)]
    assert len(texts) == len(names) > 200
    assert any("\n\tdef " in text for text in texts)  # one level of indentation is one token
    sources = [t for n, t in zip(names, texts, strict=True) if n.endswith(".py")]
    assert not any("\n    def " in text for text in sources)
    assert "Return the absolute value" in texts[names.index("builtin/builtins")]
    assert list(source.rows(0, 1)) == []


KNOWN = {"revision": "c" * 40, "files": {"data/a.parquet": 3}, "files_sha256": {}}


@pytest.mark.fault(13, "files and revisions of a dataset in a manifest")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": {"../../a.parquet": 3}}, "outside its folder"),
        ({"files": {"/etc/passwd": 3}}, "outside its folder"),
        ({"files": {"C:\\a.parquet": 3}}, "outside its folder"),
        ({"files": {"a.parquet": "3"}}, "no sizes of files"),
        ({"files": {"a.parquet": -3}}, "no sizes of files"),
        ({"files": ["a.parquet"]}, "no sizes of files"),
        ({"files_sha256": {"a": 3}}, "no sizes of files"),
        ({"files_sha256": "a"}, "no sizes of files"),
        ({"revision": "main"}, "no commit of 40 hexadecimal digits"),
        ({"revision": "../" * 10}, "no commit of 40 hexadecimal digits"),
        ({"revision": "C" * 40}, "no commit of 40 hexadecimal digits"),
        ({"revision": None}, "no commit of 40 hexadecimal digits"),
    ],
)
def test_manifest_of_a_dataset_that_cannot_be(tmp_path, change, said):
    for spec in ("fineweb-edu", "hf:owner/name/data"):
        found = find_source(spec, tmp_path, KNOWN)
        assert (found.parts[0].name, found.revision) == ("data/a.parquet", "c" * 40)
        with pytest.raises(UserError, match=said):
            find_source(spec, tmp_path, KNOWN | change)


@pytest.mark.skipif(os.name == "nt", reason="not a name there")
def test_local_files_may_have_any_name(tmp_path):
    (tmp_path / "C:\\a ..\n.txt").write_text("text")
    (part,) = find(tmp_path, tmp_path).parts
    assert part.path.read_text() == "text"
