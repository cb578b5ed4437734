"""Functions that torch.compile sees as one opaque operator, and their place in autograd."""

import functools
from collections.abc import Callable

import torch

from ..errors import UserError

_LIBRARY = torch.library.Library("gpt2", "FRAGMENT")
_TAGS = torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order


def custom_op(function: Callable | None = None, *, name: str = "") -> Callable:
    """Registers a function as the operator gpt2::name: `@custom_op` or `@custom_op(name="…")`.

    The function changes none of its arguments and returns none of them. Its annotations are the
    schema. `torch.library.custom_op` does more: it checks the results of every call, and so takes
    three times as long per call. The shapes of the results come from `torch.library.register_fake`.

    Args:
        function: computes the operator on every device.
        name: of the operator; empty: the function's name without a leading underscore.
    """
    if function is None:
        return functools.partial(custom_op, name=name)
    operator = name or function.__name__.lstrip("_")
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(operator + schema, tags=_TAGS)
    _LIBRARY.impl(operator, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.gpt2, operator).default


def refuse_second_derivatives() -> None:
    """For a backward pass of ours, which autograd would take for a constant.

    Raises:
        UserError: it was called with create_graph=True.
    """
    # autograd enables gradients in a backward pass for this alone; the compiler, while it traces
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UserError(
            "create_graph=True: the kernels for speed have first derivatives only; "
            'model(x, y, reduction="none") has all of them without autocast, under '
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )
