"""The class `GPT2`: a network with files, tokenizer and sampling.

model = GPT2.from_checkpoint("out/out_ckpt.pt")
print(model.generate("Hello world,"))

`SwitchedGPT2` offers the methods of `GPT2` for the modern network. It is made on first use, because
plain GPT-2 must not import the modern network. `isinstance(model, GPT2)` is true for both.
"""

import dataclasses
import functools
import operator
from abc import ABCMeta
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor

from .checkpoint import model_file, weights
from .config.command_line import check_keywords
from .config.model import OLD_SIZES, SIZES, GPT2Config, ModernConfig
from .config.registry import has_own_parts
from .config.switches import SWITCH_NAMES, Switches, chosen, switched
from .distributed.devices import choose_device
from .distributed.torch_defaults import of_a_new_process
from .errors import UserError
from .generate import stream as generation
from .generate.arguments import plain_numbers
from .generate.sampling import Sampling
from .generate.stream import TextWriter, check_stops
from .model.evaluation_mode import in_evaluation_mode
from .model.gpt import GPT, LanguageModel
from .model.unfilled import unfilled
from .report import console
from .report.versions import warn_of_newer_torch
from .tokenizer import Tokenizer
from .untrusted.display import shown

Prompt = str | Sequence[int] | Tensor


