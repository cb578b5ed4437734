"""The network with switches: each of `switches.Switches` is read in one place of this file.

With all of them at their defaults it computes what GPT-2 computes, by plain PyTorch; the faithful
network, and its fast operations, are in `model.py`. `network` chooses between the two.

Shapes: as in `model.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.model import ModernConfig
from ..kernels.head_loss import head_logits, head_loss, soft_cap
from ..kernels.linear import add_linear, add_mlp, linear, qkv
from ..kernels.precision import to_residual_stream
from .attention_masks import NARROWEST, Cache, Mask, documents_of, mask_for, masked_attention
from .gpt import GPT, INIT_STD
from .kv_cache import KVCache
from .packed_documents import Packed
from .rotary import rotate, turns

EPS = torch.finfo(torch.float32).eps  # of RMSNorm, whatever the precision of its input
SECOND_MOMENTS = {  # of an activation of N(0, v), small v: its coefficients of v and v²
    "gelu": (1 / 4, 1 / 2), "relu2": (0, 3 / 2), "swiglu": (0, 1 / 6),
}  # fmt: skip


def rms_norm(x: Tensor) -> Tensor:
    """x / √(mean of x²) over the last dimension (Zhang & Sennrich 2019, eq. 4), without a gain."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


class Context:
    """What all layers share in one pass."""

    def __init__(self, positions: Tensor, cache: Cache | None, documents: Tensor | None):
        self.positions, self.cache, self.documents = positions, cache, documents
        self.turned: Tensor | None = None  # with rotary positions, see `rotary.turns`
        self.dropout = 0.0  # of attention weights
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

    def forward(
        self, residual: Tensor, x: Tensor, context: Context, extra: Tensor | None
    ) -> Tensor:
        """(B, T, C), the input (B, T, C), value embeddings (B, T, C) or None -> (B, T, C)."""
        B, T, C = x.shape
        config, heads = self.config, self.config.n_head
        # `qkv` takes it that a bias of the keys does not matter: it does once they are turned
        own = self.c_attn.bias is None
        q, k, v = qkv(x, self.c_attn) if own else self.c_attn(x).split(C, dim=-1)
        if self.value_mix is not None:  # Zhou et al. 2024, arXiv:2410.17897, and modded-nanogpt
            of_x, of_token = self.value_mix.unbind()
            v = (of_x * v + of_token * extra).to(v.dtype)
        q, k, v = (part.view(B, T, heads, C // heads).transpose(1, 2) for part in (q, k, v))
        if config.qk_norm:  # Henry et al. 2020; without a gain
            q, k = rms_norm(q), rms_norm(k)
        if config.attention_scale:
            q = q * (config.attention_scale * (C // heads) ** 0.5)
        if context.turned is not None:
            q, k = rotate(q, context.turned), rotate(k, context.turned)
        y = self._attend(q.to(v.dtype), k.to(v.dtype), v, context)
        dropout = config.dropout if self.training else 0.0
        return add_linear(residual, y.transpose(1, 2).reshape(B, T, C), self.c_proj, dropout)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        cache, window, documents = context.cache, context.windows[self.kind], context.documents
        if cache is not None and (window is not None or documents is not None):
            return cache.attend_to(self.layer, q, k, v, window, context.positions, documents)
        if cache is not None:
            return cache.attend(self.layer, q, k, v)
        return masked_attention(q, k, v, context.masks[self.kind], context.dropout)


class MLP(nn.Module):
    """GELU, ReLU² (So et al. 2021) or SwiGLU (Shazeer 2020), with about 8 C² weights each."""

    def __init__(self, config: ModernConfig):
        super().__init__()
        self.config, C = config, config.n_embd
        wide = -(-8 * C // 3 // 64) * 64 if config.mlp == "swiglu" else 4 * C
        first = 2 * wide if config.mlp == "swiglu" else wide
        self.c_fc = nn.Linear(C, first, bias=config.bias)
        self.c_proj = nn.Linear(wide, C, bias=config.bias)

    def forward(self, residual: Tensor, x: Tensor) -> Tensor:
        """(B, T, C) and (B, T, C), which the layers transform -> (B, T, C)."""
        dropout = self.config.dropout if self.training else 0.0
        if self.config.mlp == "gelu":
            return add_mlp(residual, x, self.c_fc, self.c_proj, dropout)
        x = linear(x, self.c_fc)
        if self.config.mlp == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = F.relu(x).square()
        return add_linear(residual, x, self.c_proj, dropout)


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
            of_x, of_first = self.mix.unbind()
            x = (of_x * x + of_first * first).to(x.dtype)
        x = self.attn(x, self.ln_1(x), context, extra)
        return self.mlp(x, self.ln_2(x))


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
        self.compiled_apart = False  # each block by itself, see `Runtime.compile`
        self.widest: Tensor | None = None  # see `limit_attention_window`, () int64
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
                zero = self.config.zero_init and (into_stream or name == "head")
                module.weight.normal_(0.0, 0.0 if zero else INIT_STD * scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    def limit_attention_window(self, positions: int):
        """While training, no layer of `window_pattern` sees more than so many positions.

        The number is a tensor, so that another one compiles nothing anew; the whole context is a
        number like others, so that the end of a warm-up does not either (23 s on an H100).
        """
        if self.widest is None:
            self.widest = torch.tensor(positions, device=self.transformer.wte.weight.device)
        else:
            self.widest.fill_(positions)

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
        fp8, rows = self.fp8_head and self.training, self.config.padded_vocab_size
        cap = float(self.config.softcap)
        return head_loss(hidden, self.head_weight, targets, rows, reduction, fp8, cap)

    def hidden(self, idx: Tensor, cache: KVCache | Packed | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C), the output of the last norm."""
        config, T, parts = self.config, idx.shape[1], self.transformer
        start = cache.start() if cache is not None else 0
        assert isinstance(start, Tensor) or start + T <= config.block_size, (start, T)
        positions = start + torch.arange(T, device=idx.device)
        context = self._context(idx, positions, cache)
        x = parts.wte(idx)
        if config.positions == "learned":
            x = x + parts.wpe(positions)
        x = to_residual_stream(rms_norm(x) if config.norm_embedding else x)
        first = x = F.dropout(x, config.dropout, self.training)
        tables = parts.value_tables if config.value_embeddings else ()
        extras = [to_residual_stream(rms_norm(table(idx))) for table in tables]
        skips = list(self.skip_weights.unbind()) if self.skip_weights is not None else []
        half, kept = len(skips), []
        for layer, block in enumerate(parts.h):
            if layer >= config.n_layer - half:  # Ronneberger et al. 2015
                x = (x + skips[layer - config.n_layer + half] * kept.pop()).to(x.dtype)
            table = value_table(config, layer)
            extra = None if table is None else extras[table]
            x = self._through(block, x, first, context, extra)
            if layer < half:
                kept.append(x)
        if cache is not None:
            cache.advance(T)
        return parts.ln_f(x)

    def _context(self, idx: Tensor, positions: Tensor, cache: KVCache | Packed | None) -> Context:
        config, documents = self.config, None
        dropout = config.dropout if self.training else 0.0
        if isinstance(cache, Packed):
            assert not config.document_mask  # `conversations` refuses it
            documents, dropout, cache = cache.begins, cache.dropout, None
        elif config.document_mask:  # the last id of the vocabulary is the end of text
            begins = idx == config.vocab_size - 1
            documents = documents_of(begins) if cache is None else cache.enter(begins, positions)
        context = Context(positions, cache, documents)
        context.dropout = dropout
        if config.positions == "rotary":
            pairs = config.n_embd // config.n_head // 2
            turning = round(pairs * config.rope_fraction)
            context.turned = turns(positions, pairs, turning, float(config.rope_base))
        compiled = self.compiled_apart or torch.compiler.is_compiling()
        wide = config.n_embd // config.n_head >= NARROWEST
        blocks = idx.is_cuda and compiled and wide and not dropout
        for letter in sorted(set(config.window_pattern or "L")):
            window = self._window(letter, idx.device)
            context.windows[letter] = window
            if cache is None:
                context.masks[letter] = mask_for(idx.shape[1], window, documents, blocks)
        return context

    def _window(self, letter: str, device: torch.device) -> Tensor | None:
        """Positions that layers of a letter see, () int64, or None for all."""
        window = None
        if letter == "S":
            window = torch.full((), self.config.window, device=device)
        if self.widest is None or not (self.training and self.config.window_pattern):
            return window
        return self.widest if window is None else torch.minimum(window, self.widest)

    def new_cache(self, batch_size: int, dtype: torch.dtype, capacity: int) -> KVCache:
        """Room for `capacity` positions of each row."""
        return Cache(self.config, batch_size, self.head_weight, dtype, capacity)

    @property
    def head_weight(self) -> Tensor:
        """(V, C), the head's own or the token embedding."""
        return self.transformer.wte.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, C) -> (…, V)."""
        logits = head_logits(hidden, self.head_weight, self.config.padded_vocab_size)
        return soft_cap(logits, self.config.softcap)

    def flops_per_token(self) -> int:
        """As `GPT.flops_per_token`; tables that are looked up do not count, windows not either."""
        c, names = self.config, ("wpe" if self.head is None else "w", "value_")
        looked_up = [p for n, p in self.transformer.named_parameters() if n.startswith(names)]
        matrices = self.num_parameters() - sum(p.numel() for p in looked_up)
        return 6 * matrices + 12 * c.n_layer * c.n_embd * c.block_size

    def expected_first_loss(self) -> float:
        """As `GPT.expected_first_loss`; a head of zeros guesses evenly.

        Where the stream is the embedding and little else, a tied head answers with the token just
        read: its logit is σ·C (times 1/√2 where a position is added), the others' variance C·σ².
        """
        c, even = self.config, math.log(self.config.vocab_size)
        if c.zero_init and self.head is not None:
            return even
        spread = super().expected_first_loss()
        if self.head is not None or not (c.zero_init or c.norm_embedding):
            return spread
        own = INIT_STD * c.n_embd * (1.0 if c.positions == "rotary" else 0.5**0.5)
        if not c.zero_init:  # MLPs add to the stream, whose variance is 1: 4C weights over L layers
            v = INIT_STD**2 * c.n_embd  # variance of what goes into the activation
            of_v, of_square = SECOND_MOMENTS[c.mlp]
            own /= (1 + 2 * v * (of_v * v + of_square * v**2)) ** 0.5
        own = c.softcap * math.tanh(own / c.softcap) if c.softcap else own
        return spread + math.log1p(math.exp(own - spread))
