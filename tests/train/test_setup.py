"""How a run is set up: which parts of the network are compiled."""

import pytest

from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.train.setup import compile_network, network

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
