"""Parts of a plugin in the modern network: how they are made, and what of them a checkpoint keeps.

A checkpoint holds the parameters of a network, and only these. A buffer that a module registers
with `persistent=False` is a constant: whoever makes the module again computes it again.
"""

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ..config.model import ModernConfig
from ..config.registry import make_part, registered
from ..errors import UserError

AS_CONSTANT = "give register_buffer persistent=False"


def build_own(kind: str, name: str, config: ModernConfig) -> Any:
    """The part of a plugin: a module for a class, the function itself, None if it is ours.

    Raises:
        UserError: neither a function nor a class of modules; tensors that no checkpoint keeps.
    """
    part, made = registered(kind, name), make_part(kind, name, config)
    if isinstance(made, nn.Module) != isinstance(part, type):
        odd = "another class" if isinstance(part, type) else "one module for all layers"
        raise UserError(
            f"{kind}={name}: register a function or a class of torch.nn.Module, not {odd}"
        )
    if isinstance(made, nn.Module):
        _check_tensors(f"{kind}={name}", made)
    return made


def _check_tensors(label: str, module: nn.Module) -> None:
    """Raises UserError for tensors of a module that a checkpoint does not keep, or not as such."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, p in parameters.items():
        if is_lazy(p):
            raise UserError(f"{label}: its parameter {name} has no shape yet; name its sizes")
        if not p.is_floating_point():
            raise UserError(
                f"{label}: its parameter {name} is {str(p.dtype)[6:]}, and parameters are floating "
                f"numbers; make it a constant: {AS_CONSTANT}, and compute it in the constructor"
            )
    if extra := [name for name in module.state_dict() if name not in parameters]:
        raise UserError(
            f"{label}: its buffer {extra[0]} is no parameter, and checkpoints hold these alone; if "
            f"the constructor computes it, {AS_CONSTANT}, else make it a parameter (with "
            "requires_grad=False if it is not trained)"
        )


def check_shared(model: nn.Module) -> None:
    """Raises UserError for parameters of plugins that are one tensor: a file holds each once.

    Views of other numbers in one storage are two tensors.
    """
    names: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if ".own." not in name or p.is_meta or not p.numel():
            continue
        other = names.setdefault(p.data_ptr(), name)
        if other != name:
            raise UserError(
                f"{other} and {name} are one tensor, and a checkpoint cannot hold it twice; give "
                "each module its own parameters, or keep the module once and call it twice"
            )
