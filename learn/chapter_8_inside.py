# %% [markdown]
# # 8. Inside
#
# A trained network is a program that nobody wrote. It can be read a little. You will
#
# 1. look at what the network would predict after each layer: the *logit lens*;
# 2. draw what the attention heads look at;
# 3. find an *induction head*, by a score;
# 4. switch heads off, and see what the loss says;
# 5. *patch* an activation of one text into another, and see where information travels.
#
# Papers: nostalgebraist 2020, *interpreting GPT: the logit lens*; Elhage et al. 2021, *A
# Mathematical Framework for Transformer Circuits*; Olsson et al. 2022, *In-context Learning and
# Induction Heads* (arXiv:2209.11895); Meng et al. 2022, *Locating and Editing Factual Associations
# in GPT* (arXiv:2202.05262), for patching.
#
# Shapes: $T$ positions, $C$ channels, $L$ layers, $H$ heads, $V$ vocabulary.

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
# ## A model to look into
#
# Name a checkpoint of `gpt2 train` or of `learn/gpt2_in_one_file.py` and all of this chapter is
# about it; `"box"` is the small trained model of the clone (models/), and `"gpt2"` downloads
# OpenAI's weights. Without a name, a network of two layers is trained
# here, for a minute or two. Its texts are sequences of random tokens that begin again after a
# while. The first round cannot be predicted. In the second, a network can be right every time if it
# finds where the current token stood before, and what came after it: "… A B … A" is followed by B.

# %%
import os

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from gpt2 import GPT2
from gpt2.config.model import IGNORE, GPT2Config
from gpt2.interpret.logit_lens import look, record
from gpt2.interpret.patching import patch_effects, patched_logits
from gpt2.model.gpt import GPT
from learn import gpt2_in_one_file as one_file

CHECKPOINT = os.environ.get("LEARN_CHECKPOINT", "")  # or a path, "box", "gpt2"
FAST = "LEARN_FAST" in os.environ  # the project's own tests train for a moment only
torch.set_num_threads(1)  # more threads would only wait for each other: the network is small


