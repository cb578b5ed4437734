"""`gpt2 lm_eval`: lm-evaluation-harness with the class that adapts our models to it.

The class is registered under the name "gpt2" when this module is imported; `gpt2 lm_eval` imports
it and then runs the harness's own command. This is the only module that imports lm_eval.
"""

import json
import re
import sys
import traceback
from difflib import get_close_matches
from typing import Any

from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, setup_logging

from ..api import GPT2
from ..data.chat_formats import ROLES, check_messages
from ..data.chat_template import turn_end
from ..distributed.devices import choose_device, choose_dtype
from ..distributed.runtime import Runtime
from ..errors import UserError, first_line
from ..evaluate.scoring import score
from ..generate.stream import stream


def main(checkpoint: str, argv: list[str]) -> int:
    """`lm_eval run --model gpt2` on a checkpoint; `argv` are further options of that command.

    Raises:
        UserError: a checkpoint that cannot be read, an option that this command itself gives, or
            one that the harness refuses, such as an unknown task.
    """
    given = {argument.partition("=")[0] for argument in argv}
    if taken := given & {"--model", "-M", "-a"}:
        raise UserError(
            f"{min(taken)}: `gpt2 lm_eval` gives the model; its precision is "
            "--model_args=dtype=bfloat16, and for other models there is lm_eval itself"
        )
    # as JSON: of `checkpoint=a,b`, the harness would cut the path at its comma
    model = ["--model=gpt2", "--model_args", json.dumps({"checkpoint": checkpoint})]
    own = [] if given & {"--batch_size", "-b"} else ["--batch_size=auto"]
    if not given & {"--device", "--config", "-C"}:  # the harness means cuda:0, there or not
        own.append(f"--device={choose_device('auto')}")
    before, sys.argv = sys.argv, ["lm_eval", "run", *model, *own, *argv]
    try:
        setup_logging()
        harness = HarnessCLI()
        harness.execute(harness.parse_args())
    except (ValueError, TypeError, OSError) as error:
        if said := _about_options(error):
            raise UserError(said) from None
        raise
    finally:
        sys.argv = before
    return 0


