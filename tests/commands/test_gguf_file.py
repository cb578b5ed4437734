"""GGUF files as the package `gguf` reads them, and as llama.cpp speaks with them."""

import json
import struct

import jinja2
import pytest
import tokenizers
import torch
from tokenizers import pre_tokenizers

from gpt2 import GPT2
from gpt2.cli import main
from gpt2.data.chat_template import encode_prompt
from gpt2.generate.stream import generate
from gpt2.tokenizer import END_OF_TEXT, END_OF_TEXT_NAME, gpt2_tokenizer

from ..huggingface.test_own_tokenizer import TEMPLATE, TEXT, folder, library
from .test_export import TEXTS, a_model

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?\n\nSay it in Ünïcödé 🙂."},
    {"role": "assistant", "content": "A small model."},
    {"role": "user", "content": "1999?"},
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """(model that saw conversations, whose embedding has rows without a token; its GGUF file)."""
    made = tmp_path_factory.mktemp("gguf")
    model = a_model(vocab_size=50304)
    model.save(made / "out_ckpt.pt")
    (made / "config.toml").write_text('data_dir = "chats.jsonl"\n')
    command = ["export", str(made / "out_ckpt.pt"), str(made / "chat.gguf"), "--format=gguf"]
    assert main(command) == 0
    return model, made / "chat.gguf"


def read(path):
    """(settings, tensors) of a file, by an independent reader; 11 s for GPT-2's vocabulary."""
    gguf = pytest.importorskip("gguf")  # extra `dev`
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    return values, {t.name: t for t in reader.tensors}


def settings(path):
    """The settings of a file."""
    forms = {4: "<I", 5: "<i", 6: "<f", 7: "<?", 8: "<Q"}
    with open(path, "rb") as file:

        def number(form):
            return struct.unpack(form, file.read(struct.calcsize(form)))[0]

        def value(kind):
            if kind == 9:
                kind, count = number("<I"), number("<Q")
                return [value(kind) for _ in range(count)]
            return file.read(number("<Q")).decode() if kind == 8 else number(forms[kind])

        _, _, _, count = struct.unpack("<4sIQQ", file.read(24))
        return {value(8): value(number("<I")) for _ in range(count)}