class TextModel(LanguageModel):
    """What `GPT2` and `SwitchedGPT2` add to their network: loading, saving, generation."""

    def __init__(self, shape: str | GPT2Config = "gpt2", **given: Any) -> None:
        if isinstance(shape, str):
            shape = config_of(OLD_SIZES.get(shape, shape), given)
        elif not isinstance(shape, GPT2Config):
            raise UserError(f"GPT2({shown(repr(shape))}): name a size, or give a GPT2Config")
        elif given:
            raise UserError("give a GPT2Config or single fields, not both")
        fitting = model_class(shape)
        if fitting not in type(self).__mro__:
            raise UserError(f"{type(self).__name__}: for this config use {fitting.__name__}")
        super().__init__(shape)
        self.own_tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """GPT-2's tokenizer, or the one that came with the weights."""
        return self.own_tokenizer or weights.tokenizer_for(self.config.vocab_size)

    @classmethod
    @of_a_new_process()
    def from_checkpoint(cls, path: str | Path, device: str = "auto") -> Self:
        """Loads a model from a file or folder, in evaluation mode; onto a GPU if there is one.

        Reads an `out_ckpt.pt`, a checkpoint of nanoGPT, build-nanogpt or llm.c, a folder in Hugging
        Face's layout, or one of LoRA adapters whose base is found. Called on an instance, it still
        returns a new model.

        Raises:
            UserError: the file is missing, damaged, of an unknown format, or would run code.
        """
        return cls.from_weights(weights.load_local(_at_home(path)), device)

    @classmethod
    @of_a_new_process()
    def from_pretrained(cls, name: str | Path, *, revision: str = "", device: str = "auto") -> Self:
        """Loads a model from the Hugging Face Hub, or from a path like `from_checkpoint`.

        Args:
            name: "gpt2", "gpt2-xl", "OWNER/NAME", with `@REVISION` appended or not; a path; or
                "box" or "box-chat", which come with a clone.
            revision: commit, tag or branch; empty: the newest.
            device: "auto", "cpu", "cuda", "mps".

        Raises:
            UserError: no such model, no access or connection, or a network that is not GPT-2's.
        """
        name = name if isinstance(name, str) and not name.startswith("~") else _at_home(name)
        return cls.from_weights(weights.load(name, revision), device)

    @classmethod
    @of_a_new_process()
    def from_weights(cls, found: weights.Weights, device: str = "auto") -> Self:
        """A model with weights that were read before; prints the notes that came with them.

        Raises:
            UserError: tensors that do not fit the network.
        """
        warn_of_newer_torch()
        for note in found.notes:
            console.warn(f"{found.origin}: {note}")
        fitting = model_class(found.config)
        # A subclass is kept. `SwitchedGPT2` refuses GPT-2's config by itself.
        kind = cls if fitting is GPT2 or fitting in cls.__mro__ else fitting
        # Constants of a plugin's modules are in no file: their constructors compute them.
        with nullcontext() if has_own_parts(found.config.switches()) else unfilled():
            model = kind(found.config)
        model_file.load_into(model, found.state, found.origin)
        model.own_tokenizer = found.own_tokenizer
        model.end_of_text = found.own_tokenizer.end_of_text if found.own_tokenizer else None
        return cast(Self, model.to(choose_device(device)).eval())

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint that `from_checkpoint` reads."""
        model_file.save_model(_at_home(path), self, step=0, val_loss=None)

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
        stop: str | Sequence[str] | None = (),
        stop_at_end_of_text: bool = True,
        use_cache: bool = True,
    ) -> Any:
        """Continues one prompt, or several in one batch, in evaluation mode.

        Args:
            prompt: text gives text; token ids (a list, or a tensor or an array of numpy, (T,) or
                (B, T)) give lists of ids; a list of prompts gives a list of results. A result
                starts with its prompt.
            max_new_tokens: tokens to generate after each prompt.
            temperature: 0 always takes the likeliest token; 1 samples from the model's
                distribution.
            top_k: sample from this many likeliest tokens; 0: all.
            top_p: sample from the fewest likeliest tokens that reach this probability.
            min_p: sample from tokens at least this times as likely as the likeliest.
            repetition_penalty: above 1, tokens that have occurred become less likely.
            seed: makes the result reproducible; prompt i of a list uses seed + i.
            stop: a string, or several, before which a text ends; needs prompts that are text.
                None or (): none.
            stop_at_end_of_text: whether the end-of-text token ends a result.
            use_cache: False recomputes all positions for every token, which is much slower.

        Raises:
            UserError: an empty list, ids outside the vocabulary, settings of a wrong type or out
                of range.
        """
        prompts, many, text = self._read_prompts(prompt)
        tokenizer, stops = self.tokenizer, check_stops(stop)
        if stops and not text:
            raise UserError("stop= needs prompts that are text")
        steps = self._steps(
            prompts,
            max_new_tokens=max_new_tokens,
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
        writers = [TextWriter(stops, tokenizer) for _ in prompts]
        starts = [row[1:] if row[0] == tokenizer.end_of_text else row for row in prompts]
        results = [tokenizer.decode(row) for row in starts]
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
        temperature: float = 0.8,
        top_k: int = 50,
        stop: str | Sequence[str] | None = (),
        stop_at_end_of_text: bool = True,
        **settings: Any,
    ) -> Iterator[str]:
        """Yields the text that follows a prompt piece by piece; never half a character.

        With equal settings and an equal seed the pieces are what `generate` adds to the prompt.

        Args:
            prompt: the text to continue.
            max_new_tokens: tokens to generate.
            temperature: as for `generate`.
            top_k: as for `generate`.
            stop: a string, or several, before which the text ends; text that may be the start of a
                stop string is held back until the next tokens decide.
            stop_at_end_of_text: whether the end-of-text token ends the text.
            **settings: see `generate.stream.stream`.

        Raises:
            UserError: several prompts, settings of a wrong type or out of range.
        """
        fields = {f.name for f in dataclasses.fields(Sampling)}
        check_keywords(settings, {*fields, "seed", "use_cache", "decoder", "stop_token"}, "stream")
        prompts, _, _ = self._read_prompts(prompt)
        if len(prompts) > 1:
            raise UserError("stream continues one prompt; generate takes several")
        writer = TextWriter(check_stops(stop), self.tokenizer)
        end = self.tokenizer.end_of_text if stop_at_end_of_text else None
        settings = {"temperature": temperature, "top_k": top_k, "stop_token": end} | settings
        for (token,) in self._steps(prompts, max_new_tokens=max_new_tokens, **settings):
            if token is not None and (piece := writer.add(token)):
                yield piece
            if writer.stopped:
                return
        if rest := writer.finish():
            yield rest

    def _steps(self, prompts: list[list[int]], **settings: Any) -> Iterator[list[int | None]]:
        """`generate.stream.stream`, which leaves the network in the mode in which it was."""
        steps = generation.stream(self, prompts, **plain_numbers(settings))
        if not any(module.training for module in self.modules()):
            yield from steps
            return
        while True:  # between two steps the caller may train, or draw from another stream
            with in_evaluation_mode(self):
                new = next(steps, None)
            if new is None:
                return
            yield new

    def _read_prompts(self, prompt: Any) -> tuple[list[list[int]], bool, bool]:
        """(prompts as ids, True for a list of prompts, True for text)."""
        prompt = _plain(prompt)
        if isinstance(prompt, list | tuple):
            prompt = [_plain(part) for part in prompt]
        many = isinstance(prompt, list) and bool(prompt) and not hasattr(prompt[0], "__index__")
        several = prompt if many else [prompt]
        text = isinstance(several[0], str)
        try:
            if any(isinstance(p, bytes | bytearray) for p in several):
                raise TypeError  # their numbers are no token ids
            if not text and any(isinstance(_plain(i), bool) for row in several for i in row):
                raise TypeError  # a mask
            if text:
                self.tokenizer.check()
                # an empty prompt begins a new document
                begin = [self.tokenizer.end_of_text]
                rows = [self.tokenizer.encode(p) or begin for p in several]
            else:
                rows = [[operator.index(_plain(i)) for i in row] for row in several]
        except TypeError:
            raise UserError(
                "a prompt is a text, a list of token ids, or a list of one of these (decode bytes)"
            ) from None
        if any(not 0 <= i < self.config.vocab_size for row in rows for i in row):
            raise UserError(f"token ids must be from 0 to {self.config.vocab_size - 1}")
        return rows, many, text


class GPT2(TextModel, GPT, metaclass=ABCMeta):
    """GPT-2 with fresh weights: `GPT2()` (124M), `GPT2("gpt2-xl")`, `GPT2(n_layer=6, …)`.

    Args:
        shape: a name of the table of sizes, or a whole `GPT2Config`.
        **given: fields of `GPT2Config` to use instead of the size's, or switches of the modern
            network, such as mlp="relu2", which make a `SwitchedGPT2`.

    Raises:
        UserError: unknown size or option, numbers that do not fit together.
    """

    def __new__(cls, shape: str | GPT2Config = "gpt2", **given: Any) -> Any:
        """A `SwitchedGPT2` where switches are given; Python then leaves __init__ out."""
        if cls is GPT2 and isinstance(shape, str) and SWITCH_NAMES & given.keys():
            found = config_of(shape, given)
            if isinstance(found, ModernConfig):
                return _switched_gpt2()(found)
        return super().__new__(cls)


def config_of(size: str, given: dict[str, Any]) -> GPT2Config:
    """The config of a named size, with fields and switches changed.

    Raises:
        UserError: unknown size or option, values that do not fit together.
    """
    if size not in SIZES:
        raise UserError(f"unknown size {size!r}; use one of {', '.join(SIZES)}")
    fields = {f.name for f in dataclasses.fields(GPT2Config)}
    check_keywords(given, fields | SWITCH_NAMES, "GPT2")
    switches = Switches(**{name: value for name, value in given.items() if name in SWITCH_NAMES})
    numbers = SIZES[size] | {name: value for name, value in given.items() if name in fields}
    if switched(switches):
        return ModernConfig(**numbers, **chosen(switches))
    return GPT2Config(**numbers)


def model_class(config: GPT2Config) -> type[TextModel]:
    """`GPT2`, or `SwitchedGPT2` for a `ModernConfig`."""
    return _switched_gpt2() if isinstance(config, ModernConfig) else GPT2


@functools.cache
def _switched_gpt2() -> type[TextModel]:
    from .model.modern import Modern

    class SwitchedGPT2(TextModel, Modern):
        """The modern network with the methods of `GPT2`; loading a `ModernConfig` gives it."""

    SwitchedGPT2.__qualname__ = "SwitchedGPT2"  # pickle finds it by `__getattr__`
    GPT2.register(SwitchedGPT2)  # for isinstance; inheritance would bring GPT's layers as well
    return SwitchedGPT2


def __getattr__(name: str) -> Any:
    if name == "SwitchedGPT2":
        return _switched_gpt2()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _at_home(path: Any) -> Path:
    """The path, with the home folder in place of ~."""
    try:
        return Path(path).expanduser()
    except (TypeError, RuntimeError, ValueError):  # no path; no such person; a null character
        raise UserError(f"{shown(repr(path))} is no path of a checkpoint") from None


def _plain(value: Any) -> Any:
    """Tensors, arrays and numbers of numpy as Python's own lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value
