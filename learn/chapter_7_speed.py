# %% [markdown]
# # 7. Speed
#
# A GPU multiplies matrices faster than it can fetch numbers from its memory. Most of what makes a
# Transformer fast is therefore about moving fewer numbers. You will time five such ideas on your
# own machine, each against its plain form, and check that the results agree:
#
# 1. fused attention (SDPA);
# 2. `torch.compile`;
# 3. bf16;
# 4. the head in chunks;
# 5. the KV cache.
#
# Papers: Dao et al. 2022, *FlashAttention* (arXiv:2205.14135); Milakov & Gimelshein 2018, *Online
# normalizer calculation for softmax* (arXiv:1805.02867); Kalamkar et al. 2019 (arXiv:1905.12322)
# for bf16 in training; Pope et al. 2022 (arXiv:2211.05102) for inference with a KV cache.
#
# Numbers on a CPU differ from those on a GPU, in size and sometimes in sign. docs/speed.md has the
# project's numbers on GPUs.

# %%
# Cell 1 fetches and installs the project on Colab and Kaggle. Elsewhere it changes nothing.
# The project has no public address yet: put the address or the folder of a clone here.
PROJECT = "ADDRESS OF THE REPOSITORY"
import importlib.util
import subprocess
import sys

sys.path += [".", "..", "gpt2-project"]  # where `learn` may be
if importlib.util.find_spec("gpt2") is None:
    subprocess.run(["git", "clone", "--depth=1", PROJECT, "gpt2-project"], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-e", "gpt2-project"], check=True)
    importlib.invalidate_caches()  # the folder was not there before

# %%
import math
import os
import shutil
import time
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from learn import gpt2_in_one_file as one_file

FAST = "LEARN_FAST" in os.environ  # the project's own tests use small sizes
device = "cuda" if torch.cuda.is_available() else "cpu"
speedups: dict[str, float] = {}


def seconds(function: Callable[[], object], times: int) -> float:
    """The shortest of some runs, after one that warms up; waits for a GPU to finish."""
    best = math.inf
    for run in range(times + 1):
        began = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if run:
            best = min(best, time.perf_counter() - began)
    return best


def compare(name: str, plain: Callable[[], object], fast: Callable[[], object]) -> None:
    """Times two forms of one computation."""
    times = 1 if FAST else 3
    slow, quick = seconds(plain, times), seconds(fast, times)
    speedups[name] = slow / quick
    print(f"{name}: {1000 * slow:.2f} ms plain, {1000 * quick:.2f} ms, {slow / quick:.2f} x")


print("device:", device, "- threads:", torch.get_num_threads())

# %% [markdown]
# The *shortest* time is the one to compare: whatever else the machine does only makes a run longer.
#
# ## 1. Fused attention
#
# The formula of chapter 3 writes a $T \times T$ matrix of scores for each head, reads it for the
# softmax, and reads the result for the product with $v$. FlashAttention goes through the keys in
# blocks and keeps, for each query, a running maximum $m$ and a running sum $\ell$:
#
# $$m' = \max(m, s), \qquad \ell' = e^{m - m'} \ell + e^{s - m'}, \qquad
#   y' = e^{m - m'} y + e^{s - m'} v.$$
#
# At the end $y / \ell$ is the softmax's mean, and no $T \times T$ matrix was ever stored.

# %%
torch.manual_seed(0)
T = 256 if FAST else 1024
q, k, v = torch.randn(3, 1, 8, T, 64, device=device)
later = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)


def plain_attention() -> torch.Tensor:
    """By the formula."""
    scores = q @ k.transpose(-2, -1) / 8
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ v


