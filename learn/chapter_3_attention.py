# %% [markdown]
# # 3. One attention head
#
# Attention lets a position read from others. You will
#
# 1. build one head by its formula, with the causal mask;
# 2. measure why the scores are divided by $\sqrt D$;
# 3. write the weights of a head by hand, and look at what it reads;
# 4. train a head to do the same, and split a wide one into several.
#
# Paper: Vaswani et al. 2017, *Attention Is All You Need* (arXiv:1706.03762), section 3.2, eq. 1.
#
# Shapes: $B$ batch, $T$ positions, $C$ channels, $H$ heads, $D = C / H$.

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
# ## The formula
#
# Each position has a vector $x_t$ of $C$ numbers. Three matrices make three vectors of it: a
# *query* (what am I looking for?), a *key* (what do I offer to be found by?) and a *value* (what do
# I hand over?). A head computes
#
# $$q = x W_q, \quad k = x W_k, \quad v = x W_v, \qquad
#   y = \operatorname{softmax}\!\left(\frac{q k^\top}{\sqrt{D}} + M\right) v,$$
#
# where $M_{ts} = -\infty$ for $s > t$ and 0 otherwise: no position sees a later one. Each row of
# the softmax holds non-negative weights that sum to 1, so $y_t$ is a mean of the values so far.

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F


def weights_of(q: torch.Tensor, k: torch.Tensor, causal: bool = True) -> torch.Tensor:
    """softmax(q kᵀ / √D + M); (T, D) and (T, D) -> (T, T), a row for each query."""
    T, D = q.shape
    scores = q @ k.T / math.sqrt(D)
    if causal:
        later = torch.ones(T, T, dtype=torch.bool).triu(1)  # above the diagonal
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1)


torch.manual_seed(0)
words = ["the", "cat", "that", "chased", "the", "mouse", "was", "tired"]
T, C, D = len(words), 32, 16
x = torch.randn(T, C)
Wq, Wk, Wv = (torch.randn(C, D) / math.sqrt(C) for _ in range(3))
q, k, v = x @ Wq, x @ Wk, x @ Wv


def picture(weights: torch.Tensor, axis, title: str, labels: list[str] | None = None) -> None:
    """Draws weights: a row for each query, a column for each key."""
    axis.imshow(weights.detach(), cmap="Blues", vmin=0, vmax=1)
    axis.set_title(title)
    axis.set_xlabel("key")
    axis.set_ylabel("query")
    if labels:
        axis.set_xticks(range(len(labels)), labels, rotation=90)
        axis.set_yticks(range(len(labels)), labels)


fig, axes = plt.subplots(1, 2, figsize=(9, 4))
picture(weights_of(q, k, causal=False), axes[0], "without the mask", words)
picture(weights_of(q, k), axes[1], "with the mask", words)
plt.tight_layout()
plt.show()

# %% [markdown]
# The weights are random here, as nothing is trained. With the mask the first position can only see
# itself. PyTorch has the formula as one function, `scaled_dot_product_attention`. On a GPU it never
# stores the $T \times T$ weights (FlashAttention, Dao et al. 2022, arXiv:2205.14135). It computes
# the same:

# %%
y = weights_of(q, k) @ v
fused = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
print("largest difference:", (y - fused).abs().max().item())

# %% [markdown]
# The mask makes training efficient. One pass over a text of $T$ tokens gives $T$ predictions, none
# of which has seen its answer. Change a later token, and nothing before it moves:

# %%
changed = x.clone()
changed[5:] = torch.randn(3, C)
y2 = weights_of(changed @ Wq, changed @ Wk) @ (changed @ Wv)
print("moved:", [(a != b).any().item() for a, b in zip(y, y2, strict=True)])

# %% [markdown]
# ## Why √D
#
# If the numbers of $q$ and $k$ are independent, with mean 0 and variance 1, then
# $q \cdot k = \sum_{i=1}^{D} q_i k_i$ has variance $D$. Scores of standard deviation 8 (at $D =
# 64$) push softmax towards a single 1, where its gradient vanishes. Dividing by $\sqrt D$ keeps
# their variance at 1, whatever $D$ is. Measured:

# %%
widths = [2**n for n in range(1, 11)]
spread: dict[str, list[float]] = {"q·k": [], "q·k / √D": []}
largest: dict[str, list[float]] = {name: [] for name in spread}
slope: dict[str, list[float]] = {name: [] for name in spread}
for width in widths:
    a, b = torch.randn(256, width), torch.randn(64, width)
    for name, scores in (("q·k", a @ b.T), ("q·k / √D", a @ b.T / math.sqrt(width))):
        p = scores.softmax(-1)
        spread[name].append(scores.var().item())
        largest[name].append(p.max(-1).values.mean().item())
        slope[name].append((p * (1 - p)).sum(-1).mean().item())  # Σ ∂p/∂score on the diagonal
