"""`gpt2 prepare --tokenizer=`: shards with a tokenizer that is not GPT-2's."""

import functools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from gpt2.commands import inspect_shards
from gpt2.config.commands import PrepareConfig
from gpt2.data.shards import find_shards, read_manifest, write_manifest
from gpt2.data.vocabulary import GPT2_VOCABULARY, named_in, of_shards
from gpt2.errors import UserError
from gpt2.huggingface.own_tokenizer import OwnTokenizer
from gpt2.huggingface.shard_tokenizer import tokenizer_beside
from gpt2.huggingface.tokenizer_files import tokenizer_files
from gpt2.prepare import fast_tokenizer
from gpt2.prepare import run as run_module
from gpt2.prepare.chosen_tokenizer import chosen_tokenizer
from gpt2.prepare.fast_tokenizer import OwnByGigatoken, OwnByTiktoken, faster
from gpt2.prepare.multi_machine import merge

LINES = [f"o gato {n} não dorme à mesa, e o cachorro late {n * n} vezes 🙂" for n in range(60)]
END = "<|fim|>"


def library(size: int = 330, end: str = END) -> Library:
    """A byte-level BPE whose end-of-text token has id 1."""
    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|pad|>", end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(LINES, trainer)
    return made


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with tokenizer.json and tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("own")
    library().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"text": line} for line in LINES]
    rows[7]["text"] += f" {END} fica texto"
    for name, part in (("a", rows[:30]), ("b", rows[30:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def prepare(source, out_dir, tokenizer, **options):
    config = PrepareConfig(
        source=str(source), out_dir=str(out_dir), tokenizer=str(tokenizer), **options
    )
    return run_module.run(config)


def tokens_of(folder) -> np.ndarray:
    shards = [*find_shards(folder, "val"), *find_shards(folder, "train")]
    return np.concatenate([shard.read(0, shard.tokens) for shard in shards])


def test_shards_have_its_ids_and_name_it(own, texts, tmp_path, capsys):
    assert prepare(texts, tmp_path / "d", own, shard_tokens=300) == 0
    assert f"1 hold a literal {END}, which stays text" in capsys.readouterr().out
    theirs = Library.from_file(str(own / "tokenizer.json"))
    theirs.encode_special_tokens = True
    expected = []
    for number, line in enumerate(LINES):
        text = line + (f" {END} fica texto" if number == 7 else "")
        expected += [1, *theirs.encode(text, add_special_tokens=False).ids]
    assert tokens_of(tmp_path / "d").tolist() == expected
    made = read_manifest(tmp_path / "d")
    known = named_in(made)
    assert made["tokenizer"] == {
        "name": "own", "vocab_size": theirs.get_vocab_size(), "end_of_text": 1,
        "sha256": tokenizer_beside(tmp_path / "d", known.sha256, 1).sha256,
    }  # fmt: skip
    assert made["documents"] == len(LINES)
    for path in own.iterdir():
        assert (tmp_path / "d" / path.name).read_bytes() == path.read_bytes()
    assert inspect_shards.verify(tmp_path / "d") == 0
    assert inspect_shards.show(tmp_path / "d", 3) == 0
    first = find_shards(tmp_path / "d", "val")[0].tokens  # documents of the training shards
    begun = np.flatnonzero(tokens_of(tmp_path / "d")[first:] == 1)[3] + first
    end = begun + 1 + np.flatnonzero(tokens_of(tmp_path / "d")[begun + 1 :] == 1)[0]
    assert theirs.decode(expected[begun + 1 : end]) in capsys.readouterr().out


def test_a_folder_goes_on_with_its_own_tokenizer_only(own, texts, tmp_path):
    assert prepare(texts, tmp_path / "d", own, shard_tokens=300, max_shards=2) == 0
    other = tmp_path / "other"
    shutil.copytree(own, other)
    (other / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|pad|>"}))
    for tokenizer in ("auto", other):
        with pytest.raises(UserError, match=r"holds shards of the vocabulary .* give --tokenizer="):
            prepare(texts, tmp_path / "d", tokenizer, shard_tokens=300)
    assert prepare(texts, tmp_path / "d", tmp_path / "d", shard_tokens=300) == 0
    assert prepare(texts, tmp_path / "whole", own, shard_tokens=300) == 0
    assert tokens_of(tmp_path / "d").tolist() == tokens_of(tmp_path / "whole").tolist()
    assert prepare(texts, tmp_path / "gpt2", "tiktoken", shard_tokens=900, max_shards=2) == 0
    with pytest.raises(UserError, match=r"GPT-2's vocabulary of 50257, not of .* leave --token"):
        prepare(texts, tmp_path / "gpt2", own, shard_tokens=900)


def test_workers_bring_it_together(own, texts, tmp_path):
    for worker in ("1/2", "2/2"):
        assert prepare(texts, tmp_path / "d", own, shard_tokens=400, worker=worker) == 0
    assert merge(tmp_path / "d") == 0
    assert of_shards(tmp_path / "d/manifest.json").end_of_text == 1
    assert inspect_shards.verify(tmp_path / "d") == 0
    (tmp_path / "d/tokenizer.json").write_text("{}")
    assert inspect_shards.verify(tmp_path / "d") == 1


def test_gpt2s_own_files_are_gpt2(tmp_path):
    for name, content in tokenizer_files(64).items():
        (tmp_path / name).write_bytes(content)
    assert chosen_tokenizer(str(tmp_path)) == "auto"
    assert chosen_tokenizer(str(tmp_path / "tokenizer.json")) == "auto"


def test_the_end_of_text_is_found_by_config_settings_or_name(own, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    shutil.copy(own / "tokenizer.json", tmp_path)
    assert chosen_tokenizer(str(tmp_path)).end_of_text == 0
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="nothing says which token ends a text; name it as eos_"):
        chosen_tokenizer(str(tmp_path))
    library(end="</s>").save(str(tmp_path / "pt.json"))
    found = chosen_tokenizer(str(tmp_path / "pt.json"))
    assert isinstance(found, OwnTokenizer)
    assert (found.end_of_text, found.end_of_text_name) == (1, "</s>")


def large(folder):
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"] += [{**content["added_tokens"][0], "id": 2**16, "content": "<|far|>"}]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def empty(folder):
    (folder / "tokenizer.json").unlink()


def no_bytes(folder):
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["decoder"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (large, "has 65,537 tokens, and shards hold ids below 65,536"),
        (empty, "the folder has no tokenizer.json"),
        (no_bytes, "its decoder is not ByteLevel, and only byte-level BPE is read"),
        (shutil.rmtree, "none of auto, gigatoken, tiktoken, and no such folder or tokenizer.json"),
    ],
)
def test_what_cannot_be_used_is_one_line(change, message, own, texts, tmp_path):
    shutil.copytree(own, tmp_path / "x")
    change(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        prepare(texts, tmp_path / "d", tmp_path / "x")
    assert not (tmp_path / "d").exists()


def test_a_typo_is_asked_about():
    with pytest.raises(UserError, match=r"did you mean tiktoken\?"):
        chosen_tokenizer("tiktokn")


def test_a_manifest_that_is_not_to_be_trusted(own, texts, tmp_path):
    assert prepare(texts, tmp_path / "d", own) == 0
    path, good = tmp_path / "d/manifest.json", read_manifest(tmp_path / "d")
    for told in ({"end_of_text": -1}, {"vocab_size": 2**17}, {"sha256": "x"}, {"end_of_text": "1"}):
        write_manifest(tmp_path / "d", good | {"tokenizer": good["tokenizer"] | told})
        with pytest.raises(UserError, match="does not describe its tokenizer"):
            find_shards(tmp_path / "d", "train")
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        find_shards(tmp_path / "d", "train")
    path.unlink()
    with pytest.raises(UserError, match=r"holds a tokenizer.json without the manifest.json"):
        find_shards(tmp_path / "d", "train")
    (tmp_path / "d/tokenizer.json").unlink()
    assert find_shards(tmp_path / "d", "train")[0].vocabulary == GPT2_VOCABULARY
    path.write_text("{")  # of another program
    assert find_shards(tmp_path / "d", "train")[0].vocabulary == GPT2_VOCABULARY


BROKEN = {
    "not JSON": ("{", "is not JSON"),
    "empty": ("", "is not JSON"),
    "no object": ("[]", "is not a manifest of shards"),
    "an empty object": ("{}", "is not a manifest of shards"),
    "of another program": ('{"version": 3, "name": "x"}', "is not a manifest of shards"),
    "no list of shards": ('{"tokenizer": {"name": "gpt2"}}', "is not a manifest of shards"),
    "no tokenizer": ('{"shards": []}', "is not a manifest of shards"),
    "no name": ('{"shards": [], "tokenizer": {}}', "does not name the tokenizer"),
    "an unknown name": ('{"shards": [], "tokenizer": {"name": "x"}}', "does not name the token"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_manifest_is_not_read_as_gpt2s(content, message, own, texts, tmp_path):
    """1,000 ids of another tokenizer would be trained on with GPT-2's 50,257."""
    assert prepare(texts, tmp_path / "own", own) == 0
    path = tmp_path / "own/manifest.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        find_shards(path.parent, "train")
    assert str(caught.value).endswith("or make the shards again in a new folder")
    (tmp_path / "own/tokenizer.json").unlink()  # so the file may be of another program
    assert find_shards(tmp_path / "own", "train")[0].vocabulary == GPT2_VOCABULARY


def test_an_unfinished_folder_and_a_stray_tokenizer_are_read(own, texts, tmp_path):
    """A manifest that names GPT-2's tokenizer counts, whatever lies beside it."""
    assert prepare(texts, tmp_path / "own", own, shard_tokens=300, max_shards=2) == 0
    assert find_shards(tmp_path / "own", "train")[0].vocabulary.end_of_text == 1
    assert prepare(texts, tmp_path / "gpt2", "tiktoken", shard_tokens=300, max_shards=2) == 0
    assert not read_manifest(tmp_path / "gpt2")["complete"]
    shutil.copy(own / "tokenizer.json", tmp_path / "gpt2")
    assert find_shards(tmp_path / "gpt2", "train")[0].vocabulary == GPT2_VOCABULARY
    (tmp_path / "new").mkdir()  # as an interrupted preparation leaves it before the first shard
    write_manifest(tmp_path / "new", read_manifest(tmp_path / "gpt2") | {"shards": []})
    assert of_shards(tmp_path / "new/manifest.json") == GPT2_VOCABULARY


def test_the_manifest_of_many_small_files_is_read_again(texts, tmp_path):
    """`gpt2 prepare` writes it, so the same command, and training, must read it."""
    assert prepare(texts, tmp_path / "d", "tiktoken") == 0
    files = {f"{number:06}.txt": 1 for number in range(300_000)}
    write_manifest(tmp_path / "d", read_manifest(tmp_path / "d") | {"files": files})
    assert read_manifest(tmp_path / "d")["files"] == files
    assert find_shards(tmp_path / "d", "train")[0].vocabulary == GPT2_VOCABULARY


def test_it_needs_no_torch():
    code = (
        "import sys, gpt2.prepare.run, gpt2.commands.inspect_shards;"
        "assert not {'torch', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("end", [END, "gato", "<|endoftext|>"])
@pytest.mark.parametrize("kind", [OwnByGigatoken, OwnByTiktoken])
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=80) | st.text("o gatão'sll \n\t12.🙂", max_size=80))
def test_faster_libraries_make_the_ids_of_tokenizers(kind, end, text):
    made, fast = _pair(kind, end)
    texts = [text, f"{end} {text}", "", text + "\u088f", f"o{end}", "gato gato"]
    for ours, theirs in zip(
        fast.encode_documents(texts), made.encode_documents(texts), strict=True
    ):
        assert ours.tolist() == theirs.tolist()
        assert ours.dtype == theirs.dtype


@functools.cache
def _pair(kind, end):
    made = OwnTokenizer(library(500, end).to_str().encode(), 1, "test")
    return made, kind(made, fast_tokenizer._ranks(made))


def test_the_fastest_library_that_is_installed(monkeypatch):
    made, _ = _pair(OwnByTiktoken, END)
    make = faster(made)
    assert isinstance(make(), OwnByGigatoken)
    assert make() is not make()  # one for each thread
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # as if not installed
    assert isinstance(faster(made)(), OwnByTiktoken)


def changed(change):
    values = json.loads(library().to_str())
    change(values)
    return OwnTokenizer(json.dumps(values).encode(), 1, "test")


UNLIKE = {
    "a space before the text": lambda v: v["pre_tokenizer"].update(add_prefix_space=True),
    "a normalizer": lambda v: v.update(normalizer={"type": "NFC"}),
    "another order of the merges": lambda v: v["model"]["merges"].reverse(),
    "whole words first": lambda v: v["model"].update(ignore_merges=True),
    "a token that no merge makes": lambda v: v["model"]["vocab"].update(xyz=999),
    "an added token that is a word": lambda v: v["added_tokens"][0].update(special=False),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_tokenizer_unlike_gpt2s_is_encoded_by_its_library(name):
    made = changed(UNLIKE[name])
    assert faster(made)() is made


def test_a_fault_of_gigatoken_is_found(own, texts, tmp_path, monkeypatch):
    right = OwnByGigatoken._json

    def wrong(self):
        values = json.loads(right(self))
        vocab = values["model"]["vocab"]
        vocab["a"], vocab["o"] = vocab["o"], vocab["a"]
        return json.dumps(values)

    monkeypatch.setattr(OwnByGigatoken, "_json", wrong)
    with pytest.raises(UserError, match="row 0: gigatoken and tokenizers make different tokens"):
        prepare(texts, tmp_path / "d", own)


def test_a_fault_of_tiktoken_is_found(own, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # as if not installed
    right = fast_tokenizer._ranks

    def wrong(made):
        ranks = right(made)
        a, b = b"a", b"o"
        return ranks | {a: ranks[b], b: ranks[a]}

    monkeypatch.setattr(fast_tokenizer, "_ranks", wrong)
    with pytest.raises(UserError, match="row 0: tiktoken and tokenizers make different tokens"):
        prepare(texts, tmp_path / "d", own)