def fused_attention() -> torch.Tensor:
    """By PyTorch's kernel."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


print("largest difference:", (plain_attention() - fused_attention()).abs().max().item())
print(f"one layer's weights of 8 heads: {8 * T * T * 4 / 2**20:.1f} MiB")
compare("SDPA", plain_attention, fused_attention)

# %% [markdown]
# The running softmax itself, in plain Python, for one query:

# %%
query, keys, values = q[0, 0, -1].cpu(), k[0, 0].cpu(), v[0, 0].cpu()
m, total, y = -math.inf, 0.0, torch.zeros(64)
for key, value in zip(keys, values, strict=True):
    s = (query @ key).item() / 8
    larger = max(m, s)
    keep, new = math.exp(m - larger), math.exp(s - larger)
    m, total, y = larger, keep * total + new, keep * y + new * value
print("differs by", (y / total - plain_attention()[0, 0, -1].cpu()).abs().max().item())

# %% [markdown]
# ## 2. torch.compile
#
# GELU by its formula is nine operations. Run one after the other, each reads its input from memory
# and writes its output there. A compiler makes one loop of them, which reads and writes once.

# %%
x = torch.randn(2**16 if FAST else 2**22, device=device)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The tanh form, as chapter 4 has it."""
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


compiler = device == "cuda" or any(map(shutil.which, ("g++", "clang++", "cl")))
if FAST or not compiler:
    print("left out: torch.compile takes its time, and needs a C++ compiler on a CPU")
else:
    compiled = torch.compile(gelu)
    began = time.perf_counter()
    difference = (compiled(x) - gelu(x)).abs().max().item()
    print(f"compiled in {time.perf_counter() - began:.0f} s, differs by {difference:.1e}")
    compare("compile", lambda: gelu(x), lambda: compiled(x))

# %% [markdown]
# ## 3. bf16
#
# A bf16 number has the range of float32 and 8 bits of precision: about two and a half decimal
# digits. Half the bytes, and matrix units of GPUs multiply bf16 many times as fast. Weights and the
# optimizer stay float32 (*mixed precision*): a small update would be rounded away otherwise.

# %%
one = torch.tensor(1.0)
print("1 + 0.001 in bf16:", (one.bfloat16() + 0.001).item(), "- in float32:", (one + 0.001).item())
print(
    "largest bf16:",
    torch.finfo(torch.bfloat16).max,
    "- largest fp16:",
    torch.finfo(torch.float16).max,
)
size = 128 if FAST else 512
a, b = torch.randn(2, size, size, device=device)
a16, b16 = a.bfloat16(), b.bfloat16()
error = ((a16 @ b16).float() - a @ b).norm() / (a @ b).norm()
print(f"relative error of a matmul: {error.item():.1e}")
compare("bf16 matmul", lambda: a @ b, lambda: a16 @ b16)

# %% [markdown]
# On a CPU without matrix units for bf16 the number may be *below* 1. Only measuring tells.
#
# ## 4. The head in chunks
#
# The logits are by far the largest tensor of a training step: for 65,536 tokens, $65536 \cdot 50257
# \cdot 4$ bytes are 13 GB, and their gradient as much again. But the loss is a sum over rows. So
# compute some rows, their loss and their gradient, and forget the logits before the next rows.

# %%
N, C, V = (64, 32, 50257) if FAST else (256, 64, 50257)
hidden, weight = torch.randn(N, C, device=device), 0.02 * torch.randn(V, C, device=device)
targets = torch.randint(V, (N,), device=device)


def whole_head() -> tuple[torch.Tensor, ...]:
    """(loss, gradient of hidden, gradient of weight), all logits at once."""
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = F.cross_entropy(h @ w.T, targets)
    loss.backward()
    return loss.detach(), h.grad, w.grad


