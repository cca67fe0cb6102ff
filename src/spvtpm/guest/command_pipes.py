"""The pipes of a command that runs in the VM: what it reads, and what it writes."""

from __future__ import annotations

import fcntl
import os
import queue
import select
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import IO, Final

from spvtpm.wire.console import PIECE_BYTES

_INT: Final = struct.Struct("i")


def pieces(pipe: IO[bytes], quiet: int) -> Iterator[bytes]:
    """What comes out of a pipe, until its end; once descriptor `quiet` is readable, no more than is in it already."""
    poll = select.poll()
    for descriptor in (pipe.fileno(), quiet):
        poll.register(descriptor, select.POLLIN)
    while quiet not in {descriptor for descriptor, _event in poll.poll()}:
        data = os.read(pipe.fileno(), PIECE_BYTES)
        if not data:
            return
        yield data
    (left,) = _INT.unpack(fcntl.ioctl(pipe, termios.FIONREAD, bytes(_INT.size)))
    while left > 0 and (data := os.read(pipe.fileno(), min(left, PIECE_BYTES))):
        left -= len(data)
        yield data


def write_pieces(pipe: IO[bytes], waiting: queue.SimpleQueue[bytes], taken: Callable[[], None]) -> None:
    """Writes what is waiting, and tells of each piece that is written; until an empty one, or until nobody reads any more.

    Args:
        pipe: is closed in the end.
        waiting: the pieces.
        taken: hears of each.
    """
    with suppress(OSError), closing(pipe):
        while piece := memoryview(waiting.get()):
            while piece:
                piece = piece[os.write(pipe.fileno(), piece) :]
            taken()
