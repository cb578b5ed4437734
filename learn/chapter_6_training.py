# %% [markdown]
# # 6. Training
#
# A training step computes a gradient and changes the weights a little. Every part of the recipe
# can be written in a few lines. You will
#
# 1. write AdamW by its formulas, and compare it with PyTorch's;
# 2. decide which parameters decay;
# 3. draw the schedule, and clip a gradient;
# 4. see that accumulating gradients equals a large batch;
# 5. train a small GPT until it writes something like Python.
#
# Papers: Kingma & Ba 2015 (arXiv:1412.6980) for Adam; Loshchilov & Hutter 2019 (arXiv:1711.05101)
# for decoupled weight decay; Loshchilov & Hutter 2017 (arXiv:1608.03983) for the cosine; Pascanu et
# al. 2013 (arXiv:1211.5063) for clipping; Brown et al. 2020 (arXiv:2005.14165), appendix B, for the
# numbers, which are those of GPT-3.

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
# ## AdamW
#
# Adam keeps two running means for each parameter: $m$ of the gradient $g$, and $v$ of its square.
# It divides one by the root of the other, so that each parameter moves by about the learning rate
# $\eta$, however large its gradients are:
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad
#   v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2,$$
# $$\hat m = \frac{m}{1 - \beta_1^t}, \qquad \hat v = \frac{v}{1 - \beta_2^t}, \qquad
#   \theta \leftarrow \theta - \eta \lambda\, \theta
#   - \eta\, \frac{\hat m}{\sqrt{\hat v} + \epsilon}.$$
#
# - $m$ and $v$ begin at 0. The divisions by $1 - \beta^t$ at step $t$ make up for that.
# - The *decay* $\eta\lambda\theta$ pulls weights towards 0. It stands apart from the gradient: this
#   is the W of AdamW.

# %%
import argparse
import math
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from learn import gpt2_in_one_file as one_file

FAST = "LEARN_FAST" in os.environ  # the project's own tests train for a moment only
torch.set_num_threads(1)  # more threads would only wait for each other: the network is small


class AdamW:
    """AdamW for a list of parameters, by the formulas."""

    def __init__(self, parameters, lr, beta1=0.9, beta2=0.95, decay=0.1):
        self.parameters, self.lr, self.t = list(parameters), lr, 0
        self.beta1, self.beta2, self.decay = beta1, beta2, decay
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """One update, from the gradients in `p.grad`."""
        self.t += 1
        for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
            m.mul_(self.beta1).add_((1 - self.beta1) * p.grad)
            v.mul_(self.beta2).add_((1 - self.beta2) * p.grad**2)
            m_hat = m / (1 - self.beta1**self.t)
            v_hat = v / (1 - self.beta2**self.t)
            p.sub_(self.lr * self.decay * p)
            p.sub_(self.lr * m_hat / (v_hat.sqrt() + 1e-8))


