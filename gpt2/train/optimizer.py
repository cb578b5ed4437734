"""Parameter groups, AdamW or Muon with it, and gradient clipping."""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..config.train import OptimOptions
from ..distributed.devices import choose_dtype
from ..distributed.runtime import Runtime
from ..errors import UserError
from .muon import MuonAndAdamW


def build_optimizer(
    model: nn.Module, options: OptimOptions, rt: Runtime | None = None
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) in its fused form, alone or with Muon.

    Matrices and embeddings decay, biases and norms do not. A group whose learning rate is not
    `learning_rate` says so by `lr_ratio`, their quotient; all say which parameters they hold.

    Args:
        model: its parameters.
        options: rates and decay.
        rt: with Muon, the ranks that share its work.
    """
    o = options
    left = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def take(wanted: Callable[[str, nn.Parameter], bool], **settings) -> dict:
        """A group of those that are wanted and in no group yet."""
        names = [n for n, p in left.items() if wanted(n, p)]
        return {"params": [left.pop(n) for n in names], "names": names} | settings

    decays = {"weight_decay": o.weight_decay}
    apart = []
    if o.embedding_lr:
        apart.append(take(_is_table, **decays, lr_ratio=o.embedding_lr / o.learning_rate))
    if o.head_lr:
        ratio = o.head_lr / o.learning_rate
        apart.append(take(lambda n, _: n == "head.weight", **decays, lr_ratio=ratio))
    if o.optimizer != "adamw":
        muon = {
            "weight_decay": o.weight_decay if o.muon_weight_decay < 0 else o.muon_weight_decay,
            "lr_ratio": o.muon_lr / o.learning_rate,
            "momentum": o.muon_momentum,
            "even": o.optimizer == "normuon",
        }
        apart.append(take(lambda n, p: _in_block(n, p) and "c_attn" not in n, parts=1, **muon))
        apart.append(take(_in_block, parts=3, **muon))  # queries, keys and values
    groups = [take(lambda _, p: p.ndim >= 2, **decays), take(lambda *_: True, weight_decay=0.0)]
    groups = [g for g in groups + apart if g["params"] or o.optimizer == "adamw"]
    common = {"lr": o.learning_rate, "betas": (o.beta1, o.beta2), "eps": 1e-8, "fused": True}
    if o.optimizer == "adamw":
        return torch.optim.AdamW(groups, **common)
    on_gpu = rt is not None and rt.device.type == "cuda"
    in_bf16 = on_gpu and choose_dtype("auto", rt.device)[0] is torch.bfloat16
    return MuonAndAdamW(
        groups,
        all_sum=rt.all_sum if rt else lambda tensor: tensor,
        rank=rt.rank if rt else 0,
        world_size=rt.world_size if rt else 1,
        compiled=on_gpu,
        precision=torch.bfloat16 if in_bf16 else torch.float32,
        **common,
    )


def _is_table(name: str, _: nn.Parameter) -> bool:
    tables = "wte", "wpe", "value_tables"
    return name.startswith(tuple(f"transformer.{table}" for table in tables))


def _in_block(name: str, p: nn.Parameter) -> bool:
    return ".h." in name and p.ndim == 2


def check_groups(optimizer: torch.optim.Optimizer, stored: dict, origin: Path):
    """Raises UserError when a stored state would go to other parameters than it is of.

    Args:
        optimizer: the one that is to go on.
        stored: the state dict of the one before.
        origin: where it is from.
    """
    ours, theirs = optimizer.param_groups, stored["param_groups"]
    pairs = itertools.zip_longest(ours, theirs, fillvalue={"params": (), "names": ()})
    for own, other in pairs:
        same = own["names"] == other.get("names", own["names"])  # older ones had no names
        if not same or len(own["params"]) != len(other["params"]):
            raise UserError(
                f"{origin} is of a run with another optimizer for some parameters; give the same "
                "optimizer, and embedding_lr and head_lr where they were given, or use another "
                "--out_dir"
            )
    members = [pair for own in ours for pair in zip(own["names"], own["params"], strict=True)]
    for number, (name, parameter) in enumerate(members):  # torch itself does not compare shapes
        for kind, tensor in stored["state"].get(number, {}).items():
            if kind == "squares":
                continue
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape != parameter.shape:
                raise UserError(
                    f"{origin}: {kind} of {name} is {tuple(tensor.shape)} instead of "
                    f"{tuple(parameter.shape)}; use another checkpoint, or --resume=never"
                )


def clip_gradients(optimizer: torch.optim.AdamW, norm: torch.Tensor, limit: float, inside: bool):
    """Scales gradients, whose norm is given, so that it is `limit` at most.

    Args:
        optimizer: of all that have a gradient.
        norm: () on their device.
        limit: above 0.
        inside: let the optimizer divide while it reads them, and spare a pass over the memory. That
            is meant for `GradScaler`, which uses it itself; not all devices heed it.
    """
    if inside:
        optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0)
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grads_with_norm_([p for p in parameters if p.grad is not None], limit, norm)
