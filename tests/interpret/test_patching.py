"""Activation patching beside a forward pass written out by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.errors import UserError
from gpt2.interpret import patching
from gpt2.interpret.logit_lens import record
from gpt2.interpret.patching import MOST_TOKENS, check_pair, patch_effects, patched_logits

from .test_logit_lens import IDS, SHAPE, SWITCHES, built

OTHER = [*IDS[:3], 11, *IDS[4:]]  # differs in token 3


def by_hand(model, ids: list[int], patch: tuple[int, int, Tensor] | None = None):
    """GPT-2's formulas with nothing of the package; the stream and the logits.

    Args:
        model: a GPT-2, whose weights are read.
        ids: T tokens.
        patch: layer, position and (C,) state.
    """
    w = {name: p.detach() for name, p in model.named_parameters()}
    T, H = len(ids), model.config.n_head

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def patched(x, layer):
        if patch and patch[0] == layer:
            x = x.clone()
            x[patch[1]] = patch[2]
        return x

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:T]
    stream = [x := patched(x, 0)]
    for layer in range(model.config.n_layer):
        b = f"transformer.h.{layer}"
        q, k, v = linear(norm(x, f"{b}.ln_1"), f"{b}.attn.c_attn").chunk(3, -1)
        heads = []
        for q_h, k_h, v_h in zip(q.chunk(H, -1), k.chunk(H, -1), v.chunk(H, -1), strict=True):
            scores = q_h @ k_h.T / q_h.shape[-1] ** 0.5
            later = torch.ones(T, T).triu(1) > 0
            heads.append(scores.masked_fill(later, -1e30).softmax(-1) @ v_h)
        x = x + linear(torch.cat(heads, -1), f"{b}.attn.c_proj")
        inner = F.gelu(linear(norm(x, f"{b}.ln_2"), f"{b}.mlp.c_fc"), approximate="tanh")
        x = x + linear(inner, f"{b}.mlp.c_proj")
        stream.append(x := patched(x, layer + 1))
    return stream, norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


def test_every_patch_is_the_forward_pass_by_hand(monkeypatch):
    monkeypatch.setattr(patching, "PASS_TOKENS", 50)  # several passes for a layer
    model = built(None)
    found = patch_effects(model, IDS, OTHER)
    _, of_a = by_hand(model, IDS)
    stream_b, of_b = by_hand(model, OTHER)
    moved = of_b.softmax(-1) - of_a.softmax(-1)
    for layer in range(SHAPE["n_layer"] + 1):
        for position in range(len(IDS)):
            _, logits = by_hand(model, IDS, (layer, position, stream_b[layer][position]))
            ours = patched_logits(
                model, IDS, stream_b[layer][position][None], layer, torch.tensor([position])
            )
            torch.testing.assert_close(ours[0], logits, rtol=1e-9, atol=1e-9)
            for t in range(len(IDS)):
                falls, rises = moved[t].argmin(), moved[t].argmax()
                if t < 3:  # before the first difference
                    assert found.effect[layer, position, t].isnan()
                    continue
                assert (found.ours[t], found.theirs[t]) == (falls, rises)
                a, b, p = (x[t, rises] - x[t, falls] for x in (of_a, of_b, logits))
                expected = (p - a) / (b - a)
                torch.testing.assert_close(
                    found.effect[layer, position, t], expected, rtol=1e-7, atol=1e-7
                )
    torch.testing.assert_close(found.change, moved.clamp(min=0).sum(-1))
    torch.testing.assert_close(found.probs[1, 0, 5], of_b.softmax(-1)[5, found.ours[5]])


@pytest.mark.parametrize("switches", [None, *SWITCHES])
def test_what_must_hold_of_any_network(switches):
    """Switched networks have no formula here: the ends of the scale are known all the same."""
    model = built(switches)
    found = patch_effects(model, IDS, OTHER)
    T, last = len(IDS), SHAPE["n_layer"]
    known = [t for t in range(T) if not found.effect[0, 0, t].isnan()]
    assert known
    assert min(known) >= 3
    for t in known:  # behind the last block, a state makes its own prediction and no other
        own = torch.zeros(T, dtype=torch.float64)
        own[t] = 1
        torch.testing.assert_close(found.effect[last, :, t], own, rtol=1e-6, atol=1e-6)
        assert not found.effect[:, t + 1 :, t].any()  # nothing later is seen
    around = switches and ({"skips", "value_embeddings", "value_projection"} & set(switches))
    one = found.effect[0, 3, known]
    assert bool(around) or torch.allclose(one, torch.ones_like(one))  # the whole difference
    with torch.no_grad():
        expected = model(torch.tensor([IDS]))
    stream = record(model, IDS, attention=False)[1]
    for layer in range(last + 1):  # its own state changes nothing
        places = torch.arange(T)
        same = patched_logits(model, IDS, stream[layer], layer, places)
        torch.testing.assert_close(same, expected.expand(T, -1, -1), rtol=0, atol=1e-12)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 2], [1, 2, 3], "has 2 tokens and the second text 3"),
        ([1, 2], [1, 2], "both texts are equal"),
        ([1] * (MOST_TOKENS + 1), [2] * (MOST_TOKENS + 1), "at most 128 tokens"),
    ],
)
def test_texts_that_cannot_be_compared(a, b, message):
    with pytest.raises(UserError, match=message):
        check_pair(a, b)
