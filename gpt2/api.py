"""`GPT2`: the network together with files, tokenizer and sampling, for a person at a prompt.

model = GPT2().from_checkpoint("out/out_ckpt.pt")
print(model.generate("Hello world,"))
"""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint, generate
from .config import SIZES, GPT2Config, UserError
from .devices import choose_device
from .model import GPT
from .tokenizer import gpt2_tokenizer

Prompt = str | Sequence[int] | Tensor


class GPT2(GPT):
    """GPT-2 with fresh weights: `GPT2()` (124M), `GPT2("gpt2-xl")`, `GPT2(n_layer=6, …)`.

    Args:
        shape: a name of the table of sizes, or a whole `GPT2Config`.
        **given: fields of `GPT2Config` to use instead of the size's.

    Raises:
        UserError: unknown size, numbers that do not fit together.
    """

    def __init__(self, shape: str | GPT2Config = "gpt2", **given):
        if isinstance(shape, str):
            if shape not in SIZES:
                raise UserError(f"unknown size {shape!r}; use one of {', '.join(SIZES)}")
            shape = GPT2Config(**(SIZES[shape] | given))
        elif given:
            raise UserError("give a GPT2Config or single fields, not both")
        super().__init__(shape)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str = "auto") -> "GPT2":
        """The model in an `out_ckpt.pt`, on a GPU if there is one, ready to write.

        Works on the class and on an instance alike; always gives a new model.

        Raises:
            UserError: no file, or one that is damaged, foreign or would run code.
        """
        config, state, _ = checkpoint.load_model(path)
        with torch.device("meta"):  # no memory and no random numbers for weights to be replaced
            model = cls(config)
        checkpoint.load_into(model, state, path)
        return model.to(choose_device(device)).eval()

    def save(self, path: str | Path):
        """Writes a file that `from_checkpoint` reads."""
        checkpoint.save_model(Path(path), self, step=0, val_loss=None)

    def generate(
        self,
        prompt: Prompt | list[str] | list[list[int]],
        max_new_tokens: int = 50,
        *,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_at_end_of_text: bool = True,
        use_cache: bool = True,
    ):
        """Continues a prompt, or several at once.

        Args:
            prompt: text -> text; token ids (a list, or a tensor (T,) or (B, T)) -> lists of ids;
                a list of prompts -> a list of results. Results hold the prompt and what follows.
            max_new_tokens: tokens to write after each prompt.
            temperature: 0 always takes the likeliest token; 1 samples as the model says.
            top_k: choose among this many likeliest tokens; 0: all.
            top_p: choose among the fewest likeliest tokens that reach this probability.
            seed: the same seed gives the same text.
            stop_at_end_of_text: end a text where the model ends it.
            use_cache: False computes every token from the beginning, much slower.

        Raises:
            UserError: an empty list, ids outside the vocabulary, settings that mean nothing.
        """
        prompts, many, text = self._read_prompts(prompt)
        tokenizer = gpt2_tokenizer()
        written = generate.generate(
            self,
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_token=tokenizer.end_of_text if stop_at_end_of_text else None,
            use_cache=use_cache,
        )
        rows = [old + new for old, new in zip(prompts, written, strict=True)]
        if text:
            rows = [tokenizer.decode(_without_start(row)) for row in rows]
        return rows if many else rows[0]

    def stream(self, prompt: str, max_new_tokens: int = 50, **settings) -> Iterator[str]:
        """Pieces of the text that follows a prompt, as they are written; never half a character.

        The settings are those of `generate.stream`.
        """
        prompts, _, _ = self._read_prompts(prompt)
        tokenizer = gpt2_tokenizer()
        settings = {"stop_token": tokenizer.end_of_text} | settings
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for (token,) in generate.stream(self, prompts, max_new_tokens, **settings):
            if token is not None and (piece := decoder.decode(tokenizer.decode_bytes([token]))):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def _read_prompts(self, prompt) -> tuple[list[list[int]], bool, bool]:
        """(prompts as ids, whether there were several, whether they were text)."""
        if isinstance(prompt, Tensor):
            prompt = prompt.tolist()
        many = isinstance(prompt, list | tuple) and bool(prompt)
        many = many and not isinstance(prompt[0], int)
        several = list(prompt) if many else [prompt]
        text = isinstance(several[0], str)
        if text:
            # an empty prompt begins a new document
            end_of_text = gpt2_tokenizer().end_of_text
            rows = [gpt2_tokenizer().encode(p) or [end_of_text] for p in several]
        else:
            rows = [list(p) for p in several]
        if any(not 0 <= i < self.config.vocab_size for row in rows for i in row):
            raise UserError(f"token ids must be from 0 to {self.config.vocab_size - 1}")
        return rows, many, text


def _without_start(row: list[int]) -> list[int]:
    return row[1:] if row[0] == gpt2_tokenizer().end_of_text else row
