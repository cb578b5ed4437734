"""The modern network: GPT-2 with switches for RoPE, attention windows, RMSNorm and others.

Each field of `config.switches.Switches` is read in one place of this file. With all switches at
their defaults the network computes GPT-2's logits. A run of plain GPT-2 does not import this file.

Shapes: `B` batch, `T` new positions, `C` channels (n_embd), `V` vocabulary; masks: see
`attention_masks`.
"""

import math
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.model import GPT2_VOCAB_SIZE, ModernConfig
from ..config.parameter_shapes import GATE_CHANNELS
from ..config.registry import has_own_parts, registered
from ..kernels import cudnn_choice
from ..kernels.linear import add_linear, add_mlp, linear, qkv
from ..kernels.precision import matmuls_in_bf16, to_residual_stream
from .attention_cache import AttentionCache, MaskedAttentionCache
from .attention_masks import (
    Mask,
    MaskedKVCache,
    document_ids,
    mask_for,
    masked_attention,
    takes_blocks,
)
from .gpt import INIT_STD, LanguageModel
from .kv_cache import KVCache
from .own_parts import build_own, check_shared
from .packed_documents import Packed
from .rotary import apply_rope, rope_cos_sin

EPS = torch.finfo(torch.float32).eps  # of RMSNorm, whatever the precision of its input
# E[f(x)²] of an activation f for x ~ N(0, v) with small v: its coefficients of v and v².
SECOND_MOMENTS = {"gelu": (1 / 4, 1 / 2), "relu2": (0, 3 / 2), "swiglu": (0, 1 / 6)}