def chunked_head(rows: int = N // 8) -> tuple[torch.Tensor, ...]:
    """The same by the formula of the gradient (chapter 2), `rows` rows at a time."""
    loss = torch.zeros((), device=device)
    grad_h, grad_w = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        logits = hidden[part] @ weight.T
        log_sum = logits.logsumexp(1, keepdim=True)
        loss += (log_sum - logits.gather(1, targets[part, None])).sum()
        p = (logits - log_sum).exp_()
        p.scatter_add_(1, targets[part, None], torch.full((len(p), 1), -1.0, device=device))
        grad_h[part] = p @ weight / N
        grad_w.addmm_(p.T, hidden[part], alpha=1 / N)
    return loss / N, grad_h, grad_w


for name, a, b in zip(("loss", "d hidden", "d weight"), whole_head(), chunked_head(), strict=True):
    print(f"{name} differs by {(a - b).abs().max().item():.1e}")
print(f"logits: {N * V * 4 / 2**20:.0f} MiB at once, or {N // 8 * V * 4 / 2**20:.0f} MiB in chunks")
compare("head in chunks", whole_head, chunked_head)

# %% [markdown]
# Chunks save memory rather than time. What they save can be spent on a larger micro-batch.
#
# ## 5. The KV cache
#
# To write a token, plain code sends the whole text through the network, though only the last
# position is new. Keys and values of earlier positions never change, as no position sees a later
# one. So keep them, and send the new token alone:

# %%
config = one_file.Config(n_layer=2 if FAST else 4, n_head=4, n_embd=128, vocab_size=1000)
config.block_size = 256
torch.manual_seed(0)
model = one_file.GPT(config).to(device).eval()
count = 24 if FAST else 120


@torch.no_grad()
def without_cache() -> list[int]:
    """Greedy text; each token costs a pass over all."""
    ids = [1]
    for _ in range(count):
        ids.append(int(model.logits(torch.tensor([ids], device=device))[0, -1].argmax()))
    return ids


@torch.no_grad()
def with_cache() -> list[int]:
    """Greedy text; each token costs a pass over itself."""
    t, H, C = model.transformer, config.n_head, config.n_embd
    kept: list[list[torch.Tensor]] = [[] for _ in t.h]  # keys and values of each layer
    ids = [1]
    for position in range(count):
        x = t.wte.weight[ids[-1]] + t.wpe.weight[position]
        x = x.view(1, 1, C)
        for block, cache in zip(t.h, kept, strict=True):
            new = block.attn.c_attn(block.ln_1(x)).view(1, 1, 3, H, C // H)
            q, k, v = new.permute(2, 0, 3, 1, 4)  # (1, H, 1, D) each
            if cache:
                k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
            cache[:] = [k, v]
            y = F.scaled_dot_product_attention(q, k, v)  # the new position may see all
            x = x + block.attn.c_proj(y.transpose(1, 2).reshape(1, 1, C))
            x = x + block.mlp(block.ln_2(x))
        ids.append(int((t.ln_f(x) @ t.wte.weight.T).argmax()))
    return ids


began = time.perf_counter()
plain = without_cache()
between = time.perf_counter()
assert with_cache() == plain
speedups["KV cache"] = (between - began) / (time.perf_counter() - between)
print(
    f"{count} tokens in {between - began:.2f} s plain, {speedups['KV cache']:.1f} x with the cache"
)

# %% [markdown]
# The cost of a token no longer grows with the text, except for reading the cache. For GPT-2 (124M)
# the cache takes $2 \cdot L \cdot C$ numbers for each token: 18,432, or 36 KB in bf16.
#
# ## All together

# %%
plt.figure(figsize=(7, 3))
plt.barh(list(speedups), list(speedups.values()))
plt.axvline(1, color="k", linewidth=0.8)
plt.xscale("log", base=2)
plt.xlabel(f"times as fast as the plain form, on this machine ({device})")
plt.show()

# %% [markdown]
# How fast *can* it be? Training takes about $6N + 12\,L\,C\,T$ floating-point operations for each
# token ($N$ parameters; Chowdhery et al. 2022, arXiv:2204.02311, appendix B): 855 million for GPT-2
# (124M). The share of the machine's peak that a run reaches is its *model FLOPs utilisation* (MFU).
#
# ## Exercises
#
# Fill in the functions of `learn/exercises/chapter_7.py` and run `python -m learn.check 7`. Or
# define functions of these names in cells of the notebook, and call `check(7, globals())` after the
# next cell. `learn/solutions/` has answers.

# %%
from learn.check import check

check(7)
