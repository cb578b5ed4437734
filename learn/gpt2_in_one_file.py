"""GPT-2 in one file: network, data, AdamW, schedule, training and sampling, by torch and numpy.

    python learn/gpt2_in_one_file.py --data_dir=fineweb
    python learn/gpt2_in_one_file.py --out=out/one_file.pt --prompt="Hello world,"

The first command trains on the shards of `gpt2 prepare`, on one device, with the recipe of
`gpt2 train`. The second continues a text, and for that alone borrows the package's tokenizer.
Left out: resuming, several GPUs, fused kernels, the KV cache. tests/learn/ proves that logits,
gradients, order of the data, losses and samples are the package's.

Shapes: `B` batch, `T` positions, `C` channels (n_embd), `H` heads, `D` = C / H, `V` vocabulary.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


@dataclass
class Config:
    """Every number of the network and of a run; the defaults are GPT-2 (124M) on 10B tokens."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # context length, in tokens
    vocab_size: int = 50257
    data_dir: str = "fineweb"  # folder of shards
    out: str = "out/one_file.pt"  # the checkpoint
    batch_size: int = 8  # sequences of a micro-batch
    grad_accum_steps: int = 64  # micro-batches of a step: 64 × 8 × 1,024 = 524,288 tokens
    max_steps: int = 19_073
    warmup_steps: int = 715
    learning_rate: float = 6e-4  # its peak
    min_lr_ratio: float = 0.1  # the last learning rate, as a share of the peak
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    eval_every: int = 250  # steps
    eval_tokens: int = 1_048_576
    seed: int = 1337
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    prompt: str = ""  # a text to continue with the checkpoint `out`, instead of training


