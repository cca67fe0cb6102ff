"""The socket on which the hypervisor commands the SP. Every byte from it is hostile; one bad connection ends alone."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from spvtpm.processor.unix_sockets import Acceptor, listen, peer_uid
from spvtpm.wire.errors import PeerError, SpvtpmError
from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.messages import MAX_REQUEST_BYTES, ErrorReply, Reply, Request, encode_message, parse_request

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
_MAX_SENTENCE = 2048
_CLOSE_PATIENCE_S = 10.0

Carry = Callable[[Request], Awaitable[Reply]]


class HypervisorPort:
    """Accepts connections at `path` and has their requests carried out.

    Args:
        path: of the socket.
        allowed_uids: whose processes may command.
        carry_out: does one request; a `SpvtpmError` becomes an `ErrorReply`.

    Raises:
        ResourceError: the socket cannot be had.
    """

    def __init__(self, path: Path, allowed_uids: frozenset[int], carry_out: Carry) -> None:
        self._path = path
        self._allowed_uids = allowed_uids
        self._carry_out = carry_out
        self._connections: dict[asyncio.Task[None], socket.socket] = {}
        self._acceptor = Acceptor(listen(path, allowed_uids, MAX_CONNECTIONS), path.name, self._admit)

    def _admit(self, connection: socket.socket) -> None:
        refusal = self._refusal(peer_uid(connection))
        if refusal is not None:
            log.warning("refused a hypervisor connection: %s", refusal.message)
            with connection, suppress(OSError):
                connection.send(encode_frame(encode_message(refusal)))
            return
        task = asyncio.get_running_loop().create_task(self._serve(connection))
        self._connections[task] = connection
        task.add_done_callback(self._connections.pop)

    def _refusal(self, uid: int) -> ErrorReply | None:
        if uid not in self._allowed_uids:
            return ErrorReply("permission", f"user {uid} may not command this secure processor")
        if len(self._connections) >= MAX_CONNECTIONS:
            return ErrorReply("resource", f"this secure processor takes {MAX_CONNECTIONS} connections at a time")
        return None

    async def _serve(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        decoder = FrameDecoder(MAX_REQUEST_BYTES)
        with connection, suppress(OSError):
            try:
                while data := await loop.sock_recv(connection, MAX_REQUEST_BYTES):
                    for frame in decoder.feed(data):
                        await loop.sock_sendall(connection, encode_frame(encode_message(await self._answer(frame))))
            except PeerError as error:  # the stream is lost: say why, then close
                log.warning("closed a hypervisor connection: %s", error)
                await loop.sock_sendall(connection, encode_frame(encode_message(ErrorReply(error.code, str(error)))))

    async def _answer(self, frame: bytes) -> Reply:
        try:
            return await self._carry_out(parse_request(frame))
        except SpvtpmError as error:
            return ErrorReply(error.code, str(error)[:_MAX_SENTENCE])
        except Exception:
            log.exception("a hypervisor request met a defect")
            return ErrorReply("internal", "the secure processor met a defect; its log says more")

    async def close(self) -> None:
        """Takes no more requests; returns once those under way are carried out."""
        self._acceptor.close()
        self._path.unlink(missing_ok=True)
        for connection in self._connections.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
        if self._connections:
            _done, late = await asyncio.wait(self._connections, timeout=_CLOSE_PATIENCE_S)
            for task in late:  # its peer does not read the answer
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
