"""Generation: from prompts to new tokens, with what is fastest on the model's device.

`decode` has the passes through the network and the rule for full contexts, `sampling` the choice of
a token; here is who has ended.
"""

import codecs
from collections.abc import Iterator, Sequence

import torch

from ..config.model import GPT2_VOCAB_SIZE, ModernConfig
from ..errors import UserError
from ..model.gpt import GPT
from ..tokenizer import gpt2_tokenizer
from .decoder import DRAFT_MIN_PARAMETERS, DRAFT_TOKENS, GRAPH_MIN_TOKENS, Decoder
from .sampling import Sampling, check_sampling, filter_logits, pick

__all__ = ["check_sampling", "decoder_for", "filter_logits", "generate", "pick", "stream"]


def decoder_for(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling, use_cache=True
) -> Decoder:
    """The decoder that is fastest for these prompts.

    A CUDA graph on a GPU, but not under autocast, which would convert the weights for every token;
    draft and check for one sequence in float32 on a CPU.
    """
    weight, lengths = model.transformer.wte.weight, [len(prompt) for prompt in prompts]
    kind = weight.device.type
    plain = not use_cache or torch.is_autocast_enabled(kind)
    graph = not plain and kind == "cuda" and max_new_tokens >= GRAPH_MIN_TOKENS
    draft = not plain and kind == "cpu" and weight.dtype == torch.float32 and len(prompts) == 1
    draft = draft and max_new_tokens > DRAFT_TOKENS
    draft = draft and not isinstance(model.config, ModernConfig)  # it knows GPT-2's layers
    draft = draft and model.num_parameters() >= DRAFT_MIN_PARAMETERS
    return Decoder(
        model,
        len(prompts),
        max(lengths) + max_new_tokens,
        sampling,
        use_cache=use_cache,
        static=len(set(lengths)) > 1,
        graph=graph,
        draft=draft,
    )


def stream(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    seed: int | None = None,
    stop_token: int | None = None,
    use_cache: bool = True,
    decoder: Decoder | None = None,
    **settings,
) -> Iterator[list[int | None]]:
    """Continues prompts, one token for each of them at a time.

    Prompts may differ in length. Closing the iterator, or leaving it, ends the work and frees the
    memory. On a GPU tokens come two passes late; on a CPU sometimes up to a dozen at once.

    Args:
        model: on any device; switched to evaluation mode.
        prompts: token ids, at least one per prompt.
        max_new_tokens: for each prompt.
        seed: the same seed gives the same tokens, with and without cache. Row i uses seed + i and
            is what its prompt alone gives with that seed, unless the rounding of products, which
            depends on the number of rows, tips a near tie. None for other tokens every time.
        stop_token: ends the sequence that wrote it (and is not yielded).
        use_cache: False computes everything anew for every token, for comparison.
        decoder: one from an earlier call with as many prompts; keeps its memory and its CUDA graph.
            It carries its own settings.
        **settings: temperature, top_k, top_p, min_p, repetition_penalty: see `sampling.Sampling`.

    Yields:
        For each prompt its new token, or None where it has ended.

    Raises:
        UserError: settings that mean nothing, a prompt without tokens.
    """
    check_sampling(max_new_tokens, **settings)
    if not prompts or not all(prompts):
        raise UserError("a prompt needs at least one token")
    if not max_new_tokens:
        return
    if decoder is None:
        decoder = decoder_for(model, prompts, max_new_tokens, Sampling(**settings), use_cache)
    finished = [False] * len(prompts)
    for tokens in decoder.write(prompts, max_new_tokens, seed):
        new: list[int | None] = []
        for i, token in enumerate(tokens):
            finished[i] = finished[i] or token == stop_token
            new.append(None if finished[i] else token)
        yield new
        if all(finished):
            return


def generate(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, **settings
) -> list[list[int]]:
    """The new tokens of each prompt; the settings are those of `stream`."""
    written: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, max_new_tokens, **settings):
        for row, token in zip(written, new, strict=True):
            if token is not None:
                row.append(token)
    return written


class TextWriter:
    """Tokens one at a time to pieces of text that hold no half character and no stop string."""

    def __init__(self, stops: Sequence[str] = ()):
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""  # may be the beginning of a stop string
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The text that is certain with this token; nothing after a stop string."""
        known = [token] if token < GPT2_VOCAB_SIZE else []  # others may have added tokens
        return self._pass_on(self._decoder.decode(gpt2_tokenizer().decode_bytes(known)))

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._pass_on(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _pass_on(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max(map(len, self.stops), default=1) - 1
        begins = (n for n in range(min(longest, len(text)), 0, -1)
                  if any(stop.startswith(text[-n:]) for stop in self.stops))  # fmt: skip
        split = len(text) - next(begins, 0)
        self._held = text[split:]
        return text[:split]


def _stops(stop: str | Sequence[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise UserError(f"stop={stop!r}: use strings that are not empty")
    return stops
