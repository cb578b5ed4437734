"""GPT-2's forward pass for a new token of many rows: its matmuls, and as little as can be between.

Computes what `model.gpt.GPT.hidden` computes. An addition to the residual stream and the norm that
follows are one kernel on a GPU: a kernel of so few numbers takes as long as it takes to begin.

Shapes: `B` rows, `C` channels, `H` heads, `D` = C / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.precision import HAS_TRITON
from ..model.gpt import LanguageModel
from ..model.kv_cache import KVCache


def add_layer_norm(x: Tensor, y: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """(x + y, norm(x + y)), all (B, C)."""
    if x.is_cuda and HAS_TRITON:
        from ..kernels.triton_decoding import add_layer_norm_

        return add_layer_norm_(x, y, norm)
    x = x + y
    return x, norm(x)


def linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """gelu(layer(x)), (B, K) -> (B, N); on a GPU one matmul of cuBLASLt.

    `_addmm_activation` is a private operator of PyTorch, which torch.compile emits. On a CPU its
    GELU is not the tanh form.
    """
    if x.is_cuda and hasattr(torch, "_addmm_activation"):
        return torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=True)
    return F.gelu(layer(x), approximate="tanh")


def hidden(model: LanguageModel, tokens: Tensor, cache: KVCache) -> Tensor:
    """Appends a token to every row of a cache; (B, C), the output of the last norm.

    Args:
        model: one that `few_token_pass.supports` accepts, not in float64.
        tokens: (B,) int64.
        cache: holds one more position afterwards.
    """
    parts, B = model.transformer, len(tokens)
    x = (parts.wte(tokens[:, None]) + parts.wpe.weight[cache.start()]).flatten(0, 1)  # (B, C)
    y = parts.h[0].ln_1(x)
    norms_after = [block.ln_1 for block in parts.h[1:]] + [parts.ln_f]
    for layer, (block, norm_after) in enumerate(zip(parts.h, norms_after, strict=True)):
        attn, mlp = block.attn, block.mlp
        qkv = attn.c_attn(y).view(B, 1, 3, model.config.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, 1, D)
        y = cache.attend(layer, q, k, v).transpose(1, 2).reshape(B, -1)
        x, y = add_layer_norm(x, attn.c_proj(y), block.ln_2)
        x, y = add_layer_norm(x, mlp.c_proj(linear_gelu(y, mlp.c_fc)), norm_after)
    cache.advance(1)
    return y
