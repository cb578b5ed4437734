"""What a folder holds in the place of shards: token files of other projects, texts, something else.

People point `--data_dir=` at the data that they have. A bare `gpt2 prepare` would download FineWeb
beside it.
"""

import re
from pathlib import Path

TEXTS = re.compile(r".+\.((txt|jsonl)(\.(gz|xz|zst))?|parquet)", re.IGNORECASE)
NUMPY_SHARD = re.compile(r".+_(train|val)(_\d+)?\.npy")


def why_no_shards(folder: Path, split: str = "") -> str:
    """One line about a folder without shards, with a way out; "" for an empty folder.

    Args:
        folder: a folder that is there.
        split: the split that is missing, "train" or "val"; empty: both.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if bins := [n for n in (f"{split}.bin", "train.bin", "val.bin") if n in names]:
        return (
            f"{folder} holds {bins[0]}, as nanoGPT writes it: token ids without a header, "
            "which shards have; run `gpt2 prepare --source=TEXT` on the text it was made of"
        )
    if arrays := list(filter(NUMPY_SHARD.fullmatch, names)):
        return (
            f"{folder} holds {arrays[0]}, as build-nanogpt writes it: a numpy array of token ids, "
            "without the header of a shard; the Python in docs/data.md#other-programs converts "
            "such files"
        )
    missing = f"{folder} holds no {f'*_{split}_*.bin ' * bool(split)}shards"
    if below := next((n for n in names if any((folder / n).glob("*_train_*.bin"))), ""):
        return f"{missing}; did you mean {folder / below}?"
    if any(map(TEXTS.fullmatch, names)):
        return f"{missing}; run `gpt2 prepare --source={folder} --out_dir=data/mine`"
    if "manifest.json" in names:
        return f"{missing}; run the `gpt2 prepare` again that made it"
    advice = "make some of a text with `gpt2 prepare --source=TEXT --out_dir=data/mine`"
    return f"{missing}, but {names[0]}; {advice}" if names else ""
