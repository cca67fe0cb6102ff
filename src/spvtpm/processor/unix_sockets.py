"""Unix sockets on which strangers may knock: how the SP listens, accepts, and sees who it is."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

from spvtpm.files.unix_sockets import MAX_SOCKET_PATH_BYTES
from spvtpm.wire.errors import ResourceError

log = logging.getLogger(__name__)

_ACCEPT_PAUSE_S = 0.05
"""When descriptors are exhausted, the socket stays readable: trying again at once would burn a core."""


def listen(path: Path, allowed_uids: frozenset[int], backlog: int) -> socket.socket:
    """A unix stream socket that listens at `path`; a stale file there is replaced.

    Whom it lets connect is a first hurdle; whoever accepts a connection looks at `peer_of`.

    Args:
        path: of the socket.
        allowed_uids: mode 0600 lets this process's own user and root in, who may be all; mode 0666 everybody.
        backlog: connections that may wait to be accepted.

    Raises:
        ResourceError: the path is too long, or cannot be used.
    """
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise ResourceError(f"the socket path {path} is longer than {MAX_SOCKET_PATH_BYTES} bytes")
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise ResourceError(f"no socket can be had: {error.strerror}") from None
    try:
        path.unlink(missing_ok=True)
        old = os.umask(0o111 if allowed_uids - {0, os.geteuid()} else 0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise ResourceError(f"cannot listen on {path}: {error.strerror}") from None
    return listener


class Acceptor:
    """Hands each new connection of a listening socket to `handle`, in the event loop; pauses when none can be accepted.

    Args:
        listener: closed by `close()`.
        name: for the log.
        handle: owns the connection, which does not block.
    """

    def __init__(self, listener: socket.socket, name: str, handle: Callable[[socket.socket], None]) -> None:
        self._listener = listener
        self._name = name
        self._handle = handle
        self._resuming: asyncio.TimerHandle | None = None
        self._resume()

    def _resume(self) -> None:
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            connection, _address = self._listener.accept()
        except OSError as error:
            log.warning("cannot accept a connection to %s: %s", self._name, error.strerror)
            loop.remove_reader(self._listener)
            self._resuming = loop.call_later(_ACCEPT_PAUSE_S, self._resume)
            return
        connection.setblocking(False)
        self._handle(connection)

    def close(self) -> None:
        """Accepts no more."""
        if self._resuming is not None:
            self._resuming.cancel()
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
