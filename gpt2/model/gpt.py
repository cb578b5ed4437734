"""GPT-2 as a PyTorch module: token ids to logits, or to a loss.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": a decoder-only
Transformer with LayerNorm before each sub-layer and one after the last, learned positions, tanh
GELU, biases everywhere, and a head that shares its weights with the token embedding. Modules carry
the names of the released model (`transformer.h.0.attn.c_attn`, …).

Shapes: `B` batch, `T` new positions, `S` positions so far, `C` channels (n_embd), `H` heads,
`D` = C / H, `V` vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config.model import IGNORE, GPT2Config
from ..kernels.attention import causal_attention
from ..kernels.head_loss import head_logits, head_loss, own_loss
from ..kernels.layer_norm import LayerNorm, with_norm
from ..kernels.linear import add_linear, add_mlp, packed_qkv, packs, qkv
from ..kernels.logits_loss import soft_cap
from ..kernels.packed_attention import packed_attention
from ..kernels.precision import to_residual_stream
from .attention_cache import AttentionCache
from .kv_cache import KVCache

INIT_STD = 0.02


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which no position sees a later one."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def add_to(self, residual: Tensor, x: Tensor, cache: AttentionCache | None = None) -> Tensor:
        """residual + attention(x), all (B, T, C); one matmul kernel projects and adds on a GPU."""
        B, T, C = x.shape
        dropout = self.dropout if self.training else 0.0
        if cache is None and not dropout and packs(x, self.c_attn, self.n_head):
            y = packed_attention(packed_qkv(x, self.c_attn), self.n_head)
            return add_linear(residual, y, self.c_proj)
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
            for part in qkv(x, self.c_attn)
        )
        if cache is not None:
            y = cache.attend(self.layer, q, k, v)
        else:
            y = causal_attention(q, k, v, dropout)
        return add_linear(residual, y.transpose(1, 2).reshape(B, T, C), self.c_proj, dropout)


class MLP(nn.Module):
    """Two linear layers, 4 C wide in between, with the tanh form of GELU."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.recompute = False  # in training: keep the input alone, compute c_fc and GELU again
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + mlp(x), all (B, T, C)."""
        dropout = self.dropout if self.training else 0.0
        return add_mlp(residual, x, self.c_fc, self.c_proj, dropout, self.recompute)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); hooks see a block, its norms and matrices."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: AttentionCache | None = None) -> Tensor:
        """The residual stream x, (B, T, C) -> (B, T, C)."""
        x = self.attn.add_to(*with_norm(x, self.ln_1), cache)
        return self.mlp.add_to(*with_norm(x, self.ln_2))


class LanguageModel(nn.Module):
    """What `GPT` and `modern.Modern` share: the loss, the initialisation, checkpointed blocks.

    A subclass builds `transformer` (with `wte` and the blocks `h`) and defines `hidden`.
    """

    transformer: Any  # nn.ModuleDict, whose entries type checkers cannot see
    cache_type: ClassVar[type[KVCache]] = KVCache
    blocks_differ: ClassVar[bool] = False  # True: compiled code of a block serves no other block
    head_is_embedding: ClassVar[bool] = True  # logits are hidden · wteᵀ, and nothing else
    draft_supported: ClassVar[bool] = True  # speculative decoding, which reads GPT-2's layers

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.end_of_text: int | None = None  # id; None: the last of the vocabulary
        self.fp8_head = False  # in training, see `head_loss`
        self.sampled_ids: Tensor | None = None  # in training: `sampled` of `head_loss`
        self.second_share: Tensor | None = None  # in training: `second` of `head_loss`
        self.checkpoint_activations = False  # in training, recompute each block in backward
        self.parts_draw = False  # parts of a plugin in the blocks may draw random numbers
        self.own_loss: Callable | None = None  # of a plugin, in training; see `own_loss`
        self.compiled_apart = False  # each block is compiled by itself, not the whole model

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws all matrices from N(0, init_std²); biases are 0, LayerNorm starts at 1 and 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.init_std(name))
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    def init_std(self, name: str) -> float:
        """0.02; projections into the residual stream are scaled by 1/√(2L).

        Each of the L blocks adds to the stream twice, so the scale keeps its variance from growing
        with depth (Radford et al. 2019, section 2.3).
        """
        into_stream = name.endswith("c_proj")
        return INIT_STD * ((2 * self.config.n_layer) ** -0.5 if into_stream else 1.0)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the next token; with targets, the loss in nats.

        Args:
            idx: (B, T) int64 token ids.
            targets: (B, T) int64 ids to predict; negative, as -1 or -100, where none is.
            reduction: of the loss: "mean" over the predicted tokens, "sum", or "none" for (B·T,).
            cache: holds the positions already seen; `idx` then has the new ones only.
        """
        hidden = self.hidden(idx, cache)
        if targets is None:
            return self.logits(hidden)
        padded_rows, fp8 = self.config.padded_vocab_size, self.fp8_head and self.training
        hidden, weight = hidden.flatten(0, 1), self.head_weight
        targets = targets.flatten().clamp(min=IGNORE)
        if self.own_loss is not None and self.training:
            return own_loss(self.own_loss, self.logits(hidden), targets, reduction)
        options = padded_rows, reduction, fp8, self.softcap
        aims = (self.sampled_ids, self.second_share) if self.training else (None, None)
        return head_loss(hidden, weight, targets, *options, *aims, idx.shape[1])

    def hidden(self, idx: Tensor, cache: AttentionCache | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C), the output of the last norm."""
        raise NotImplementedError

    def limit_attention_window(self, positions: int) -> None:
        """For `window_warmup`, which needs a network with attention windows: `modern.Modern`."""
        raise NotImplementedError

    def positions(self, idx: Tensor, cache: AttentionCache | None) -> Tensor:
        """(T,) or (B, T), the positions of new tokens."""
        start, T = cache.start() if cache is not None else 0, idx.shape[1]
        assert isinstance(start, Tensor) or start + T <= self.config.block_size, "beyond context"
        return start + torch.arange(T, device=idx.device)

    def run_block(self, block: nn.Module, *inputs: object) -> Tensor:
        """block(*inputs); with `checkpoint_activations`, backward recomputes it from its inputs.

        Activation checkpointing (Chen et al. 2016, arXiv:1604.06174). The random state is saved
        only if a block may draw, because reading it breaks the capture of a CUDA graph.
        """
        if not (self.training and self.checkpoint_activations):
            return block(*inputs)
        draws = self.config.dropout > 0 or self.parts_draw
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws)

    @property
    def head_weight(self) -> Tensor:
        """(V, C), by which the head multiplies: the token embedding."""
        return self.transformer.wte.weight

    @property
    def softcap(self) -> float:
        """Limit of the logits, see `soft_cap`; 0: none."""
        return 0.0

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, C) -> (…, V)."""
        logits = head_logits(hidden, self.head_weight, self.config.padded_vocab_size)
        return soft_cap(logits, self.softcap)

    def new_cache(self, batch_size: int, dtype: torch.dtype, capacity: int) -> KVCache:
        """An empty cache for `capacity` positions of each row."""
        return self.cache_type(self.config, batch_size, self.head_weight, dtype, capacity)

    def num_parameters(self) -> int:
        """All parameters; a head that is the token embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def lookup_parameters(self) -> int:
        """Parameters that are looked up and never multiplied: the position table."""
        return self.transformer.wpe.weight.numel()

    def flops_per_token(self) -> int:
        """Training FLOPs per token: 6 N + 12 L C T (Chowdhery et al. 2022, appendix B).

        N leaves out `lookup_parameters`. Attention is counted in full: neither the causal mask nor
        an attention window is deducted. Other projects count like this, so the MFU is comparable.
        """
        c, matrices = self.config, self.num_parameters() - self.lookup_parameters()
        return 6 * matrices + 12 * c.n_layer * c.n_embd * c.block_size

    def expected_first_loss(self) -> float:
        """Loss in nats of fresh weights: ln V + C·σ²/2.

        A uniform guess costs ln V = 10.82. The last LayerNorm gives vectors of length √C, so the
        tied N(0, σ²) head makes logits of variance C·σ², and the mean of their exponentials is
        exp(C·σ²/2): 0.15 nats more at C = 768.
        """
        return math.log(self.config.vocab_size) + self.config.n_embd * INIT_STD**2 / 2

    def own_logit(self) -> float:
        """Mean logit that fresh weights give the token just read; 0 is that of all others.

        The tied head meets the token's own embedding in the normalised stream, whose variance is
        2σ² of the embeddings and 2v·E[gelu²] of the MLPs: v / √(2σ² + 2v·E[gelu²]), v = C·σ².
        """
        v = self.config.n_embd * INIT_STD**2
        return v / (2 * INIT_STD**2 + 2 * v * (v / 4 + v**2 / 2)) ** 0.5


class GPT(LanguageModel):
    """GPT-2."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd),
            }
        )
        self.init_weights()

    def embed(self, idx: Tensor, cache: AttentionCache | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C), the residual stream before the first block."""
        embedding = self.transformer.wte(idx) + self.transformer.wpe(self.positions(idx, cache))
        return F.dropout(to_residual_stream(embedding), self.config.dropout, self.training)

    def hidden(self, idx: Tensor, cache: AttentionCache | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C), the output of the last LayerNorm."""
        x = self.embed(idx, cache)
        for block in self.transformer.h:
            x = self.run_block(block, x, cache)
        if cache is not None:
            cache.advance(idx.shape[1])
        return self.transformer.ln_f(x)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not compiled; a compiled `embed` would be the original's."""
        return {k: v for k, v in super().__getstate__().items() if k != "embed"}
