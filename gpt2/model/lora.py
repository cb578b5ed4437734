"""LoRA: adapters of low rank are trained beside frozen matrices.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), eq. 3:
W x + (α / r) B A x. A is random and B zero, so training starts from the given network. A and B have
the names and shapes of the package `peft`.

Shapes: `r` rank, `K` in, `N` out; "..." is (B, T).
"""

import json
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.finetune import TuningOptions

PEFT_PREFIX = "base_model.model."
SAMPLED = 16  # numbers of each frozen matrix that adapters keep


class LoRALinear(nn.Linear):
    """A frozen linear layer with a trained adapter.

    Args:
        layer: its weight (N, K) and bias are used, not copied.
        rank: r.
        alpha: α; the adapter's output is multiplied by α / r.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
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
        """(N, K): W + (α / r) B A, the matrix of a plain layer with the outputs of this one."""
        return self.weight + self.scale * (self.lora_B @ self.lora_A)


def adapt(model: Any, tuning: TuningOptions | None) -> None:
    """Freezes a model and replaces matrices of its blocks by `LoRALinear`; in place.

    Args:
        model: a `LanguageModel` on the CPU.
        tuning: names the rank, α and the matrices; without a rank, or None, nothing changes.
    """
    if tuning is None or not tuning.lora_rank:
        return
    model.requires_grad_(False)
    for parent in list(model.transformer.h.modules()):
        for name in tuning.targets():
            if isinstance(layer := getattr(parent, name, None), nn.Linear):
                setattr(parent, name, LoRALinear(layer, tuning.lora_rank, tuning.lora_alpha))


def notes_on_base(tuning: TuningOptions | None, adapted: bool) -> list[str]:
    """What to know about adapters on these weights, for the log.

    Args:
        tuning: as for `adapt`.
        adapted: whether the weights are those of adapters on another base.
    """
    if tuning is None or not tuning.lora_rank or not adapted:
        return []
    return [
        "the adapters of this run will have adapters as their base, which no program reads: keep "
        "out_ckpt.pt, the whole model, or begin with that of the earlier run"
    ]


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any(isinstance(module, LoRALinear) for module in model.modules())


def merged_state(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of the network without adapters: each is added to its matrix.

    Args:
        model: with or without adapters.
        state: its state dict, if the caller has it; an empty one stays empty, as on ranks that do
            not gather FSDP parts.
    """
    state = dict(model.state_dict() if state is None else state)
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear) and state:
            a, b = state.pop(f"{name}.lora_A"), state.pop(f"{name}.lora_B")
            state[f"{name}.weight"] = state[f"{name}.weight"] + module.scale * (b @ a)
    return state


def base_sample(layers: list[str], state: dict[str, Tensor]) -> list[float]:
    """The first numbers of each frozen matrix, by which adapters know their base again.

    Args:
        layers: names of the adapted layers.
        state: with the matrix of each, (N, K).
    """
    rows = [state[f"{name}.weight"][0, :SAMPLED].float() for name in sorted(layers)]
    return torch.cat(rows).tolist()


def to_peft(
    model: nn.Module, base: str, state: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], bytes, str]:
    """The adapters in the format of `peft`.

    Args:
        model: with adapters.
        base: path or name of the frozen weights.
        state: see `merged_state`.

    Returns:
        tensors by name, bytes of adapter_config.json, `base_sample` as JSON.
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
    sample = json.dumps(base_sample(list(found), state) if state else [])
    return tensors, json.dumps(settings, indent=1).encode(), sample
