"""LoRA: frozen weights, and beside each matrix a product of two small ones that is trained.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), eq. 3:
W x + (α / r) B A x, with A random and B zero, so that training begins with the given network. The
names and shapes of A and B are those of the package `peft`.

Shapes: `r` rank, `K` in, `N` out; "..." is (B, T).
"""

import json
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PEFT_PREFIX = "base_model.model."


class LoRALinear(nn.Linear):
    """A linear layer with frozen weight and bias, and an adapter that is trained.

    Args:
        layer: takes over its weight (N, K) and bias.
        rank: r.
        alpha: α; what the adapter adds is multiplied by α / r.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, layer.in_features))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as the paper's own code does

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """(N, K): the one matrix that does the same."""
        return self.weight + self.scale * (self.lora_B @ self.lora_A)


def adapt(model: nn.Module, tuning):
    """Freezes a model and gives its blocks adapters, as `lora_rank` and its options say.

    Args:
        model: a `GPT` on the CPU.
        tuning: `tool_config.TuningOptions`, or None.
    """
    if tuning is None or not tuning.lora_rank:
        return
    model.requires_grad_(False)
    for parent in list(model.transformer.h.modules()):
        for name in tuning.targets():
            if isinstance(layer := getattr(parent, name, None), nn.Linear):
                setattr(parent, name, LoRALinear(layer, tuning.lora_rank, tuning.lora_alpha))


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any(isinstance(module, LoRALinear) for module in model.modules())


def merged_state(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict, in which adapters are added to their matrices and so no longer there.

    Args:
        model: with or without adapters.
        state: its state dict, if that is already at hand; an empty one stays empty.
    """
    state = dict(model.state_dict() if state is None else state)
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear) and state:
            a, b = state.pop(f"{name}.lora_A"), state.pop(f"{name}.lora_B")
            state[f"{name}.weight"] = state[f"{name}.weight"] + module.scale * (b @ a)
    return state


def to_peft(
    model: nn.Module, base: str, state: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], bytes]:
    """(tensors, adapter_config.json) under which `peft` knows the adapters of a model.

    Args:
        model: with adapters.
        base: where its frozen weights are from.
        state: as for `merged_state`.
    """
    state = model.state_dict() if state is None else state
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    tensors = {
        f"{PEFT_PREFIX}{name}.{part}.weight": state[f"{name}.{part}"].detach().cpu().contiguous()
        for name in found
        for part in ("lora_A", "lora_B")
        if state
    }
    one = next(iter(found.values()))
    rank = len(one.lora_A)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": one.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in found}),
        "fan_in_fan_out": True,  # transformers keeps GPT-2's matrices as (in, out)
        "bias": "none",
        "inference_mode": True,
    }
    return tensors, json.dumps(settings, indent=1).encode()
