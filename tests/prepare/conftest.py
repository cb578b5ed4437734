"""Shared by the tests of preparing."""

import threading

import pytest

from gpt2.prepare import fast_tokenizer

_made: list[tuple[threading.Thread, object]] = []  # with the thread that has each


@pytest.fixture(autouse=True)
def _gigatoken_tokenizers_are_used_again(monkeypatch):
    """One takes 0.3 s to make; a thread gets that of another which has ended."""
    make = fast_tokenizer._gigatoken

    def lend():
        for i, (thread, tokenizer) in enumerate(_made):
            if not thread.is_alive():
                _made[i] = threading.current_thread(), tokenizer
                return tokenizer
        _made.append((threading.current_thread(), make()))
        return _made[-1][1]

    monkeypatch.setattr(fast_tokenizer, "_gigatoken", lend)
