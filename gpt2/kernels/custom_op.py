"""Functions that are one operation to the compiler."""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("gpt2", "FRAGMENT")
_TAGS = torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order


def custom_op(function: Callable) -> Callable:
    """Registers a function as the operation gpt2::name, without a leading underscore.

    It changes none of its arguments and returns none of them; its annotations are its schema. As
    `torch.library.custom_op`, which takes three times as long for each call: it checks the results
    of every call. What shapes come out is told by `torch.library.register_fake`.
    """
    name = function.__name__.lstrip("_")
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()), tags=_TAGS)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.gpt2, name).default
