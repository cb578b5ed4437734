# %% [markdown]
# # 2. A table of bigrams, and what a loss means
#
# The simplest language model looks at one token and says which token may follow. It fits into a
# table, needs no neural network, and already has everything that the number "loss" is about. You
# will
#
# 1. count bigrams and make probabilities of them;
# 2. compute a loss in nats, and say it in bits, as a perplexity, and in bits per byte;
# 3. learn the same table by gradient descent, and see it arrive at the counts;
# 4. write text with it.
#
# Papers: Shannon 1948, *A Mathematical Theory of Communication*, for bigrams of letters and for
# entropy.

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
# ## The text
#
# The source code of two modules that come with Python. To keep the table small enough to look at,
# tokens are characters here, not GPT-2's.

# %%
import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

text = Path(subprocess.__file__).read_text("utf-8") + Path(argparse.__file__).read_text("utf-8")
text = text.encode("ascii", "ignore").decode()
letters = sorted(set(text))
V = len(letters)
number = {letter: i for i, letter in enumerate(letters)}
ids = torch.tensor([number[letter] for letter in text])
cut = int(0.9 * len(ids))
train, held_out = ids[:cut], ids[cut:]  # the model never sees the second part
print(f"{len(train):,} tokens to learn from, {len(held_out):,} held out, V = {V}")

# %% [markdown]
# ## Counting
#
# $N_{ab}$ is how often $b$ follows $a$. The model is
#
# $$p(b \mid a) = \frac{N_{ab} + 1}{\sum_{c} (N_{ac} + 1)}.$$
#
# The added 1 keeps a pair that was never seen from having probability 0, which would make the loss
# infinite.

# %%
counts = torch.zeros(V, V)
counts.index_put_((train[:-1], train[1:]), torch.ones(len(train) - 1), accumulate=True)
table = (counts + 1) / (counts + 1).sum(1, keepdim=True)  # (V, V), rows sum to 1

shown = [number[letter] for letter in " \n().,=:_'abcdefghijklmnopqrstuvwxyz" if letter in number]
plt.figure(figsize=(7, 7))
plt.imshow(table[shown][:, shown], cmap="viridis", vmax=0.5)
names = [letters[i].replace("\n", "⏎").replace(" ", "␣") for i in shown]
plt.xticks(range(len(shown)), names)
plt.yticks(range(len(shown)), names)
plt.xlabel("next character")
plt.ylabel("character")
plt.colorbar(label="probability", shrink=0.7)
plt.show()

# %% [markdown]
# ## The loss
#
# The loss of a prediction is minus the logarithm of the probability that the model gave to what
# really came. The loss of a model is the mean over all tokens, the *cross-entropy*:
#
# $$\mathcal{L} = -\frac{1}{T} \sum_{t=1}^{T} \ln p(x_t \mid x_{<t}).$$
#
# With the natural logarithm its unit is the **nat**; one nat is $1 / \ln 2 = 1.443$ bits. Bits say
# what a file would take: an ideal compressor that uses the model's probabilities writes
# $\mathcal{L} / \ln 2$ bits for each token.


