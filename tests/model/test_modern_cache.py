"""Writing with switches: what is kept of earlier positions changes nothing."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.config.model import IGNORE, ModernConfig
from gpt2.generate.stream import generate
from gpt2.model.packed_documents import Packed
from gpt2.train.setup import network

SWITCHES = {
    "positions": ["learned", "rotary"],
    "window_pattern": ["", "SL", "SSL"],
    "document_mask": [False, True],
    "qk_norm": [False, True],
    "attention_scale": [0.0, 0.3],
    "norm": ["layernorm", "rmsnorm"],
    "norm_embedding": [False, True],
    "mlp": ["gelu", "relu2", "swiglu"],
    "bias": [True, False],
    "softcap": [0.0, 4.0],
    "untied_head": [False, True],
    "value_embeddings": [0, 1, 2],
    "value_projection": [0, 1, 2],
    "attention_gate": [False, True],
    "skips": ["none", "unet", "unet+input"],
    "rope_fraction": [1.0, 0.5],
}
COMBINATIONS = st.fixed_dictionaries({n: st.sampled_from(v) for n, v in SWITCHES.items()})


def model_of(switches, **shape):
    """Weights that are far from fresh ones, in float64, so that no near tie decides."""
    switches = dict(switches)
    if switches.get("window_pattern"):
        switches["window"] = 5
    if switches.get("value_projection"):
        switches["value_embeddings"] = 0
    if switches.get("positions", "learned") != "rotary":
        switches.pop("rope_fraction", None)
    torch.manual_seed(0)
    shape = {"n_layer": 5, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 13} | shape
    model = network(ModernConfig(**shape, **switches)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@settings(max_examples=15, deadline=None, derandomize=True)
@given(COMBINATIONS, st.integers(0, 9))
def test_cached_decoding_equals_the_full_pass(switches, seed):
    """Prompts of different lengths, one beyond the context, and on past its end."""
    model = model_of(switches)
    torch.manual_seed(seed)
    prompts = [torch.randint(0, 13, (n,)).tolist() for n in (1, 5, 9, 20)]
    cached = generate(model, prompts, 20, temperature=0)
    assert cached == generate(model, prompts, 20, temperature=0, use_cache=False)
    assert cached[2] == generate(model, prompts[2:3], 20, temperature=0)[0]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(COMBINATIONS)
def test_packed_rows_are_what_each_is_alone(switches):
    switches = switches | {"document_mask": False}  # refused with conversations
    model = model_of(switches)
    idx = torch.randint(0, 12, (1, 15))
    begins = torch.tensor([[0] * 6 + [6] * 8 + [14]])
    alone = torch.cat([model(part) for part in idx.split([6, 8, 1], dim=1)], 1)
    torch.testing.assert_close(model(idx, cache=Packed(begins)), alone)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(COMBINATIONS)
def test_checkpointed_activations_and_the_chunked_head_change_no_gradient(switches):
    """Against plain cross-entropy of whole logits."""
    model = model_of(switches).train()
    idx = torch.randint(0, 13, (2, 16))
    targets = idx.roll(-1, 1)
    targets[0, 3:6] = IGNORE
    plain = torch.nn.functional.cross_entropy(
        model(idx).flatten(0, 1), targets.flatten(), ignore_index=IGNORE
    )
    wanted = torch.autograd.grad(plain, list(model.parameters()))
    model.checkpoint_activations = True
    loss = model(idx, targets)
    found = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, plain)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
