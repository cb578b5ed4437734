"""Chat templates of strangers: rendered by a process of their own, within limits.

A template of a model is Jinja, and turns messages into text (transformers' `apply_chat_template`).
"""

import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from .display import shown
from .template_worker import receive, send

MAX_TEMPLATE = 2**17  # characters of a template
MAX_TEXT_BYTES = 2**26  # of a rendered conversation
SECONDS = 10  # for one conversation, the start of the process included
# What `data.chat_template.jinja_template` writes, whichever token ends a text.
OURS = re.compile(
    r"\{% for message in messages %\}\{\{ '[^']+' \+ message\['role'\] \+ '\\n' \+ "
    r"message\['content'\] \}\}\{% endfor %\}\{% if add_generation_prompt %\}.*"
)


def template_source(settings: dict[str, Any], jinja: bytes | None) -> str:
    """The default chat template in a model's files, in Jinja; "" without one.

    Args:
        settings: of tokenizer_config.json.
        jinja: content of chat_template.jinja, which comes first; None without the file.
    """
    if jinja is not None:
        return jinja.decode("utf-8", "replace")
    source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        found = [t.get("template") for t in source if isinstance(t, dict)
                 and t.get("name") == "default"]  # fmt: skip
        source = found[0] if found else None
    return source if isinstance(source, str) else ""


@dataclass(frozen=True)
class ModelTemplate:
    """The chat template that a model brings.

    Args:
        source: in Jinja.
        where: file or folder, for messages.
        variables: bos_token, eos_token and others, as text.
        special: texts that are tokens where the template writes them, and text in messages.
        turn_end: id of the token that ends an answer.
        encode: ids of a text in which `special` are tokens.
        error: why it cannot be used; empty: it can.
    """

    source: str
    where: str
    variables: dict[str, str]
    special: tuple[str, ...]
    turn_end: int
    encode: Callable[[str], list[int]]
    error: str = ""

    def render(self, messages: Sequence[dict[str, str]], *, ask: bool) -> str:
        """The text of a conversation.

        Args:
            messages: with role and content.
            ask: end with the head of the assistant's next message.

        Raises:
            UserError: the template refuses the messages, is damaged, or takes too much.
        """
        if self.error:
            raise UserError(self.error)
        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        try:
            given = {**self.variables, "messages": plain, "add_generation_prompt": ask}
            return _renderer(os.getpid()).render(self.source, given)
        except ValueError as error:
            reason = shown(first_line(error))
            raise UserError(f"{self.where}: its chat template fails: {reason}") from None


class _Renderer:
    """The process that renders; threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, source: str, values: dict) -> str:
        """The rendered text; raises ValueError with the reason if there is none."""
        if len(source) > MAX_TEMPLATE:
            raise ValueError(f"it has over {MAX_TEMPLATE:,} characters")
        with self._lock:
            process = self._running()
            assert process.stdin
            assert process.stdout
            late = threading.Timer(SECONDS, process.kill)
            late.start()
            try:
                send(process.stdin, json.dumps([source, values]).encode())
                answer = receive(process.stdout, MAX_TEXT_BYTES)
            except OSError:
                answer = b""
            finally:
                late.cancel()
            if not answer:
                process.kill()
                process.communicate()  # waits for its end
                raise ValueError(f"it takes over {SECONDS} seconds, or too much memory")
        text = answer[1:].decode("utf-8", "replace")
        if answer[:1] != b"+":
            raise ValueError(text)
        return text

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:  # Ctrl-C, or too slow
            script = Path(__file__).with_name("template_worker.py")
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process


@functools.cache
def _renderer(pid: int) -> _Renderer:
    """One for each process: a fork must not write into its parent's pipes."""
    return _Renderer()
