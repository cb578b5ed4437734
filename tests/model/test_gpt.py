"""The network against Hugging Face's GPT-2, and against what the papers say."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2.api import GPT2
from gpt2.config.model import SIZES, GPT2Config
from gpt2.errors import UserError
from gpt2.huggingface.model_format import from_hf, to_hf
from gpt2.model.gpt import GPT
from gpt2.model.kv_cache import KVCache
from gpt2.model.unfilled import unfilled

PARAMETERS = {  # of the released models
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
# Two layers of each size's shape: its number of heads and its depth-to-width relation in small.
SMALL_SHAPES = {
    "gpt2": {"n_layer": 2, "n_head": 12, "n_embd": 96},
    "gpt2-medium": {"n_layer": 4, "n_head": 16, "n_embd": 128},
    "gpt2-large": {"n_layer": 6, "n_head": 20, "n_embd": 160},
    "gpt2-xl": {"n_layer": 8, "n_head": 25, "n_embd": 200},
}


def make_hf(config: GPT2Config):
    hf_config = transformers.GPT2Config(
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_positions=config.block_size,
        vocab_size=config.vocab_size,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        attn_implementation="eager",
    )
    return transformers.GPT2LMHeadModel(hf_config).eval()


@pytest.fixture(scope="module", params=SMALL_SHAPES)
def pair(request):
    """(ours, Hugging Face's) with the same random weights, biases and norms included."""
    torch.manual_seed(0)
    config = GPT2Config(**SMALL_SHAPES[request.param], block_size=64, vocab_size=500)
    hf = make_hf(config)
    with torch.no_grad():
        for p in hf.parameters():
            p.normal_(0, 0.15)
    model = GPT(config)
    model.load_state_dict(from_hf(hf.state_dict()))
    return model, hf


def test_logits_equal_hugging_face(pair):
    model, hf = pair
    idx = torch.randint(0, 500, (3, 64))
    torch.testing.assert_close(model(idx), hf(idx).logits, atol=1e-4, rtol=0)


def test_gradients_equal_hugging_face(pair):
    model, hf = pair
    model.zero_grad()
    hf.zero_grad()
    idx = torch.randint(0, 500, (2, 65))
    loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    theirs = hf(idx[:, :-1], labels=idx[:, :-1]).logits
    their_loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), idx[:, 1:].flatten())
    their_loss.backward()
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=1e-5)
    gradients = from_hf({n: p.grad for n, p in hf.named_parameters()})
    assert set(gradients) == {n for n, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_full_size_logits_equal_hugging_face():
    torch.manual_seed(0)
    hf = make_hf(GPT2Config())
    with unfilled():
        model = GPT(GPT2Config())
    model.load_state_dict(from_hf(hf.state_dict()), assign=True)
    idx = torch.randint(0, 50257, (1, 256))
    with torch.no_grad():
        torch.testing.assert_close(model(idx), hf(idx).logits, atol=1e-4, rtol=0)


def test_hf_names_round_trip(pair):
    model, hf = pair
    theirs = to_hf(model.state_dict())
    assert set(theirs) == set(hf.state_dict())
    for name, tensor in hf.state_dict().items():
        assert torch.equal(theirs[name], tensor), name


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_count(size):
    with torch.device("meta"):
        model = GPT(GPT2Config(**SIZES[size]))
    assert model.num_parameters() == PARAMETERS[size]


def test_initialisation():
    torch.manual_seed(0)
    model = GPT(GPT2Config(n_layer=8, n_head=4, n_embd=256, vocab_size=5000))
    residual = 0.02 / math.sqrt(2 * 8)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.ndim == 1:
            assert (p == 1).all(), name
        else:
            expected = residual if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(p.mean().item()) < expected / 20, name


@pytest.mark.parametrize("size", ["gpt2", "gpt2-tiny"])
def test_first_loss_is_what_theory_expects(size):
    torch.manual_seed(0)
    model = GPT(GPT2Config(**SIZES[size]))
    idx = torch.randint(0, 50257, (2, 257))
    with torch.no_grad():
        loss = model(idx[:, :-1], idx[:, 1:]).item()
    assert loss == pytest.approx(model.expected_first_loss(), abs=0.05)
    assert loss == pytest.approx(10.9, abs=0.1)


def test_later_tokens_do_not_change_earlier_logits():
    torch.manual_seed(0)
    model = GPT(GPT2Config(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100))
    idx = torch.randint(0, 100, (1, 16))
    changed = idx.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 100
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


def test_padded_ids_are_never_seen():
    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=130)
    assert config.padded_vocab_size == 256
    torch.manual_seed(0)
    model = GPT(config)
    idx = torch.randint(0, 130, (2, 16))
    logits = model(idx)
    assert logits.shape == (2, 16, 130)
    # the softmax of the loss runs over the 130 real ids only
    by_hand = -logits.log_softmax(-1).gather(-1, idx[..., None]).mean()
    torch.testing.assert_close(model(idx, idx), by_hand)


