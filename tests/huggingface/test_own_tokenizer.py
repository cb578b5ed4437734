"""Models whose tokenizer is not GPT-2's: read, sampled, evaluated and exported with their own."""

import json
import shutil
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers import GPT2Config as TheirConfig

from gpt2 import GPT2, cli
from gpt2.checkpoint import weights
from gpt2.commands import evaluate
from gpt2.config.commands import EvalConfig, ServeConfig
from gpt2.data.chat_template import encode_prompt
from gpt2.data.shards import write_shard
from gpt2.errors import UserError
from gpt2.huggingface import kept_tokenizer, own_tokenizer
from gpt2.huggingface.own_tokenizer import NoTokenizer, OwnTokenizer
from gpt2.serve.logprobs import token_name
from gpt2.serve.requests import ChatRequest, CompletionRequest, make_request, parse
from gpt2.serve.server import describe
from gpt2.tokenizer import gpt2_tokenizer

from ..mutations import mutate, mutate_bytes

SENTENCES = ["o gato dorme na varanda e o cachorro late", "não há pão à mesa amanhã"] * 9
TEXT = "o gato não dorme 🙂 à mesa\n\n  amanhã"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def library(size: int = 400, added: tuple[str, ...] = ()) -> Library:
    """A byte-level BPE of another language, whose end-of-text token is 0."""
    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(SENTENCES, trainer)
    made.add_tokens(list(added))
    return made


