import inspect
import pickle

import pytest
import torch

import gpt2
from gpt2 import GPT2
from gpt2.config.commands import WritingConfig
from gpt2.errors import UserError

from .conftest import run_python

SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT2(**SMALL).eval()


@pytest.mark.parametrize("given", [{}, {"temperature": 1.0, "top_k": 0}, {"top_p": 0.9}])
def test_stream_gives_the_text_of_generate(model, given):
    for seed in (1, 2):
        whole = model.generate("Hello", 12, seed=seed, **given)
        pieces = list(model.stream("Hello", 12, seed=seed, **given))
        assert len(pieces) > 1
        assert whole == "Hello" + "".join(pieces)


def test_generate_stream_and_the_command_line_have_equal_defaults():
    whole, pieces = (inspect.signature(f).parameters for f in (GPT2.generate, GPT2.stream))
    shared = ("max_new_tokens", "temperature", "top_k", "stop", "stop_at_end_of_text")
    assert [whole[name].default for name in shared] == [pieces[name].default for name in shared]
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        assert whole[name].default == getattr(WritingConfig(), name)


def test_a_network_takes_the_switches_of_the_command_line():
    made = GPT2("gpt2-tiny", mlp="relu2", n_layer=1, n_embd=16, n_head=2, block_size=32)
    assert type(made).__name__ == "SwitchedGPT2"
    assert isinstance(made, GPT2)
    assert (made.config.mlp, made.config.n_layer) == ("relu2", 1)
    assert len(made.generate([1, 2], 3)) == 5
    assert pickle.loads(pickle.dumps(made)).config == made.config
    assert type(GPT2(**SMALL, mlp="gelu")) is GPT2  # GPT-2's own value
    assert type(pickle.loads(pickle.dumps(GPT2(**SMALL)))) is GPT2


@pytest.mark.parametrize(("given", "said"), [
    ({"mpl": "relu2"}, r"GPT2\(mpl=…\): unknown option; did you mean mlp\?"),
    ({"n_layr": 2}, r"did you mean n_layer\?"),
    ({"mlp": "relu3"}, "mlp='relu3': use gelu or relu2 or swiglu"),
    ({"shape": "gpt3", "mlp": "relu2"}, "unknown size 'gpt3'; use one of gpt2,"),
    ({"zzzzz": 1}, "unknown option; use attention_gate, attention_scale, bias,"),
])  # fmt: skip
def test_mistakes_are_one_line(given, said):
    with pytest.raises(UserError, match=said) as caught:
        GPT2(**given)
    assert "\n" not in str(caught.value)


def test_the_package_lists_what_it_has_and_imports_it_late():
    code = "import sys, gpt2; print({'torch', 'numpy'} & {*sys.modules} or 'light', *dir(gpt2))"
    said = run_python("-c", code, real=True).stdout.split()
    assert said[0] == "light"
    assert {*said[1:]} == {*dir(gpt2)} >= {*gpt2.__all__}
    assert {"GPT2", "TrainConfig", "run", "train", "register", "__version__"} <= {*said}
    assert all(getattr(gpt2, name) for name in dir(gpt2))
    from gpt2.train import loop

    assert gpt2.run is loop.run
    assert callable(gpt2.train)
