"""Sampling, the cache, and the GPT2 class."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from gpt2 import GPT2
from gpt2.config.model import GPT2Config
from gpt2.data.shards import find_shards
from gpt2.errors import UserError
from gpt2.generate.sampling import Sampling, choose, filter_logits
from gpt2.generate.speculative import SpeculativeDecoding
from gpt2.generate.stream import TextWriter, decoder_for, generate
from gpt2.huggingface.model_format import to_hf
from gpt2.model.gpt import GPT
from gpt2.tokenizer import gpt2_tokenizer

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPT2Config(**SHAPE, block_size=32, vocab_size=300))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    return GPT2(**SHAPE, block_size=64)


def test_cached_greedy_output_equals_uncached(model):
    """100 tokens through a context of 32, so that it slides several times."""
    prompts = [[1, 2, 3], [7, 8, 9, 10, 11], [5]]
    cached = generate(model, prompts, 100, temperature=0)
    assert cached == generate(model, prompts, 100, temperature=0, use_cache=False)
    assert [len(row) for row in cached] == [100] * 3


def test_prompts_of_different_length_do_not_disturb_each_other(model):
    prompts = [[1, 2, 3], [7, 8, 9, 10, 11, 12, 13, 14], [5]]
    together = generate(model, prompts, 15, temperature=0)
    assert together == [generate(model, [p], 15, temperature=0)[0] for p in prompts]


def copies_of(model, rows: int, new_tokens: int) -> tuple[bool, bool]:
    """Whether a decoder drafts, and whether it packs."""
    decoder = decoder_for(model, [[1]] * rows, new_tokens, Sampling())
    return decoder.speculative is not None, decoder.forward.packed is not None


def test_weights_are_copied_only_for_many_tokens(model, monkeypatch):
    """Copying those of GPT-2 (124M) takes as long as 200 tokens save, or 20 of several rows."""
    monkeypatch.setattr("gpt2.generate.stream.DRAFT_MIN_PARAMETERS", 0)
    assert copies_of(model, 1, 199) == (False, False)
    assert copies_of(model, 1, 200) == (True, False)
    assert copies_of(model, 2, 19) == (False, False)
    assert copies_of(model, 2, 20) == (False, True)
    switched = GPT2(**SHAPE, block_size=32, mlp="relu2")
    assert copies_of(switched, 1, 200) == copies_of(switched, 2, 20) == (False, False)
    assert copies_of(copy.deepcopy(model).double(), 2, 20) == (False, False)
    with torch.autocast("cpu", torch.bfloat16):
        assert copies_of(model, 2, 20) == (False, False)


@pytest.fixture(scope="module")
def trained(data_dir):
    """Two blocks that have seen a little text, so that some tokens are clearly likelier."""
    torch.manual_seed(0)
    model = GPT(GPT2Config(**SHAPE, block_size=256, vocab_size=512))
    (shard, *_) = find_shards(data_dir, "train")
    tokens = torch.from_numpy(shard.read(0, shard.tokens).astype("int64"))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(40):
        x = tokens[step * 512 : step * 512 + 513]
        loss = model(x[:-1].view(4, 128), x[1:].view(4, 128))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 5.5  # 6.2 without training
    return model


def hugging_face(model) -> transformers.GPT2LMHeadModel:
    c = model.config
    config = transformers.GPT2Config(
        n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_positions=c.block_size,
        vocab_size=c.vocab_size, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    hf = transformers.GPT2LMHeadModel(config).eval()
    hf.load_state_dict(to_hf(model.state_dict()))
    return hf


PROMPTS = [[4, 5, 6], [7], list(range(20, 70)), [250, 3, 250, 3], [100] * 9]


@torch.no_grad()
def greedy(hf, prompt: list[int], row: list[int], penalty: float) -> list[int]:
    """What hf takes at each place of a row behind a prompt, if it has taken what is before it.

    In one pass: its own `generate` makes one for each token, which is 200 times as slow. A row that
    equals this is, place by place, what `generate` writes.
    """
    ids = torch.tensor([prompt + row])
    logits = hf(ids).logits
    adjust = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    places = range(len(prompt), ids.shape[1])
    return [adjust(ids[:, :at], logits[:, at - 1]).argmax().item() for at in places]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("weights", ["random", "trained"])
def test_greedy_equals_hugging_face(model, trained, weights, settings, monkeypatch):
    """200 tokens each: alone, all together, and drafted; one prompt also by its `generate`."""
    if weights == "random":
        torch.manual_seed(1)
        model = GPT(GPT2Config(**SHAPE, block_size=256, vocab_size=300))
        for p in model.parameters():
            p.data.normal_(0, 0.3)
    else:
        model = trained
    hf = hugging_face(model)
    first = hf.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=200, do_sample=False, **settings)
    penalty = settings.get("repetition_penalty", 1.0)
    settings = settings | {"temperature": 0}
    ours = generate(model, PROMPTS, 200, **settings)
    assert [len(row) for row in ours] == [200] * 5
    assert PROMPTS[0] + ours[0] == first[0].tolist()
    assert [greedy(hf, p, row, penalty) for p, row in zip(PROMPTS, ours, strict=True)] == ours
    monkeypatch.setattr("gpt2.generate.stream.DRAFT_MIN_PARAMETERS", 0)
    monkeypatch.setattr(SpeculativeDecoding, "pays", lambda self: True)
    assert [generate(model, [p], 200, **settings)[0] for p in PROMPTS] == ours


def test_sampling_equals_itself_without_cache(trained):
    settings = {"temperature": 0.9, "top_k": 60, "min_p": 0.01, "seed": 4}
    cached = generate(trained, PROMPTS, 60, **settings)
    assert cached == generate(trained, PROMPTS, 60, use_cache=False, **settings)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(trained, [prompt], 60, **settings | {"seed": 4 + i})
        assert alone[0] == cached[i]


def test_prompt_longer_than_the_context(model):
    prompt = [i % 300 for i in range(100)]
    out = generate(model, [prompt], 5, temperature=0)
    assert out == generate(model, [prompt[-16:]], 5, temperature=0)  # half of 32, as documented


def test_seed_makes_samples_repeat(model):
    one, two, other = (generate(model, [[1]], 20, seed=seed) for seed in (3, 3, 4))
    assert one == two != other
    assert generate(model, [[1]], 20) != generate(model, [[1]], 20)


def test_stop_token_ends_a_row(model):
    free = generate(model, [[1], [2]], 20, temperature=0)
    stop = free[0][4]
    stopped = generate(model, [[1], [2]], 20, temperature=0, stop_token=stop)
    for row, whole in zip(stopped, free, strict=True):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)


def test_filters_against_plain_python():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0, -1.0]])
    kept = lambda **kw: (filter_logits(logits, 1.0, **kw) > -1e9).tolist()[0]  # noqa: E731
    assert kept() == [True] * 5
    assert kept(top_k=2) == [False, True, True, False, False]
    assert kept(top_k=99) == [True] * 5
    p = logits.softmax(-1)[0]  # 0.086, 0.636, 0.234, 0.032, 0.012
    assert kept(top_p=p[1].item() - 0.01) == [False, True, False, False, False]
    assert kept(top_p=p[1].item() + 0.01) == [False, True, True, False, False]
    assert kept(top_p=1e-9) == [False, True, False, False, False]
    assert kept(top_p=0.97) == [True, True, True, True, False]
    torch.testing.assert_close(filter_logits(logits, 0.5), logits * 2)


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, 3)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    drawn = choose(logits, uniform, Sampling())
    shares = drawn.bincount() / 20_000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": float("nan")},
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 1.1},
    ],
)
def test_settings_that_mean_nothing(model, bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        generate(model, [[1]], 5, **bad)


def test_empty_prompts(model):
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(UserError, match="at least one token"):
            generate(model, prompts, 5)


# ---- the class GPT2 -----------------------------------------------------------------------------


def test_words_of_the_readme(gpt2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gpt2.save("out/out_ckpt.pt")
    model = GPT2(**SHAPE).from_checkpoint("out/out_ckpt.pt")
    text = model.generate("Hello world,")
    assert isinstance(text, str)
    assert text.startswith("Hello world,")
    assert len(text) > len("Hello world,")


def test_train_gpt2_exports_the_class():
    from train_gpt2 import GPT2 as same

    assert same is GPT2


def test_kinds_of_prompt(gpt2):
    settings = {"max_new_tokens": 5, "temperature": 0}
    text = gpt2.generate("Hello", **settings)
    assert gpt2.generate(["Hello", "Hello"], **settings) == [text, text]
    ids = gpt2.generate([15496], **settings)
    assert len(ids) == 6
    assert ids[0] == 15496
    assert gpt2.generate(torch.tensor([15496]), **settings) == ids
    assert gpt2.generate([[15496], [11]], **settings)[0] == ids
    assert gpt2.generate(torch.tensor([[15496], [15496]]), **settings) == [ids, ids]
    assert isinstance(gpt2.generate("", **settings), str)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint8])
def test_ids_of_numpy(gpt2, dtype):
    """Shards hold uint16, which torch cannot multiply; a list of them is no list of prompts."""
    row = np.array([15, 11], dtype)
    wanted = gpt2.generate([15, 11], 3, temperature=0)
    for prompt in (row, list(row), tuple(row), torch.tensor([15, 11]), list(torch.tensor(row))):
        found = gpt2.generate(prompt, 3, temperature=0)
        assert found == wanted
        assert all(type(i) is int for i in found)
    for prompts in (
        np.stack([row, row]),
        [row, row],
        [row, [15, 11]],
        [torch.tensor([15, 11])] * 2,
    ):
        assert gpt2.generate(prompts, 3, temperature=0) == [wanted, wanted]
    assert gpt2.generate(np.str_("Hello"), 2, temperature=0).startswith("Hello")


@pytest.mark.parametrize(
    "prompt", [np.array([1.0]), [1, "a"], ["a", 1], [[1], "a"], 5, [[[1]]], {}]
)
def test_what_is_no_prompt(gpt2, prompt):
    with pytest.raises(UserError, match=r"a prompt (is a text, a list of|needs at least)"):
        gpt2.generate(prompt, 2)


def test_stream_pieces_make_the_text(gpt2):
    pieces = list(gpt2.stream("Hello", 40, temperature=0))
    whole = gpt2.generate("Hello", 40, temperature=0)
    assert "Hello" + "".join(pieces) == whole


def pieces_of(text: str, stops) -> tuple[list[str], TextWriter]:
    writer = TextWriter(stops)
    pieces = [writer.add(token) for token in gpt2_tokenizer().encode(text)]
    return [*pieces, writer.finish()], writer


@pytest.mark.parametrize("stop", ["brown fox", "\n\n", "x", "naïve ☕", "over the lazy do!", "ooo"])
def test_text_ends_before_the_stop_string(stop):
    """At every token's end the text so far neither holds a part of it nor lags without need."""
    text = "The quick brown fox\njumps over the lazy dog ooops\n\nnaïve ☕ ooo end"
    pieces, writer = pieces_of(text, [stop, "never there"])
    assert "".join(pieces) == text.split(stop, maxsplit=1)[0]
    assert writer.stopped == (stop in text)
    assert not writer.stopped or writer.add(50) == ""
    free, _ = pieces_of(text, [])
    assert "".join(free) == text