def repeated(rows: int, period: int, length: int, V: int, seed: int) -> torch.Tensor:
    """(rows, length) random tokens that repeat after `period`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (rows, period), generator=generator).repeat(1, length)[:, :length]


def train_small(steps: int) -> tuple[GPT, list[float]]:
    """Two layers of width 64, trained to continue repeated sequences; and the losses."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32, "vocab_size": 32}
    run = one_file.Config(**shape, learning_rate=3e-3, max_steps=steps, warmup_steps=50)
    run.weight_decay, run.beta2 = 0.01, 0.98
    torch.manual_seed(0)
    model = GPT(GPT2Config(**shape))
    optimizer, losses = one_file.build_optimizer(model, run), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = one_file.learning_rate(step, run)
        period = 6 + step * 7 % 11  # 6 … 16
        tokens = repeated(32, period, 33, 32, seed=step)
        targets = tokens[:, 1:].clone()
        targets[:, :period] = IGNORE  # up to the first token of the second round: mere chance
        loss = model(tokens[:, :-1], targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


if CHECKPOINT:
    model = GPT2.from_pretrained(CHECKPOINT, device="cpu")
else:
    model, losses = train_small(20 if FAST else 800)
    plt.figure(figsize=(6, 3))
    plt.plot(losses)
    plt.xlabel("step")
    plt.ylabel("loss, nats")
    plt.title("slowly at first, then quickly")
    plt.show()
model.eval()
L, H, V = model.config.n_layer, model.config.n_head, model.config.vocab_size
period = min(12, model.config.block_size // 3)
ids = repeated(1, period, 2 * period + 1, V, seed=10_000)[0].tolist()

# %% [markdown]
# ## The logit lens
#
# Each block adds to one residual stream. So the head can read the stream not only after the last
# block, but after any: $\text{logits}_\ell = \operatorname{LN}_f(x_\ell)\, W_E^\top$. What would
# the network say if it ended there? `gpt2.interpret.logit_lens.record` gives the stream before,
# between and after the blocks.

# %%
with torch.no_grad():
    logits, stream, recorder = record(model, ids)
    by_layer = torch.stack([model.transformer.ln_f(x) @ model.head_weight.T for x in stream])
chances = by_layer[:, :-1].softmax(-1)  # (L + 1, T, V): of the token that follows each position
came = torch.tensor(ids[1:]).expand(L + 1, -1)[..., None]
lens = chances.gather(2, came)[..., 0]  # (L + 1, T)
print("differs from `gpt2 inspect` by", (lens - look(model, ids).lens_actual).abs().max().item())

plt.figure(figsize=(9, 2.5))
plt.imshow(lens, aspect="auto", cmap="viridis", vmin=0, vmax=1)
plt.axvline(period - 0.5, color="w")
plt.yticks(range(L + 1), ["embedding", *(f"block {n + 1}" for n in range(L))])
plt.xlabel("position; the second round begins at the white line")
plt.colorbar(label="p(what came)")
plt.show()
print(f"p of what came, by layer, in the second round: {lens[:, period:].mean(1).tolist()}")

# %% [markdown]
# In the first round nobody can know. In the second the last block knows, and the first does not
# yet.
#
# ## What heads look at
#
# Two patterns have names. A *previous-token head* looks one position back: a line just below the
# diagonal. An **induction head** looks for where the current token stood before, and at what came
# *after* it: in a sequence that repeats after $P$ positions, that is $P - 1$ positions back. It
# copies that token into its prediction.

# %%
weights = torch.stack(recorder.weights)  # (L, H, T, T): queries, keys
T = weights.shape[-1]


def looks_back(weights: torch.Tensor, distance: int) -> torch.Tensor:
    """(L, H): the mean weight that queries give to the key `distance` positions before."""
    return weights.diagonal(-distance, dim1=-2, dim2=-1).mean(-1)


previous, induction = looks_back(weights, 1), looks_back(weights, period - 1)
layer, head = divmod(int(induction.argmax()), H)
before, before_head = divmod(int(previous.argmax()), H)
print(f"previous token: layer {before + 1}, head {before_head}, weight {previous.max():.2f}")
print(f"induction:      layer {layer + 1}, head {head}, weight {induction.max():.2f}")
print(f"a head that looks everywhere alike has about {1 / T:.2f}")

shown_layers = range(L) if L * H <= 16 else sorted({before, layer})
fig, axes = plt.subplots(
    len(shown_layers), H, figsize=(2.2 * H, 2.3 * len(shown_layers)), squeeze=False
)
for row, of_layer in zip(axes, shown_layers, strict=True):
    for number, axis in enumerate(row):
        axis.imshow(weights[of_layer, number], cmap="Blues", vmin=0, vmax=1)
        mark = (of_layer, number)
        name = {(before, before_head): "previous token", (layer, head): "induction"}.get(mark, "")
        axis.set_title(f"{of_layer + 1}.{number} {name}", fontsize=8)
        axis.axis("off")
plt.tight_layout()
plt.show()

# %% [markdown]
# The two work together. A head of the first layer tells each position which token stood before it.
# Then a head of the second layer can ask: which position comes after a token like mine? One layer
# alone cannot do it. So the loss falls slowly at first: both heads must be there before either
# pays.
# (With few steps of training neither is there yet.)
#
# ## Switching heads off
#
# A head writes into the stream by its $D$ columns of the output matrix. Set them to 0 and it is
# silent. How much does the loss of the second round rise?


# %%
@torch.no_grad()
def second_round(model: GPT, rows: int = 8) -> float:
    """The loss in nats where the sequence repeats."""
    tokens = repeated(rows, period, 2 * period + 1, V, seed=20_000)
    logits = model(tokens[:, :-1])[:, period:]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, period + 1 :].flatten()).item()


@torch.no_grad()
def without_head(layer: int, head: int) -> float:
    """The loss of the second round while a head is silent."""
    matrix = model.transformer.h[layer].attn.c_proj.weight  # (C, C): from H · D to C
    D = matrix.shape[0] // H
    kept = matrix[:, head * D : (head + 1) * D].clone()
    matrix[:, head * D : (head + 1) * D] = 0
    loss = second_round(model)
    matrix[:, head * D : (head + 1) * D] = kept
    return loss


