"""One new token of each of a few sequences: what `model.GPT` computes, in five kernels a layer.

Shapes: `B` sequences, `C` channels, `H` heads, `D` = C / H, `V` vocabulary.
"""

from collections.abc import Callable

from torch import Tensor, nn

from .model import GPT, Block, KVCache
from .ops import small_linear

FEW_ROWS = 4  # each row reads the weights again, if from the cache of the GPU; more are multiplied


def knows(model: GPT) -> bool:
    """Whether the layers are GPT-2's own: no switches, no adapters."""
    return all(
        type(block) is Block
        and all(type(m) is nn.Linear for m in (block.attn.c_attn, block.attn.c_proj))
        and all(type(m) is nn.Linear for m in (block.mlp.c_fc, block.mlp.c_proj))
        for block in model.transformer.h
    )


def product(x: Tensor, layer: nn.Module, **around) -> Tensor:
    """`ops.small_linear` with the weight of a layer, and its bias if it has one."""
    return small_linear(x, layer.weight, getattr(layer, "bias", None), **around)


def next_logits(
    model: GPT, tokens: Tensor, cache: KVCache, product: Callable[..., Tensor] = product
) -> Tensor:
    """Reads the newest token of every row, (B,) ids -> (B, V).

    Args:
        model: one that `knows` accepts.
        tokens: (B,) int64.
        cache: has a position more afterwards.
        product: computes the products, also that of the head with the embedding.
    """
    parts, heads = model.transformer, model.config.n_head
    start = cache.length if cache.lengths is None else cache.lengths
    x = parts.wte(tokens) + parts.wpe.weight[start]  # (B, C)
    for layer, block in enumerate(parts.h):
        attn, mlp = block.attn, block.mlp
        qkv = product(x, attn.c_attn, norm=block.ln_1)
        q, k, v = qkv.unflatten(1, (3, heads, 1, -1)).unbind(1)  # (B, H, 1, D)
        y = cache.attend(layer, q, k, v).flatten(1)
        x = product(y, attn.c_proj, residual=x)
        y = product(x, mlp.c_fc, norm=block.ln_2, gelu=True)
        x = product(y, mlp.c_proj, residual=x)
    cache.advance(1)
    return product(x, parts.wte, norm=parts.ln_f)
