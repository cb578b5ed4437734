"""GPT-2's forward pass for a few new tokens, with five kernels per layer.

Computes what `model.gpt.GPT` computes. With few rows the number of kernels limits the speed, so
each linear layer is one kernel together with the LayerNorm before it and the GELU or residual
addition after it.

Shapes: `B` sequences, `T` new tokens of each, `C` channels, `H` heads, `D` = C / H, `V`
vocabulary, `K` in, `N` out.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.precision import HAS_TRITON
from ..model.gpt import Block, LanguageModel
from ..model.kv_cache import KVCache

FEW_ROWS = 4  # the kernel reads the weights once per row; with more rows cuBLAS is faster


def small_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: nn.LayerNorm | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + gelu(norm(x) weightᵀ + bias) for a few rows; on a GPU with Triton one kernel.

    Args:
        x: (B, K).
        weight: (N, K).
        bias: (N,).
        norm: a LayerNorm of width K, or None.
        gelu: apply GELU in its tanh form.
        residual: (B, N) to add, or None.

    Returns:
        (B, N).
    """
    if x.is_cuda and HAS_TRITON and x.dtype != torch.float64:
        from ..kernels.triton_decoding import small_linear_

        return small_linear_(x, weight, bias, norm, gelu, residual)
    plain = functools.partial(F.linear, weight=weight, bias=bias)
    return apply_linear(plain, x, norm=norm, gelu=gelu, residual=residual)


def apply_linear(
    linear: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    norm: nn.Module | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + gelu(linear(norm(x))); norm, gelu and residual are optional."""
    y = linear(norm(x) if norm else x)
    y = F.gelu(y, approximate="tanh") if gelu else y
    return y if residual is None else residual + y


def half_linear(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function layer(x) for one row on a CPU, (1, K) -> (1, N), with an fp16 copy of the weight.

    Where PyTorch has FBGEMM (x86), the copy is in FBGEMM's packed layout. That matmul accumulates
    in float32 and is up to three times as fast as `torch.mv`.

    Args:
        layer: has a `weight` (N, K), and a `bias` (N,) or none.
    """
    weight, bias = layer.weight.detach(), getattr(layer, "bias", None)
    if _has_fbgemm():
        packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)
    weight = weight.half()

    def linear(x: Tensor) -> Tensor:
        y = torch.mv(weight, x.flatten().half()).to(x.dtype)
        return (y if bias is None else y + bias)[None]

    return linear


def packed_linear(layer: nn.Module, rows: int) -> Callable[[Tensor], Tensor]:
    """A function layer(x) for about `rows` rows on a CPU, (rows, K) -> (rows, N), in float32.

    Uses a copy of the weight in oneDNN's blocked layout. With a dozen rows, `F.linear` spends half
    of its time on converting the weight to that layout.

    `_reorder_linear_weight` and `_linear_pointwise` are private operators of PyTorch, which
    torch.compile emits for CPUs; no public function multiplies by a packed float32 weight. Without
    oneDNN, in other precisions, or in a PyTorch that lacks the operators, `F.linear` takes their
    place: equal up to rounding, but slower.
    """
    weight, bias = layer.weight.detach(), getattr(layer, "bias", None)
    if weight.dtype != torch.float32 or not _has_packed_linear():
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _has_fbgemm() -> bool:
    """Whether this PyTorch multiplies by fp16 weights packed by FBGEMM."""
    engines = getattr(torch.backends, "quantized", None)
    operators = ("linear_prepack_fp16", "linear_dynamic_fp16")
    return "fbgemm" in getattr(engines, "supported_engines", ()) and all(
        hasattr(torch.ops.quantized, name) for name in operators
    )


def _has_packed_linear() -> bool:
    """Whether oneDNN's private operators are there, and do what `packed_linear` asks of them.

    They are tried on a small matrix: a private operator may change its arguments.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    weight, x = torch.arange(12.0).view(3, 4), torch.ones(2, 4)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 2)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, TypeError, RuntimeError):
        return False
    return torch.allclose(y, F.linear(x, weight))


def supports(model: LanguageModel) -> bool:
    """Whether all layers are GPT-2's own: no switches, no LoRA adapters."""
    return all(
        type(block) is Block
        and all(type(m) is nn.Linear for m in (block.attn.c_attn, block.attn.c_proj))
        and all(type(m) is nn.Linear for m in (block.mlp.c_fc, block.mlp.c_proj))
        for block in model.transformer.h
    )


def fits_one_kernel(model: LanguageModel, rows: int) -> bool:
    """Whether `one_kernel` is made for a model that `supports` accepts, and so many rows."""
    if model.transformer.wte.weight.is_cuda:
        from ..kernels import one_token

        return one_token.fits(model, rows)
    return False


def one_kernel(model: LanguageModel, cache: KVCache) -> Any:
    """`next_logits` of one sequence in one kernel.

    Args:
        model: one that `fits_one_kernel` accepts.
        cache: of one row, with `lengths`.

    Returns:
        A `one_token.OneToken`.
    """
    from ..kernels import one_token

    return one_token.OneToken(model, cache)


def small_layer(x: Tensor, layer: nn.Module, **given: Any) -> Tensor:
    """`small_linear` with a layer's weight, and its bias if it has one."""
    return small_linear(x, layer.weight, getattr(layer, "bias", None), **given)


def linear_layers(model: LanguageModel) -> list[nn.Module]:
    """All layers that `next_logits` calls `linear` with."""
    layers: list[nn.Module] = [model.transformer.wte]
    for block in model.transformer.h:
        layers += block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj
    return layers


def using(copies: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Callable[..., Tensor]:
    """A `linear` for `next_logits` that uses copies of the layers' weights."""
    return lambda x, layer, **given: apply_linear(copies[layer], x, **given)


def next_logits(
    model: LanguageModel,
    tokens: Tensor,
    cache: KVCache,
    linear: Callable[..., Tensor] = small_layer,
) -> Tensor:
    """Appends T tokens to every row of a cache; logits after each of them.

    Args:
        model: one that `supports` accepts.
        tokens: (B, T) int64.
        cache: holds T more positions afterwards.
        linear: called as `linear(x, layer, norm=…, gelu=…, residual=…)` for every linear layer, and
            with the token embedding for the head.

    Returns:
        (B · T, V) logits.
    """
    (B, T), heads = tokens.shape, model.config.n_head
    parts, at = model.transformer, cache.start()
    at = at if T == 1 else at + torch.arange(T, device=tokens.device)
    x = (parts.wte(tokens) + parts.wpe.weight[at]).flatten(0, 1)  # (B · T, C)
    for layer, block in enumerate(parts.h):
        attn, mlp = block.attn, block.mlp
        qkv = linear(x, attn.c_attn, norm=block.ln_1)
        q, k, v = qkv.view(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        y = cache.attend(layer, q, k, v).transpose(1, 2).reshape(B * T, -1)
        x = linear(y, attn.c_proj, residual=x)
        y = linear(x, mlp.c_fc, norm=block.ln_2, gelu=True)
        x = linear(y, mlp.c_proj, residual=x)
    cache.advance(T)
    return linear(x, parts.wte, norm=parts.ln_f)
