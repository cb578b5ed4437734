"""The key-value store that the ranks of one run share."""

from typing import Protocol


class Store(Protocol):
    """Strings that all ranks share; torch's `TCPStore` is one."""

    def set(self, key: str, value: str) -> None:
        """Stores a value."""

    def get(self, key: str) -> bytes:
        """The value; waits until there is one."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys have a value."""
