"""Causal attention, with and without a cache, by `scaled_dot_product_attention`.

Shapes: `B` batch, `H` heads, `T` new positions, `S` positions so far, `D` head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config.model import GPT2Config
from .precision import HAS_TRITON

KERNELS = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "FlashAttention-2",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient attention",
    SDPBackend.MATH: "plain PyTorch, whose scores take memory of T² numbers a head",
}
ALL_BUT_CUDNN = [kernel for kernel in KERNELS if kernel != SDPBackend.CUDNN_ATTENTION]


def describe_kernel(config: GPT2Config, device: torch.device, dtype: torch.dtype) -> str:
    """Which kernel computes plain causal attention in training, in one sentence.

    PyTorch chooses. From 2.11 on it takes cuDNN on GPUs of compute capability 9 and 10, if it finds
    a cuDNN newer than 9.15; an older one on LD_LIBRARY_PATH costs training a quarter of the speed
    of attention. `torch.backends.cuda.enable_cudnn_sdp(False)` is for comparisons.

    `_fused_sdp_choice` is a private function of PyTorch, which makes the choice; no public one
    tells it for given tensors.

    Args:
        config: shape of the network.
        device: of the run.
        dtype: of queries, keys and values.
    """
    heads = config.n_head
    shape = 1, config.block_size, heads, config.n_embd // heads  # as the network lays them out
    q = torch.empty(shape, device=device, dtype=dtype, requires_grad=True).transpose(1, 2)
    choice = getattr(torch, "_fused_sdp_choice", lambda *_, **__: -1)
    chosen = choice(q, q, q, dropout_p=config.dropout, is_causal=True)
    return f"causal attention: {KERNELS.get(SDPBackend(chosen), 'as PyTorch chooses')}"


def visible_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, dropout: float = 0.0
) -> Tensor:
    """softmax(q kᵀ / √D) v over the keys that a mask shows.

    cuDNN never computes masks of 64, 192, 320, … keys: there its backward pass returns NaN for a
    query whose scores are all below -88 (PyTorch 2.11 to 2.13, pytorch/pytorch#196678).

    Args:
        q: (B, H, T, D).
        k: (B, H, S, D).
        v: (B, H, S, D).
        visible: (B or 1, 1, T, S) bool.
        dropout: probability of dropping an attention weight.
    """
    if k.shape[-2] % 128 == 64:
        with sdpa_kernel(ALL_BUT_CUDNN):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √D) v, in which no query sees a later key (Vaswani et al. 2017, eq. 1).

    Args:
        q: (B, H, T, D), the last T of S positions.
        k: (B, H, S, D) with S ≥ T; S > T when the first S - T positions come from a cache.
        v: (B, H, S, D).
        dropout: probability of dropping an attention weight.
    """
    new, total = q.shape[-2], k.shape[-2]
    if new == total:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    if new == 1:  # the last position sees everything
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    visible = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)


def cached_attention(  # noqa: PLR0917 - what attention has
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, end: int
) -> Tensor:
    """Attention of new positions over a KV cache whose rows differ in length.

    Stores the new keys and values in the cache. Reads nothing back from the device, so a CUDA graph
    can capture it.

    Args:
        q: (B, H, T, D), queries of the T new positions of every row; so k and v.
        k: (B, H, T, D).
        v: (B, H, T, D).
        keys: (B, H, S_max, D), changed in place.
        values: (B, H, S_max, D), changed in place.
        lengths: (B,) int64, positions of each row before the new ones.
        end: S, the longest row with its new positions; the Triton kernel does not use it.
    """
    T = q.shape[2]
    if q.is_cuda and T == 1 and HAS_TRITON and q.dtype != torch.float64:
        from .triton_decoding import cached_attention_

        return cached_attention_(q, k, v, keys, values, lengths)
    at = lengths[:, None] + torch.arange(T, device=q.device)  # (B, T)
    rows = torch.arange(len(q), device=q.device)[:, None]
    keys[rows, :, at], values[rows, :, at] = k.transpose(1, 2), v.transpose(1, 2)
    visible = torch.arange(end, device=q.device) <= at[:, None, :, None]  # (B, 1, T, S)
    keys, values = keys[:, :, :end], values[:, :, :end]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)


def causal_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`causal_attention` by the formula, for tests."""
    new, total = q.shape[-2], k.shape[-2]
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    visible = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v
