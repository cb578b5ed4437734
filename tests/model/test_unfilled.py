import pytest
import torch
from torch import nn

from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.model.gpt import GPT
from gpt2.model.modern import Modern
from gpt2.model.unfilled import unfilled

from ..conftest import run_python

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8}


def test_networks_have_their_shapes_and_no_memory():
    for config in (GPT2Config(**SHAPE), ModernConfig(**SHAPE, mlp="swiglu", untied_head=True)):
        kind = Modern if isinstance(config, ModernConfig) else GPT
        whole = kind(config).state_dict()
        state = torch.get_rng_state()
        with unfilled():
            made = kind(config)
        assert torch.equal(torch.get_rng_state(), state)
        assert {n: t.shape for n, t in made.state_dict().items()} == {
            n: t.shape for n, t in whole.items()
        }
        assert all(p.is_meta for p in made.parameters())
    weight = nn.Linear(2, 2).weight  # behind the block all is as before
    assert not weight.is_meta
    assert weight.std() > 0


@pytest.mark.long
def test_loading_a_model_imports_no_compiler(tmp_path):
    path = tmp_path / "m.pt"
    from gpt2 import GPT2

    GPT2(**SHAPE).save(path)
    code = (
        f"import sys; from gpt2 import GPT2; GPT2.from_checkpoint({str(path)!r}, 'cpu')"
        ".generate('a', 2); print({'torch._dynamo', 'sympy'} & {*sys.modules})"
    )
    assert run_python("-c", code, real=True).stdout == "set()\n"
