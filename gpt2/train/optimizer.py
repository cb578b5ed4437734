"""Parameter groups, AdamW or Muon with it, and gradient clipping."""

from typing import Any

import torch
from torch import nn

from ..config.registry import registered
from ..config.train import OptimOptions
from ..distributed.devices import choose_dtype
from ..distributed.runtime import Runtime
from .muon import MuonAndAdamW
from .optimizer_state import own_optimizer


def build_optimizer(
    model: nn.Module, options: OptimOptions, rt: Runtime | None = None
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) in its fused form, alone or together with Muon.

    Matrices and embeddings decay; biases, norms and gates do not. A group with a peak rate of its
    own carries `lr_ratio`, that rate divided by `learning_rate`. Every group carries the names of
    its parameters, which `check_groups` compares with those of a checkpoint.

    Args:
        model: its trainable parameters.
        options: rates and decay.
        rt: with Muon, the ranks that share its work; None: this process alone.
    """
    o = options
    settings: dict[str, dict[str, Any]] = {  # in the order in which checkpoints number parameters
        "decay": {"weight_decay": o.weight_decay},
        "no_decay": {"weight_decay": 0.0},
    }
    if o.embedding_lr:
        ratio = o.embedding_lr / o.learning_rate
        settings["embedding"] = {"weight_decay": o.weight_decay, "lr_ratio": ratio}
    if o.head_lr:
        ratio = o.head_lr / o.learning_rate
        settings["head"] = {"weight_decay": o.weight_decay, "lr_ratio": ratio}
    if o.optimizer in ("muon", "normuon"):
        muon = {
            "weight_decay": o.weight_decay if o.muon_weight_decay < 0 else o.muon_weight_decay,
            "lr_ratio": o.muon_lr / o.learning_rate,
            "momentum": o.muon_momentum,
            "normuon": o.optimizer == "normuon",
        }
        settings["muon"] = {"parts": 1} | muon
        settings["muon_qkv"] = {"parts": 3} | muon  # queries, keys and values: three matrices
    groups = {kind: {"params": [], "names": []} | of_kind for kind, of_kind in settings.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[_kind(name, parameter, set(settings))]
            group["params"].append(parameter)
            group["names"].append(name)
    if own := registered("optimizer", o.optimizer):
        return own_optimizer(own, [group for group in groups.values() if group["params"]], o)
    common: dict[str, Any] = {"lr": o.learning_rate, "eps": 1e-8, "fused": True}
    common["betas"] = (o.beta1, o.beta2)
    if o.optimizer == "adamw":
        return torch.optim.AdamW(list(groups.values()), **common)
    device = rt.device if rt else torch.device("cpu")
    on_gpu = device.type == "cuda"
    in_bf16 = on_gpu and choose_dtype("auto", device)[0] is torch.bfloat16
    return MuonAndAdamW(
        [group for group in groups.values() if group["params"]],
        all_sum=rt.all_sum if rt else lambda tensor: tensor,
        rank=rt.rank if rt else 0,
        world_size=rt.world_size if rt else 1,
        compiled=on_gpu,
        precision=torch.bfloat16 if in_bf16 else torch.float32,
        **common,
    )


def _kind(name: str, parameter: nn.Parameter, kinds: set[str]) -> str:
    """The group of a parameter: of the rules below, the first whose group is among `kinds`."""
    tables = tuple(f"transformer.{table}" for table in ("wte", "wpe", "value_tables"))
    if "embedding" in kinds and name.startswith(tables):
        return "embedding"
    if "head" in kinds and name == "head.weight":
        return "head"
    if name.endswith("_gate"):
        return "no_decay"
    if "muon" in kinds and ".h." in name and parameter.ndim == 2:
        return "muon_qkv" if "c_attn" in name else "muon"
    return "decay" if parameter.ndim >= 2 else "no_decay"


def clip_gradients(
    optimizer: torch.optim.AdamW, norm: torch.Tensor, limit: float, in_optimizer: bool
) -> None:
    """Scales all gradients so that their norm is at most `limit` (Pascanu et al. 2013).

    Args:
        optimizer: of the parameters.
        norm: () the norm of all gradients, on their device.
        limit: above 0.
        in_optimizer: the fused optimizer divides while it reads the gradients, which saves a pass
            over the memory. Its attribute `grad_scale` was made for `GradScaler`; fused kernels on
            CUDA read it, other devices may not.
    """
    if in_optimizer:
        scale = ((norm + 1e-6) / limit).clamp(min=1.0)
        optimizer.grad_scale = scale  # type: ignore[attr-defined] # of GradScaler
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grads_with_norm_([p for p in parameters if p.grad is not None], limit, norm)
