"""`ServedModel`: the facts about the model that requests are checked against."""

from dataclasses import dataclass, field
from typing import Any

from ..tokenizer import Tokenizer, gpt2_tokenizer

MAX_TEXTS = 128  # of one request: prompts times n


@dataclass(frozen=True)
class ServedModel:
    """Name and limits of the model that the server runs.

    Args:
        name: as clients write it in `model`.
        block_size: context length in tokens.
        vocab_size: ids of a prompt are below it.
        chat: trained (fine-tuned on conversations), untrained, or impossible (the network's
            document_mask hides earlier messages).
        max_texts: texts that one request may ask for.
        max_new_tokens: limit per text; 0 for no limit but the context.
        created: seconds since 1970.
        tokenizer: the model's.
    """

    name: str
    block_size: int
    vocab_size: int
    chat: str
    max_texts: int = MAX_TEXTS
    max_new_tokens: int = 0
    created: int = 0
    tokenizer: Tokenizer = field(default_factory=gpt2_tokenizer)

    def card(self) -> dict[str, Any]:
        """The model's entry in /v1/models."""
        longest = min(self.max_new_tokens or self.block_size, self.block_size)
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "gpt2",
            "context_length": self.block_size,
            "max_new_tokens": longest,
            "chat": self.chat,
        }