def test_the_first_of_several_stop_strings_counts():
    assert "".join(pieces_of("one two three", ["three", "two"])[0]) == "one "


def test_stop_in_generate_and_stream(gpt2):
    whole = gpt2.generate("Hello", 40, temperature=0)[len("Hello") :]
    stop = whole[10:16]
    cut = whole.split(stop)[0]
    assert gpt2.generate("Hello", 40, temperature=0, stop=stop) == "Hello" + cut
    assert (
        gpt2.generate(["Hello", "Hello"], 40, temperature=0, stop=[stop, "§§"])
        == ["Hello" + cut] * 2
    )
    assert "".join(gpt2.stream("Hello", 40, temperature=0, stop=stop)) == cut


def test_stop_that_means_nothing(gpt2):
    for stop in ("a", ["a"]):
        with pytest.raises(UserError, match="prompts that are text"):
            gpt2.generate([1, 2], stop=stop)
    with pytest.raises(UserError, match="not empty"):
        gpt2.generate("a", stop=["a", ""])


def test_bad_ids(gpt2):
    for ids in ([50257], [-1]):
        with pytest.raises(UserError, match="0 to 50256"):
            gpt2.generate(ids)


def test_padded_ids_are_never_written(gpt2):
    """Even when every real token is as unlikely as a float allows."""
    out = gpt2.generate([[5]] * 50, 30, temperature=100.0, top_k=0, seed=0)
    assert max(max(row) for row in out) < 50257


@pytest.mark.slow
def test_default_is_gpt2():
    with torch.device("meta"):
        assert GPT2().num_parameters() == 124_439_808
        assert GPT2("gpt2-medium").config.n_layer == 24
    with pytest.raises(UserError, match="gpt2-xl"):
        GPT2("gpt3")


def test_a_text_that_is_open_when_python_ends_says_nothing():
    code = (
        "from gpt2 import GPT2\n"
        "open_text = GPT2(n_layer=1, n_head=1, n_embd=8, block_size=16).stream('a', 9, seed=1)\n"
        "next(open_text)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_more_tokens_than_memory_holds_numbers_for_are_refused(gpt2):
    for count in (10**7 + 1, 10**12):
        with pytest.raises(UserError, match=f"max_new_tokens={count}: use at most 10,000,000"):
            gpt2.generate("a", count)
        with pytest.raises(UserError, match="use at most 10,000,000"):
            next(gpt2.stream("a", count))
