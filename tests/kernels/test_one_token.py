"""The kernel of a whole token: on a CPU with fibers for threads, and on a GPU."""

import copy
import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gpt2.config.model import SIZES, GPT2Config
from gpt2.generate import few_token_pass
from gpt2.generate.sampling import Sampling
from gpt2.generate.stream import decoder_for, generate
from gpt2.kernels.one_token import SOURCES, OneToken, constants, pieces_of_a_phase
from gpt2.model.gpt import GPT

HERE = Path(__file__).parent
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 256, "block_size": 64, "vocab_size": 300}
BLOCKS = 18
LENGTHS = 0, 1, 3, 40, 63  # shares of attention that are empty, of one position, and full


def some_model(std: float, shape: dict[str, int], dtype=torch.bfloat16, device="cpu") -> GPT:
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(GPT2Config(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn_like(p))
    return model.to(dtype)


class Texts:
    """Caches with the same past, of a network and of its copy in float32, which is exact enough."""

    def __init__(self, model: GPT):
        self.wide = copy.deepcopy(model).float()
        self.models, self.device = (self.wide, model), model.transformer.wte.weight.device
        self.caches = [
            m.new_cache(1, m.transformer.wte.weight.dtype, m.config.block_size) for m in self.models
        ]
        self.token = torch.zeros(1, dtype=torch.int64, device=self.device)
        for cache in self.caches:
            cache.lengths = torch.zeros(1, dtype=torch.int64, device=self.device)

    def begin(self, length: int) -> None:
        torch.manual_seed(length)
        for name in ("keys", "values"):
            past = torch.randn_like(getattr(self.caches[1], name))
            for cache in self.caches:
                getattr(cache, name).copy_(past)
        for cache in self.caches:
            cache.length = length
            cache.lengths.fill_(length)
        self.token.fill_(7)

    @torch.inference_mode()
    def compare(self, one: OneToken, length: int, error: float) -> None:
        """The logits of two tokens, keys and values, and the choice."""
        self.begin(length)
        for step in range(min(2, self.wide.config.block_size - length)):
            wanted = few_token_pass.next_logits(self.wide, self.token[:, None], self.caches[0])
            found = one.next_logits(self.token, choose=True)
            exact, cache = self.caches
            pairs = ((found, wanted), (cache.keys, exact.keys), (cache.values, exact.values))
            for one_of_them, other in pairs:
                difference = (one_of_them.float() - other).norm()
                assert difference < error * other.norm()
            assert self.token.item() == found.argmax().item()
            assert cache.lengths.item() == cache.length == length + step + 1


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function: the launch of the kernel for a shape and a precision, on a CPU."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("one_token")
    parts = HERE / "cuda_on_cpu.h", SOURCES[-1], HERE / "cuda_on_cpu_launch.h"
    source = folder / "all.cpp"
    source.write_text("".join(part.read_text("utf-8") for part in parts), "utf-8")

    @functools.cache
    def launch_of(width: int, heads: int, dtype: torch.dtype):
        library = folder / f"{width}{heads}{dtype}.so"
        # the ring has room for a phase, not for a layer
        macros = constants(GPT2Config(**SMALL | {"n_embd": width, "n_head": heads}), BLOCKS) | {
            "STAGES": 10
        }
        macros |= {"FLOAT16": 1} if dtype == torch.float16 else {}
        command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-fsanitize=alignment"]
        command += ["-fno-sanitize-recover", *[f"-D{n}={value}" for n, value in macros.items()]]
        subprocess.run([*command, source, "-o", library], check=True)
        launch = ctypes.CDLL(str(library)).launch
        return lambda network: launch(ctypes.byref(network))

    return launch_of


@pytest.fixture(scope="module")
def on_a_cpu(compiled):
    """The launch of the kernel for `SMALL`, as a function."""
    return compiled(SMALL["n_embd"], SMALL["n_head"], torch.bfloat16)


@pytest.mark.parametrize(
    ("width", "heads", "dtype", "error"),
    [(256, 2, torch.bfloat16, 4e-3), (256, 4, torch.float16, 6e-4), (128, 4, torch.bfloat16, 4e-3)],
)
def test_the_kernel_equals_the_plain_pass_on_a_cpu(compiled, width, heads, dtype, error):
    """Heads of 128, 64 and 32 channels."""
    model = some_model(0.05, SMALL | {"n_embd": width, "n_head": heads}, dtype)
    texts = Texts(model)
    launch = compiled(width, heads, dtype)
    one = OneToken(model, texts.caches[1], blocks=BLOCKS, launch=launch)
    for length in LENGTHS if heads * width == 1024 else (3, 63):
        texts.compare(one, length, error)


def test_without_a_choice_the_token_stays(on_a_cpu):
    model = some_model(0.05, SMALL)
    texts = Texts(model)
    texts.begin(5)
    one = OneToken(model, texts.caches[1], blocks=BLOCKS, launch=on_a_cpu)
    one.next_logits(texts.token)
    assert texts.token.item() == 7


def test_of_equal_logits_the_first_is_chosen_and_of_nan_the_last(on_a_cpu):
    model = some_model(0.05, SMALL)
    texts = Texts(model)
    texts.begin(5)
    one = OneToken(model, texts.caches[1], blocks=BLOCKS, launch=on_a_cpu)
    with torch.no_grad():
        model.transformer.wte.weight[20:] = model.transformer.wte.weight[19]
        model.transformer.ln_f.weight.zero_()
    one.next_logits(texts.token, choose=True)
    assert texts.token.item() == one.logits.argmax().item() <= 19
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = torch.nan
    one.next_logits(texts.token, choose=True)
    assert texts.token.item() == SMALL["vocab_size"] - 1


@pytest.mark.parametrize("size", SIZES)
def test_the_ring_holds_the_weights_of_any_phase(size):
    for blocks, holds in ((132, True), (114, size != "gpt2-xl"), (78, size != "gpt2-xl")):
        macros = constants(GPT2Config(**SIZES[size]), blocks)
        assert (pieces_of_a_phase(macros) <= macros["STAGES"]) == holds


def hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
def test_the_kernel_equals_the_plain_pass(size, dtype, error):
    if not hopper():
        pytest.skip("needs compute capability 9.0")
    model = some_model(0.02, SIZES[size], dtype, "cuda")
    texts = Texts(model)
    one = OneToken(model, texts.caches[1])
    for length in (0, 3, 500, 1023):
        texts.compare(one, length, error)


def compare_small() -> None:
    """On a GPU, for the sanitizers, which are slow."""
    model = some_model(0.05, SMALL | {"n_embd": 256, "n_head": 4}, device="cuda")
    texts = Texts(model)
    one = OneToken(model, texts.caches[1])
    for length in LENGTHS:
        texts.compare(one, length, 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 60, 127, 140])
def test_the_kernel_chooses_what_argmax_chooses(length):
    """Greedy text by CUDA graphs, over a context that fills and is read again."""
    if not hopper():
        pytest.skip("needs compute capability 9.0")
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 256, "block_size": 128, "vocab_size": 300}
    model = some_model(0.1, shape, device="cuda")
    prompt = [torch.randint(300, (length,)).tolist()]
    decoder = decoder_for(model, prompt, 150, Sampling(temperature=0.0))
    assert decoder.forward.one_kernel is not None
    text = generate(model, prompt, 150, decoder=decoder)
    assert generate(model, prompt, 150, decoder=decoder) == text
    decoder.greedy = False
    with torch.inference_mode():
        decoder.graph = decoder.forward.record(decoder._recorded_step)
    assert generate(model, prompt, 150, decoder=decoder) == text