def test_reductions_and_ignored_targets():
    torch.manual_seed(0)
    model = GPT(GPT2Config(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=100))
    idx = torch.randint(0, 100, (2, 16))
    targets = idx.clone()
    targets[0, :5] = -1
    each = model(idx, targets, reduction="none")
    assert each.shape == (32,)
    assert not each[:5].any()
    torch.testing.assert_close(model(idx, targets, reduction="sum"), each.sum())
    torch.testing.assert_close(model(idx, targets), each.sum() / 27)


def test_cache_gives_the_same_logits():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=100)
    model = GPT(config).eval()
    idx = torch.randint(0, 100, (2, 32))
    cache = KVCache(config, 2, model.transformer.wte.weight, torch.float32)
    with torch.no_grad():
        pieces = [model(part, cache=cache) for part in idx.split([5, 1, 1, 10, 15], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(idx), atol=1e-5, rtol=1e-5)


def test_dropout_only_while_training():
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 100}
    model = GPT(GPT2Config(**shape, dropout=0.5))
    idx = torch.randint(0, 100, (2, 16))
    model.train()
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_bits(dropout):
    """Each block's attention runs twice, from the same random numbers; in evaluation once."""
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 100}
    torch.manual_seed(0)
    model = GPT(GPT2Config(**shape, dropout=dropout))
    idx, targets = torch.randint(0, 100, (2, 2, 16))
    calls = []
    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda *_: calls.append(1))
    found = []
    for model.checkpoint_activations in (False, True):
        calls.clear()
        torch.manual_seed(1)
        loss = model(idx, targets)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters()), torch.rand(3)])
        model.zero_grad(set_to_none=True)
        assert len(calls) == (6 if model.checkpoint_activations else 3)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    calls.clear()
    model.eval()(idx, targets).backward()
    assert len(calls) == 3


def test_activation_checkpointing_keeps_less():
    """What backward needs, in bytes: far less than half with four blocks."""
    shape = {"n_layer": 4, "n_head": 2, "n_embd": 64, "block_size": 64, "vocab_size": 100}
    model = GPT(GPT2Config(**shape))
    idx = torch.randint(0, 100, (4, 64))
    kept = {}
    for model.checkpoint_activations in (False, True):
        sizes = {}  # storages that are kept, each once

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.hidden(idx).sum()
        kept[model.checkpoint_activations] = sum(sizes.values())
        loss.backward()
    assert kept[True] < kept[False] / 2, kept


def test_flops_per_token():
    """6 × (124.4M - 0.8M) + 12 × 12 × 768 × 1024, the number that PaLM's appendix B counts."""
    with torch.device("meta"):
        model = GPT(GPT2Config())
    assert model.flops_per_token() == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024


def test_negative_targets_are_not_predicted():
    """-1 is nanoGPT's, -100 that of PyTorch and transformers."""
    model = GPT2(n_layer=1, n_head=2, n_embd=32, block_size=8)
    x, y = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, -100, -2, 9]])
    expected = F.cross_entropy(model(x)[0], y[0].masked_fill(y[0] < 0, -100))
    torch.testing.assert_close(model(x, y), expected)
    torch.testing.assert_close(
        model(x, y, reduction="none"), model(x, y.clamp(min=-1), reduction="none")
    )


@pytest.mark.parametrize("switches", [{}, {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True}])
def test_second_derivatives_are_right_or_refused(switches):
    """Autograd would take what the loss's own backward gives for a constant."""
    model = GPT2(n_layer=1, n_head=2, n_embd=32, block_size=8, **switches)
    x, y = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 3, 4, 9]])
    weights = list(model.parameters())

    def second(loss):
        first = torch.autograd.grad(loss, weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), weights)

    with sdpa_kernel(SDPBackend.MATH):
        expected = second(F.cross_entropy(model(x)[0], y[0]))
        found = second(model(x, y, reduction="none").mean())
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
        with pytest.raises(UserError, match="first derivatives only"):
            second(model(x, y))
    model(x, y).backward()
    assert all(p.grad is not None for p in weights)
