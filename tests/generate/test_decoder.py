"""All ways of decoding give the tokens of the plainest one, which computes everything anew."""

import gc
import types
import weakref

import psutil
import pytest
import torch

from gpt2.config.model import GPT2Config
from gpt2.errors import UserError
from gpt2.generate.decoder import Decoder
from gpt2.generate.few_token_pass import half_linear, packed_linear
from gpt2.generate.sampling import Sampling
from gpt2.generate.speculative import SpeculativeDecoding
from gpt2.kernels.attention import cached_attention, causal_attention_reference
from gpt2.model.gpt import GPT

GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
EVEN, UNEVEN = [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [7, 8, 9, 10, 11], [5], list(range(70))]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPT2Config(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=300))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


def written(model, prompts, count, sampling, **ways):
    decoder = Decoder(model, len(prompts), 200, sampling, **ways)
    return list(decoder.write(prompts, count, seed=3))


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
@pytest.mark.parametrize("prompts", [EVEN, UNEVEN])
def test_static_cache_equals_no_cache(model, prompts, sampling):
    """100 tokens through a context of 32: rows slide again and again, each at its own time."""
    plain = written(model, prompts, 100, sampling, use_cache=False)
    assert len(plain) == 100
    assert written(model, prompts, 100, sampling, static=True) == plain
    if prompts is EVEN:
        assert written(model, prompts, 100, sampling) == plain


@pytest.mark.parametrize("prompts", [EVEN, UNEVEN])
def test_packed_weights_give_the_same_tokens(model, prompts):
    plain = written(model, prompts, 60, DRAWN, use_cache=False)
    assert written(model, prompts, 60, DRAWN, static=prompts is UNEVEN, packed=True) == plain


def test_packed_weights_are_copies():
    """A step multiplies by them: a change of the head has no effect any more."""
    network = GPT(GPT2Config(n_layer=1, n_head=1, n_embd=16, block_size=32, vocab_size=50))
    forward = Decoder(network, 2, 16, GREEDY, packed=True).forward
    with torch.inference_mode():
        network.transformer.wte.weight[10:] = 0
        assert forward.next_logits(torch.tensor([3, 4]))[:, 10:].abs().amax() > 0


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_drafted_tokens_are_those_of_the_float32_model(model, sampling, monkeypatch):
    monkeypatch.setattr(SpeculativeDecoding, "pays", lambda self: True)
    for prompt in ([1, 2, 3], [5], list(range(70))):
        plain = written(model, [prompt], 100, sampling, use_cache=False)
        assert written(model, [prompt], 100, sampling, draft=True) == plain


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_bad_drafts_change_nothing(model, sampling, monkeypatch):
    """A draft of other weights is right only by chance."""
    monkeypatch.setattr(SpeculativeDecoding, "pays", lambda self: True)
    decoder = Decoder(model, 1, 200, sampling, draft=True)
    head = torch.randn(300, 32)
    decoder.speculative.halves[model.transformer.wte] = lambda x: x @ head.t()
    plain = written(model, [[1, 2, 3]], 60, sampling, use_cache=False)
    assert list(decoder.write([[1, 2, 3]], 60, seed=3)) == plain
    assert decoder.speculative.tokens < 2 * decoder.speculative.rounds


def test_drafting_ends_where_it_does_not_pay(model):
    draft = Decoder(model, 1, 64, GREEDY, draft=True).speculative
    assert not draft.pays()  # before the plain pass is measured
    draft.single_step_seconds = 1.0
    assert draft.pays()
    for _ in range(3):
        draft.count(2, 1.0)
    assert draft.pays()
    draft.count(1, 9.0)
    assert not draft.pays()


@pytest.mark.parametrize("missing", ["nothing", "engine", "module", "operators"])
def test_linear_layers_of_the_draft(missing, monkeypatch):
    """Both forms equal `F.linear` with weights rounded to float16."""
    if missing == "engine":
        monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["none"])
    elif missing == "module":
        monkeypatch.delattr(torch.backends, "quantized")
    elif missing == "operators":
        monkeypatch.setattr(torch.ops, "quantized", object())
    torch.manual_seed(0)
    for layer in (torch.nn.Linear(100, 30), torch.nn.Embedding(301, 64)):
        x, bias = torch.randn(1, layer.weight.shape[1]), getattr(layer, "bias", None)
        exact = torch.nn.functional.linear(x, layer.weight.half().float(), bias)
        with torch.inference_mode():
            found = half_linear(layer)(x)
        assert found.dtype == torch.float32
        atol = 1e-5 if missing == "nothing" else 1e-2
        torch.testing.assert_close(found, exact, atol=atol, rtol=1e-2)


