"""GPT-2's tokenizer in the files that transformers, vLLM and llama.cpp read."""

import json
from typing import Any

from ..tokenizer import END_OF_TEXT, END_OF_TEXT_NAME, merge_ranks, merges_folder
from ..untrusted.parsing import read_json


def tokenizer_files(block_size: int) -> dict[str, bytes]:
    """File name -> content of each tokenizer file.

    transformers encodes a literal `<|endoftext|>` as token 50256, unless it is called with
    `split_special_tokens=True`.

    Args:
        block_size: context length of the model, in tokens.
    """
    folder = merges_folder()
    special = {
        "content": END_OF_TEXT_NAME,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT_NAME)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "added_tokens_decoder": {str(END_OF_TEXT): special},
        **names,
    }
    added = ({"id": END_OF_TEXT, **special},)
    return {
        "tokenizer.json": tokenizer_json(added).encode(),
        "vocab.json": (folder / "encoder.json").read_bytes(),
        "merges.txt": (folder / "vocab.bpe").read_bytes(),
        "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
        "special_tokens_map.json": json.dumps(names, indent=1).encode(),
    }


def tokenizer_json(added_tokens: tuple[dict[str, Any], ...] = ()) -> str:
    """The content of Hugging Face's tokenizer.json.

    Args:
        added_tokens: special tokens, as entries of the file's `added_tokens`.
    """
    folder = merges_folder()
    merge_ranks(folder)  # checks the sha256
    merges = (folder / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]  # the first is a title
    vocab = read_json(folder / "encoder.json")
    cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0",
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": cut,
        "decoder": cut,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return json.dumps(content)