fig, axes = plt.subplots(1, 3, figsize=(12, 3))
titles = ("variance of the scores", "largest of 64 weights", "Σ p (1 - p): gradient of softmax")
for axis, title, numbers in zip(axes, titles, (spread, largest, slope), strict=True):
    for name, values in numbers.items():
        axis.plot(widths, values, "o-", label=name)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("D")
    axis.set_title(title)
axes[0].set_yscale("log", base=2)
axes[0].legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# ## A head by hand
#
# What can a head do? This one reads the token before. Let the first $T$ channels say at which
# position a vector is, by a one in its place. The key is the position; the query is the position
# before, which a shifted identity matrix makes of it.

# %%
T = 8
position = torch.eye(T)
W_query = torch.eye(T).roll(-1, dims=1)  # position t -> t - 1
W_query[0] = 0  # nothing is before the first
sharp = 30.0  # the factor decides how sure the softmax is
by_hand = weights_of(sharp * position @ W_query, position)
fig, axis = plt.subplots(figsize=(4, 4))
picture(by_hand, axis, "a head that reads the token before")
plt.show()

# %% [markdown]
# ## A head that learns it
#
# Now with random weights and a task: at each position, name the token before. The network has an
# embedding of tokens, an embedding of positions, one head, and a matrix that gives logits. Nobody
# tells it where to look.

# %%
torch.manual_seed(1)
V, T, C = 12, 16, 32
parameters = {
    "wte": torch.randn(V, C) * 0.5,
    "wpe": torch.randn(T, C) * 0.5,
    "qkv": torch.randn(C, 3 * C) / math.sqrt(C),
    "head": torch.randn(C, V) / math.sqrt(C),
}
for p in parameters.values():
    p.requires_grad_()
optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)


def forward(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids (B, T) -> logits (B, T, V), and queries and keys."""
    x = parameters["wte"][ids] + parameters["wpe"]
    q, k, v = (x @ parameters["qkv"]).split(C, dim=-1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y @ parameters["head"], q, k


def score(ids: torch.Tensor) -> torch.Tensor:
    """The loss of naming the token before, in nats; position 0 has none."""
    logits, _, _ = forward(ids)
    return F.cross_entropy(logits[:, 1:].flatten(0, 1), ids[:, :-1].flatten())


fresh = weights_of(*(part[0] for part in forward(torch.randint(V, (1, T)))[1:]))
losses = []
for _ in range(300):
    loss = score(torch.randint(V, (32, T)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
trained = weights_of(*(part[0] for part in forward(torch.randint(V, (1, T)))[1:]))
fig, axes = plt.subplots(1, 3, figsize=(13, 3.6))
axes[0].plot(losses)
axes[0].axhline(math.log(V), color="grey", linestyle="--")
axes[0].set_title("loss, nats; dashed: ln V")
picture(fresh, axes[1], "before training")
picture(trained, axes[2], "after training")
plt.tight_layout()
plt.show()
print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f}")

# %% [markdown]
# The diagonal below the main one is what we wrote by hand.
#
# ## Several heads
#
# One head gives one mean. GPT-2 wants several at a time, so it cuts the $C = 768$ channels into $H
# = 12$ heads of $D = 64$. Each does its own attention, and the results stand side by side again.
# In code this is a `view` and a `transpose`, and costs no more than one wide head.

# %%
B, T, C, H = 2, 8, 32, 4
q, k, v = torch.randn(3, B, T, C)
by_head = [part.view(B, T, H, C // H).transpose(1, 2) for part in (q, k, v)]  # (B, H, T, D)
y = F.scaled_dot_product_attention(*by_head, is_causal=True)
y = y.transpose(1, 2).reshape(B, T, C)
second = slice(8, 16)  # the channels of head 1
alone = weights_of(q[0, :, second], k[0, :, second]) @ v[0, :, second]
print("head 1 alone differs by", (y[0, :, second] - alone).abs().max().item())

# %% [markdown]
# ## Exercises
#
# Fill in the functions of `learn/exercises/chapter_3.py` and run `python -m learn.check 3`. Or
# define functions of these names in cells of the notebook, and call `check(3, globals())` after the
# next cell. `learn/solutions/` has answers.

# %%
from learn.check import check

check(3)
