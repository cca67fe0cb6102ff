"""A fuzzer's bytes read as decisions: numbers, choices, pieces, damage. Every input means something; none is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_MOST_EDITS = 4


class Program:
    """Reads decisions from the front of the input; where it has ended, all numbers are 0.

    Args:
        data: the input.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Whether there is something left."""
        return self._at < len(self._data)

    def number(self, size_bytes: int = 1) -> int:
        """An unsigned number, little-endian."""
        return int.from_bytes(self.take(size_bytes), "little")

    def below(self, bound: int) -> int:
        """A number from 0 to `bound` - 1."""
        return self.number((bound.bit_length() + 7) // 8) % bound

    def choose(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def take(self, size_bytes: int) -> bytes:
        """The next bytes, fewer at the end."""
        piece = self._data[self._at : self._at + size_bytes]
        self._at += len(piece)
        return piece

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))

    def damage(self, content: bytes) -> bytes:
        """The content after up to three changes of bits, bytes, or length; often none."""
        changed = bytearray(content)
        for _ in range(max(0, self.below(2 * _MOST_EDITS) - _MOST_EDITS)):
            at = self.below(len(changed) + 1)
            kind = self.below(6)
            if kind == 0 and at < len(changed):
                changed[at] ^= 1 << self.below(8)
            elif kind == 1:
                piece = self.take(self.below(9))
                changed[at : at + len(piece)] = piece
            elif kind == 2:
                changed[at:at] = self.take(self.below(9))
            elif kind == 3:
                del changed[at : at + 1 + self.below(16)]
            elif kind == 4:
                del changed[at:]
            else:
                changed[at:at] = changed[at : at + 1 + self.below(64)]
        return bytes(changed)
