"""Trains GPT-2: `python train_gpt2.py --help`. The same as `gpt2 train`; see gpt2/train.py.

Several GPUs: `torchrun --standalone --nproc_per_node=2 train_gpt2.py`.
"""

import sys

from gpt2 import GPT2
from gpt2.cli import main

__all__ = ["GPT2"]

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
