import inspect
import pickle

import numpy as np
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


@pytest.mark.parametrize(("given", "said"), [
    ({"seed": 1.5}, "seed=1.5: use a whole number"),
    ({"seed": "x"}, "seed='x': use a whole number"),
    ({"seed": 2**64}, f"seed={2**64}: use a whole number up to 9e+18"),
    ({"max_new_tokens": 3.0}, "max_new_tokens=3.0: use a whole number"),
    ({"max_new_tokens": True}, "max_new_tokens=True: use a whole number"),
    ({"max_new_tokens": -1}, "max_new_tokens=-1: use 0 or more"),
    ({"top_k": 5.0}, "top_k=5.0: use a whole number"),
    ({"top_k": None}, "top_k=None: use a whole number"),
    ({"temperature": None}, "temperature=None: use a number"),
    ({"temperature": np.ones(2)}, "temperature=array"),
    ({"top_p": "0.9"}, "top_p='0.9': use a number"),
    ({"temperature": 10**400}, "use a number"),
    ({"top_k": 10**400}, "use a whole number"),
    ({"stop": [""]}, "use strings that are not empty"),
    ({"stop": np.array(["a", ""])}, "use strings that are not empty"),
    ({"stop": 3}, "stop=3: use strings that are not empty"),
    ({"stop": b"a"}, "stop=b'a': use strings that are not empty"),
])  # fmt: skip
def test_settings_of_a_wrong_type_are_one_line(model, given, said):
    for call in (model.generate, lambda *a, **k: list(model.stream(*a, **k))):
        with pytest.raises(UserError) as caught:
            call("Hello", **given)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [b"Hello", bytearray(b"Hello"), [b"Hello"], ["Hello", b"Hello"]])
def test_bytes_are_no_token_ids(model, prompt):
    with pytest.raises(UserError, match="decode bytes"):
        model.generate(prompt, 2)


@pytest.mark.parametrize("prompt", [[True, False], np.array([True]), [[1, 2], [True]]])
def test_a_mask_is_no_list_of_token_ids(model, prompt):
    with pytest.raises(UserError, match="a prompt is a text, a list of token ids"):
        model.generate(prompt, 2)


def test_an_unknown_setting_of_stream_is_named(model):
    with pytest.raises(UserError, match=r"stream\(sed=…\): unknown option; did you mean seed"):
        list(model.stream("Hello", 2, sed=1))


@pytest.mark.parametrize("name", [None, 3, b"gpt2"])
def test_what_is_no_name_of_a_model(name):
    with pytest.raises(UserError, match="is no path of a checkpoint"):
        GPT2.from_pretrained(name)


def test_numbers_of_numpy_and_of_torch_are_numbers(model):
    plain = model.generate("Hello", 5, seed=3, top_k=7, temperature=0.5)
    of_numpy = {"seed": np.int64(3), "top_k": np.uint8(7), "temperature": np.float32(0.5)}
    of_torch = {"seed": torch.tensor(3), "top_k": torch.tensor([7]), "temperature": 0.5}
    assert model.generate("Hello", np.int64(5), **of_numpy, stop=None) == plain
    assert model.generate("Hello", torch.tensor(5), **of_torch) == plain
    assert "Hello" + "".join(model.stream("Hello", 5, **of_numpy, stop=None)) == plain


def test_generation_leaves_the_mode_of_training():
    """A text that is written between two steps does not turn dropout off for the steps after it."""
    model = GPT2(**SMALL, dropout=0.5)
    model.train()
    model.transformer.ln_f.eval()  # a frozen module
    modes = [module.training for module in model.modules()]
    assert model.generate("a", 3, seed=1) == model.generate("a", 3, seed=1)  # without dropout
    assert [module.training for module in model.modules()] == modes
    alone = list(model.stream("a", 9, seed=1, top_k=0))
    first, second = model.stream("b", 2, seed=3), model.stream("a", 9, seed=1, top_k=0)
    found = [next(second), next(first), next(second)]
    assert [module.training for module in model.modules()] == modes  # the caller may train here
    assert found[0] + found[2] == "".join(alone[:2])
    first.close()
    assert found[::2] + list(second) == alone  # without dropout, though the other has ended
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(UserError):
        model.generate("a", 3, temperature=-1)
    assert [module.training for module in model.modules()] == modes


def test_stream_takes_one_prompt(model):
    pieces = list(model.stream("a", 3, seed=1))
    assert list(model.stream(["a"], 3, seed=1)) == pieces
    with pytest.raises(UserError, match="stream continues one prompt; generate takes several"):
        list(model.stream(["a", "b"]))


@pytest.mark.parametrize("shape", [12, {"n_layer": 1}, None])
def test_a_shape_is_a_size_or_a_config(shape):
    with pytest.raises(UserError, match="name a size, or give a GPT2Config"):
        GPT2(shape)


def test_home_and_what_is_no_path(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    model.save("~/kept.pt")
    assert (tmp_path / "kept.pt").exists()
    for load in (GPT2.from_checkpoint, GPT2.from_pretrained):
        assert load("~/kept.pt", device="cpu").config == model.config
    for wrong in (None, 3, "~\0", "~nobody-of-this-name/x.pt"):
        with pytest.raises(UserError, match=r"no such checkpoint|is no path of a checkpoint"):
            GPT2.from_checkpoint(wrong)
    with pytest.raises(UserError, match="device=None: use auto, cpu, cuda"):
        GPT2.from_checkpoint("~/kept.pt", device=None)
    for folder in (tmp_path, "", ".", "/"):
        with pytest.raises(UserError, match=r"not written: it is a folder; name a file$"):
            model.save(folder)


@pytest.mark.parametrize("training", [False, True])
def test_another_reduction_is_refused(training):
    model, ids = GPT2(**SMALL).train(training), torch.tensor([[1, 2, 3]])
    for wrong in ("Mean", "avg", None):
        with pytest.raises(UserError, match="use mean, sum or none"):
            model(ids, ids, reduction=wrong)
    with pytest.raises(AssertionError, match="beyond context"):
        model(torch.zeros(1, 33, dtype=torch.int64))


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
