"""So many of something at a time, for each user, each host, or in all. Streams and relays come in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from spvtpm.wire.errors import TooMany


class Places:
    """A bounded number of places for each key; one event loop's."""

    def __init__(self, most: int, what: str) -> None:
        """
        Args:
            most: for each key.
            what: of which there may be so many, in the plural, for the sentence.
        """
        self._most = most
        self._what = what
        self._taken: Counter[str] = Counter()

    @contextmanager
    def taken(self, key: str = "") -> Iterator[None]:
        """Has a place meanwhile.

        Raises:
            TooMany: none is free.
        """
        if self._taken[key] >= self._most:
            raise TooMany(f"there are {self._most} {self._what} already")
        self._taken[key] += 1
        try:
            yield
        finally:
            self._taken[key] -= 1
            if not self._taken[key]:
                del self._taken[key]
