"""GPT-2 from scratch: `from gpt2 import GPT2`."""

__all__ = ["GPT2"]


def __getattr__(name: str):
    if name == "GPT2":  # imported when asked for: torch takes seconds, `gpt2 --help` must not
        from .api import GPT2

        return GPT2
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
