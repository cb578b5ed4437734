# %% [markdown]
# # 1. Text to tokens
#
# A language model reads and writes numbers. This chapter turns a text into numbers the way GPT-2
# does: by *byte-pair encoding* (BPE). You will
#
# 1. learn merges from a small text, by counting;
# 2. encode a word with GPT-2's 50,000 merges, and draw which bytes became which token;
# 3. see where a text is cut into words, and what that means for spaces, numbers and code.
#
# Papers: Sennrich, Haddow & Birch 2016, *Neural Machine Translation of Rare Words with Subword
# Units* (arXiv:1508.07909), for BPE; Radford et al. 2019, *Language Models are Unsupervised
# Multitask Learners*, section 2.2, for bytes instead of characters.

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
# ## Bytes
#
# Every text is a sequence of bytes: numbers from 0 to 255, by UTF-8. An ASCII letter takes one
# byte, other characters two to four. So 256 tokens suffice for all texts, and no text is unknown.

# %%
from collections import Counter
from itertools import pairwise

import matplotlib.pyplot as plt

for text in ("low", "für", "猫"):
    print(f"{text!r}: {list(text.encode())}")

# %% [markdown]
# Bytes make long sequences, though, and a Transformer has a fixed context of 1,024 tokens. BPE
# makes sequences shorter: it gives frequent pairs of neighbours a token of their own.
#
# ## Learning merges
#
# 1. Start with the bytes.
# 2. Count all pairs of neighbours.
# 3. Replace the most frequent pair by a new token everywhere.
# 4. Repeat from 2, once for each merge that you want.