whole = second_round(model)
rises = torch.tensor([[without_head(a, b) - whole for b in range(H)] for a in shown_layers])
plt.figure(figsize=(5, 2.5))
plt.imshow(rises, cmap="Reds", aspect="auto")
plt.xlabel("head")
plt.yticks(range(len(shown_layers)), [f"layer {n + 1}" for n in shown_layers])
plt.colorbar(label="rise of the loss, nats")
plt.show()
print(f"whole {whole:.3f} nats; without {layer + 1}.{head}: {without_head(layer, head):.3f}")

# %% [markdown]
# Heads stand in for one another: where several do the same work, one of them can be silent at
# little cost. A small rise therefore does not say that a head does nothing.
#
# ## In a model that has read
#
# Is induction a trick of networks that see nothing but repetitions? `box` comes with the project
# (models/): eight layers, trained on 2.7 billion tokens of English. Random tokens are as strange to
# it as anything can be. The measures are those above, with 25 tokens that come twice.

# %%
box = GPT2.from_pretrained("box", device="cpu")
strange = torch.cat([repeated(1, 25, 51, box.config.vocab_size, seed=seed) for seed in range(4)])


@torch.no_grad()
def surprise_of_box() -> torch.Tensor:
    """(50,) the loss in nats at each position, mean of four sequences."""
    logits = box(strange[:, :-1]).transpose(1, 2)
    return F.cross_entropy(logits, strange[:, 1:], reduction="none").mean(0)


with torch.no_grad():
    recorders = [record(box, row.tolist())[2] for row in strange]
box_weights = torch.stack([torch.stack(r.weights) for r in recorders]).mean(0)
surprise = surprise_of_box()
print(f"first round {surprise[:24].mean():.2f} nats, second {surprise[25:].mean():.2f}")
for pattern, distance in (("previous token", 1), ("induction", 24)):
    scores = looks_back(box_weights, distance)
    best = scores.flatten().topk(3).indices.tolist()
    print(f"{pattern}: a head that looks everywhere alike has about {1 / 51:.2f}")
    for number in best:
        block, which = divmod(number, box.config.n_head)
        matrix = box.transformer.h[block].attn.c_proj.weight
        kept, D = matrix.detach().clone(), box.config.n_embd // box.config.n_head
        with torch.no_grad():
            matrix[:, which * D : (which + 1) * D] = 0
        without = surprise_of_box()[25:].mean()
        with torch.no_grad():
            matrix.copy_(kept)
        weight = scores[block, which]
        print(f"  {block + 1}.{which}: weight {weight:.2f}; without it {without:.2f} nats")

plt.figure(figsize=(6, 2))
plt.plot(surprise)
plt.axvline(24.5, color="k")
plt.ylabel("nats")
plt.xlabel("position; the second round begins at the line")
plt.show()

# %% [markdown]
# In the first round `box` is worse than an even guess, $\ln 50257 = 10.8$ nats: it expects words
# that fit together. In the second round the loss falls from 15.2 to 3.6. Head 4.2 looks at the
# previous token, and head 5.0, one block later, is an induction head. Without either, most of the
# fall is lost (11.9 and 10.4 nats). Heads 7.2 and 6.1 look the same way, and are missed less.
# The page of `gpt2 inspect` counts layers from 0: there, head 4.2 is head 2 of layer 3.
#
# So text alone teaches the circuit that the small network learned from repetitions: names and
# phrases come again in text as well. `LEARN_CHECKPOINT=box` runs the whole chapter on `box`.
#
# ## Patching
#
# Where does the knowledge of one token travel? Take two texts that differ in that token only, A and
# B. Run A, but replace the stream at *one* layer and *one* position by B's. If the prediction at
# the end becomes B's, then what makes the difference is stored there.
#
# In A the token at position 4 is $a$, in B it is $b$. The last token of both is the one at position
# 3, in its second round, so a network with induction says $a$ for A and $b$ for B. We measure
# $\text{logit}_b - \text{logit}_a$: 0 % is A's, 100 % is B's.

