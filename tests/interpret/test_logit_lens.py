"""What `gpt2 inspect` computes, beside the networks themselves and transformers."""

import math

import pytest
import torch

from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.errors import UserError
from gpt2.huggingface.model_format import from_hf
from gpt2.interpret.logit_lens import look, record
from gpt2.train.setup import network

from ..models import reference

SHAPE = {"n_layer": 4, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 99}
SWITCHES = [
    {},
    {"positions": "rotary", "qk_norm": True, "norm": "rmsnorm", "mlp": "relu2", "bias": False},
    {"window_pattern": "SL", "window": 3},
    {"document_mask": True, "window_pattern": "SSSL", "window": 4, "positions": "rotary"},
    {"document_mask": True},
    {"softcap": 3.0, "untied_head": True, "value_embeddings": 1, "norm_embedding": True},
    {"skips": "unet+input", "mlp": "swiglu"},
    {"value_projection": 2},
]
IDS = [5, 98, 7, 8, 5, 6, 98, 9, 5, 7, 7, 1]  # 98 ends a document


def built(switches: dict | None):
    """A network of float64 with weights far from fresh ones; None: GPT-2's own."""
    torch.manual_seed(0)
    cls = GPT2Config if switches is None else ModernConfig
    model = network(cls(**SHAPE, **(switches or {}))).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("switches", [None, *SWITCHES])
def test_it_is_the_network_itself(switches):
    model = built(switches)
    with torch.no_grad():
        expected = model(torch.tensor([IDS]))[0]
    logits, stream, recorder = record(model, IDS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.logits(model.transformer.ln_f(stream[-1])), logits)
    assert len(stream) == SHAPE["n_layer"] + 1
    for weights in recorder.weights:
        sums = weights.sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert weights.triu(1).abs().max() == 0
    assert torch.equal(record(model, IDS, attention=False)[0], expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_windows_and_documents_are_those_of_each_layer():
    model = built({"document_mask": True, "window_pattern": "SL", "window": 3})
    seen = look(model, IDS)
    documents = [0, 1, 1, 1, 1, 1, 6, 6, 6, 6, 6, 6]  # where each begins
    narrow = [max(d, q - 2) for q, d in enumerate(documents)]
    assert [f.tolist() for f in seen.first] == [narrow, documents] * 2
    for weights, first in zip(seen.attention, seen.first, strict=True):
        for q, k in enumerate(first.tolist()):
            assert weights[:, q, :k].abs().sum() == 0
            assert (weights[:, q, k : q + 1] > 0).all()


def test_attention_and_stream_are_those_of_transformers():
    theirs = reference(vocab_size=99, block_size=32)
    ours = network(GPT2Config(**SHAPE | {"n_layer": 2})).eval()
    state = from_hf(theirs.state_dict())
    ours.load_state_dict(state, strict=True)
    theirs.set_attn_implementation("eager")  # the others do not tell their weights
    with torch.no_grad():
        out = theirs(torch.tensor([IDS]), output_attentions=True, output_hidden_states=True)
    logits, stream, recorder = record(ours, IDS)
    torch.testing.assert_close(logits, out.logits[0], rtol=1e-4, atol=1e-4)
    for mine, other in zip(recorder.weights, out.attentions, strict=True):
        torch.testing.assert_close(mine, other[0], rtol=1e-5, atol=1e-6)
    for mine, other in zip(stream[:-1], out.hidden_states[:-1], strict=True):  # theirs ends normed
        torch.testing.assert_close(mine, other[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("switches", [None, {"softcap": 3.0}])
def test_numbers_of_each_token(switches):
    model = built(switches)
    seen = look(model, IDS, top=4, lens_top=3)
    idx = torch.tensor([IDS])
    with torch.no_grad():
        losses = model(idx[:, :-1], idx[:, 1:], reduction="none")
        probabilities = model(idx)[0].softmax(-1)
    torch.testing.assert_close(seen.nats, losses)
    for at in range(len(IDS) - 1):
        p = probabilities[at]
        assert seen.ranks[at] == 1 + (p > p[IDS[at + 1]]).sum()
        assert math.isclose(
            math.exp(-seen.nats[at]), p[IDS[at + 1]], rel_tol=1e-6
        )  # softcap is float32
    for at in range(len(IDS)):  # the last one too: what may follow
        best = probabilities[at].sort(descending=True)
        assert seen.top_ids[at].tolist() == best.indices[:4].tolist()
        torch.testing.assert_close(seen.top_probs[at], best.values[:4])
    assert torch.equal(seen.lens_ids[-1], seen.top_ids[:, :3])
    torch.testing.assert_close(seen.lens_actual[-1], (-seen.nats).exp())


def test_lens_is_the_network_cut_off_after_a_layer():
    """Without its later blocks the network predicts what the lens shows for that depth."""
    model = built(None)
    seen = look(model, IDS, lens_top=99)
    for depth in range(SHAPE["n_layer"] + 1):
        cut = built(None)
        cut.transformer.h = cut.transformer.h[:depth]
        with torch.no_grad():
            p = cut(torch.tensor([IDS]))[0].softmax(-1)
        torch.testing.assert_close(seen.lens_probs[depth], p.gather(1, seen.lens_ids[depth]))


def test_one_token_predicts_only_what_follows():
    seen = look(built(None), [3])
    assert (len(seen.nats), len(seen.ranks), len(seen.top_ids)) == (0, 0, 1)
    assert seen.attention[0].tolist() == [[[1.0]]] * 2


def test_a_network_that_has_diverged_is_said():
    """Its weights may be finite."""
    model = built(None).float()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1e30)
    with pytest.raises(UserError, match="logits are not finite: its training has diverged"):
        look(model, [1, 2, 3])
