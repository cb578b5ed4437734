"""Text generation: from prompts to new tokens, and from tokens to text.

`stream` yields new tokens step by step, `generate` returns them all, `TextWriter` turns tokens
into text. `Decoder` runs the network; `sampling` chooses the tokens.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ..errors import UserError
from ..model.gpt import LanguageModel
from ..tokenizer import Tokenizer, gpt2_tokenizer
from .decoder import GRAPH_MIN_TOKENS, Decoder
from .few_token_pass import supports
from .sampling import Sampling, check_sampling
from .speculative import DRAFT_MIN_PARAMETERS, DRAFT_MIN_TOKENS

PACK_MIN_TOKENS = 20  # packing the weights takes about as long as this many steps save


def decoder_for(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    use_cache: bool = True,
) -> Decoder:
    """The fastest kind of decoder for a model, its device and these prompts.

    A CUDA graph on a GPU, except under autocast, which would convert the weights for every token.
    In float32 on a CPU speculative decoding for one sequence, packed weights for several; both copy
    the weights first, which pays only when many tokens follow.
    """
    weight = model.transformer.wte.weight
    lengths = [len(prompt) for prompt in prompts]
    device = weight.device.type
    can_be_fast = use_cache and not torch.is_autocast_enabled(device)
    graph = can_be_fast and device == "cuda" and max_new_tokens >= GRAPH_MIN_TOKENS
    can_copy = can_be_fast and device == "cpu" and weight.dtype == torch.float32
    draft = (
        can_copy
        and len(prompts) == 1
        and max_new_tokens >= DRAFT_MIN_TOKENS
        and model.draft_supported
        and model.num_parameters() >= DRAFT_MIN_PARAMETERS
    )
    several = len(prompts) > 1 and max_new_tokens >= PACK_MIN_TOKENS
    return Decoder(
        model,
        len(prompts),
        max(lengths) + max_new_tokens,
        sampling,
        use_cache=use_cache,
        static=len(set(lengths)) > 1,
        graph=graph,
        draft=draft,
        packed=can_copy and several and supports(model),
    )


def stream(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    seed: int | None = None,
    stop_token: int | None = None,
    use_cache: bool = True,
    decoder: Decoder | None = None,
    **settings: float,
) -> Iterator[list[int | None]]:
    """Continues prompts and yields one new token of each at a time.

    Closing the iterator ends the work and frees the memory. On a GPU, tokens arrive two steps after
    they are computed; with speculative decoding, up to a dozen arrive at once.

    Args:
        model: on any device; switched to evaluation mode.
        prompts: token ids, at least one per prompt; lengths may differ.
        max_new_tokens: for each prompt.
        seed: row i uses seed + i; None for different tokens on every call. A row's tokens depend on
            its prompt and seed alone, with or without cache. One exception: rounding depends on the
            number of rows, and may decide between two nearly equal choices.
        stop_token: ends the sequence that generates it; it is not yielded.
        use_cache: False recomputes all positions for every token, as a reference.
        decoder: one from an earlier call with as many prompts, to reuse its memory and CUDA graph.
            Its own sampling settings apply.
        **settings: fields of `Sampling`.

    Yields:
        For each prompt the new token, or None if its sequence has ended.

    Raises:
        UserError: a setting is out of range, or a prompt has no tokens.
    """
    sampling = check_sampling(max_new_tokens, **settings)
    if not prompts or not all(prompts):
        raise UserError("a prompt needs at least one token")
    if not max_new_tokens:
        return
    if decoder is None:
        decoder = decoder_for(model, prompts, max_new_tokens, sampling, use_cache)
    ended = [False] * len(prompts)
    for tokens in decoder.write(prompts, max_new_tokens, seed):
        new: list[int | None] = []
        for i, token in enumerate(tokens):
            ended[i] = ended[i] or token == stop_token
            new.append(None if ended[i] else token)
        yield new
        if all(ended):
            return


def generate(
    model: LanguageModel, prompts: list[list[int]], max_new_tokens: int, **settings: Any
) -> list[list[int]]:
    """The new tokens of each prompt; `settings` are the keyword arguments of `stream`."""
    written: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, max_new_tokens, **settings):
        for row, token in zip(written, new, strict=True):
            if token is not None:
                row.append(token)
    return written


class TextWriter:
    """Incremental decoding of one sequence, with stop strings.

    Text is held back while it may be an incomplete UTF-8 character or the beginning of a stop
    string.

    Args:
        stops: strings before which the text ends.
        tokenizer: the model's; by default GPT-2's.
    """

    def __init__(self, stops: Sequence[str] = (), tokenizer: Tokenizer | None = None):
        self.stops, self.tokenizer = tuple(stops), tokenizer or gpt2_tokenizer()
        self.stopped = False  # a stop string has occurred
        self._held = ""  # may be the beginning of a stop string
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Adds a token; returns the text that is now certain, "" after a stop string."""
        return self._release(self._decoder.decode(self.tokenizer.decode_bytes([token])))

    def finish(self) -> str:
        """Ends the text; returns what was held back."""
        text = self._release(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        split = len(text) - self._length_of_stop_prefix(text)
        self._held = text[split:]
        return text[:split]

    def _length_of_stop_prefix(self, text: str) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        longest = max(map(len, self.stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stops):
                return length
        return 0


def check_stops(stop: str | Sequence[str] | None) -> list[str]:
    """Stop strings as a list; none for None.

    Raises:
        UserError: one is empty, or not a string.
    """
    if stop is None:
        return []
    stops = [stop] if isinstance(stop, str) or not isinstance(stop, Iterable) else list(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise UserError(f"stop={stop!r}: use strings that are not empty")
    return stops
