"""A relay between a terminal and a secure processor that does as a test says, and one that only pretends to lead to one."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES

Side = Literal["owner", "sp"]
"""Who has sent a frame."""

Hook = Callable[[Side, int, bytes], list[bytes]]
"""What becomes of a side's n-th frame on a connection: what is handed on in its place. `Cut` and `Held` end the connection."""


class Cut(Exception):
    """The relay ends the connection."""


class Held(Exception):
    """The relay ends the sender's connection, keeps the other one, and may use it: `Relay.inject`."""


def honest(_side: Side, _number: int, frame: bytes) -> list[bytes]:
    """Hands everything on."""
    return [frame]


class Relay:
    """Listens at `path`, and joins each connection with one of its own to `target`. Keeps all that it has seen.

    Args:
        path: of its socket.
        target: the secure processor's channel socket; None: it leads nowhere, and `hook` answers alone.
        hook: may be changed at any time.
        take_s: a side that takes nothing for so long is cut off; None: never.
    """

    def __init__(self, path: Path, target: Path | None, hook: Hook = honest, take_s: float | None = None) -> None:
        self.path, self.target, self.hook, self.take_s = path, target, hook, take_s
        self.seen: list[tuple[Side, bytes]] = []
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        self._held: set[socket.socket] = set()
        self._news = threading.Condition()
        self._to_sp: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._start(self._accept)

    def frames(self, side: Side) -> list[bytes]:
        """What this side has sent."""
        return [frame for sender, frame in self.seen if sender == side]

    def await_frames(self, side: Side, number: int) -> None:
        """Until this side has sent so many."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.frames(side)) >= number, 30), len(self.frames(side))

    def inject(self, frame: bytes) -> bytes:
        """Hands a frame on to the secure processor in the last connection to it; gives the frame that it answers with."""
        with self._news:
            before = len(self.frames("sp"))
            self._to_sp[-1].sendall(encode_frame(frame))
            assert self._news.wait_for(lambda: len(self.frames("sp")) > before, 30)
        return self.frames("sp")[before]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(self._listener)
        for connection in self._open:
            self._end(connection)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()
        for connection in self._open:
            connection.close()

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=run, args=arguments, daemon=True))
        self._threads[-1].start()

    @staticmethod
    def _end(connection: socket.socket) -> None:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                owner, _ = self._listener.accept()
                self._open.append(owner)
                self._limit(owner)
                sp = None
                if self.target is not None:
                    sp = socket.socket(socket.AF_UNIX)
                    sp.connect(str(self.target))
                    self._open.append(sp)
                    self._limit(sp)
                    self._to_sp.append(sp)
                    self._start(self._carry, "sp", sp, owner)
                self._start(self._carry, "owner", owner, sp or owner)

    def _limit(self, connection: socket.socket) -> None:
        if self.take_s is not None:  # of sending alone, so not `settimeout`
            limit = struct.pack("@ll", int(self.take_s), int(self.take_s % 1 * 1_000_000))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def _carry(self, side: Side, source: socket.socket, destination: socket.socket) -> None:
        decoder, number = FrameDecoder(MAX_CHANNEL_FRAME_BYTES), 0
        with suppress(OSError, Cut):
            while data := source.recv(1 << 16):
                for frame in decoder.feed(data):
                    with self._news:
                        self.seen.append((side, frame))
                        self._news.notify_all()
                    try:
                        self._hand_on(destination, self.hook(side, number, frame))
                    except Held:
                        self._held.add(source)
                        self._end(source)
                        return
                    number += 1
        self._end(source)
        self._end(destination)

    def _hand_on(self, destination: socket.socket, frames: list[bytes]) -> None:
        if destination not in self._held:
            for frame in frames:
                destination.sendall(encode_frame(frame))
