"""GPT-2: the network, and nothing but the network.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": a decoder-only
Transformer with LayerNorm before each sub-layer and one after the last, learned positions, tanh
GELU, biases everywhere, and a head that shares its weights with the token embedding. Modules carry
the names of the released model (`transformer.h.0.attn.c_attn`, …). No devices, files, optimizers
or printing here.

Shapes: `B` batch, `T` new positions, `S` positions so far, `C` channels (n_embd), `H` heads,
`D` = C / H, `V` vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config.model import GPT2Config
from ..kernels.attention import causal_attention
from ..kernels.head_loss import head_logits, head_loss
from ..kernels.layer_norm import LayerNorm
from ..kernels.linear import add_linear, add_mlp, qkv
from ..kernels.precision import to_residual_stream
from .kv_cache import KVCache

INIT_STD = 0.02


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which no position sees a later one; adds to the residual stream."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, residual: Tensor, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T, C) and (B, T, C), to which the heads attend -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
            for part in qkv(x, self.c_attn)
        )
        if cache is not None:
            y = cache.attend(self.layer, q, k, v)
        else:
            y = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        dropout = self.dropout if self.training else 0.0
        return add_linear(residual, y.transpose(1, 2).reshape(B, T, C), self.c_proj, dropout)


class MLP(nn.Module):
    """Two layers, four times as wide in between, with the tanh form of GELU; adds to the stream."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, residual: Tensor, x: Tensor) -> Tensor:
        """(B, T, C) and (B, T, C), which the layers transform -> (B, T, C)."""
        dropout = self.dropout if self.training else 0.0
        return add_mlp(residual, x, self.c_fc, self.c_proj, dropout)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.attn(x, self.ln_1(x), cache)
        return self.mlp(x, self.ln_2(x))


class GPT(nn.Module):
    """The network: token ids to logits, or to a loss."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.fp8_head = False  # in training, see `ops.head_loss`
        self.checkpoint_activations = False  # while training, compute each block's a second time
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd),
            }
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """N(0, 0.02) for all matrices; those that write to the residual stream by 1/√(2L) less.

        Each of the L blocks adds to the stream twice, so the scale keeps its variance from growing
        with depth (Radford et al. 2019, section 2.3). Biases start at 0, LayerNorm at 1 and 0.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                into_stream = name.endswith("c_proj")
                scale = (2 * self.config.n_layer) ** -0.5 if into_stream else 1.0
                module.weight.normal_(0.0, INIT_STD * scale)
            if isinstance(module, nn.Linear):
                module.bias.zero_()

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the next token, or with targets the loss in nats.

        Args:
            idx: (B, T) int64 token ids.
            targets: (B, T) int64 ids to predict, `ops.IGNORE` (-1) where nothing is predicted.
            reduction: of the loss: "mean" over the predicted tokens, "sum", or "none" for (B·T,).
            cache: positions already seen; `idx` then holds only the new ones.
        """
        hidden = self.hidden(idx, cache)
        if targets is None:
            return self.logits(hidden)
        weight, padded_rows = self.transformer.wte.weight, self.config.padded_vocab_size
        fp8 = self.fp8_head and self.training
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        return head_loss(hidden, weight, targets, padded_rows, reduction, fp8)

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C), the output of the last LayerNorm."""
        start = cache.start() if cache is not None else 0
        T = idx.shape[1]
        assert isinstance(start, Tensor) or start + T <= self.config.block_size, (start, T)
        positions = start + torch.arange(T, device=idx.device)
        x = to_residual_stream(self.transformer.wte(idx) + self.transformer.wpe(positions))
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = self._through(block, x, cache)
        if cache is not None:
            cache.advance(T)
        return self.transformer.ln_f(x)

    def _through(self, block: nn.Module, *inputs) -> Tensor:
        """block(*inputs); where `checkpoint_activations` says so, backward computes it once more.

        Only the inputs are kept then (Chen et al. 2016, arXiv:1604.06174). The state of random
        numbers is looked at only if some are drawn: that keeps a CUDA graph from being recorded.
        """
        if not (self.training and self.checkpoint_activations):
            return block(*inputs)
        draws = self.config.dropout > 0
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws)

    def new_cache(self, batch_size: int, dtype: torch.dtype, capacity: int) -> KVCache:
        """Room for `capacity` positions of each row."""
        return KVCache(self.config, batch_size, self.transformer.wte.weight, dtype, capacity)

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, C) -> (…, V), by the token embedding."""
        return head_logits(hidden, self.transformer.wte.weight, self.config.padded_vocab_size)

    def num_parameters(self) -> int:
        """All parameters; the head is the token embedding and counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Training FLOPs per token: 6 N + 12 L C T (Chowdhery et al. 2022, appendix B).

        N leaves out the position table, which is looked up and not multiplied. Attention is
        counted without its causal half, as usual, so that numbers compare with other people's.
        """
        c = self.config
        matrices = self.num_parameters() - self.transformer.wpe.weight.numel()
        return 6 * matrices + 12 * c.n_layer * c.n_embd * c.block_size

    def expected_first_loss(self) -> float:
        """Loss in nats of fresh weights: ln V + C·σ²/2.

        Guessing evenly costs ln V = 10.82. The last LayerNorm gives vectors of length √C, so the
        tied N(0, σ²) head makes logits of variance C·σ², and the mean of their exponentials is
        exp(C·σ²/2): 0.15 nats more at C = 768.
        """
        return math.log(self.config.vocab_size) + self.config.n_embd * INIT_STD**2 / 2