# ---- network ------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head attention in which no position sees a later one (Vaswani et al. 2017)."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.n_head = c.n_head
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd)  # queries, keys, values
        self.c_proj = nn.Linear(c.n_embd, c.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=-1)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in (q, k, v))
        # softmax(q kᵀ / √D + mask) v, without ever storing the T × T weights
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two linear layers, 4 C wide in between, with the tanh form of GELU."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd)
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP; each reads the residual stream through a LayerNorm and adds to it."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.n_embd)
        self.attn = Attention(c)
        self.ln_2 = nn.LayerNorm(c.n_embd)
        self.mlp = MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream x, (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): embeddings, blocks, a last LayerNorm; token ids in, loss out."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.transformer = nn.ModuleDict()  # names as in the released model
        self.transformer.wte = nn.Embedding(c.vocab_size, c.n_embd)  # tokens
        self.transformer.wpe = nn.Embedding(c.block_size, c.n_embd)  # positions
        self.transformer.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.transformer.ln_f = nn.LayerNorm(c.n_embd)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weights ~ N(0, 0.02²); projections into the residual stream are scaled by 1/√(2L)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                scale = (2 * self.config.n_layer) ** -0.5 if name.endswith("c_proj") else 1.0
                module.weight.normal_(0.0, INIT_STD * scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    def logits(self, idx: Tensor) -> Tensor:
        """Ids (B, T) -> logits of the next token, (B, T, V). The head is the token embedding."""
        t = self.transformer
        x = t.wte(idx) + t.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in t.h:
            x = block(x)
        return F.linear(t.ln_f(x), t.wte.weight)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of (B, T) targets, in nats. On a GPU, matmuls are in bf16."""
        with torch.autocast("cuda", torch.bfloat16, enabled=idx.is_cuda):
            logits = self.logits(idx).flatten(0, 1)
        return F.cross_entropy(logits.float(), targets.flatten())


# ---- data ---------------------------------------------------------------------------------------
def open_shards(folder: str, split: str) -> list[np.ndarray]:
    """The uint16 tokens of each shard of a split, "train" or "val", on the disk."""
    paths = sorted(Path(folder).glob(f"*_{split}_*.bin"))
    if not paths or any(np.fromfile(p, "<i4", 2).tolist() != [20240520, 1] for p in paths):
        raise SystemExit(f"no shards *_{split}_*.bin in {folder}; make them with `gpt2 prepare`")
    return [np.memmap(path, "<u2", mode="r", offset=1024) for path in paths]  # after the header


def sequence_order(sizes: list[int], T: int, seed: int) -> Iterator[tuple[int, int]]:
    """(shard, index of the first token) of each training sequence, epoch after epoch.

    An epoch visits every sequence once. The shards are shuffled, neighbours form groups of up to
    128M tokens, and the sequences of a group are shuffled: the disk is read one part at a time.
    From the second epoch on, a shard begins a few tokens later.
    """

    def random(count: int, epoch: int, stream: int) -> np.ndarray:
        return np.random.Philox(key=[seed, (epoch << 32) + stream]).random_raw(count)

    for epoch in itertools.count():
        groups: list[list[int]] = []
        for i in np.argsort(random(len(sizes), epoch, 0), kind="stable").tolist():
            full = not groups or sum(sizes[j] for j in [*groups[-1], i]) > 128_000_000
            if full or len(groups[-1]) == 128:
                groups.append([])
            groups[-1].append(i)
        for group in groups:
            places = []
            for i in group:
                shift = int(random(1, epoch, len(sizes) + 1 + i)[0]) % ((sizes[i] - 1) % T + 1)
                first = shift if epoch else 0
                places += [(i, first + n * T) for n in range((sizes[i] - 1) // T)]
            for n in np.argsort(random(len(places), epoch, group[0] + 1), kind="stable"):
                yield places[n]


def batch(shards: list[np.ndarray], places: list[tuple[int, int]], c: Config) -> tuple[Tensor, ...]:
    """Inputs and targets, (B, T) each: one stretch of tokens, shifted by one."""
    rows = [shards[i][start : start + c.block_size + 1].astype(np.int64) for i, start in places]
    tokens = torch.from_numpy(np.stack(rows)).to(c.device)
    return tokens[:, :-1], tokens[:, 1:]


# ---- training -----------------------------------------------------------------------------------
def build_optimizer(model: nn.Module, c: Config) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019): matrices and embeddings decay, biases and norms do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(c.beta1, c.beta2), eps=1e-8, fused=True)


def learning_rate(step: int, c: Config) -> float:
    """The rate of a step (from 0): linear warm-up, then half a cosine down to the last rate."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    progress = min(1.0, (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return c.learning_rate * (c.min_lr_ratio + (1 - c.min_lr_ratio) * cosine)


@torch.no_grad()
def validation_loss(model: GPT, shards: list[np.ndarray], c: Config) -> float:
    """The mean loss in nats over whole sequences of the validation shards, in their order."""
    T = c.block_size
    places = [(i, n) for i, shard in enumerate(shards) for n in range(0, len(shard) - T, T)]
    places = places[: max(1, c.eval_tokens // T)]
    cuts = [places[i : i + c.batch_size] for i in range(0, len(places), c.batch_size)]
    return sum(len(some) * model(*batch(shards, some, c)).item() for some in cuts) / len(places)


def train(c: Config) -> list[float]:
    """Trains from fresh weights, writes the checkpoint, and returns the loss of each step."""
    torch.manual_seed(c.seed)
    train_shards, val_shards = (open_shards(c.data_dir, split) for split in ("train", "val"))
    if min(max(map(len, shards)) for shards in (train_shards, val_shards)) <= c.block_size:
        raise SystemExit(f"too few tokens for block_size={c.block_size}; use a smaller one")
    model = GPT(c).to(c.device)
    if c.device.startswith("cuda"):
        model.compile()
    optimizer, losses = build_optimizer(model, c), []
    order = sequence_order([len(shard) for shard in train_shards], c.block_size, c.seed)
    for step in range(c.max_steps):
        loss = 0.0
        for _ in range(c.grad_accum_steps):
            x, y = batch(train_shards, list(itertools.islice(order, c.batch_size)), c)
            part = model(x, y) / c.grad_accum_steps
            part.backward()  # gradients add up until zero_grad
            loss += part.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        print(f"step {step + 1} loss {losses[-1]:.4f} norm {norm:.2f}")
        if (step + 1) % c.eval_every == 0 or step + 1 == c.max_steps:
            val_loss = validation_loss(model, val_shards, c)
            print(f"step {step + 1} validation loss {val_loss:.4f}")
            save(model, c, step + 1, val_loss)
    return losses


def save(model: GPT, c: Config, step: int, val_loss: float) -> None:
    """Writes the checkpoint, which `load` and `gpt2 sample` read."""
    config = {name: getattr(c, name) for name in SHAPE} | {"dropout": 0.0}
    content = {"model": model.state_dict(), "config": config, "step": step, "val_loss": val_loss}
    Path(c.out).parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, c.out)


# ---- sampling -----------------------------------------------------------------------------------
def load(path: str) -> GPT:
    """The model of a checkpoint, written by this file or by `gpt2 train`, on the CPU."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    model = GPT(Config(**{name: content["config"][name] for name in SHAPE}))
    model.load_state_dict(content["model"])
    return model


@torch.no_grad()
def generate(model: GPT, ids: list[int], count: int, top_k: int, seed: int) -> list[int]:
    """Continues ids by `count` tokens, each among the `top_k` likeliest."""
    ids, first, T = list(ids), 0, model.config.block_size
    for u in torch.rand(count, generator=torch.Generator().manual_seed(seed)):
        if len(ids) - first > T:  # the context is full: go on from its second half
            first = len(ids) - max(1, T // 2)
        context = torch.tensor([ids[first:]], device=model.transformer.wte.weight.device)
        logits = model.logits(context)[0, -1].float()
        logits[logits < logits.topk(top_k).values[-1]] = -math.inf
        cumulative = logits.softmax(-1).double().cumsum(-1).cpu()
        # the uniform number u chooses the token in whose part of [0, 1) it falls
        ids.append(int(torch.searchsorted(cumulative, u * cumulative[-1], right=True)))
    return ids


def main() -> None:
    """Reads `--name=value` for the fields of `Config`; trains, or continues a prompt."""
    parser = argparse.ArgumentParser(description="GPT-2 in one file", allow_abbrev=False)
    for name, value in asdict(Config()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    c = Config(**vars(parser.parse_args()))
    if c.prompt:
        from gpt2.tokenizer import gpt2_tokenizer as tokenizer  # torch and numpy know no text

        ids = tokenizer().encode(c.prompt)
        print(tokenizer().decode(generate(load(c.out).to(c.device), ids, 100, 50, c.seed)))
    else:
        train(c)


if __name__ == "__main__":
    main()
