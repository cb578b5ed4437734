"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): less memory for a second forward.

Kept for backward, in numbers of C channels per token and block of GPT-2, and the matrix products
that forward repeats:

- `False`: 16 C, none. Eight of them are the inner layer of the MLP, before and after GELU.
- `mlp`: 8 C, a third: the first matrix of the MLP, with GELU.
- `True`: 1 C, all: the input of the block alone.
"""

from ..errors import UserError
from .gpt import LanguageModel


def checkpoint_activations(model: LanguageModel, kind: str) -> None:
    """Sets what backward recomputes in training; `kind` is the option `activation_checkpointing`.

    Raises:
        UserError: mlp, for a network whose MLP is not that of GPT-2.
    """
    model.checkpoint_activations = kind == "True"
    of_network = getattr(model.config, "mlp", "gelu")
    if kind == "mlp" and of_network != "gelu":
        raise UserError(
            f"activation_checkpointing=mlp is for mlp=gelu, and this network has mlp={of_network}; "
            "use --activation_checkpointing=True"
        )
    for block in model.transformer.h:
        block.mlp.recompute = kind == "mlp"