def _about_options(error: Exception) -> str:
    """What the harness found wrong with its options, in one line; "" for any other error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    said, module = first_line(error), str(frames[-1].f_globals.get("__name__"))
    if not module.startswith("lm_eval.config") and not said.startswith("No tasks specified"):
        return ""
    names = said.removeprefix("Tasks not found: ")
    if names == said:
        return f"lm_eval: {said.rstrip('.')}; see gpt2 lm_eval --help=all"
    # Making the list anew takes seconds.
    known = getattr(frames[-1].f_locals.get("task_manager"), "all_tasks", [])
    close = [c for name in names.split(", ") for c in get_close_matches(name, known, n=1)]
    hint = f" (did you mean {', '.join(close)}?)" if close else ""
    return f"--tasks: no such task: {names}; `lm_eval ls tasks` lists them{hint}"


@register_model("gpt2")
class Harness(TemplateLM):
    """A checkpoint of ours, as lm-evaluation-harness asks for it in `--model_args`.

    Float32 unless another precision is asked for, as `--model hf` with the exported weights. Unlike
    there, a literal `<|endoftext|>` in a task's text is text.

    Args:
        checkpoint: whatever `GPT2.from_pretrained` reads.
        device: as in `--device` of the harness; None: a GPU if there is one.
        dtype: of the matmuls: float32, bfloat16, float16 or auto; float64: of everything, to
            compare implementations.
        batch_size: sequences of full length in a batch; "auto": what suits the device. Shorter
            ones are batched by the same number of tokens.
        max_batch_size: of "auto" in other models; only None.
    """

    def __init__(
        self,
        checkpoint: str,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if max_batch_size is not None:
            raise UserError("max_batch_size: use --batch_size=N alone")
        self._device = choose_device(device or "auto")
        compute = "float32" if dtype == "float64" else dtype
        self._rt = Runtime(self._device, choose_dtype(compute, self._device)[0])
        self._model = GPT2.from_pretrained(checkpoint, device=str(self._device))
        self._tokenizer = self._model.tokenizer
        self._tokenizer.check()
        if dtype == "float64":
            self._model.double()
        end = re.escape(self._tokenizer.end_of_text_name)
        # the head of a message in the text of a conversation
        self._head = re.compile(rf"{end}({'|'.join(ROLES)})\n")
        self.max_length = self._model.config.block_size
        sequences = 0 if str(batch_size).startswith("auto") else int(batch_size)
        self._batch_tokens = sequences * self.max_length
        self._chat = False  # the texts of the tasks are conversations

    @property
    def eot_token_id(self) -> int:
        """End of text, which also stands for an empty context."""
        return self._tokenizer.end_of_text

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self._tokenizer.sha256 if self._model.own_tokenizer else self._tokenizer.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text, or of a conversation as `apply_chat_template` writes it."""
        if not self._chat:
            return self._tokenizer.encode(string)
        if self._tokenizer.template:
            return self._tokenizer.template.encode(string)
        first, *messages = self._head.split(string)  # then role, text, role, text, …
        ids = self._tokenizer.encode(first)
        for role, text in zip(messages[::2], messages[1::2], strict=True):
            ids += [self._tokenizer.end_of_text, *self._tokenizer.encode(f"{role}\n")]
            ids += self._tokenizer.encode(text)
        return ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template for the report of the harness; called with `--apply_chat_template`.

        Raises:
            UserError: another template is named, or the model cannot chat.
        """
        if not chat_template:
            return ""
        if isinstance(chat_template, str):
            raise UserError(
                f"--apply_chat_template={chat_template}: there is one template only, that of "
                "`gpt2 finetune`; write --apply_chat_template alone"
            )
        if getattr(self._model.config, "document_mask", False):
            raise UserError(
                "--apply_chat_template: this model has document_mask, and does not see past the "
                "end-of-text tokens that separate messages"
            )
        self._chat = True
        if self._tokenizer.template:
            return self._tokenizer.template.source
        return f"{self._tokenizer.end_of_text_name}{{role}}\n{{content}}"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; `tok_encode` gives the ids of `data.chat_template`.

        Args:
            chat_history: messages in OpenAI's form.
            add_generation_prompt: end with the head of the assistant's next message; False if the
                last message is the beginning of the assistant's.

        Raises:
            UserError: a message that holds the head of another.
        """
        self._chat = True
        messages = check_messages(chat_history)
        if self._tokenizer.template:
            return self._by_template(messages, add_generation_prompt)
        for message in messages:
            if found := self._head.search(message["content"]):
                raise UserError(
                    f"a text of the task holds {found[0]!r}, which begins a message; leave "
                    "--apply_chat_template out"
                )
        end = self._tokenizer.end_of_text_name
        text = "".join(f"{end}{m['role']}\n{m['content']}" for m in messages)
        return text + f"{end}assistant\n" * add_generation_prompt

    def _by_template(self, messages: list[dict[str, str]], ask: bool) -> str:
        """A conversation as the template of the model writes it."""
        template = self._tokenizer.template
        assert template
        for text in (message["content"] for message in messages):
            if found := [literal for literal in template.special if literal in text]:
                raise UserError(
                    f"a text of the task holds {found[0]!r}, a token of the chat template; leave "
                    "--apply_chat_template out"
                )
        text, last = template.render(messages, ask=ask), messages[-1]["content"]
        return text if ask else text[: text.rindex(last) + len(last)] if last in text else text

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of what continues it.

        The line break that ends the head of a message stays in the context. The harness moves other
        white space of its end to the continuation.
        """
        if self._chat and self._tokenizer.template:
            return self.tok_encode(context), self._tokenizer.encode(continuation)
        if self._chat and self._head.split(context)[-1] == "":
            return self.tok_encode(context), self.tok_encode(continuation)
        return super()._encode_pair(context, continuation)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = score(self._model, pairs, self._rt, "log-likelihoods", self._batch_tokens) or []
        answers = [(-s.nats, s.greedy) for s in scores]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in chunks that overlap by one token."""
        chunks, counts = [], []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            of_text = [(None, *make_disjoint_window(pair)) for pair in pairs]
            chunks += of_text
            counts.append(len(of_text))
        answers = iter(self._loglikelihood_tokens(chunks))
        sums = [sum(next(answers)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that follow the contexts, up to a stop sequence or end of text."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict) -> str:
        given = normalize_gen_kwargs(settings, default_max_gen_toks=256)
        end = self._tokenizer.end_of_text_name
        until = handle_stop_sequences(given.pop("until", None), eos=end)
        count = given.pop("max_gen_toks")
        sampled = given.pop("do_sample", False)
        temperature = given.pop("temperature", 0.0) if sampled else 0.0
        given.pop("temperature", None)
        top_k, top_p = given.pop("top_k", 50 if sampled else 0), given.pop("top_p", 1.0)
        if given or count >= self.max_length:
            wrong = ", ".join(given) or f"max_gen_toks={count} with a context of {self.max_length}"
            raise UserError(f"the task's generation_kwargs cannot be followed: {wrong}")
        begin = [self._tokenizer.end_of_text]
        prompt = (self.tok_encode(context) or begin)[count - self.max_length :]
        ids: list[int] = []
        with self._rt.autocast():
            for (token,) in stream(
                self._model,
                [prompt],
                count,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop_token=turn_end(self._tokenizer),
            ):
                # ids behind the vocabulary have no text
                if token is not None and token < self._tokenizer.vocab_size:
                    ids.append(token)
                text = self._tokenizer.decode(ids)
                if any(stop and stop in text for stop in until):
                    break
        answer = postprocess_generated_text(self._tokenizer.decode(ids), until, None)
        self.cache_hook.add_partial("generate_until", (context, settings), answer)
        return answer
