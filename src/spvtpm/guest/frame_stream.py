"""Frames over one unix stream connection, for the machine's sockets: blocking, with a time for each."""

from __future__ import annotations

import select
import socket
import time
from contextlib import suppress

from spvtpm.wire.errors import ChannelError
from spvtpm.wire.framing import FrameDecoder, encode_frame

_READ_BYTES = 1 << 16
_SEND_S = 60.0


class FrameStream:
    """One connection. One thread receives; sends must not overlap.

    Args:
        connection: stays the caller's to close.
        max_frame_bytes: the longest frame that the other side may send.
    """

    def __init__(self, connection: socket.socket, max_frame_bytes: int) -> None:
        self._connection = connection
        self._decoder = FrameDecoder(max_frame_bytes)
        self._waiting: list[bytes] = []
        connection.settimeout(_SEND_S)

    def has_gone(self) -> bool:
        """Whether the other side has closed."""
        poll = select.poll()
        poll.register(self._connection, select.POLLRDHUP)
        return bool(poll.poll(0))

    def receive(self, deadline: float | None, or_readable: int | None = None) -> bytes | None:
        """The next frame; None: there was none until the deadline, or the other descriptor is readable.

        Args:
            deadline: by `time.monotonic`; None: there is none.
            or_readable: a descriptor that ends the waiting.

        Raises:
            ChannelError: there is none any more.
            FrameError: it is too long, or empty.
        """
        while not self._waiting:
            poll = select.poll()
            poll.register(self._connection, select.POLLIN)
            if or_readable is not None:
                poll.register(or_readable, select.POLLIN)
            ready = {descriptor for descriptor, _event in poll.poll(_left_ms(deadline))}
            if not ready or or_readable in ready:
                return None
            try:
                data = self._connection.recv(_READ_BYTES)
            except OSError as error:
                raise ChannelError(f"the connection broke: {error.strerror or error}") from None
            if not data:
                raise ChannelError("the connection was closed")
            self._waiting += self._decoder.feed(data)
        return self._waiting.pop(0)

    def send(self, *frames: bytes) -> None:
        """Sends frames.

        Raises:
            ChannelError: nobody takes them. Whoever receives hears of that, too.
        """
        try:
            for frame in frames:
                self._connection.sendall(encode_frame(frame))
        except TimeoutError:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)  # what comes behind a part of a frame means nothing
            raise ChannelError("the other side takes nothing more") from None
        except OSError as error:
            raise ChannelError(f"the connection broke: {error.strerror or error}") from None


def _left_ms(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
