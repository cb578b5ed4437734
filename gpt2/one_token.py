"""One new token of each of a few sequences: what `model.GPT` computes, in five kernels a layer.

Shapes: `B` sequences, `C` channels, `H` heads, `D` = C / H, `V` vocabulary.
"""

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


def next_logits(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """Reads the newest token of every row, (B,) ids -> (B, V).

    Args:
        model: one that `knows` accepts.
        tokens: (B,) int64.
        cache: with `lengths`; has a position more afterwards.
    """
    parts, heads = model.transformer, model.config.n_head
    x = parts.wte(tokens) + parts.wpe(cache.lengths)  # (B, C)
    for layer, block in enumerate(parts.h):
        attn, mlp = block.attn, block.mlp
        qkv = small_linear(x, attn.c_attn.weight, attn.c_attn.bias, norm=block.ln_1)
        q, k, v = qkv.unflatten(1, (3, heads, 1, -1)).unbind(1)  # (B, H, 1, D)
        y = cache.attend(layer, q, k, v).flatten(1)
        x = small_linear(y, attn.c_proj.weight, attn.c_proj.bias, residual=x)
        y = small_linear(x, mlp.c_fc.weight, mlp.c_fc.bias, norm=block.ln_2, gelu=True)
        x = small_linear(y, mlp.c_proj.weight, mlp.c_proj.bias, residual=x)
    cache.advance(1)
    return small_linear(x, parts.wte.weight, norm=parts.ln_f)
