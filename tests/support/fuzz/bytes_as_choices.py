"""Reads choices out of bytes, so that a fuzzer that mutates bytes changes one choice at a time."""

from collections.abc import Sequence
from typing import TypeVar

ItemT = TypeVar("ItemT")


class Choices:
    """Takes choices from the front of the bytes. When they run out, every choice is the first."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, below: int) -> int:
        """Returns a number in [0, below), from one byte, or from two if one has not enough values."""
        num_bytes = 1 if below <= 256 else 2
        return int.from_bytes(self.take(num_bytes), "little") % below

    def one_of(self, items: Sequence[ItemT]) -> ItemT:
        """Returns one of the items."""
        return items[self.number(len(items))]

    def take(self, num_bytes: int) -> bytes:
        """Returns so many bytes, fewer at the end."""
        part = self._data[self._at : self._at + num_bytes]
        self._at += len(part)
        return part

    def rest(self) -> bytes:
        """Returns what is left."""
        return self.take(len(self._data))