def gated(heads: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Each head times its gate 2 σ(W x), which is 1 for W = 0 (Qiu et al. 2025, arXiv:2505.06708).

    Args:
        heads: (B, T, H, D).
        x: (B, T, C); the gate reads the first channels, which suffice (modded-nanogpt).
        weight: W, (H, channels that are read).
    """
    gates = 2 * torch.sigmoid(F.linear(x[..., : weight.shape[1]], weight))
    return heads * gates[..., None].to(heads.dtype)


def rms_norm(x: Tensor) -> Tensor:
    """x / √(mean of x²) over the last dimension (Zhang & Sennrich 2019, eq. 4), without a gain."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


class Context:
    """Inputs that all layers share in one forward pass."""

    def __init__(
        self, positions: Tensor, cache: MaskedAttentionCache | None, documents: Tensor | None
    ) -> None:
        self.positions, self.cache, self.documents = positions, cache, documents
        self.cos_sin: Tensor | None = None  # with RoPE, see `rotary.rope_cos_sin`
        self.dropout = 0.0  # of attention weights
        self.windows: dict[str, Tensor | None] = {}  # letter of window_pattern -> attention window
        self.masks: dict[str, Mask] = {}  # letter -> attention mask, if there is no cache


class Attention(nn.Module):
    """Attention with RoPE, QK-norm, an attention window and value embeddings."""

    def __init__(self, config: ModernConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        pattern = config.window_pattern or "L"
        self.window_letter = pattern[layer % len(pattern)]
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        gate = config.n_head, min(GATE_CHANNELS, config.n_embd)
        self.output_gate = nn.Parameter(torch.zeros(gate)) if config.attention_gate else None
        self.c_value, self.value_gate, self.value_mix = None, None, None
        if from_nearer_end(config, layer) < config.value_projection:
            self.c_value = nn.Linear(config.n_embd, config.n_embd, bias=False)
            self.value_gate = nn.Parameter(torch.zeros(gate))
        if self.c_value is not None or value_table(config, layer) is not None:
            self.value_mix = nn.Parameter(torch.full((2,), 0.5))

    def add_to(
        self, residual: Tensor, x: Tensor, context: Context, value_embedding: Tensor | None
    ) -> Tensor:
        """residual + attention(x), all (B, T, C), as is the value embedding of this layer."""
        B, T, C = x.shape
        config, heads = self.config, self.config.n_head
        # `qkv` gives a bias of the keys no gradient. That is right without RoPE only.
        fused = self.c_attn.bias is None
        q, k, v = qkv(x, self.c_attn) if fused else self.c_attn(x).split(C, dim=-1)
        if (
            self.value_mix is not None and value_embedding is not None
        ):  # Zhou et al. 2024, arXiv:2410.17897, and modded-nanogpt
            if self.value_gate is not None:
                in_heads = value_embedding.unflatten(-1, (heads, C // heads))
                value_embedding = gated(in_heads, x, self.value_gate).flatten(-2)
            of_x, of_token = self.value_mix.unbind()
            v = (of_x * v + of_token * value_embedding).to(v.dtype)
        q, k, v = (part.view(B, T, heads, C // heads).transpose(1, 2) for part in (q, k, v))
        if config.qk_norm:  # Henry et al. 2020; without a gain
            q, k = rms_norm(q), rms_norm(k)
        if config.attention_scale:
            q = q * (config.attention_scale * (C // heads) ** 0.5)
        if context.cos_sin is not None:
            q, k = apply_rope(q, context.cos_sin), apply_rope(k, context.cos_sin)
        y = self._attend(q.to(v.dtype), k.to(v.dtype), v, context).transpose(1, 2)
        y = y if self.output_gate is None else gated(y, x, self.output_gate)
        dropout = config.dropout if self.training else 0.0
        return add_linear(residual, y.reshape(B, T, C), self.c_proj, dropout)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        cache, documents = context.cache, context.documents
        window = context.windows[self.window_letter]
        if cache is not None and (window is not None or documents is not None):
            return cache.attend_masked(self.layer, q, k, v, window, context.positions, documents)
        if cache is not None:
            return cache.attend(self.layer, q, k, v)
        return masked_attention(q, k, v, context.masks[self.window_letter], context.dropout)


class MLP(nn.Module):
    """GELU, ReLU² (So et al. 2021) or SwiGLU (Shazeer 2020), with about 8 C² weights each.

    Or what a plugin registered: a module instead of all of it, or the function between the layers.
    """

    def __init__(self, config: ModernConfig) -> None:
        super().__init__()
        self.config, C = config, config.n_embd
        self.recompute = False  # as in GPT-2's, for mlp=gelu
        self.own = build_own("mlp", config.mlp, config)
        if isinstance(self.own, nn.Module):
            return
        wide = -(-8 * C // 3 // 64) * 64 if config.mlp == "swiglu" else 4 * C
        first = 2 * wide if config.mlp == "swiglu" else wide
        self.c_fc = nn.Linear(C, first, bias=config.bias)
        self.c_proj = nn.Linear(wide, C, bias=config.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + mlp(x), all (B, T, C)."""
        dropout = self.config.dropout if self.training else 0.0
        if self.config.mlp == "gelu":
            return add_mlp(residual, x, self.c_fc, self.c_proj, dropout, self.recompute)
        if isinstance(self.own, nn.Module):
            return residual + F.dropout(self.own(x), dropout).to(residual.dtype)
        x = linear(x, self.c_fc)
        if self.own is not None:
            x = self.own(x)
        elif self.config.mlp == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = F.relu(x).square()
        return add_linear(residual, x, self.c_proj, dropout)


class Norm(nn.Module):
    """LayerNorm, RMSNorm without parameters, or a function or module of a plugin."""

    def __init__(self, config: ModernConfig) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = None
        self.own = build_own("norm", config.norm, config)
        if config.norm == "layernorm":
            self.weight = nn.Parameter(torch.ones(config.n_embd))
            self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, C)."""
        if self.own is not None:
            return self.own(x)
        if self.weight is None:
            return rms_norm(x)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); before that, x is mixed with the embedding."""

    def __init__(self, config: ModernConfig, layer: int) -> None:
        super().__init__()
        self.ln_1, self.attn = Norm(config), Attention(config, layer)
        self.ln_2, self.mlp = Norm(config), MLP(config)
        mixes = config.skips == "unet+input"
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0])) if mixes else None

    def forward(
        self, x: Tensor, embedding: Tensor, context: Context, value_embedding: Tensor | None
    ) -> Tensor:
        """The residual stream x, (B, T, C) -> (B, T, C).

        Args:
            x: (B, T, C).
            embedding: (B, T, C), the input of the first block.
            context: of this forward pass.
            value_embedding: (B, T, C), or None for a layer without one.
        """
        if self.attn.c_value is not None:
            value_embedding = linear(embedding, self.attn.c_value)
        if self.mix is not None:
            of_x, of_embedding = self.mix.unbind()
            x = (of_x * x + of_embedding * embedding).to(x.dtype)
        x = self.attn.add_to(x, self.ln_1(x), context, value_embedding)
        return self.mlp.add_to(x, self.ln_2(x))


def from_nearer_end(config: ModernConfig, layer: int) -> int:
    """Layers between this one and the nearer end of the network, 0 for the first and the last."""
    return min(layer, config.n_layer - 1 - layer)


def value_table(config: ModernConfig, layer: int) -> int | None:
    """The table of value embeddings of a layer, or None.

    The first layers use the tables 0, 1, …, the last layers …, 1, 0.
    """
    at = from_nearer_end(config, layer)
    return at if at < config.value_embeddings else None


class Modern(LanguageModel):
    """The network of a `ModernConfig`."""

    cache_type: ClassVar[type[KVCache]] = MaskedKVCache
    blocks_differ: ClassVar[bool] = True
    head_is_embedding: ClassVar[bool] = False
    draft_supported: ClassVar[bool] = False
    config: ModernConfig

    def __init__(self, config: ModernConfig) -> None:
        super().__init__(config)
        self.parts_draw = has_own_parts(config.switches())  # until `check_parts` saw that none does
        self.widest: Tensor | None = None  # see `limit_attention_window`, () int64
        V, C = config.vocab_size, config.n_embd
        parts: dict[str, nn.Module] = {"wte": nn.Embedding(V, C)}
        if config.positions == "learned":
            parts["wpe"] = nn.Embedding(config.block_size, C)
        parts["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        parts["ln_f"] = Norm(config)
        tables = [nn.Embedding(V, C) for _ in range(config.value_embeddings)]
        if tables:
            parts["value_tables"] = nn.ModuleList(tables)
        self.transformer = nn.ModuleDict(parts)
        self.head = nn.Linear(C, V, bias=False) if config.untied_head else None
        self.skip_weights = None
        if config.skips != "none":
            self.skip_weights = nn.Parameter(torch.ones(config.n_layer // 2))
        check_shared(self)
        self.init_weights()

    def init_std(self, name: str) -> float:
        """GPT-2's; 0 for projections into the residual stream and the head with `zero_init`."""
        zero = self.config.zero_init and (name.endswith("c_proj") or name == "head")
        return 0.0 if zero else super().init_std(name)

    def limit_attention_window(self, positions: int) -> None:
        """Limits the attention window of all layers in training, if there is a `window_pattern`.

        The limit is a tensor, so a new value does not recompile. The end of a warm-up sets it to
        the whole context instead of removing it, which would recompile (23 s on an H100).
        """
        if self.widest is None:
            self.widest = torch.tensor(positions, device=self.transformer.wte.weight.device)
        else:
            self.widest.fill_(positions)

    def hidden(self, idx: Tensor, cache: AttentionCache | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C), the output of the last norm."""
        config, parts = self.config, self.transformer
        positions = self.positions(idx, cache)
        context = self._context(idx, positions, cache)
        x = parts.wte(idx)
        if config.positions == "learned":
            x = x + parts.wpe(positions)
        x = to_residual_stream(rms_norm(x) if config.norm_embedding else x)
        embedding = x = F.dropout(x, config.dropout, self.training)
        tables = parts.value_tables if config.value_embeddings else ()
        value_embeddings = [to_residual_stream(rms_norm(table(idx))) for table in tables]
        skips = list(self.skip_weights.unbind()) if self.skip_weights is not None else []
        half = len(skips)
        kept: list[Tensor] = []
        for layer, block in enumerate(parts.h):
            if layer >= config.n_layer - half:  # U-net skips, Ronneberger et al. 2015
                x = (x + skips[layer - config.n_layer + half] * kept.pop()).to(x.dtype)
            table = value_table(config, layer)
            value_embedding = None if table is None else value_embeddings[table]
            x = self.run_block(block, x, embedding, context, value_embedding)
            if layer < half:
                kept.append(x)
        if cache is not None:
            cache.advance(idx.shape[1])
        return parts.ln_f(x)

    def _context(self, idx: Tensor, positions: Tensor, cache: AttentionCache | None) -> Context:
        config, documents = self.config, None
        dropout = config.dropout if self.training else 0.0
        masked = cast("MaskedAttentionCache | None", cache)
        if isinstance(cache, Packed):  # its documents go into the mask, beside windows
            assert not config.document_mask  # `train.setup` refuses it
            documents, dropout, masked = cache.begins, cache.dropout, None
        elif config.document_mask:
            # GPT-2's end-of-text token, behind which a padded table has rows without a token
            last = min(config.vocab_size, GPT2_VOCAB_SIZE) - 1
            begins = idx == (last if self.end_of_text is None else self.end_of_text)
            if masked is None:
                documents = document_ids(begins)
            else:
                documents = masked.add_documents(begins, positions)
        context = Context(positions, masked, documents)
        context.dropout = dropout
        if config.positions == "rotary":
            pairs = config.n_embd // config.n_head // 2
            rotated = round(pairs * config.rope_fraction)
            context.cos_sin = rope_cos_sin(positions, pairs, rotated, float(config.rope_base))
        compiled = self.compiled_apart or torch.compiler.is_compiling()
        width = config.n_embd // config.n_head
        flex = compiled and takes_blocks(idx.device, width) and not dropout
        fixed = documents is None and self.widest is None and not dropout
        in_bf16 = matmuls_in_bf16(idx.device.type)
        shorter = config.window < idx.shape[1]
        as_number = fixed and shorter and cudnn_choice.takes(idx.device, width, in_bf16)
        for letter in sorted(set(config.window_pattern or "L")):
            window = self._window(letter, idx.device)
            context.windows[letter] = window
            if masked is None and letter == "S" and as_number:
                context.masks[letter] = config.window
            elif masked is None:
                context.masks[letter] = mask_for(idx.shape[1], window, documents, flex)
        return context

    def _window(self, letter: str, device: torch.device) -> Tensor | None:
        """The attention window of the layers of a letter, () int64; None: all positions."""
        window = None
        if letter == "S":
            window = torch.full((), self.config.window, device=device)
        if self.widest is None or not (self.training and self.config.window_pattern):
            return window
        return self.widest if window is None else torch.minimum(window, self.widest)

    @property
    def head_weight(self) -> Tensor:
        """(V, C), the untied head's or the token embedding."""
        return self.transformer.wte.weight if self.head is None else self.head.weight

    @property
    def softcap(self) -> float:
        """Limit of the logits, see `soft_cap`; 0: none."""
        return float(self.config.softcap)

    def lookup_parameters(self) -> int:
        """Positions and value embeddings; beside an untied head, the token embedding too."""
        names = ("wpe" if self.head is None else "w", "value_")
        named = self.transformer.named_parameters()
        return sum(p.numel() for name, p in named if name.startswith(names))

    def expected_first_loss(self) -> float:
        """Loss in nats of fresh weights; see `LanguageModel.expected_first_loss`. NaN: unknown.

        A head of zeros makes a uniform guess. If the residual stream is little more than the
        embedding, a tied head predicts the token just read, see `own_logit`.
        """
        c = self.config
        if c.mlp not in SECOND_MOMENTS or registered("norm", c.norm):
            return math.nan  # of a plugin, which may do anything
        if c.zero_init and self.head is not None:
            return math.log(c.vocab_size)
        spread = super().expected_first_loss()
        if self.head is not None or not (c.zero_init or c.norm_embedding):
            return spread
        return spread + math.log1p(math.exp(self.own_logit() - spread))

    def own_logit(self) -> float:
        """As of GPT-2; without MLPs in the stream it is σ·C, times 1/√2 with learned positions."""
        c = self.config
        if self.head is not None:
            return 0.0
        v, tables = INIT_STD**2 * c.n_embd, 1 if c.positions == "rotary" else 2
        of_v, of_square = SECOND_MOMENTS[c.mlp]
        of_mlps = 0.0 if c.zero_init else 2 * v * (of_v * v + of_square * v**2)  # 4C over L layers
        embedded = tables * INIT_STD**2  # their variance, which `norm_embedding` sets to 1
        own = v / (embedded + of_mlps) ** 0.5
        if c.norm_embedding:
            own = v * embedded**-0.5 / (1 + of_mlps) ** 0.5
        return c.softcap * math.tanh(own / c.softcap) if c.softcap else own
