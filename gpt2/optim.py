"""Parameter groups, AdamW or Muon with it, and the schedules as pure functions of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from .config import BatchPlan, OptimOptions, warmup_steps
from .muon import MuonAndAdamW
from .runtime import Runtime


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Two groups: matrices and embeddings decay, biases and LayerNorm do not."""
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module, options: OptimOptions, rt: Runtime | None = None
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) in its fused form, alone or with Muon.

    A group whose learning rate is not `learning_rate` says so by `lr_ratio`, their quotient.

    Args:
        model: its parameters.
        options: rates and decay.
        rt: with Muon, the ranks that share its work.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    embeddings = [(n, p) for n, p in named if _is_table(n)] if options.embedding_lr else []
    head = [(n, p) for n, p in named if n == "head.weight"] if options.head_lr else []
    muon = [(n, p) for n, p in named if ".h." in n and p.ndim == 2]
    muon = muon if options.optimizer == "muon" else []
    apart = {n for n, _ in (*embeddings, *head, *muon)}
    rest = [p for n, p in named if n not in apart]
    groups = parameter_groups(rest, options.weight_decay)
    for members, rate in ((embeddings, options.embedding_lr), (head, options.head_lr)):
        if members:
            groups.append(_group(members, rate, options))
    common = {
        "lr": options.learning_rate,
        "betas": (options.beta1, options.beta2),
        "eps": 1e-8,
        "fused": True,
    }
    if not muon:
        return torch.optim.AdamW([g for g in groups if g["params"] or len(groups) == 2], **common)
    for parts in (1, 3):  # c_attn holds queries, keys and values
        members = [(n, p) for n, p in muon if ("c_attn" in n) == (parts == 3)]
        extra = {"parts": parts, "momentum": options.muon_momentum}
        groups.append(_group(members, options.muon_lr, options) | extra)
    rank, world_size = (rt.rank, rt.world_size) if rt else (0, 1)
    all_sum = rt.all_sum if rt else lambda tensor: tensor
    compiled = rt is not None and rt.device.type == "cuda"
    return MuonAndAdamW(
        [g for g in groups if g["params"]],
        all_sum=all_sum, rank=rank, world_size=world_size, compiled=compiled, **common,
    )  # fmt: skip


def _is_table(name: str) -> bool:
    return name.startswith(("transformer.wte", "transformer.wpe", "transformer.value_tables"))


def _group(members: list[tuple[str, nn.Parameter]], rate: float, options: OptimOptions) -> dict:
    ratio = rate / options.learning_rate if options.learning_rate else 0.0
    parameters = [p for _, p in members]
    return {"params": parameters, "weight_decay": options.weight_decay, "lr_ratio": ratio}


def learning_rate_at(step: int, options: OptimOptions) -> float:
    """Learning rate of the step-th update (from 0): linear warm-up, then as `schedule` says.

    cosine: half a cosine falls from the peak to `min_lr_ratio` of it at `max_steps` (Brown et al.
    2020, appendix B; Loshchilov & Hutter 2017). wsd: stable, then a line to the same over the last
    `cooldown` of the steps (Hu et al. 2024, arXiv:2404.06395; Hägele et al. 2024).
    """
    peak, warmup = options.learning_rate, warmup_steps(options)
    if step < warmup:
        return peak * (step + 1) / warmup
    if options.schedule == "wsd":
        left = (options.max_steps - step) / max(1, options.cooldown * options.max_steps)
        share = min(1.0, max(0.0, left))
        return peak * (options.min_lr_ratio + (1 - options.min_lr_ratio) * share)
    progress = min(1.0, (step - warmup) / max(1, options.max_steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (options.min_lr_ratio + (1 - options.min_lr_ratio) * cosine)


def micro_batches_at(step: int, options: OptimOptions, plan: BatchPlan) -> int:
    """Micro-batches of the step-th update: from 1 to all over `batch_warmup` of the run."""
    full = plan.grad_accum_steps
    warmup = options.batch_warmup * options.max_steps
    return full if step >= warmup else 1 + int(step / warmup * (full - 1))


def window_at(step: int, options: OptimOptions, full: int) -> int:
    """Positions that a layer may see at the step-th update: eighths of `full`, up to all."""
    warmup = options.window_warmup * options.max_steps
    return full if step >= warmup else math.ceil(full / 8) * (1 + int(step / warmup * 7))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float):
    """Gives every group the learning rate, times its `lr_ratio` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
