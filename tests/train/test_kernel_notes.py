"""The sentences about kernels at the start of a run."""

import pytest
import torch

from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.config.train import BatchPlan, OptimOptions
from gpt2.distributed.runtime import Runtime
from gpt2.kernels import window_attention
from gpt2.model.gpt import GPT
from gpt2.model.modern import Modern
from gpt2.train.kernel_notes import kernel_notes

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 100}


def notes(config: GPT2Config, **recipe) -> list[str]:
    network = Modern if isinstance(config, ModernConfig) else GPT
    plan = BatchPlan(batch_size=2, block_size=32, grad_accum_steps=1, world_size=1)
    rt = Runtime(torch.device("cpu"), torch.bfloat16)
    return kernel_notes(network(config), plan, OptimOptions(**recipe), rt)


def test_gpt2_has_no_windows():
    linear, attention = notes(GPT2Config(**SHAPE))
    assert linear == "linear layers: plain PyTorch (no CUDA device)"
    assert attention.startswith("causal attention: ")


@pytest.mark.parametrize(
    ("switches", "recipe", "kernel"),
    [
        ({}, {}, "cuDNN"),
        ({"document_mask": True}, {}, "FlexAttention where it is compiled"),
        ({}, {"window_warmup": 0.5}, "FlexAttention where it is compiled"),
    ],
)
def test_only_windows_that_stay_alone_as_they_are_go_to_cudnn(
    switches, recipe, kernel, monkeypatch
):
    monkeypatch.setattr(window_attention, "fits", lambda *_: True)
    monkeypatch.setattr(window_attention, "frontend", lambda: True)
    config = ModernConfig(**SHAPE, window_pattern="SL", window=8, **switches)
    assert notes(config, **recipe)[-1] == f"attention windows: {kernel}"