# %%
text = (
    "the theme of the thesis is there: the other theory gathers dust, and then the thin thread "
    "of thought is lost. they think that the truth is worth the search, whether the path is "
    "rough or smooth, whether the weather is fine or the north wind breathes. "
)
ids = list(text.encode())
pieces = {i: bytes([i]) for i in range(256)}  # token -> its bytes


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replaces each occurrence of `pair` by `new`, from left to right."""
    out, at = [], 0
    while at < len(ids):
        if tuple(ids[at : at + 2]) == pair:
            out.append(new)
            at += 2
        else:
            out.append(ids[at])
            at += 1
    return out


lengths = [len(ids)]
for number in range(40):
    pair, count = Counter(pairwise(ids)).most_common(1)[0]
    new = 256 + number
    pieces[new] = pieces[pair[0]] + pieces[pair[1]]
    ids = merge(ids, pair, new)
    lengths.append(len(ids))
    if number < 12:
        a, b = (pieces[i].decode() for i in pair)
        print(f"merge {number:2}: {a!r} + {b!r} -> {pieces[new].decode()!r}, {count} times")

# %% [markdown]
# The first merges are the common endings and words. Each merge shortens the text, by less and less:

# %%
plt.figure(figsize=(6, 3))
plt.plot(lengths)
plt.xlabel("merges")
plt.ylabel("tokens of the text")
plt.ylim(0)
plt.title(f"{lengths[0]} bytes become {lengths[-1]} tokens")
plt.show()

# %% [markdown]
# GPT-2's authors did this with 40 GB of web pages and 50,000 merges. With the 256 bytes and one
# token for the end of a text that gives
#
# $$V = 256 + 50{,}000 + 1 = 50{,}257.$$
#
# ## Encoding with GPT-2's merges
#
# The merges are fixed now. The *rank* of a merge is its number: merges that were learned first have
# the lowest ranks. To encode a word: merge the neighbours whose merge has the lowest rank, until
# no neighbours have a merge. In GPT-2 the rank of a merge also tells the id of its token.

# %%
from gpt2.tokenizer import gpt2_tokenizer, merge_ranks, merges_folder

ranks = merge_ranks(merges_folder())  # bytes of a token -> its id


def encode_word(word: str) -> list[list[bytes]]:
    """The pieces of a word after each merge; the first entry has the bytes, the last the tokens."""
    parts = [bytes([b]) for b in word.encode()]
    steps = [parts]
    while True:
        known = [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not known:
            return steps
        _, at = min(known)
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]
        steps.append(parts)


for step in encode_word(" tokenization"):
    print(" | ".join(part.decode(errors="replace") for part in step))

# %% [markdown]
# The same as a picture: each row is one merge later, and a box that is new is coloured.


# %%
def draw(word: str, axis) -> None:
    """Draws the merges of a word from top to bottom."""
    steps, before = encode_word(word), set()
    for row, parts in enumerate(steps):
        left, spans = 0, set()
        for part in parts:
            width = len(part)
            spans.add((left, width))
            colour = "tab:orange" if (left, width) not in before and row else "whitesmoke"
            axis.add_patch(plt.Rectangle((left, -row), width, 0.8, facecolor=colour, edgecolor="k"))
            shown = part.decode(errors="replace").replace(" ", "␣")
            axis.text(left + width / 2, 0.4 - row, shown, ha="center", va="center", fontsize=8)
            left += width
        before = spans
    axis.set_xlim(-0.1, len(word.encode()) + 0.1)
    axis.set_ylim(-len(steps) + 0.9, 1)
    axis.axis("off")


fig, axes = plt.subplots(1, 2, figsize=(11, 4))
draw(" tokenization", axes[0])
draw(" unbelievably", axes[1])
plt.show()

# %% [markdown]
# Is this really GPT-2's encoding? The package's tokenizer decides:

# %%
tokenizer = gpt2_tokenizer()
for word in (" tokenization", " unbelievably", "Hello", " für", " 猫"):
    ours = [ranks[part] for part in encode_word(word)[-1]]
    assert ours == tokenizer.encode(word), word
    print(f"{word!r}: {ours}")

# %% [markdown]
# ## Words first
#
# Before any merge, a pattern cuts the text into words, and no merge crosses a cut. Otherwise "dog."
# and "dog!" would become tokens of their own. A space before a word belongs to the word, so
# "dog" at the beginning of a text and " dog" inside are two different tokens.

# %%
for sentence in ("The dog's 2 dogs.", "In 2024: 123456 + 1", "def f(x):\n    return x"):
    print([tokenizer.decode([i]) for i in tokenizer.encode(sentence)])

# %% [markdown]
# - Numbers are cut as the merges happen to be, not by digits: arithmetic is hard for such a model.
# - GPT-2 has no token for four spaces. Indented code costs a token for every space. (`gpt2 demo`
#   therefore trains on Python sources whose indentation has become tabs.)
#
# How many bytes does a token hold? The more, the longer the text that fits into the context.

# %%
import argparse
import inspect

samples = {
    "English": inspect.getdoc(argparse) or "",
    "Python": inspect.getsource(argparse)[:20_000],
    "digits": " ".join(str(n * n) for n in range(2000)),
    "German": "Der Zug fährt um acht Uhr, und wir müssen noch Fahrkarten kaufen. " * 10,
    "Chinese": "我们明天早上八点坐火车去北京,还没有买票。" * 10,
}
per_token = {name: len(s.encode()) / len(tokenizer.encode(s)) for name, s in samples.items()}
plt.figure(figsize=(6, 3))
plt.bar(per_token.keys(), per_token.values())
plt.ylabel("bytes per token")
plt.show()

# %% [markdown]
# The merges come from English web pages, so English fares best.
#
# ## Where one text ends
#
# Training data is one long row of tokens. Token 50256 stands between documents. No text encodes to
# it: only the program writes it.

# %%
print(tokenizer.encode("<|endoftext|>"), "is text;", tokenizer.end_of_text, "is the token")

# %% [markdown]
# ## Exercises
#
# Fill in the functions of `learn/exercises/chapter_1.py` and run `python -m learn.check 1`. Or
# define functions of these names in cells of the notebook, and call `check(1, globals())` after the
# next cell. `learn/solutions/` has answers.

# %%
from learn.check import check

check(1)
