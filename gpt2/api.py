"""`GPT2`: the network together with files, tokenizer and sampling, for a person at a prompt.

model = GPT2().from_checkpoint("out/out_ckpt.pt")
print(model.generate("Hello world,"))
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import model_file, weights
from .config.model import SIZES, GPT2Config, ModernConfig
from .distributed.devices import choose_device
from .errors import UserError
from .generate import stream as generation
from .generate.stream import TextWriter, check_stops
from .model.gpt import GPT
from .model.modern import Modern
from .report import console
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
        if isinstance(shape, ModernConfig) != isinstance(self, Modern):
            other = "GPT2" if isinstance(self, Modern) else "SwitchedGPT2"
            raise UserError(f"{type(self).__name__}: for this config use {other}")
        super().__init__(shape)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str = "auto") -> "GPT2":
        """The model in a file or folder, on a GPU if there is one, ready to write.

        Takes an `out_ckpt.pt`, a checkpoint of nanoGPT, build-nanogpt or llm.c, and a folder in
        Hugging Face's layout. Works on the class and on an instance alike; gives a new model.

        Raises:
            UserError: no file, or one that is damaged, foreign or would run code.
        """
        return cls.from_weights(weights.load_local(path), device)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str = "", device: str = "auto"
    ) -> "GPT2":
        """A model of the Hugging Face Hub: "gpt2", "gpt2-xl", "OWNER/NAME"; or as above.

        Args:
            name: `@REVISION` may stand behind it.
            revision: commit, tag or branch; empty: the newest.
            device: "auto", "cpu", "cuda", "mps".

        Raises:
            UserError: no such model, no access or connection, or a network that is not GPT-2's.
        """
        return cls.from_weights(weights.load(name, revision), device)

    @classmethod
    def from_weights(cls, found: weights.Weights, device: str = "auto") -> "GPT2":
        """A model of weights that are read already; says what had to be changed in them.

        Raises:
            UserError: tensors that do not fit.
        """
        for note in found.notes:
            console.warn(f"{found.origin}: {note}")
        with torch.device("meta"):  # no memory and no random numbers for weights to be replaced
            kind = SwitchedGPT2 if isinstance(found.config, ModernConfig) else cls
            model = kind(found.config)
        model_file.load_into(model, found.state, found.origin)
        return model.to(choose_device(device)).eval()

    def save(self, path: str | Path):
        """Writes a file that `from_checkpoint` reads."""
        model_file.save_model(Path(path), self, step=0, val_loss=None)

    def generate(
        self,
        prompt: Prompt | list[str] | list[list[int]],
        max_new_tokens: int = 50,
        *,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
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
            min_p: choose among the tokens at least this times as likely as the likeliest.
            repetition_penalty: above 1, tokens that have occurred become less likely.
            seed: the same seed gives the same text; prompt number i of a list uses seed + i.
            stop: a string, or several, before which a text ends; for prompts that are text.
            stop_at_end_of_text: end a text where the model ends it.
            use_cache: False computes every token from the beginning, much slower.

        Raises:
            UserError: an empty list, ids outside the vocabulary, settings that mean nothing.
        """
        prompts, many, text = self._read_prompts(prompt)
        tokenizer, stops = gpt2_tokenizer(), check_stops(stop)
        if stops and not text:
            raise UserError("stop= needs prompts that are text")
        steps = generation.stream(
            self,
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop_token=tokenizer.end_of_text if stop_at_end_of_text else None,
            use_cache=use_cache,
        )
        if not text:
            rows = [list(row) for row in prompts]
            for new in steps:
                for row, token in zip(rows, new, strict=True):
                    row.extend([] if token is None else [token])
            return rows if many else rows[0]
        writers = [TextWriter(stops) for _ in prompts]
        results = [tokenizer.decode(_without_start(row)) for row in prompts]
        for new in steps:
            for i, token in enumerate(new):
                if token is not None:
                    results[i] += writers[i].add(token)
            if all(writer.stopped for writer in writers):
                break
        results = [text + writer.finish() for text, writer in zip(results, writers, strict=True)]
        return results if many else results[0]

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 50,
        *,
        stop: str | Sequence[str] = (),
        **settings,
    ) -> Iterator[str]:
        """Pieces of the text that follows a prompt, as they are written; never half a character.

        Args:
            prompt: the text to continue.
            max_new_tokens: tokens to write.
            stop: a string, or several, before which the text ends; what may be the beginning of
                one is held back until it is known.
            **settings: those of `generate.stream`.

        Raises:
            UserError: settings that mean nothing.
        """
        prompts, _, _ = self._read_prompts(prompt)
        writer = TextWriter(check_stops(stop))
        settings = {"stop_token": gpt2_tokenizer().end_of_text} | settings
        for (token,) in generation.stream(self, prompts, max_new_tokens, **settings):
            if token is not None and (piece := writer.add(token)):
                yield piece
            if writer.stopped:
                return
        if rest := writer.finish():
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
            weights.check_vocabulary(self.config, "the model")
            # an empty prompt begins a new document
            end_of_text = gpt2_tokenizer().end_of_text
            rows = [gpt2_tokenizer().encode(p) or [end_of_text] for p in several]
        else:
            rows = [list(p) for p in several]
        if any(not 0 <= i < self.config.vocab_size for row in rows for i in row):
            raise UserError(f"token ids must be from 0 to {self.config.vocab_size - 1}")
        return rows, many, text


class SwitchedGPT2(GPT2, Modern):
    """The same around the network with switches; `from_checkpoint` gives it where it is needed."""


def _without_start(row: list[int]) -> list[int]:
    return row[1:] if row[0] == gpt2_tokenizer().end_of_text else row
