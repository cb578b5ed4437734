# %% [markdown]
# # 5. The whole GPT-2
#
# Embeddings, blocks, a last LayerNorm, and a head: that is all. You will
#
# 1. put the network together from the parts of chapters 3 and 4;
# 2. see that its logits are the package's, bit by bit;
# 3. count its 124 million parameters, part by part;
# 4. explain the loss of fresh weights, 10.98 nats, by a formula, and check the formula by
#    measurement.
#
# Papers: Radford et al. 2019, *Language Models are Unsupervised Multitask Learners*; Press & Wolf
# 2017 (arXiv:1608.05859) for a head that is the token embedding.
#
# Shapes: $B$ batch, $T$ positions, $C$ channels, $L$ layers, $H$ heads, $V$ vocabulary.

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
# ## The network
#
# 1. Each token has a row of $C$ numbers in the table `wte` ($V \times C$), each position one in the
#    table `wpe` ($1024 \times C$). Their sum is the residual stream at its start.
# 2. $L$ blocks add to the stream.
# 3. A last LayerNorm.
# 4. The *head* multiplies by `wte` again, transposed: the logit of a token is the dot product of
#    the stream with the row of this token. Input and output share one table (*weight tying*).

# %%
import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Shape:
    """GPT-2 (124M)."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    vocab_size: int = 50257


class Attention(nn.Module):
    """Chapter 3."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.n_head = s.n_head
        self.c_attn = nn.Linear(s.n_embd, 3 * s.n_embd)
        self.c_proj = nn.Linear(s.n_embd, s.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        parts = self.c_attn(x).split(C, dim=-1)
        q, k, v = (p.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Chapter 4."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.c_fc = nn.Linear(s.n_embd, 4 * s.n_embd)
        self.c_proj = nn.Linear(4 * s.n_embd, s.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Chapter 4."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(s.n_embd), Attention(s)
        self.ln_2, self.mlp = nn.LayerNorm(s.n_embd), MLP(s)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Ids (B, T) -> logits of the next token (B, T, V)."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(s.vocab_size, s.n_embd)
        self.transformer.wpe = nn.Embedding(s.block_size, s.n_embd)
        self.transformer.h = nn.ModuleList(Block(s) for _ in range(s.n_layer))
        self.transformer.ln_f = nn.LayerNorm(s.n_embd)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        t = self.transformer
        x = t.wte(ids) + t.wpe(torch.arange(ids.shape[1]))
        for block in t.h:
            x = block(x)
        return t.ln_f(x) @ t.wte.weight.T


# %% [markdown]
# ## Equal to the package
#
# The names are those of the released model, so weights of GPT-2 fit. Here a small network of the
# package gives its weights to ours:

# %%
from gpt2.config.model import GPT2Config
from gpt2.model import gpt

small = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 32, "vocab_size": 500}
torch.manual_seed(0)
theirs = gpt.GPT(GPT2Config(**small)).eval()
ours = GPT(Shape(**small))
ours.load_state_dict(theirs.state_dict())
ids = torch.randint(500, (2, 32))
with torch.no_grad():
    print("largest difference of the logits:", (ours(ids) - theirs(ids)).abs().max().item())

# %% [markdown]
# ## Counting parameters
#
# | part | numbers |
# |---|---|
# | token embedding, also the head | $V C$ |
# | position embedding | $1024\, C$ |
# | attention of a block: queries, keys, values; output | $3C^2 + 3C$; $C^2 + C$ |
# | MLP of a block | $4C^2 + 4C$; $4C^2 + C$ |
# | two LayerNorms of a block | $4C$ |
# | last LayerNorm | $2C$ |
#
# That makes $VC + 1024\,C + L(12 C^2 + 13 C) + 2C$. On the *meta* device a network has shapes, but
# no numbers, so even the largest one is counted at once:

# %%
from gpt2.config.model import SIZES


def parts_of(s: Shape) -> dict[str, int]:
    """Parameters of each part."""
    with torch.device("meta"):
        named = dict(GPT(s).named_parameters())
    kinds = {"wte": "token embedding", "wpe": "position embedding", "attn": "attention"}
    kinds |= {"mlp": "MLP", "ln": "LayerNorm"}
    found = dict.fromkeys(kinds.values(), 0)
    for name, p in named.items():
        found[next(kind for key, kind in kinds.items() if key in name)] += p.numel()
    return found


released = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
fig, axis = plt.subplots(figsize=(7, 3))
left = torch.zeros(len(released))
counted = [parts_of(Shape(**SIZES[name])) for name in released]
for part in counted[0]:
    share = torch.tensor([of[part] / sum(of.values()) for of in counted])
    axis.barh(released, share, left=left, label=part)
    left += share
axis.set_xlabel("share of the parameters")
axis.legend(bbox_to_anchor=(1, 1))
plt.show()
for name, of in zip(released, counted, strict=True):
    L, C = SIZES[name]["n_layer"], SIZES[name]["n_embd"]
    formula = 50257 * C + 1024 * C + L * (12 * C * C + 13 * C) + 2 * C
    assert formula == sum(of.values())
    print(f"{name:12} {formula:13,}  ", ", ".join(f"{k} {v / 1e6:.1f}M" for k, v in of.items()))

# %% [markdown]
# In the smallest GPT-2 a third of all parameters is the token table; in XL it is a twentieth. The
# blocks have $12 C^2$ each: a third in attention, two thirds in the MLP.
#
# ## The first loss
#
# A network that knows nothing should guess uniformly, and lose $\ln V = 10.82$ nats. Fresh GPT-2
# loses 10.98. Why?
#
# - The last LayerNorm gives each position a vector $h$ with $\sum_i h_i^2 = C$.
# - A logit is $z_b = \sum_i h_i w_{bi}$, and the rows of `wte` are drawn from $N(0, \sigma^2)$ with
#   $\sigma = 0.02$. So $z_b \sim N(0, C\sigma^2)$.
# - The loss is $\ln \sum_b e^{z_b} - z_\text{target}$. The second term is 0 on average. The sum has
#   $V$ terms, and the mean of $e^z$ for $z \sim N(0, s^2)$ is $e^{s^2/2}$. Hence
#
# $$\mathcal{L}_0 = \ln V + \frac{C \sigma^2}{2}
#   = 10.825 + \frac{768 \cdot 0.0004}{2} = 10.825 + 0.154 = 10.979.$$
#
# A first loss far from this one points to a bug, or to text that repeats its tokens (chapter 6).
# Measured, for networks of several widths:

# %%
widths = (64, 256, 512, 768)
measured = []
ids = torch.randint(50257, (1, 257), generator=torch.Generator().manual_seed(1))
for C in widths:
    torch.manual_seed(0)
    fresh = gpt.GPT(GPT2Config(n_layer=1, n_head=4, n_embd=C, block_size=256))
    with torch.no_grad():
        measured.append(fresh(ids[:, :-1], ids[:, 1:]).item())
formula = [math.log(50257) + C * 0.02**2 / 2 for C in widths]
plt.figure(figsize=(6, 3))
plt.plot(widths, formula, label="ln V + C σ² / 2")
plt.plot(widths, measured, "o", label="measured")
plt.axhline(math.log(50257), color="grey", linestyle="--", label="ln V")
plt.xlabel("C")
plt.ylabel("first loss, nats")
plt.legend()
plt.show()
print(f"C = 768: formula {formula[-1]:.3f}, measured {measured[-1]:.3f}")

# %% [markdown]
# One layer is enough here, because the last LayerNorm makes the length of $h$ independent of
# what is below it. The measured points scatter: each is a mean over 256 targets whose logits have a
# deviation of $\sqrt{C} \sigma$, up to 0.55. `gpt2 train` prints both numbers at the start of each
# run.
#
# The whole thing with training and sampling is `learn/gpt2_in_one_file.py`.
#
# ## Exercises
#
# Fill in the functions of `learn/exercises/chapter_5.py` and run `python -m learn.check 5`. Or
# define functions of these names in cells of the notebook, and call `check(5, globals())` after the
# next cell. `learn/solutions/` has answers.

# %%
from learn.check import check

check(5)