def folder(path, made: Library, vocab_size: int = 0, **settings):
    """A model with this tokenizer, as transformers writes it."""
    torch.manual_seed(0)
    size = vocab_size or made.get_vocab_size()
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 64, "vocab_size": size}
    model = GPT2LMHeadModel(
        TheirConfig(**shape, **({"eos_token_id": 0, "bos_token_id": 0} | settings))
    )
    model.save_pretrained(path)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder whose tokenizer has another 384 or so tokens, padded to GPT-2's vocabulary."""
    return folder(tmp_path_factory.mktemp("own") / "pt", library(), vocab_size=50257)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder whose network has as many rows as its tokenizer has tokens."""
    return folder(tmp_path_factory.mktemp("small") / "pt", library())


def test_ids_bytes_and_text_are_those_of_transformers(own):
    theirs, ours = AutoTokenizer.from_pretrained(own), weights.load(own).tokenizer
    assert isinstance(ours, OwnTokenizer)
    assert ours.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
    assert ours.encode(TEXT) != gpt2_tokenizer().encode(TEXT)
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert ours.end_of_text == theirs.eos_token_id == 0
    literal = ours.encode("<|endoftext|>")
    assert 0 not in literal
    assert ours.decode(literal) == "<|endoftext|>"
    lengths = ours.bytes_per_token()
    assert lengths[0] == 0
    assert sum(lengths[ours.encode(TEXT)]) == len(TEXT.encode())
    tokens, counts = ours.encode_documents([TEXT, "", "o gato"])
    assert tokens.dtype == np.uint16
    assert sum(counts) == len(tokens)
    assert [i for i, t in enumerate(tokens) if t == 0] == [0, counts[0], counts[0] + 1]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_text_comes_back(text):
    made = OwnTokenizer(library().to_str().encode(), 0, "test")
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert made.decode(made.encode(text)) == whole
    assert len(made.bytes_per_token()) == made.vocab_size


def test_texts_are_written_and_read_in_its_language(small, capsys):
    own = small
    model = GPT2.from_pretrained(str(own), device="cpu")
    theirs = AutoTokenizer.from_pretrained(own)
    ids = model.generate(theirs.encode(TEXT), 12, seed=3, stop_at_end_of_text=False)
    known = [i for i in ids if i < model.tokenizer.vocab_size]
    text = model.generate(TEXT, 12, seed=3, stop_at_end_of_text=False)
    assert text == model.tokenizer.decode(known)
    pieces = model.stream(TEXT, 12, seed=3, stop_token=None, temperature=0.8, top_k=50)
    assert "".join(pieces) == text.removeprefix(TEXT)
    assert (
        cli.main(["sample", str(own), f"--prompt={TEXT}", "--max_new_tokens=12", "--seed=3"]) == 0
    )
    assert "own tokenizer is used" in capsys.readouterr().err


def test_a_conversation_has_its_ids():
    ours = OwnTokenizer(library().to_str().encode(), 0, "test")
    ids = encode_prompt([{"role": "user", "content": TEXT}], ours)
    begin = [0, *ours.encode("user\n"), *ours.encode(TEXT)]
    assert ids == [*begin, 0, *ours.encode("assistant\n")]


def test_it_goes_into_a_checkpoint_and_out_again(own, tmp_path):
    model = GPT2.from_pretrained(str(own), device="cpu")
    model.save(tmp_path / "out_ckpt.pt")
    again = GPT2.from_checkpoint(tmp_path / "out_ckpt.pt", "cpu")
    assert again.tokenizer.sha256 == model.tokenizer.sha256
    assert again.generate(TEXT, 9, seed=1) == model.generate(TEXT, 9, seed=1)
    assert cli.main(["export", str(tmp_path / "out_ckpt.pt"), str(tmp_path / "hf")]) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.encode(TEXT, add_special_tokens=False) == model.tokenizer.encode(TEXT)
    assert theirs.eos_token_id == 0


def test_export_keeps_tokenizer_special_ids_and_template(own, tmp_path):
    assert cli.main(["export", str(own), str(tmp_path / "hf")]) == 0
    for name in own_tokenizer.FILES:
        if (own / name).exists():
            assert (tmp_path / "hf" / name).read_bytes() == (own / name).read_bytes()
    before, after = (
        AutoTokenizer.from_pretrained(own),
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    assert before.encode(TEXT) == after.encode(TEXT)
    assert after.chat_template == TEMPLATE
    config = TheirConfig.from_pretrained(tmp_path / "hf")
    assert (config.eos_token_id, config.bos_token_id) == (0, 0)
    ends = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert ends["eos_token_id"] == 0


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_vocab_and_merges_without_a_tokenizer_json(own, tmp_path, end):
    shutil.copytree(own, tmp_path / "old")
    made = json.loads((own / "tokenizer.json").read_text("utf-8"))["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in made["merges"]]
    (tmp_path / "old/tokenizer.json").unlink()
    (tmp_path / "old/vocab.json").write_text(json.dumps(made["vocab"]), encoding="utf-8")
    (tmp_path / "old/merges.txt").write_bytes(end.join(["#version: 0.2", *merges, ""]).encode())
    found = weights.load(tmp_path / "old").tokenizer
    assert found.encode(TEXT) == weights.load(own).tokenizer.encode(TEXT)
    assert found.end_of_text == 0


def test_wrong_merges_are_named_by_their_file(own, tmp_path):
    shutil.copytree(own, tmp_path / "old")
    made = json.loads((own / "tokenizer.json").read_text("utf-8"))["model"]
    (tmp_path / "old/tokenizer.json").unlink()
    (tmp_path / "old/vocab.json").write_text(json.dumps(made["vocab"]), encoding="utf-8")
    (tmp_path / "old/merges.txt").write_text("no merge of it\n", "utf-8")
    found = weights.load(tmp_path / "old").tokenizer
    with pytest.raises(UserError, match=r"old.merges\.txt: not read by tokenizers"):
        found.encode(TEXT)


def test_gpt2_with_added_tokens_keeps_them(tmp_path):
    GPT2("gpt2-tiny").save(tmp_path / "m.pt")
    assert cli.main(["export", str(tmp_path / "m.pt"), str(tmp_path / "gpt2")]) == 0
    assert weights.load(tmp_path / "gpt2").own_tokenizer is None  # GPT-2's own files
    theirs = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    theirs.save_pretrained(tmp_path / "gpt2")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    model.resize_token_embeddings(50258)
    model.config.eos_token_id = 50257
    model.save_pretrained(tmp_path / "gpt2")
    found = weights.load(tmp_path / "gpt2").tokenizer
    assert found.encode(TEXT) == gpt2_tokenizer().encode(TEXT)
    assert (found.end_of_text, found.vocab_size) == (50257, 50258)
    assert found.decode([50257]) == "<|im_end|>"


def other_model(path):
    content = json.loads((path / "tokenizer.json").read_text("utf-8"))
    content["model"] = {"type": "WordPiece", "unk_token": "?", "vocab": {"?": 0}}
    (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def without_files(path):
    for name in own_tokenizer.FILES:
        (path / name).unlink(missing_ok=True)


def no_merge(path):
    content = json.loads((path / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"] = ["there is no such"]
    (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


REFUSED = {
    "another model": (other_model, "its model is 'WordPiece', and only byte-level BPE is read"),
    "no files": (without_files, "its config.json says bos_token_id=0, eos_token_id=0, and GPT-2's"),
    "a damaged one": (no_merge, "not read by tokenizers"),
    "no JSON": (lambda path: (path / "tokenizer.json").write_text("{"), "is not JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_is_not_known_gives_no_text(name, own, tmp_path, capsys):
    change, message = REFUSED[name]
    shutil.copytree(own, tmp_path / "x")
    change(tmp_path / "x")
    model = GPT2.from_pretrained(str(tmp_path / "x"), device="cpu")
    assert isinstance(model.tokenizer, NoTokenizer)
    assert len(model.generate([1, 2], 3, stop_at_end_of_text=False)) == 5  # ids are ids
    for command in (
        ["sample", "--prompt=a"],
        ["inspect", "a"],
        ["eval", f"--text={own}/config.json"],
    ):
        assert cli.main([command[0], str(tmp_path / "x"), *command[1:]]) == 2
        assert message in capsys.readouterr().err
    model.save(tmp_path / "m.pt")
    with pytest.raises(UserError, match=message):
        GPT2.from_checkpoint(tmp_path / "m.pt", "cpu").generate("a", 1)
    assert cli.main(["export", str(tmp_path / "x"), str(tmp_path / "hf")]) == 0
    kept = {
        p.name: p.read_bytes() for p in (tmp_path / "x").iterdir() if p.name in own_tokenizer.FILES
    }
    assert {n: (tmp_path / "hf" / n).read_bytes() for n in kept} == kept
    assert TheirConfig.from_pretrained(tmp_path / "hf").eos_token_id == 0


def test_training_keeps_the_rows_of_its_tokenizer(own):
    found = weights.for_training(weights.load(own), 64)
    assert found.config.vocab_size == found.tokenizer.vocab_size < 50257
    assert any("of 50,257 rows are used" in note for note in found.notes)


def test_more_tokens_than_rows(tmp_path):
    made = library(added=tuple(f"[x{i}]" for i in range(9)))
    path = folder(tmp_path / "m", made, vocab_size=50257)
    shutil.copy(path / "tokenizer.json", tmp_path / "kept.json")
    content = json.loads((path / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"][-1]["id"] = 50257
    (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="its tokenizer has 50,258 tokens and its network 50,257"):
        weights.load(path).tokenizer.check()


def test_loss_and_bits_per_byte_are_those_of_its_ids(small, tmp_path, capsys):
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    arguments = [f"--text={tmp_path / 't.txt'}", f"--json={tmp_path / 'r.json'}", "--device=cpu"]
    assert cli.main(["eval", str(small), *arguments, "--dtype=float32"]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    ids = torch.tensor([[0, *AutoTokenizer.from_pretrained(small).encode(TEXT)]])
    with torch.no_grad():
        theirs = GPT2LMHeadModel.from_pretrained(small)(ids, labels=ids).loss.item()
    assert found["text_loss"] == pytest.approx(theirs, rel=1e-5)
    nats, size = found["text_loss"] * found["text_tokens"], len(TEXT.encode())
    assert found["text_bpb"] == pytest.approx(nats / size / np.log(2), rel=1e-5)
    assert cli.main(["inspect", str(small), TEXT, "--out="]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = AutoTokenizer.from_pretrained(small).encode(TEXT)
    assert len([line for line in lines if line[:4].strip().isdigit()]) == len(words)
    (tmp_path / "d").mkdir()
    write_shard(tmp_path / "d/x_val_000000.bin", np.arange(99, dtype=np.uint16))
    with pytest.raises(UserError, match="has GPT-2's vocabulary of 50257, and"):
        evaluate.run(str(small), EvalConfig(data_dir=str(tmp_path / "d"), device="cpu"))


def test_the_harness_asks_in_its_language(small):
    from gpt2.commands.lm_eval_harness import Harness

    harness, theirs = Harness(str(small), device="cpu"), AutoTokenizer.from_pretrained(small)
    assert harness.tok_encode(TEXT) == theirs.encode(TEXT)
    assert harness.eot_token_id == 0
    written = harness.apply_chat_template([{"role": "user", "content": TEXT}])
    ids = harness.tok_encode(written)
    assert ids == encode_prompt([{"role": "user", "content": TEXT}], harness._tokenizer)


def test_the_server_speaks_its_language(small):
    model = GPT2.from_pretrained(str(small), device="cpu")
    served = describe(str(small), ServeConfig(), model)
    raw = json.dumps({"prompt": TEXT, "max_tokens": 5, "temperature": 0, "echo": True})
    request = make_request(parse(raw.encode(), CompletionRequest), served)
    ids = AutoTokenizer.from_pretrained(small).encode(TEXT)
    (choice,) = request.choices
    assert choice.generation.tokens == ids
    piece = choice.add(ids[1])
    assert piece.text == TEXT + model.tokenizer.decode([ids[1]])
    assert choice.add(0).finish == "stop"
    assert token_name(0, "", model.tokenizer) == "<|endoftext|>"
    raw = json.dumps({"messages": [{"role": "user", "content": TEXT}], "max_tokens": 5})
    request = make_request(parse(raw.encode(), ChatRequest), served)
    prompt = encode_prompt([{"role": "user", "content": TEXT}], model.tokenizer)
    assert request.choices[0].generation.tokens == prompt


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json"])
def test_mutated_tokenizers_give_text_or_one_line(name, small, tmp_path):
    shutil.copytree(small, tmp_path / "m")
    made = json.loads((small / "tokenizer.json").read_text("utf-8"))
    if name == "vocab.json":
        (tmp_path / "m/tokenizer.json").unlink()
        (tmp_path / "m/vocab.json").write_text(json.dumps(made["model"]["vocab"]), "utf-8")
        (tmp_path / "m/merges.txt").write_text("#version: 0.2\n", "utf-8")
    config = json.loads((tmp_path / "m/config.json").read_text())
    content, rng, refused = json.loads((tmp_path / "m" / name).read_text("utf-8")), Random(0), 0
    for _ in range(150):
        data = json.dumps(mutate(content, rng)).encode()
        (tmp_path / "m" / name).write_bytes(data if rng.random() < 0.7 else mutate_bytes(data, rng))
        asked = config if rng.random() < 0.5 else {}
        found = own_tokenizer.tokenizer_of(tmp_path / "m", asked, 400)
        if isinstance(found, NoTokenizer):
            refused += 1
            assert "\n" not in found.reason
            assert found.reason.isprintable()
        elif found:
            found.decode(found.encode(TEXT))
    assert refused


def test_a_stored_tokenizer_is_not_trusted(small, tmp_path):
    GPT2.from_pretrained(str(small), device="cpu").save(tmp_path / "m.pt")
    content = torch.load(tmp_path / "m.pt")
    stored = kept_tokenizer.to_store(
        OwnTokenizer(library(added=("[x]",)).to_str().encode(), 0, "x")
    )
    for tokenizer, message in (
        (stored, "its tokenizer has 306 tokens and its network 305"),
        ({"reason": "a \x1b[2J"}, r"a \\x1b\[2J"),
        ({"content": torch.zeros(3)}, "its `tokenizer` is damaged"),
    ):
        torch.save(content | {"tokenizer": tokenizer, "format": None}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=message):
            weights.load(tmp_path / "x.pt").tokenizer.check()
