"""A few new tokens: what `model.GPT` computes, in five kernels a layer.

Shapes: `B` sequences, `T` new tokens of each, `C` channels, `H` heads, `D` = C / H, `V`
vocabulary, `K` in, `N` out.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.precision import HAS_TRITON
from ..model.gpt import GPT, Block
from ..model.kv_cache import KVCache

FEW_ROWS = 4  # each row reads the weights again, if from the cache of the GPU; more are multiplied


def small_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: nn.LayerNorm | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + gelu(norm(x) weightᵀ + bias), each of them if it is given, for a few rows.

    On a GPU one kernel: with few rows the number of kernels is what takes time.

    Args:
        x: (B, K).
        weight: (N, K).
        bias: (N,).
        norm: a LayerNorm of width K.
        gelu: the tanh form.
        residual: (B, N).
    """
    if x.is_cuda and HAS_TRITON and x.dtype != torch.float64:
        from ..kernels.triton_decoding import small_linear_

        return small_linear_(x, weight, bias, norm, gelu, residual)
    plain = functools.partial(F.linear, weight=weight, bias=bias)
    return around(plain, x, norm=norm, gelu=gelu, residual=residual)


def around(
    linear: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    norm: nn.Module | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + gelu(linear(norm(x))), each of them if it is given."""
    y = linear(norm(x) if norm else x)
    y = F.gelu(y, approximate="tanh") if gelu else y
    return y if residual is None else residual + y


def half_linear(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """layer(x) for one row on a CPU, (1, K) -> (1, N), by a copy of the weight in float16.

    Where PyTorch has FBGEMM (x86), its packed form, which sums in float32 and is up to three times
    as fast as PyTorch's product of a matrix with a vector.

    Args:
        layer: with a `weight` (N, K), and a `bias` (N,) or none.
    """
    weight, bias = layer.weight.detach(), getattr(layer, "bias", None)
    if "fbgemm" in torch.backends.quantized.supported_engines:
        packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)
    weight = weight.half()

    def product(x: Tensor) -> Tensor:
        y = torch.mv(weight, x.flatten().half()).to(x.dtype)
        return (y if bias is None else y + bias)[None]

    return product


def packed_linear(layer: nn.Module, rows: int) -> Callable[[Tensor], Tensor]:
    """layer(x) for about so many rows on a CPU, (rows, K) -> (rows, N), in float32.

    By a copy of the weight in the order in which oneDNN reads it: the plain product of a dozen rows
    spends half its time on putting the weight into such an order.
    """
    weight, bias = layer.weight.detach(), getattr(layer, "bias", None)
    if not torch.backends.mkldnn.is_available() or weight.dtype != torch.float32:
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def knows(model: GPT) -> bool:
    """Whether the layers are GPT-2's own: no switches, no adapters."""
    return all(
        type(block) is Block
        and all(type(m) is nn.Linear for m in (block.attn.c_attn, block.attn.c_proj))
        and all(type(m) is nn.Linear for m in (block.mlp.c_fc, block.mlp.c_proj))
        for block in model.transformer.h
    )


def product(x: Tensor, layer: nn.Module, **given) -> Tensor:
    """`small_linear` with the weight of a layer, and its bias if it has one."""
    return small_linear(x, layer.weight, getattr(layer, "bias", None), **given)


def next_logits(
    model: GPT, tokens: Tensor, cache: KVCache, product: Callable[..., Tensor] = product
) -> Tensor:
    """Reads the newest tokens of every row, (B, T) ids -> (B · T, V).

    Args:
        model: one that `knows` accepts.
        tokens: (B, T) int64.
        cache: has T positions more afterwards.
        product: computes the products, also that of the head with the embedding.
    """
    (B, T), heads = tokens.shape, model.config.n_head
    parts, at = model.transformer, cache.start()
    at = at if T == 1 else at + torch.arange(T, device=tokens.device)
    x = (parts.wte(tokens) + parts.wpe.weight[at]).flatten(0, 1)  # (B · T, C)
    for layer, block in enumerate(parts.h):
        attn, mlp = block.attn, block.mlp
        qkv = product(x, attn.c_attn, norm=block.ln_1)
        q, k, v = qkv.view(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        y = cache.attend(layer, q, k, v).transpose(1, 2).reshape(B * T, -1)
        x = product(y, attn.c_proj, residual=x)
        y = product(x, mlp.c_fc, norm=block.ln_2, gelu=True)
        x = product(y, mlp.c_proj, residual=x)
    cache.advance(T)
    return product(x, parts.wte, norm=parts.ln_f)