def other_arguments(x, packed):
    """Stands for a private operator that has changed."""
    raise AssertionError(x, packed)  # not reached: Python finds five arguments too many


@pytest.mark.parametrize("missing", ["nothing", "oneDNN", "operators", "one", "arguments"])
def test_linear_layers_of_the_verification(missing, monkeypatch):
    """All forms equal `F.linear`, also for fewer and more rows than the weight was packed for."""
    if missing == "oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif missing == "operators":
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    elif missing in ("one", "arguments"):
        kept = {"_reorder_linear_weight": lambda weight, rows: weight}
        changed = {"_linear_pointwise": other_arguments} if missing == "arguments" else {}
        monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace(**kept, **changed))
    torch.manual_seed(0)
    for layer in (torch.nn.Linear(100, 30), torch.nn.Embedding(301, 64)):
        for rows in (1, 12, 20):
            x = torch.randn(rows, layer.weight.shape[1])
            exact = torch.nn.functional.linear(x, layer.weight, getattr(layer, "bias", None))
            with torch.inference_mode():
                found = packed_linear(layer, 12)(x)
            torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


def test_drafted_memory_is_half():
    layer = torch.nn.Linear(4096, 8192)
    with torch.inference_mode():
        half_linear(torch.nn.Linear(64, 64))
        before = psutil.Process().memory_info().rss
        kept = half_linear(layer)
        added = psutil.Process().memory_info().rss - before
    assert kept
    assert added < 0.7 * layer.weight.nbytes


def test_a_decoder_is_used_again(model):
    decoder = Decoder(model, 3, 60, DRAWN, static=True)
    prompts = UNEVEN[:3]
    first = list(decoder.write(prompts, 30, seed=1))
    other = list(decoder.write([[9], [8, 8], [7]], 10, seed=2))
    assert list(decoder.write(prompts, 30, seed=1)) == first
    assert other != first[:10]
    assert first == list(Decoder(model, 3, 60, DRAWN, static=True).write(prompts, 30, seed=1))


def test_a_row_depends_on_its_own_prompt_and_seed(model):
    together = written(model, UNEVEN, 40, DRAWN, static=True)
    for i, prompt in enumerate(UNEVEN):
        alone = Decoder(model, 1, 200, DRAWN).write([prompt], 40, seed=3 + i)
        assert [row[i] for row in together] == [token for (token,) in alone]


def test_closed_early_it_frees_the_cache(model):
    decoder = Decoder(model, 1, 100, GREEDY)
    keys = weakref.ref(decoder.forward.cache.keys)
    writer = decoder.write([[1]], 50)
    next(writer)
    del decoder
    assert keys() is not None
    writer.close()
    del writer
    gc.collect()
    assert keys() is None


@pytest.mark.parametrize("new", [1, 3])
def test_attention_over_a_cache_of_uneven_rows(new):
    torch.manual_seed(0)
    lengths = torch.tensor([0, 5, 12])
    q, k, v = torch.randn(3, 3, 2, new, 8)
    keys, values = torch.randn(2, 3, 2, 20, 8)
    old_keys, old_values = keys.clone(), values.clone()
    out = cached_attention(q, k, v, keys, values, lengths, 12 + new)
    for i, n in enumerate(lengths.tolist()):
        row = slice(i, i + 1)
        whole_k = torch.cat((old_keys[row, :, :n], k[row]), 2)
        whole_v = torch.cat((old_values[row, :, :n], v[row]), 2)
        exact = causal_attention_reference(q[row], whole_k, whole_v)
        torch.testing.assert_close(out[row], exact)
        assert torch.equal(keys[row, :, : n + new], whole_k)
        assert torch.equal(values[row, :, n + new :], old_values[row, :, n + new :])


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
@pytest.mark.parametrize("ways", [{}, {"use_cache": False}, {"static": True}, {"draft": True}])
def test_logits_that_are_not_numbers_are_no_text(sampling, ways):
    """Finite weights of a run that has diverged: the likeliest of NaN would be token 0."""
    network = GPT(GPT2Config(n_layer=1, n_head=1, n_embd=64, block_size=32, vocab_size=50))
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(1e30)
    with pytest.raises(UserError, match="logits are not finite: its training has diverged"):
        written(network, [[1, 2, 3]], 4, sampling, **ways)
