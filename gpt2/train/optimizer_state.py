"""The state of an optimizer in a checkpoint, and optimizers of plugins."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..config.train import OptimOptions
from ..errors import UserError

# Tensors that an optimizer keeps for each parameter.
OF_ADAMW = {"step", "exp_avg", "exp_avg_sq"}
OF_MUON = {"step", "momentum"}
OTHER = "use another checkpoint, or --resume=never"


def own_optimizer(
    build: Callable, groups: list[dict[str, Any]], options: OptimOptions
) -> torch.optim.AdamW:
    """The optimizer that a plugin builds.

    Args:
        build: (parameter groups, options) -> torch.optim.Optimizer.
        groups: with `params`, their `names`, `weight_decay`, `lr`, and `lr_ratio` where a group has
            a rate of its own. The optimizer keeps all of these keys.
        options: of the optimizer and its schedule.

    Raises:
        UserError: something else than an optimizer of all these parameters.
    """
    wanted = {name for group in groups for name in group["names"]}
    made = build([group | {"lr": options.learning_rate} for group in groups], options)
    if not isinstance(made, torch.optim.Optimizer):
        raise UserError(
            f"optimizer={options.optimizer} of the plugin gave a {type(made).__name__} instead of "
            "a torch.optim.Optimizer"
        )
    kept = {name for group in made.param_groups for name in group.get("names", ())}
    if kept != wanted:
        raise UserError(
            f"optimizer={options.optimizer} of the plugin must keep all parameters and the "
            "`names` of their groups, by which a resume compares them"
        )
    return cast(torch.optim.AdamW, made)


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer skips the update where its `found_inf` is set, as fused ones do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


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
                "--out_dir (docs/troubleshooting.md#resume-refused)"
            )
    numbers_of_file = [number for other in theirs for number in other["params"]]
    if numbers_of_file != list(range(len(numbers_of_file))):  # torch would mix parameters up
        raise UserError(f"{origin}: the parameters of the optimizer are not in order; {OTHER}")
    members = [
        (name, parameter, _buffers_of(optimizer, own))
        for own in ours
        for name, parameter in zip(own["names"], own["params"], strict=True)
    ]
    for number, (name, parameter, wanted) in enumerate(members):
        buffers = stored["state"].get(number, {})
        if buffers and not wanted <= {*buffers}:
            raise UserError(f"{origin}: the optimizer state of {name} is not whole; {OTHER}")
        if wanted:
            _check_tensors(name, parameter, buffers, origin)


def _buffers_of(optimizer: torch.optim.Optimizer, group: dict) -> set[str]:
    """Tensors for each parameter of a group; none are known of an optimizer of a plugin."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return set()
    return OF_MUON if "momentum" in group else OF_ADAMW


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