torch.manual_seed(0)
a = torch.randn(20, 10, requires_grad=True)
b = a.detach().clone().requires_grad_()
ours = AdamW([a], lr=0.01)
theirs = torch.optim.AdamW([b], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
for _ in range(50):
    g = torch.randn(20, 10)
    a.grad, b.grad = g.clone(), g.clone()
    ours.step()
    theirs.step()
print("after 50 steps the two differ by", (a - b).abs().max().item())

# %% [markdown]
# ## What decays
#
# Matrices and embeddings decay. Biases and the gains of LayerNorm do not: they are few, and a gain
# that decays to 0 would switch a channel off. The rule is the number of dimensions:

# %%
config = one_file.Config(n_layer=2, n_head=2, n_embd=64, vocab_size=256, block_size=64)
torch.manual_seed(1)
model = one_file.GPT(config)
for group in one_file.build_optimizer(model, config).param_groups:
    numbers = sum(p.numel() for p in group["params"])
    print(f"decay {group['weight_decay']}: {len(group['params'])} tensors, {numbers:,} numbers")

# %% [markdown]
# ## The schedule
#
# The learning rate rises linearly for the first steps, while $m$ and $v$ are still means of few
# gradients. Then it falls by half a cosine to a tenth of its peak:
#
# $$\eta_t = \eta_\text{max} \left(0.1 + 0.9 \cdot \tfrac12 (1 + \cos \pi p)\right), \qquad
#   p = \frac{t - t_\text{warm-up}}{t_\text{max} - t_\text{warm-up}}.$$

# %%
whole = one_file.Config()
plt.figure(figsize=(6, 3))
plt.plot([one_file.learning_rate(step, whole) for step in range(whole.max_steps)])
plt.xlabel("step")
plt.ylabel("learning rate")
plt.title("GPT-2 (124M) on 10 billion tokens")
plt.show()

# %% [markdown]
# ## Clipping
#
# One odd batch can have a gradient many times as long as usual. All gradients together are one long
# vector; if its norm exceeds 1, it is scaled to norm 1. Its direction stays.

# %%
text = Path(argparse.__file__).read_bytes() + Path(subprocess.__file__).read_bytes()
ids = torch.tensor(list(text))  # tokens are bytes here: a small vocabulary trains quickly
train, held_out = ids[:-4096], ids[-4096:]


def batch(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (rows, T), from random places of the training text."""
    T = config.block_size
    starts = torch.randint(len(train) - T, (rows,), generator=generator)
    stretch = torch.stack([train[s : s + T + 1] for s in starts.tolist()])
    return stretch[:, :-1], stretch[:, 1:]


x, y = batch(8, torch.Generator().manual_seed(0))
(100 * model(x, y)).backward()  # a hundred times too large
before = [p.grad.clone() for p in model.parameters()]
norm = math.sqrt(sum(g.square().sum().item() for g in before))
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
after = [p.grad for p in model.parameters()]
print(f"norm {norm:.1f} -> {math.sqrt(sum(g.square().sum().item() for g in after)):.3f}")
print("cosine:", F.cosine_similarity(before[0].flatten(), after[0].flatten(), dim=0).item())

# %% [markdown]
# ## Accumulation
#
# GPT-2 trains on 524,288 tokens a step, far more than fit into memory. The gradient of a mean is
# the mean of gradients, so a batch can be computed piece by piece. `backward` *adds* to `p.grad`;
# nothing else is needed than a division:

# %%
x, y = batch(8, torch.Generator().manual_seed(1))
model.zero_grad()
model(x, y).backward()
large = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
for rows in range(0, 8, 2):
    (model(x[rows : rows + 2], y[rows : rows + 2]) / 4).backward()
largest = max(g.abs().max().item() for g in large)
worst = max((a - p.grad).abs().max().item() for a, p in zip(large, model.parameters(), strict=True))
print(f"one batch of 8 and four of 2: gradients up to {largest:.2f} differ by up to {worst:.1e}")

# %% [markdown]
# The rest is rounding: sums in another order.
#
# ## A run
#
# Everything together. Two layers of width 64 on the source of two Python modules, byte by byte,
# takes about a minute. Before you run it: what will the first loss be? (Chapter 5 has the formula.)

# %%
steps = 30 if FAST else 600
config.max_steps, config.warmup_steps, config.learning_rate = steps, steps // 20, 5e-3
model = one_file.GPT(config)
optimizer = one_file.build_optimizer(model, config)
generator = torch.Generator().manual_seed(2)


@torch.no_grad()
def validation() -> float:
    """The loss on the held-out bytes, in nats."""
    x = held_out.view(-1, config.block_size)
    return model(x[:, :-1], x[:, 1:]).item()


losses, norms, checks = [], [], {0: validation()}
for step in range(steps):
    for group in optimizer.param_groups:
        group["lr"] = one_file.learning_rate(step, config)
    x, y = batch(16, generator)
    loss = model(x, y)
    loss.backward()
    norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if (step + 1) % (steps // 6) == 0:
        checks[step + 1] = validation()

formula = math.log(256) + 64 * 0.02**2 / 2
fig, axes = plt.subplots(1, 2, figsize=(11, 3.5))
axes[0].plot(losses, label="training")
axes[0].plot(checks.keys(), checks.values(), "o-", label="held out")
axes[0].axhline(formula, color="grey", linestyle="--", label="formula")
axes[0].set_ylabel("loss, nats per byte")
axes[0].legend()
axes[1].plot(norms)
axes[1].axhline(1, color="grey", linestyle="--")
axes[1].set_ylabel("norm of the gradient, before clipping")
for axis in axes:
    axis.set_xlabel("step")
plt.tight_layout()
plt.show()
print(f"first loss {losses[0]:.3f}, formula {formula:.3f}")
print(f"held out: {checks[steps] / math.log(2):.2f} bits per byte")

# %% [markdown]
# The first loss lies below the formula. The formula takes the target to be unrelated to the token
# just read. In so small a network the stream is mostly the embedding of that token, so the tied
# head gives this token the highest logit, and indented code is full of repeated spaces.

# %%
prompt = list(b"    def ")
written = one_file.generate(model, prompt, 60 if FAST else 300, top_k=20, seed=3)
print(bytes(written).decode(errors="replace"))

# %% [markdown]
# `learn/gpt2_in_one_file.py` does this for GPT-2's tokens and shards, and `gpt2 train` with all
# that a long run needs.
#
# ## Exercises
#
# Fill in the functions of `learn/exercises/chapter_6.py` and run `python -m learn.check 6`. Or
# define functions of these names in cells of the notebook, and call `check(6, globals())` after the
# next cell. `learn/solutions/` has answers.

# %%
from learn.check import check

check(6)
