"""The windows of a VM's console: how much of what a side does not take may be on its way to it, and so in its memory.

Each side counts what it has sent (`Room`) and what has come (`Intake`), both in pieces. Nothing here speaks with anybody; all is
thread-safe.

Source: the mechanism is that of SSH, RFC 4254, section 5.2. Format: docs/formats/console.md.
"""

from __future__ import annotations

import threading

from spvtpm.wire.console import WINDOW_PIECES
from spvtpm.wire.errors import MessageError

_TOLD_AT_ONCE = WINDOW_PIECES // 4
"""So many pieces are taken before it is said. Fewer than a window: whoever waits for room is told of some while he waits."""


class Room:
    """Of one who sends: whether another piece may go. Life: construct → `await_piece`, `give_back` … → `close`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._on_the_way = 0
        self._is_closed = False

    def await_piece(self) -> bool:
        """Waits until a piece may go, which then counts as sent; False: none may any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._on_the_way < WINDOW_PIECES)
            if self._is_closed:
                return False
            self._on_the_way += 1
            return True

    def give_back(self, pieces: int) -> None:
        """The other side has taken so many.

        Raises:
            MessageError: it has not been sent so many.
        """
        with self._changed:
            if pieces > self._on_the_way:
                raise MessageError(f"{pieces} pieces taken, and {self._on_the_way} were on their way")
            self._on_the_way -= pieces
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing goes any more; whoever waits is told."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class Intake:
    """Of one who receives: what the other side may still send."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._come = 0
        self._taken = 0

    def come(self) -> None:
        """A piece is here.

        Raises:
            MessageError: it is more than a window.
        """
        with self._lock:
            if self._come == WINDOW_PIECES:
                raise MessageError(f"more than {WINDOW_PIECES} pieces that nobody has taken yet")
            self._come += 1

    def taken(self) -> int:
        """A piece has been given on. How many are to be told now as taken, before another one is; mostly none."""
        with self._lock:
            self._taken += 1
            if self._taken < _TOLD_AT_ONCE:
                return 0
            told, self._taken = self._taken, 0
            self._come -= told
            return told
