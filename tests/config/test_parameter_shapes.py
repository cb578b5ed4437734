"""The closed form of shapes, against the networks."""

import itertools

import pytest

from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.config.parameter_shapes import check_fit, check_size, parameter_shapes
from gpt2.errors import UserError
from gpt2.train.setup import network

SIZES = {"n_layer": 3, "n_head": 2, "n_embd": 48, "block_size": 8, "vocab_size": 30}
SWITCHES = {
    "positions": ("learned", "rotary"),
    "norm": ("layernorm", "rmsnorm"),
    "mlp": ("gelu", "relu2", "swiglu"),
    "bias": (True, False),
    "untied_head": (False, True),
    "value_embeddings": (0, 1),
    "attention_gate": (False, True),
    "skips": ("none", "unet", "unet+input"),
}


def shapes_of(config) -> dict:
    return {n: tuple(t.shape) for n, t in network(config).state_dict().items()}


def test_shapes_of_gpt2():
    config = GPT2Config(**SIZES)
    assert parameter_shapes(config) == shapes_of(config)


@pytest.mark.parametrize("n_layer", [2, 3])
def test_shapes_with_every_pair_of_switches(n_layer):
    for one, two in itertools.combinations(SWITCHES, 2):
        for values in itertools.product(SWITCHES[one], SWITCHES[two]):
            given = dict(zip((one, two), values, strict=True))
            config = ModernConfig(**SIZES | {"n_layer": n_layer} | given)
            assert parameter_shapes(config) == shapes_of(config), given


@pytest.mark.parametrize("n_embd", [8, 48])  # fewer channels than a gate reads, and more
@pytest.mark.parametrize("gate", [False, True])
def test_shapes_with_projected_values(gate, n_embd):
    sizes = SIZES | {"n_layer": 5, "n_embd": n_embd}
    config = ModernConfig(**sizes, value_projection=2, attention_gate=gate)
    assert parameter_shapes(config) == shapes_of(config)


def test_the_least_size_is_below_that_of_every_network():
    for given in ({"mlp": "swiglu", "norm": "rmsnorm", "bias": False, "positions": "rotary"}, {}):
        config = ModernConfig(**SIZES | given)
        held = 2 * sum(p.numel() for p in network(config).parameters())
        check_size(config, held, "x")
        with pytest.raises(UserError, match="x does not fit the model: its config describes"):
            check_size(config, held // 2, "x")


def test_what_does_not_fit_is_named():
    with pytest.raises(UserError) as caught:
        check_fit({"a": (1,), "b": (2,)}, {"b": (3,), "\x1b[31mc": (1,)}, "x.pt")
    assert str(caught.value) == (
        r"x.pt does not fit the model: missing a, unexpected \x1b[31mc, b is (3,) instead of (2,)"
    )
    check_fit({"a": (1,)}, {"a": (1,)}, "x.pt")