# %%
text_a = ids[: period + 4]
text_b = list(text_a)
text_b[4] = next(t for t in range(V) if t not in text_a)
a, b = text_a[4], text_b[4]


@torch.no_grad()
def run_patched(ids: list[int], patch: torch.Tensor, layer: int, position: int) -> float:
    """logit_b - logit_a at the end, with the stream before block `layer` replaced at a position."""

    def replace(_, inputs: tuple) -> tuple:
        x = inputs[0].clone()
        x[0, position] = patch
        return (x, *inputs[1:])

    modules = [*model.transformer.h, model.transformer.ln_f]
    handle = modules[layer].register_forward_pre_hook(replace)
    try:
        logits = model(torch.tensor([ids]))[0, -1]
    finally:
        handle.remove()
    return (logits[b] - logits[a]).item()


stream_b = record(model, text_b)[1]
by_hand = run_patched(text_a, stream_b[1][4], layer=1, position=4)
logits = patched_logits(model, text_a, stream_b[1][4][None], 1, torch.tensor([4]))[0, -1]
print("the package's function differs by", abs(by_hand - (logits[b] - logits[a]).item()))

# %% [markdown]
# That was one place. `gpt2.interpret.patching.patch_effects` tries all of them, many at a time, and
# gives the share of the logit difference that moves over: (layers + 1, patched position,
# prediction). It compares the token that loses most probability with the one that gains most.

# %%
found = patch_effects(model, text_a, text_b)
effect = found.effect[:, :, -1]
print("tokens compared:", found.ours[-1].item(), found.theirs[-1].item(), "and ours:", a, b)

plt.figure(figsize=(9, 2.5))
plt.imshow(100 * effect, cmap="RdBu_r", vmin=-100, vmax=100, aspect="auto")
plt.yticks(range(L + 1), ["embedding", *(f"block {n + 1}" for n in range(L))])
plt.xlabel("position whose stream is B's")
plt.colorbar(label="% of the difference")
plt.show()
places = effect.argmax(1).tolist()
print("where it is stored, from the embedding on:", places, "- the last position is", period + 3)

# %% [markdown]
# At first the difference is at position 4, where the token stands. At the end it is at the last
# position, where the prediction is made. Induction heads carried it there.
#
# ## From France to Italy
#
# `box` has read about capitals. Where does it keep the country until the city is asked for?

# %%
tokenizer = box.tokenizer
france, italy = (f"The capital of {x} is the city of" for x in ("France", "Italy"))
names = [tokenizer.decode([t]) for t in tokenizer.encode(italy)]
found = patch_effects(box, tokenizer.encode(france), tokenizer.encode(italy))
cities = [tokenizer.decode([int(t[-1])]) for t in (found.ours, found.theirs)]
of_text, of_second = found.probs[:, :, -1].tolist()
print(f"{cities} after France: {of_text}, after Italy: {of_second}")

plt.figure(figsize=(6, 3))
plt.imshow(100 * found.effect[:, :, -1], cmap="RdBu_r", vmin=-100, vmax=100, aspect="auto")
plt.yticks(range(len(found.effect)), ["embedding", *(f"block {n + 1}" for n in range(8))])
plt.xticks(range(len(names)), names, rotation=30)
plt.colorbar(label=f"% from{cities[0]} to{cities[1]}")
plt.show()
print("the country's state alone:", [round(v, 2) for v in found.effect[:, 3, -1].tolist()])

# %% [markdown]
# Replacing the state of one token, ' Italy', makes Rome of Paris, up to block 5. Blocks 6 to 8 copy
# it to the last position. "Paris" and "Rome" had 18.5 % and 7.0 %: a network of 19M parameters
# knows this much, and the page of `gpt2 inspect box TEXT --patch=TEXT` shows it for every token.
#
# ## Exercises
#
# Fill in the functions of `learn/exercises/chapter_8.py` and run `python -m learn.check 8`. Or
# define functions of these names in cells of the notebook, and call `check(8, globals())` after the
# next cell. `learn/solutions/` has answers.

# %%
from learn.check import check

check(8)
