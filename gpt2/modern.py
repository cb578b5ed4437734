"""The network with switches: each of `switches.Switches` is read in one place of this file.

With all of them at their defaults it computes what GPT-2 computes, by plain PyTorch; the faithful
network, and its fast operations, are in `model.py`. `network` chooses between the two.

Shapes: as in `model.py`.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import GPT2Config, ModernConfig
from .masks import Mask, documents_of, mask_for, masked_attention, visible
from .model import GPT, INIT_STD, KVCache
from .ops import IGNORE, causal_attention, gelu, head_logits, head_loss, to_residual_stream


def network(config: GPT2Config) -> GPT:
    """The network of a config; the one place that decides which."""
    return Modern(config) if isinstance(config, ModernConfig) else GPT(config)


def rms_norm(x: Tensor) -> Tensor:
    """x / √(mean of x²) over the last dimension (Zhang & Sennrich 2019, eq. 4), without a gain."""
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions (Su et al. 2021, eq. 34): pair i of x turns by position · base^(-2i/D).

    Args:
        x: (B, H, T, D); its two halves hold the pairs' two members.
        positions: (T,) or (B, T).
        base: of the wavelengths.
    """
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[..., None] * rates  # (T, D/2) or (B, T, D/2)
    if angles.ndim == 3:
        angles = angles[:, None]  # every head
    cos, sin = angles.cos(), angles.sin()
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Cache(KVCache):
    """A cache for layers with windows, and of several documents."""

    PER_ROW: ClassVar = KVCache.PER_ROW | {"documents": 0}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        shape = self.keys.shape[1], self.keys.shape[3]
        self.documents = torch.zeros(shape, dtype=torch.int64, device=self.keys.device)

    def enter(self, begins: Tensor, positions: Tensor) -> Tensor:
        """Takes down where documents begin, (B, T) bool; (B, T) the documents' numbers."""
        rows = torch.arange(len(self.documents), device=begins.device)
        rows = (rows if self.rows is None else self.rows)[:, None]
        at = positions.expand(begins.shape)
        before = self.documents[rows, (at[:, :1] - 1).clamp(min=0)] * (at[:, :1] > 0)
        numbers = before + begins.cumsum(1)
        self.documents[rows, at] = numbers
        return numbers

    def attend_to(  # noqa: PLR0917 - what attention has
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: Tensor | None,
        positions: Tensor, documents: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """As `attend`, over what window and documents show."""
        T, keys, values = q.shape[2], self.keys[layer], self.values[layer]
        if self.rows is not None:
            keys[self.rows, :, :T], values[self.rows, :, :T] = k, v
            seen = visible(positions, positions, window, documents, documents)
            return masked_attention(q, k, v, seen)
        end = self.length + T
        rows = torch.arange(len(q), device=q.device)[:, None]
        at = positions.expand(len(q), T)
        keys[rows, :, at], values[rows, :, at] = k.transpose(1, 2), v.transpose(1, 2)
        kept = None if documents is None else self.documents[:, :end]
        seen = visible(at, torch.arange(end, device=q.device), window, documents, kept)
        return masked_attention(q, keys[:, :, :end], values[:, :, :end], seen)


class Context:
    """What all layers share in one pass."""

    def __init__(self, positions: Tensor, cache: Cache | None, documents: Tensor | None):
        self.positions, self.cache, self.documents = positions, cache, documents
        self.windows: dict[str, Tensor | None] = {}  # of a letter of the pattern
        self.masks: dict[str, Mask] = {}  # the same, without a cache


class Attention(nn.Module):
    """Attention with rotary positions, QK-norm, a window and value embeddings."""

    def __init__(self, config: ModernConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        pattern = config.window_pattern or "L"
        self.kind = pattern[layer % len(pattern)]
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.value_mix = None
        if value_table(config, layer) is not None:
            self.value_mix = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x: Tensor, context: Context, extra: Tensor | None) -> Tensor:
        """(B, T, C), and (B, T, C) of value embeddings or None -> (B, T, C)."""
        B, T, C = x.shape
        config, heads, cache = self.config, self.config.n_head, context.cache
        q, k, v = self.c_attn(x).split(C, dim=-1)
        if self.value_mix is not None:  # Zhou et al. 2024, arXiv:2410.17897, and modded-nanogpt
            v = (self.value_mix[0] * v + self.value_mix[1] * rms_norm(extra)).to(v.dtype)
        q, k, v = (part.view(B, T, heads, C // heads).transpose(1, 2) for part in (q, k, v))
        if config.qk_norm:  # Henry et al. 2020; without a gain
            q, k = rms_norm(q), rms_norm(k)
        if config.positions == "rotary":
            q, k = (rotate(part, context.positions, config.rope_base) for part in (q, k))
        if config.qk_norm or config.positions == "rotary":
            q, k = q.to(v.dtype), k.to(v.dtype)
        window = context.windows[self.kind]
        if cache is not None and (window is not None or context.documents is not None):
            given = context.positions, context.documents
            y = cache.attend_to(self.layer, q, k, v, window, *given)
        elif cache is not None:
            y = cache.attend(self.layer, q, k, v)
        elif (mask := context.masks[self.kind]) is not None:
            y = masked_attention(q, k, v, mask)
        else:
            y = causal_attention(q, k, v, config.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, config.dropout, self.training)


class MLP(nn.Module):
    """GELU, ReLU² (So et al. 2021) or SwiGLU (Shazeer 2020), with about 8 C² weights each."""

    def __init__(self, config: ModernConfig):
        super().__init__()
        self.config, C = config, config.n_embd
        wide = -(-8 * C // 3 // 64) * 64 if config.mlp == "swiglu" else 4 * C
        first = 2 * wide if config.mlp == "swiglu" else wide
        self.c_fc = nn.Linear(C, first, bias=config.bias)
        self.c_proj = nn.Linear(wide, C, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.c_fc(x)
        if self.config.mlp == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = F.relu(x).square() if self.config.mlp == "relu2" else gelu(x)
        return F.dropout(self.c_proj(x), self.config.dropout, self.training)


class Norm(nn.Module):
    """LayerNorm, or RMSNorm without parameters."""

    def __init__(self, config: ModernConfig):
        super().__init__()
        if config.norm == "layernorm":
            self.weight = nn.Parameter(torch.ones(config.n_embd))
            self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        else:
            self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, C)."""
        if self.weight is None:
            return rms_norm(x)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), after x was mixed with the embedding."""

    def __init__(self, config: ModernConfig, layer: int):
        super().__init__()
        self.ln_1, self.attn = Norm(config), Attention(config, layer)
        self.ln_2, self.mlp = Norm(config), MLP(config)
        mixes = config.skips == "unet+input"
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0])) if mixes else None

    def forward(self, x: Tensor, first: Tensor, context: Context, extra: Tensor | None) -> Tensor:
        """(B, T, C), the embedding (B, T, C), and of value embeddings or None -> (B, T, C)."""
        if self.mix is not None:
            x = (self.mix[0] * x + self.mix[1] * first).to(x.dtype)
        x = x + self.attn(self.ln_1(x), context, extra).to(x.dtype)
        return x + self.mlp(self.ln_2(x)).to(x.dtype)


def value_table(config: ModernConfig, layer: int) -> int | None:
    """Which table of value embeddings a layer uses: 0, 1, … from the front, …, 0 at the end."""
    from_end = config.n_layer - 1 - layer
    return next((at for at in (layer, from_end) if at < config.value_embeddings), None)


class Modern(GPT):
    """The network: token ids to logits, or to a loss; used like `GPT`."""

    def __init__(self, config: ModernConfig):
        nn.Module.__init__(self)
        self.config = config
        self.fp8_head = self.checkpoint_activations = False
        self.widest: Tensor | None = None  # while windows grow: no layer sees more, () int64
        V, C = config.vocab_size, config.n_embd
        parts = {"wte": nn.Embedding(V, C)}
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
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's, or zero for what `zero_init` names."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                into_stream = name.endswith("c_proj")
                scale = (2 * self.config.n_layer) ** -0.5 if into_stream else 1.0
                if self.config.zero_init and (into_stream or name == "head"):
                    scale = 0.0
                module.weight.normal_(0.0, INIT_STD * scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    def limit_windows(self, positions: int):
        """No layer of `window_pattern` sees more than so many positions, from now on."""
        device = self.transformer.wte.weight.device
        self.widest = torch.tensor(positions, device=device)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        cache: KVCache | None = None,
    ) -> Tensor:
        """As `GPT.forward`."""
        hidden = self.hidden(idx, cache)
        if targets is None:
            return self.logits(hidden)
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        if not self.config.softcap:
            fp8, rows = self.fp8_head and self.training, self.config.padded_vocab_size
            return head_loss(hidden, self.head_weight, targets, rows, reduction, fp8)
        return F.cross_entropy(
            self.logits(hidden).float(), targets, ignore_index=IGNORE, reduction=reduction
        )

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C), the output of the last norm."""
        config, T, parts = self.config, idx.shape[1], self.transformer
        start = cache.start() if cache is not None else 0
        positions = start + torch.arange(T, device=idx.device)
        context = self._context(idx, positions, cache)
        x = parts.wte(idx)
        if config.positions == "learned":
            x = x + parts.wpe(positions)
        x = to_residual_stream(rms_norm(x) if config.norm_embedding else x)
        first = x = F.dropout(x, config.dropout, self.training)
        extras = [table(idx) for table in parts.value_tables] if config.value_embeddings else []
        kept: list[Tensor] = []
        for layer, block in enumerate(parts.h):
            if self.skip_weights is not None and layer >= config.n_layer - len(self.skip_weights):
                weight = self.skip_weights[layer - config.n_layer + len(self.skip_weights)]
                x = (x + weight * kept.pop()).to(x.dtype)  # Ronneberger et al. 2015
            table = value_table(config, layer)
            extra = None if table is None else extras[table]
            if self.training and self.checkpoint_activations:
                x = checkpoint(block, x, first, context, extra, use_reentrant=False)
            else:
                x = block(x, first, context, extra)
            if self.skip_weights is not None and layer < len(self.skip_weights):
                kept.append(x)
        if cache is not None:
            cache.advance(T)
        return parts.ln_f(x)

    def _context(self, idx: Tensor, positions: Tensor, cache: KVCache | None) -> Context:
        config, documents = self.config, None
        if config.document_mask:  # the last id of the vocabulary is the end of text
            separator = config.vocab_size - 1
            if cache is not None:
                documents = cache.enter(idx == separator, positions)
            else:
                documents = documents_of(idx, separator)
        context = Context(positions, cache, documents)
        blocks = idx.is_cuda and torch.compiler.is_compiling()
        for letter in set(config.window_pattern or "L"):
            window = None
            if letter == "S":
                window = torch.full((), config.window, device=idx.device)
            if self.widest is not None and config.window_pattern:
                widest = self.widest.to(idx.device)
                window = widest if window is None else torch.minimum(window, widest)
            context.windows[letter] = window
            if cache is None:
                context.masks[letter] = mask_for(idx.shape[1], window, documents, blocks)
        return context

    def new_cache(self, batch_size: int, dtype: torch.dtype, capacity: int) -> KVCache:
        """Room for `capacity` positions of each row."""
        return Cache(self.config, batch_size, self.head_weight, dtype, capacity)

    @property
    def head_weight(self) -> Tensor:
        """(V, C), the head's own or the token embedding."""
        return self.transformer.wte.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, C) -> (…, V), capped as Gemma 2 does (Gemma team 2024, arXiv:2408.00118)."""
        logits, cap = self.raw_logits(hidden), self.config.softcap
        return cap * torch.tanh(logits.float() / cap) if cap else logits

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """(…, C) -> (…, V), without a cap."""
        return head_logits(hidden, self.head_weight, self.config.padded_vocab_size)

    def flops_per_token(self) -> int:
        """As `GPT.flops_per_token`; tables that are looked up do not count, windows not either."""
        c, names = self.config, ("wpe", "value_") if self.head is None else ("w", "value_")
        looked_up = [p for n, p in self.transformer.named_parameters() if n.startswith(names)]
        matrices = self.num_parameters() - sum(p.numel() for p in looked_up)
        return 6 * matrices + 12 * c.n_layer * c.n_embd * c.block_size

    def expected_first_loss(self) -> float:
        """As `GPT.expected_first_loss`; a head of zeros guesses evenly."""
        if self.config.zero_init and self.head is not None:
            return math.log(self.config.vocab_size)
        return super().expected_first_loss()
