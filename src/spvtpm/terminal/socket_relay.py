"""A relay behind a unix socket: the secure processor's own, or that of somebody who hands on what comes."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from spvtpm.terminal.relay import OpenRelay
from spvtpm.wire.errors import ChannelError, FrameError, NotRunning, PermissionRefused
from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES

_READ_BYTES = 1 << 16


class SocketRelay:
    """A connection to a relay's socket.

    Args:
        path: of the relay's socket, or of an SP's state directory, in which it is `run/channel.sock`.
        timeout_s: how long a message, one way, may take.

    Raises:
        NotRunning: nobody listens there.
        PermissionRefused: this user may not connect.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._decoder = FrameDecoder(MAX_CHANNEL_FRAME_BYTES)
        self._waiting: list[bytes] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout_s)
        try:
            if path.is_dir():
                path = path / "run" / "channel.sock"
            self._socket.connect(str(path))
        except PermissionError:
            self._socket.close()
            raise PermissionRefused(f"this user may not connect to {path}") from None
        except OSError as error:
            self._socket.close()
            raise NotRunning(f"no secure processor answers at {path}: {error.strerror or error}") from None
        self._source = self._socket.dup()  # a thread that sends and one that receives have time limits of their own

    def deadline(self) -> float:
        """As `Relay` has it; so the others."""
        return time.monotonic() + self._timeout_s

    def send(self, frames: Iterable[bytes]) -> None:
        deadline = self.deadline()
        try:
            for frame in frames:
                self._socket.settimeout(_left(deadline))
                self._socket.sendall(encode_frame(frame))
        except TimeoutError:
            raise ChannelError("the other side takes nothing more") from None
        except (BrokenPipeError, ConnectionResetError):
            return  # what was said before the connection ended is still to be read, and worth more
        except OSError as error:
            raise ChannelError(f"the connection broke: {error.strerror or error}") from None

    def receive(self, deadline: float) -> bytes:
        while not self._waiting:
            try:
                self._source.settimeout(_left(deadline))
                data = self._source.recv(_READ_BYTES)
            except TimeoutError:
                raise ChannelError("the other side did not answer in time") from None
            except OSError as error:
                raise ChannelError(f"the connection broke: {error.strerror or error}") from None
            if not data:
                raise ChannelError("the connection was closed before the other side had answered")
            try:
                self._waiting += self._decoder.feed(data)
            except FrameError as error:
                raise FrameError(f"what answers at this socket is no secure processor's channel: {error}") from None
        return self._waiting.pop(0)

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._source.close()


def through_socket(path: Path) -> OpenRelay:
    """The way through a relay's socket, or to the SP of a state directory."""
    return partial(SocketRelay, path)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