def encoder(values):
    """llama.cpp's tokenizer for these settings: byte-level BPE, special tokens read as such."""
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in values["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] == 1}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    # An added token takes the next free id: the control tokens here follow the others.
    found.add_special_tokens([token for i, token in enumerate(tokens) if kinds[i] == 3])
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_reader_finds_the_tensors_and_the_sizes(dtype, tmp_path):
    made = library()
    source = folder(tmp_path / "pt", made)
    path = tmp_path / "m.gguf"
    assert main(["export", str(source), str(path), "--to=gguf", f"--dtype={dtype}"]) == 0
    values, tensors = read(path)
    assert {name: values[name] for name in settings(path)} == settings(path)
    assert values["general.architecture"] == "gpt2"
    assert values["gpt2.block_count"] == 1
    assert values["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert len(tensors) == 16
    state = GPT2.from_pretrained(source, device="cpu").state_dict()
    matrix = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    for ours, theirs, kind in (
        ("transformer.wte.weight", "token_embd.weight", matrix),
        ("transformer.wpe.weight", "position_embd.weight", "F32"),
        ("transformer.h.0.attn.c_attn.weight", "blk.0.attn_qkv.weight", matrix),
        ("transformer.h.0.attn.c_proj.weight", "blk.0.attn_output.weight", matrix),
        ("transformer.h.0.mlp.c_fc.weight", "blk.0.ffn_up.weight", matrix),
        ("transformer.h.0.mlp.c_proj.bias", "blk.0.ffn_down.bias", "F32"),
        ("transformer.h.0.ln_2.weight", "blk.0.ffn_norm.weight", "F32"),
        ("transformer.ln_f.bias", "output_norm.bias", "F32"),
    ):
        tensor, wanted = tensors[theirs], state[ours]
        assert tensor.tensor_type.name == kind, theirs
        assert list(tensor.shape) == list(reversed(wanted.shape))
        wanted = wanted.to(getattr(torch, dtype)) if kind == matrix else wanted
        found = torch.from_numpy(tensor.data.copy()).view(wanted.dtype)
        assert torch.equal(found.view(wanted.shape), wanted), theirs


def test_the_template_gives_the_ids_of_chat(chat):
    values = settings(chat[1])
    assert values["tokenizer.ggml.eos_token_id"] == END_OF_TEXT
    assert values["tokenizer.ggml.bos_token_id"] == END_OF_TEXT
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.ggml.tokens"][END_OF_TEXT] == END_OF_TEXT_NAME
    assert len(values["tokenizer.ggml.tokens"]) == 50304  # a row of the embedding each
    assert values["tokenizer.ggml.token_type"][-1] == 5  # not used
    template = jinja2.Template(values["tokenizer.chat_template"])
    text = template.render(messages=MESSAGES, add_generation_prompt=True)
    assert encoder(values).encode(text).ids == encode_prompt(MESSAGES)
    for text in TEXTS:
        assert encoder(values).encode(text).ids == gpt2_tokenizer().encode(text)


def test_llama_cpp_says_what_chat_says(chat):
    """Greedy, with caches in float32. xllamacpp is llama.cpp with its server, as a wheel."""
    llama = pytest.importorskip("xllamacpp")
    model, path = chat
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 64, 1
    params.use_jinja, params.warmup, params.n_gpu_layers = True, False, 0
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    request = {"messages": MESSAGES[:2], "temperature": 0, "max_tokens": 12}
    answer = llama.Server(params).handle_chat_completions(request)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    prompt = encode_prompt(MESSAGES[:2])
    ours = generate(model, [prompt], 12, temperature=0, stop_token=END_OF_TEXT)[0]
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["choices"][0]["message"]["content"] == gpt2_tokenizer().decode(ours)


def test_no_template_without_conversations(tmp_path):
    a_model().save(tmp_path / "m.pt")
    assert main(["export", str(tmp_path / "m.pt"), str(tmp_path / "m.gguf"), "--to=gguf"]) == 0
    assert "tokenizer.chat_template" not in settings(tmp_path / "m.gguf")


def test_a_tokenizer_of_its_own(tmp_path, capsys):
    made = library(added=("<|user|>",))
    source = folder(tmp_path / "pt", made)
    assert main(["export", str(source), str(tmp_path / "m.gguf"), "--to=gguf"]) == 0
    values = settings(tmp_path / "m.gguf")
    assert values["tokenizer.ggml.eos_token_id"] == 0
    assert values["tokenizer.chat_template"] == TEMPLATE
    kinds = dict(zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"],
                     strict=True))  # fmt: skip
    assert (kinds["<|endoftext|>"], kinds["<|user|>"]) == (3, 4)
    tokens = values["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in made.encode(TEXT).ids] == made.encode(TEXT).tokens
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    other = folder(tmp_path / "other", made)
    assert main(["export", str(other), str(tmp_path / "o.gguf"), "--to=gguf"]) == 2
    assert "its tokenizer cuts words unlike GPT-2's" in capsys.readouterr().err


def test_a_name_of_a_file_makes_no_folder(tmp_path, capsys):
    a_model().save(tmp_path / "m.pt")
    assert main(["export", str(tmp_path / "m.pt"), str(tmp_path / "full.gguf")]) == 0
    assert (tmp_path / "full.gguf").read_bytes()[:4] == b"GGUF"
    for name in ("x.safetensors", "x.bin", "x.pth", "x.ckpt", "x.onnx", "x.h5"):
        assert main(["export", str(tmp_path / "m.pt"), str(tmp_path / name)]) == 2
        told = f"is the name of a file, and --to=hf makes a folder; name it {tmp_path / 'x'}, or"
        assert told in capsys.readouterr().err
        assert not (tmp_path / name).exists()
    assert main(["export", str(tmp_path / "m.pt"), str(tmp_path / "m.pt")]) == 2
    assert "delete it first" not in capsys.readouterr().err  # that would be the model itself
    assert main(["export", str(tmp_path / "m.pt"), str(tmp_path / "v1.5")]) == 0
    assert (tmp_path / "v1.5/config.json").is_file()


def test_what_cannot_be_is_one_line(tmp_path, capsys):
    a_model(vocab_size=20).save(tmp_path / "m.pt")
    path = tmp_path / "m.gguf"
    assert main(["export", str(tmp_path / "m.pt"), str(path), "--to=gguf"]) == 2
    assert "GGUF needs a tokenizer, and its 20 tokens are not GPT-2's" in capsys.readouterr().err
    assert not path.exists()
    assert main(["export", str(tmp_path / "m.pt"), str(tmp_path / "no/m.gguf"), "--to=gguf"]) == 2
    assert "is no folder; make it first" in capsys.readouterr().err
    path.write_text("mine", "utf-8")
    assert main(["export", str(tmp_path / "m.pt"), str(path), "--to=gguf"]) == 2
    assert "is there already; name a new file" in capsys.readouterr().err
    assert path.read_text("utf-8") == "mine"