# %%
def loss(table: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean of -ln p, in nats per token."""
    return -table[ids[:-1], ids[1:]].log().mean().item()


uniform = torch.full((V, V), 1 / V)
alone = torch.bincount(train, minlength=V) + 1.0  # characters by how often they occur
models = {"uniform guess": uniform, "single characters": (alone / alone.sum()).expand(V, V)}
models["bigrams"] = table
for name, of_model in models.items():
    nats = loss(of_model, held_out)
    print(
        f"{name:18} {nats:.3f} nats = {nats / math.log(2):.3f} bits per character,"
        f" perplexity {math.exp(nats):.1f}"
    )
print(f"ln V = {math.log(V):.3f}")

# %% [markdown]
# - A uniform guess costs $\ln V$, whatever the text. For GPT-2's vocabulary that is
#   $\ln 50257 = 10.82$ nats: the loss of a network that knows nothing yet.
# - The **perplexity** $e^{\mathcal{L}}$ is the number of equally likely choices that would be as
#   hard to guess.
# - A difference in loss is a ratio of probabilities: 0.1 nats less means that the text became
#   $e^{0.1} = 1.105$ times as probable *per token*.
#
# Where does the loss come from? Each character of a line of the held-out part, with its loss in
# bits:

# %%
start = next(i for i in range(len(held_out)) if letters[held_out[i]] == "d")
line = held_out[start - 1 : start + 45]
bits = -table[line[:-1], line[1:]].log2()
plt.figure(figsize=(11, 2.5))
plt.bar(range(len(bits)), bits)
plt.xticks(range(len(bits)), [letters[i].replace("\n", "⏎").replace(" ", "␣") for i in line[1:]])
plt.ylabel("bits")
plt.title(f"mean {bits.mean():.2f} bits per character")
plt.show()

# %% [markdown]
# ## Bits per byte
#
# A loss per token can only be compared between models that cut the text into the same tokens. Long
# tokens are harder to guess, but there are fewer of them. **Bits per byte** can always be compared:
#
# $$\text{bits per byte} = \frac{\mathcal{L}}{\ln 2} \cdot \frac{\text{tokens}}{\text{bytes}}.$$
#
# `gpt2 demo` ends with a validation loss of 4.91 nats per token of GPT-2's vocabulary. That is not
# worse than the bigram table's number above:

# %%
from gpt2.tokenizer import gpt2_tokenizer

some = text[cut:]
per_byte = len(gpt2_tokenizer().encode(some.replace("    ", "\t"))) / len(
    some.replace("    ", "\t")
)
nats = loss(table, held_out)
print(f"bigrams:          {nats / math.log(2):.2f} bits per byte (a character is a byte here)")
print(f"4.91 nats/token:  {4.91 / math.log(2) * per_byte:.2f} bits per byte, on this kind of text")

# %% [markdown]
# ## The same table by gradient descent
#
# A network computes *logits* $z$ and makes probabilities by softmax,
# $p_b = e^{z_b} / \sum_c e^{z_c}$. The smallest such network looks its logits up in a table
# $W$ of $V \times V$ numbers: $z = W_a$. Its gradient is simple, and will be that of GPT-2's last
# layer, too:
#
# $$\frac{\partial \mathcal{L}}{\partial z_b} = p_b - [b \text{ is what came}].$$

# %%
W = torch.zeros(V, V, requires_grad=True)
optimizer = torch.optim.AdamW([W], lr=0.1, weight_decay=0.0)
losses = []
for _ in range(150):
    # The mean over all pairs of the text; equal pairs have equal losses, so each is computed once.
    nats = (counts * -F.log_softmax(W, dim=1)).sum() / counts.sum()
    optimizer.zero_grad()
    nats.backward()
    optimizer.step()
    losses.append(nats.item())

x, y = train[:2000], train[1:2001]
with torch.no_grad():
    p = W[x].softmax(1)
    by_hand = torch.zeros(V, V).index_add_(0, x, p - F.one_hot(y, V)) / len(x)
    W.grad = None
F.cross_entropy(W[x], y).backward()  # softmax, -ln and mean in one
print("the formula of the gradient differs from autograd by", (W.grad - by_hand).abs().max().item())

plt.figure(figsize=(6, 3))
plt.plot(losses, label="gradient descent")
plt.axhline(loss(table, train), color="k", linestyle=":", label="counting")
plt.axhline(math.log(V), color="grey", linestyle="--", label="ln V")
plt.xlabel("step")
plt.ylabel("training loss, nats")
plt.legend()
plt.show()

# %% [markdown]
# It begins at $\ln V$, because equal logits are a uniform guess, and ends where counting ends: the
# relative frequencies are the table with the lowest cross-entropy. For a table nobody needs
# gradients. For a model that looks at a thousand tokens there is nothing to count, as nearly every
# context is new. There gradient descent still works, and that is the rest of this course.
#
# ## Writing
#
# Draw a next character from the row of the current one, again and again:

# %%
generator = torch.Generator().manual_seed(1)
out = [number["d"]]
for _ in range(300):
    out.append(torch.multinomial(table[out[-1]], 1, generator=generator).item())
print("".join(letters[i] for i in out))

# %% [markdown]
# Neighbours fit, nothing else does: the model forgets everything but one character.
#
# ## Exercises
#
# Fill in the functions of `learn/exercises/chapter_2.py` and run `python -m learn.check 2`. Or
# define functions of these names in cells of the notebook, and call `check(2, globals())` after the
# next cell. `learn/solutions/` has answers.

# %%
from learn.check import check

check(2)
