"""The connections of one socket on which strangers may knock: who may, how many at a time, and an end in order."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path

from spvtpm.files.unix_sockets import peer_of
from spvtpm.processor.unix_sockets import Acceptor, listen
from spvtpm.wire.errors import PermissionRefused, ResourceError, SpvtpmError

log = logging.getLogger(__name__)

_CLOSE_PATIENCE_S = 10.0

Serve = Callable[[socket.socket], Coroutine[None, None, None]]


class Connections:
    """Accepts connections at `path` and serves each in a task of its own.

    Args:
        path: of the socket.
        allowed_uids: whose processes may connect.
        limit: connections at a time.
        serve: one connection, to its end; whoever calls it closes the connection.
        refusal: bytes to send to somebody who is turned away.

    Raises:
        ResourceError: the socket cannot be had.
    """

    def __init__(
        self,
        path: Path,
        allowed_uids: frozenset[int],
        limit: int,
        serve: Serve,
        refusal: Callable[[SpvtpmError], bytes],
    ) -> None:
        self._path = path
        self._allowed_uids = allowed_uids
        self._limit = limit
        self._serve = serve
        self._refusal = refusal
        self._open: dict[asyncio.Task[None], socket.socket] = {}
        self._acceptor = Acceptor(listen(path, allowed_uids, limit), path.name, self._admit)

    def _admit(self, connection: socket.socket) -> None:
        refused = self._refused(peer_of(connection).uid)
        if refused is not None:
            log.warning("turned a connection to %s away: %s", self._path.name, refused)
            with connection, suppress(OSError):
                connection.send(self._refusal(refused))
            return
        task = asyncio.get_running_loop().create_task(self._run(connection))
        self._open[task] = connection
        task.add_done_callback(self._open.pop)

    def _refused(self, uid: int) -> SpvtpmError | None:
        if uid not in self._allowed_uids:
            return PermissionRefused(f"user {uid} may not command this secure processor")
        if len(self._open) >= self._limit:
            return ResourceError(f"this secure processor takes {self._limit} connections at a time")
        return None

    async def _run(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            await self._serve(connection)

    async def close(self) -> None:
        """Takes no more connections, hears no more from those that are there; returns once what was begun is done."""
        self._acceptor.close()
        self._path.unlink(missing_ok=True)
        for connection in self._open.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
        if self._open:
            _done, late = await asyncio.wait(self._open, timeout=_CLOSE_PATIENCE_S)
            for task in late:  # its peer does not read the answer
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
