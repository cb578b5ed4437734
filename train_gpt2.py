"""Trains GPT-2: `python train_gpt2.py --help`. The command is `gpt2 train`; see gpt2/train/loop.py.

Several GPUs: `torchrun --standalone --nproc_per_node=2 train_gpt2.py`.
"""

import sys

from gpt2.cli import main


def __getattr__(name: str):
    if name == "GPT2":  # `from train_gpt2 import GPT2`; torch takes seconds, --help must not
        from gpt2 import GPT2

        return GPT2
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
