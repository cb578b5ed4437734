"""`gpt2 sample` and `gpt2 chat`: generation in the terminal."""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ..api import GPT2, TextModel
from ..checkpoint.weights import locate
from ..config.commands import ChatConfig, SampleConfig, WritingConfig
from ..data.chat_template import Message, encode_prompt, fit, turn_end
from ..errors import UserError
from ..files import check_replaceable
from ..generate.sampling import check_sampling
from ..generate.stream import TextWriter, stream
from ..report import console
from ..untrusted.display import shown
from ..untrusted.parsing import to_json

HELP = """/reset            forget what was said (not the system message)
/system TEXT      tell the model what it is, and begin anew; without TEXT: nothing
/save FILE.jsonl  append the conversation, as `gpt2 finetune --data=` reads it
/help, /quit      Ctrl-C ends an answer"""

UNTRAINED = (
    "This model has not been trained on conversations: it imitates them rather than answering. "
    "`gpt2 sample` continues a text, `gpt2 finetune` teaches it to answer."
)


def sample(path: str, config: SampleConfig) -> int:
    """Continues `--prompt=`; an empty one begins a new document. Returns an exit code."""
    model = _load(path, config)
    for number in range(config.num_samples):
        _write_sample(model, config, config.prompt, number)
    return 0


def sample_at_keyboard(path: str, config: SampleConfig) -> int:
    """Continues one prompt after the other from the keyboard; returns an exit code."""
    model = _load(path, config)
    print("Type a beginning and press Enter; an empty line ends.", flush=True)
    number = 0
    while prompt := _ask() or "":
        _write_sample(model, config, prompt, number)
        number += 1
    return 0


class Chat:
    """A conversation with a model.

    Args:
        model: fine-tuned on conversations.
        config: sampling and length of answers.
    """

    def __init__(self, model: TextModel, config: ChatConfig):
        model.tokenizer.check()
        self.model, self.config = model, config
        self.messages: list[Message] = []
        self.answers = 0
        self.begin(config.system)

    def begin(self, system: str) -> None:
        """Forgets all messages and sets the system message; "" for none."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str) -> Generator[str, None, None]:
        """Yields the answer to a message in pieces; one that is cut short stays in the history.

        When the conversation outgrows the context, the oldest messages are left out.

        Raises:
            UserError: the message is too long; it is not kept.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        longest = min(self.config.max_new_tokens, self.model.config.block_size // 2)
        tokenizer = self.model.tokenizer
        fitting = fit(asked, self.model.config.block_size - longest, tokenizer)
        prompt = encode_prompt(fitting, tokenizer)
        seed = self.config.seed + self.answers if self.config.seed >= 0 else None
        tokens = stream(
            self.model,
            [prompt],
            longest,
            seed=seed,
            stop_token=turn_end(tokenizer),
            **_sampling(self.config),
        )
        writer, written = TextWriter(tokenizer=tokenizer), ""
        try:
            for (token,) in tokens:
                if token == tokenizer.end_of_text:
                    break
                if token is not None and (piece := writer.add(token)):
                    written += piece
                    yield piece
            if rest := writer.finish():
                written += rest
                yield rest
        finally:
            self.messages = [*asked, {"role": "assistant", "content": written}]
            self.answers += 1

    def save(self, path: str) -> None:
        """Appends the conversation to a .jsonl file; raises UserError when that is impossible."""
        check_replaceable(Path(path), b"{", ".jsonl file of conversations")
        try:
            with open(path, "ab") as file:
                file.write(to_json({"messages": self.messages}) + b"\n")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def chat(path: str, config: ChatConfig) -> int:
    """Chats until `/quit` or the end of the input; returns an exit code."""
    from ..data.conversations import chat_kind  # `sample` does without it, and begins sooner

    model = _load(path, config)
    kind = chat_kind(locate(path), model.config, model.tokenizer)
    if kind == "impossible":
        raise UserError(
            f"{path} has document_mask: the end-of-text tokens between messages hide them from one "
            "another; `gpt2 sample` continues texts with it"
        )
    talk = Chat(model, config)
    with contextlib.suppress(
        ImportError
    ):  # Windows has no readline; its console edits lines itself
        import readline  # noqa: F401 - makes input() edit, and bring back what was written
    if kind == "untrained":
        print(UNTRAINED, flush=True)
    print("Type a message and press Enter; /help tells the rest.", flush=True)
    while (line := _ask()) is not None and line.strip() != "/quit":
        try:
            if line.startswith("/"):
                _run_command(talk, line)
            elif line.strip():
                _write_answer(talk, line)
        except UserError as error:
            console.error(str(error))
    return 0


def _run_command(talk: Chat, line: str) -> None:
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/reset":
        talk.begin(next((m["content"] for m in talk.messages if m["role"] == "system"), ""))
    elif command == "/system":
        talk.begin(rest)
    elif command == "/save" and rest and talk.messages:
        talk.save(rest)
        print(f"appended to {shown(Path(rest))}", flush=True)
    elif command == "/save":
        raise UserError("write /save FILE.jsonl, after something was said")
    elif command == "/help":
        print(HELP, flush=True)
    else:
        raise UserError(f"no command {command}; /help lists them")


def _write_answer(talk: Chat, text: str) -> None:
    pieces = talk.answer(text)
    try:
        for piece in pieces:
            print(_visible(piece), end="", flush=True)
    except KeyboardInterrupt:  # ends the answer, not the conversation
        pieces.close()
    print(flush=True)


def _load(path: str, config: WritingConfig) -> TextModel:
    check_sampling(config.max_new_tokens, **_sampling(config))
    model = GPT2.from_pretrained(path, device=config.device)
    return model.bfloat16() if config.dtype == "bfloat16" else model


def _sampling(config: WritingConfig) -> dict[str, Any]:
    return {
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "min_p": config.min_p,
        "repetition_penalty": config.repetition_penalty,
    }


def _write_sample(model: TextModel, config: SampleConfig, prompt: str, number: int) -> None:
    """Prints a prompt and its continuation as it is generated."""
    print(_visible(prompt), end="", flush=True)
    pieces = model.stream(
        prompt,
        config.max_new_tokens,
        stop=config.stop or (),
        seed=config.seed + number if config.seed >= 0 else None,
        **_sampling(config),
    )
    for piece in pieces:
        print(_visible(piece), end="", flush=True)
    print("\n", flush=True)


def _visible(text: str) -> str:
    """Text of a model for a terminal, which would obey escape codes; line breaks and tabs stay."""
    return shown(text, limit=0, keep="\n\t")


def _ask() -> str | None:
    """A line, or None at the end of the input."""
    try:
        return input("> ")
    except EOFError:
        return None
