"""Functions that torch.compile sees as one opaque operator."""

import functools
from collections.abc import Callable

import torch

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
