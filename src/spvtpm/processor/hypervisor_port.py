"""The socket on which the hypervisor commands the SP. Every byte from it is hostile; one bad connection ends alone."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from spvtpm.processor.connections import Connections
from spvtpm.wire.errors import PeerError, SpvtpmError
from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.messages import (
    MAX_REQUEST_BYTES,
    Reply,
    Request,
    encode_message,
    error_reply,
    parse_request,
)

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64

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
        self._carry_out = carry_out
        self._connections = Connections(path, allowed_uids, MAX_CONNECTIONS, self._serve, _refusal)

    async def _serve(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        decoder = FrameDecoder(MAX_REQUEST_BYTES)
        try:
            while data := await loop.sock_recv(connection, MAX_REQUEST_BYTES):
                for frame in decoder.feed(data):
                    await loop.sock_sendall(connection, encode_frame(encode_message(await self._answer(frame))))
        except PeerError as error:  # the stream is lost: say why, then close
            log.warning("closed a hypervisor connection: %s", error)
            await loop.sock_sendall(connection, _refusal(error))

    async def _answer(self, frame: bytes) -> Reply:
        try:
            return await self._carry_out(parse_request(frame))
        except SpvtpmError as error:
            return error_reply(error)
        except Exception:
            log.exception("a hypervisor request met a defect")
            return error_reply(SpvtpmError("the secure processor met a defect; its log says more"))

    async def close(self) -> None:
        """Takes no more requests; returns once those under way are carried out."""
        await self._connections.close()


def _refusal(error: SpvtpmError) -> bytes:
    return encode_frame(encode_message(error_reply(error)))
