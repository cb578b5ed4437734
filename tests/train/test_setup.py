"""How a run is set up: which parts of the network are compiled."""

import pytest

from gpt2.config.model import GPT2Config
from gpt2.model.gpt import GPT
from gpt2.train.setup import compile_network


@pytest.mark.parametrize("layers", [2, 48])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_are_compiled_apart_if_many_or_computed_twice(checkpointing, layers):
    """PyTorch 2.11 would else keep what it should drop (`pytest -m gpu` measures it)."""
    model = GPT(GPT2Config(n_layer=layers, n_head=2, n_embd=8, block_size=8, vocab_size=9))
    model.checkpoint_activations = checkpointing
    compile_network(model, sharded=False)
    apart = checkpointing or layers == 48
    assert (model._compiled_call_impl is None) == apart
    for block in model.transformer.h:
        assert (block._compiled_call_impl is not None) == apart
