# %% [markdown]
# # 4. The block
#
# GPT-2 is a stack of $L$ equal blocks. Each reads a *residual stream* and adds to it, twice. You
# will
#
# 1. write LayerNorm and GELU by their formulas;
# 2. put a block together, and compare it with the package's;
# 3. measure how the stream grows with depth, with and without the factor $1/\sqrt{2L}$;
# 4. measure what LayerNorm *before* each part does to the gradient, against LayerNorm after.
#
# Papers: He et al. 2015 (arXiv:1512.03385) for residual connections; Ba et al. 2016
# (arXiv:1607.06450) for LayerNorm; Hendrycks & Gimpel 2016 (arXiv:1606.08415) for GELU; Radford et
# al. 2019, section 2.3, for LayerNorm first and the factor $1/\sqrt{N}$; Xiong et al. 2020
# (arXiv:2002.04745) for why LayerNorm first trains well.

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

# %% [markdown]
# ## LayerNorm
#
# Each position's vector gets mean 0 and variance 1, then a learned gain $\gamma$ and bias $\beta$:
#
# $$\operatorname{LN}(x) = \gamma \odot \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta,
#   \qquad \mu = \frac{1}{C} \sum_i x_i, \quad \sigma^2 = \frac{1}{C} \sum_i (x_i - \mu)^2.$$

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn


def layer_norm(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(..., C) -> (..., C)."""
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return gain * (x - mean) / torch.sqrt(variance + 1e-5) + bias


torch.manual_seed(0)
x, gain, bias = 3 + 5 * torch.randn(4, 64), torch.randn(64), torch.randn(64)
difference = layer_norm(x, gain, bias) - F.layer_norm(x, (64,), gain, bias)
print("differs from PyTorch's by", difference.abs().max().item())

# %% [markdown]
# ## GELU
#
# GELU multiplies $x$ by the probability $\Phi(x)$ that a standard normal number is below it. GPT-2
# computes it by an approximation with tanh:
#
# $$\operatorname{GELU}(x) = x\,\Phi(x) \approx \frac{x}{2}
#   \left(1 + \tanh\!\left(\sqrt{2/\pi}\,(x + 0.044715\,x^3)\right)\right).$$


# %%
def gelu(x: torch.Tensor) -> torch.Tensor:
    """The tanh form, elementwise."""
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


t = torch.linspace(-4, 4, 401)
fig, axes = plt.subplots(1, 2, figsize=(10, 3))
axes[0].plot(t, gelu(t), label="GELU, by tanh")
axes[0].plot(t, F.relu(t), "--", label="ReLU")
axes[0].legend()
axes[1].plot(t, gelu(t) - F.gelu(t))
axes[1].set_title("tanh form minus exact form")
plt.show()
print("differs from PyTorch's by", (gelu(t) - F.gelu(t, approximate="tanh")).abs().max().item())

# %% [markdown]
# GELU is smooth, and lets a little of small negative numbers through, so that their gradient is not
# 0 as with ReLU.
#
# ## The block
#
# $$x \leftarrow x + \operatorname{Attention}(\operatorname{LN}_1(x)), \qquad
#   x \leftarrow x + \operatorname{MLP}(\operatorname{LN}_2(x)).$$
#
# Attention moves information between positions. The MLP works on each position alone: it widens to
# $4C$, applies GELU, and narrows again. The stream itself is never normalised or multiplied on its
# way. A part can leave it alone by adding 0, and the gradient flows through the sums unchanged.


# %%
class Block(nn.Module):
    """A block of GPT-2, (B, T, C) -> (B, T, C)."""

    def __init__(self, C: int, H: int) -> None:
        super().__init__()
        self.H = H
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.attention_out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.wide, self.narrow = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Chapter 3."""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.H, C // self.H).transpose(1, 2) for part in self.qkv(x).chunk(3, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attention_out(y.transpose(1, 2).reshape(B, T, C))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Two matrices with GELU between."""
        return self.narrow(gelu(self.wide(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reads the residual stream twice, and adds to it twice."""
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


# %% [markdown]
# The package's block has other names for the same parts:

# %%
from gpt2.config.model import GPT2Config
from gpt2.model import gpt

C, H = 96, 4
theirs = gpt.Block(GPT2Config(n_embd=C, n_head=H), layer=0)
ours = Block(C, H)
pairs = {
    "ln_1": theirs.ln_1,
    "ln_2": theirs.ln_2,
    "qkv": theirs.attn.c_attn,
    "attention_out": theirs.attn.c_proj,
    "wide": theirs.mlp.c_fc,
    "narrow": theirs.mlp.c_proj,
}
for name, module in pairs.items():
    getattr(ours, name).load_state_dict(module.state_dict())
x = torch.randn(2, 10, C)
print("differs from the package's by", (ours(x) - theirs(x)).abs().max().item())
count = sum(p.numel() for p in ours.parameters())
print(f"{count:,} parameters; 12 C² = {12 * C**2:,}, and the rest are biases, gains and norms")

# %% [markdown]
# ## The stream grows with depth
#
# Each block adds two terms. At the start of training they are nearly independent, so their
# variances add up: after $L$ blocks there are $2L$ terms. GPT-2 draws all matrices from $N(0,
# 0.02^2)$, but those that write into the stream from $N(0, 0.02^2 / (2L))$. Then the sum of the
# $2L$ variances does not depend on $L$. Measured, after each block:


# %%
@torch.no_grad()
def variances(L: int, scaled: bool, C: int = 128) -> list[float]:
    """Variance of the residual stream after 0, 1, … L fresh blocks."""
    torch.manual_seed(0)
    x = 0.02 * torch.randn(1, 32, C) + 0.02 * torch.randn(1, 32, C)  # embeddings: token + position
    found = [x.var().item()]
    for _ in range(L):
        block = Block(C, 4)
        for name, p in block.named_parameters():
            if p.ndim == 2:
                into_stream = name.startswith(("attention_out", "narrow"))
                p.normal_(0, 0.02 / math.sqrt(2 * L) if scaled and into_stream else 0.02)
            elif not name.startswith("ln"):
                p.zero_()
        x = block(x)
        found.append(x.var().item())
    return found


depths = (6, 12, 24, 48)
fig, axes = plt.subplots(1, 2, figsize=(11, 3.5), sharey=True)
ends: dict[bool, list[float]] = {}
for axis, scaled in zip(axes, (False, True), strict=True):
    for L in depths:
        measured = variances(L, scaled)
        ends.setdefault(scaled, []).append(measured[-1])
        axis.plot(measured, label=f"L = {L}")
    axis.set_title("with 1/√(2L)" if scaled else "all matrices alike")
    axis.set_xlabel("block")
axes[0].set_ylabel("variance of the residual stream")
axes[0].set_yscale("log")
axes[0].legend()
plt.show()
for scaled, found in ends.items():
    print(f"scaled={scaled}: at the end of {depths} blocks", [f"{v:.5f}" for v in found])

# %% [markdown]
# Without the factor the variance at the end grows in proportion to the depth. With it, 6 and 48
# blocks end alike. The embedding thus keeps its share of the stream in a deep network, too.
#
# ## LayerNorm first
#
# The original Transformer normalised *after* each addition, $x \leftarrow \operatorname{LN}(x +
# f(x))$. Each norm then brings the stream back to variance 1, and the last block makes up a large
# part of it, however many blocks there are. With LayerNorm first the stream grows, and each block
# is one of $2L$ terms under the last norm. So its gradient should shrink like $1/\sqrt{L}$ (Xiong
# et al., theorem 1). Here is the gradient of the last block's first MLP matrix, at their
# initialisation (Glorot & Bengio 2010):


# %%
def last_gradient(first: bool, L: int, C: int = 64) -> float:
    """Norm of the gradient of the last block's `wide`, for fresh weights."""
    torch.manual_seed(0)
    blocks = [Block(C, 4) for _ in range(L)]
    for block in blocks:
        for name, p in block.named_parameters():
            if p.ndim == 2:
                nn.init.xavier_normal_(p)
            elif not name.startswith("ln"):
                nn.init.zeros_(p)
    head, targets = torch.randn(C, 32) / math.sqrt(C), torch.randint(32, (32,))
    x = torch.randn(1, 32, C)
    for block in blocks:
        if first:
            x = block(x)
        else:
            x = block.ln_1(x + block.attention(x))
            x = block.ln_2(x + block.mlp(x))
    x = F.layer_norm(x, (C,))
    F.cross_entropy(x[0] @ head, targets).backward()
    return blocks[-1].wide.weight.grad.norm().item()


depths = (2, 4, 8, 16, 32)
plt.figure(figsize=(6, 3))
plt.plot(depths, [last_gradient(True, L) for L in depths], "o-", label="LayerNorm first (GPT-2)")
plt.plot(depths, [last_gradient(False, L) for L in depths], "o-", label="LayerNorm after (2017)")
plt.plot(depths, [1.4 / math.sqrt(L) for L in depths], "k:", label="∝ 1/√L")
plt.xscale("log", base=2)
plt.yscale("log", base=2)
plt.xlabel("L")
plt.ylabel("gradient in the last block")
plt.legend()
plt.show()

# %% [markdown]
# With LayerNorm after, the last block of a deep network gets a gradient as large as that of a
# shallow one, and the first steps move all blocks too far: such networks need a long and careful
# warm-up. With LayerNorm first the gradient shrinks as the network gets deeper.
#
# ## Exercises
#
# Fill in the functions of `learn/exercises/chapter_4.py` and run `python -m learn.check 4`. Or
# define functions of these names in cells of the notebook, and call `check(4, globals())` after the
# next cell. `learn/solutions/` has answers.

# %%
from learn.check import check

check(4)
