"""Parameter groups, AdamW or Muon with it, and gradient clipping."""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config.train import OptimOptions
from ..distributed.devices import choose_dtype
from ..distributed.runtime import Runtime
from ..errors import UserError
from .muon import MuonAndAdamW

# Tensors that an optimizer keeps for each parameter.
OF_ADAMW = {"step", "exp_avg", "exp_avg_sq"}
OF_MUON = {"step", "momentum"}
OTHER = "use another checkpoint, or --resume=never"


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
    if o.optimizer != "adamw":
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
    common: dict[str, Any] = {
        "lr": o.learning_rate,
        "betas": (o.beta1, o.beta2),
        "eps": 1e-8,
        "fused": True,
    }
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


def check_groups(optimizer: torch.optim.Optimizer, stored: dict, origin: Path) -> None:
    """Checks that the optimizer state of a checkpoint fits the parameters of this run.

    Args:
        optimizer: of this run.
        stored: the checkpoint's optimizer state dict.
        origin: the checkpoint, for the message.

    Raises:
        UserError: the groups differ, or the shape of a tensor does (torch compares no shapes).
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
    numbers_of_file = [number for other in theirs for number in other["params"]]
    if numbers_of_file != list(range(len(numbers_of_file))):  # torch would mix parameters up
        raise UserError(f"{origin}: the parameters of the optimizer are not in order; {OTHER}")
    members = [
        (name, parameter, OF_MUON if "momentum" in own else OF_ADAMW)
        for own in ours
        for name, parameter in zip(own["names"], own["params"], strict=True)
    ]
    for number, (name, parameter, wanted) in enumerate(members):
        buffers = stored["state"].get(number, {})
        if buffers and not wanted <= {*buffers}:
            raise UserError(f"{origin}: the optimizer state of {name} is not whole; {OTHER}")
        _check_tensors(name, parameter, buffers, origin)


def _check_tensors(name: str, parameter: nn.Parameter, buffers: dict, origin: Path) -> None:
    """Raises UserError for a tensor of the optimizer that does not fit its parameter."""
    for kind, tensor in buffers.items():
        if tensor is None:  # in an FSDP part
            continue
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise UserError(f"{origin}: {kind} of {name} holds no numbers; {OTHER}")
        # `step` counts, and `squares` has a number for each row.
        numbers = {"step": 1, "squares": len(parameter)}
        fits, wanted = tensor.shape == parameter.shape, str(tuple(parameter.shape))
        if kind in numbers:
            fits, wanted = tensor.numel() == numbers[kind], f"{numbers[kind]:,} numbers"
        if not fits:
            raise UserError(
                f"{origin}: {kind} of {name} is {tuple(tensor.shape)} instead of {wanted}; {OTHER}"
            )


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
