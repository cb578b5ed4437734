"""Which parts of a network are compiled, and what a copy of it is."""

import copy
import io

import pytest
import torch

from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.train.compilation import compile_network
from gpt2.train.setup import network

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 8, "vocab_size": 9}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [GPT2Config, ModernConfig])
def test_what_is_compiled(kind, checkpointing, sharded):
    """PyTorch 2.11 would else keep what checkpoints should drop (`pytest -m gpu` measures it)."""
    model = network(kind(**SHAPE))
    model.checkpoint_activations = checkpointing
    compile_network(model, sharded)
    apart = checkpointing or sharded or kind is GPT2Config
    assert (model._compiled_call_impl is None) == apart
    for block in model.transformer.h:
        assert (block._compiled_call_impl is not None) == apart
    around = kind is GPT2Config and not sharded
    assert (model.transformer.ln_f._compiled_call_impl is not None) == around
    assert ("embed" in vars(model)) == around
    assert not any("_orig_mod" in name for name in model.state_dict())


def test_a_copy_of_a_compiled_network_runs_its_own_weights():
    model = network(GPT2Config(**SHAPE))
    compile_network(model, sharded=False)
    copied, idx = copy.deepcopy(model), torch.tensor([[1, 2]])
    assert "embed" not in vars(copied)
    with torch.no_grad():
        copied.transformer.wte.weight.zero_()
        copied.transformer.wpe.weight.zero_()
    assert not copied.embed(idx).any()
    torch.save(model, io.BytesIO())
