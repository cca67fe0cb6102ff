"""The socket for what moves between secure processors (`wire/migration.py`). Every byte from it is hostile."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from typing import Final

from spvtpm.processor.connections import Connections
from spvtpm.processor.migration.manager import Migration
from spvtpm.processor.migration.peers import Peers
from spvtpm.processor.relay_socket import RelaySocket
from spvtpm.wire.errors import NotFound, SpvtpmError
from spvtpm.wire.framing import encode_frame
from spvtpm.wire.messages import error_reply
from spvtpm.wire.migration import Link, MemoryIn, Opening, encode_migration, parse_opening

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 256
_OPENING_S: Final = 20.0


class MigrationPort:
    """Accepts connections at `path`, and hands them to their handoffs.

    Args:
        path: of the socket.
        allowed_uids: whose processes may connect.
        migration: all handoffs.
        peers: is told of revocation lists that come along.

    Raises:
        ResourceError: the socket cannot be had.
    """

    def __init__(self, path: Path, allowed_uids: frozenset[int], migration: Migration, peers: Peers) -> None:
        self._migration = migration
        self._peers = peers
        self._connections = Connections(path, allowed_uids, MAX_CONNECTIONS, self._serve, _refusal)

    async def _serve(self, connection: socket.socket) -> None:
        relay = RelaySocket(connection)
        try:
            async with asyncio.timeout(_OPENING_S):
                opening = parse_opening(await relay.receive())
            await self._hand_over(opening, relay)
        except TimeoutError:
            log.info("a connection for a migration said, or took, nothing in time")
        except SpvtpmError as error:
            log.warning("a connection for a migration was refused, or broke: %s", error)
            await relay.send(encode_migration(error_reply(error)))

    async def _hand_over(self, opening: Opening, relay: RelaySocket) -> None:
        leaving, coming = self._migration.outgoing(opening.handoff), self._migration.incoming(opening.handoff)
        if isinstance(opening, Link):
            await self._peers.learn(opening.revoked)
            side = leaving or coming
            if side is None:
                raise NotFound(f"no handoff {opening.handoff.hex()} is under way here")
            try:
                await side.serve_link(relay)
            finally:
                if coming is not None:
                    self._migration.link_ended(coming)
        elif isinstance(opening, MemoryIn):
            if leaving is None:
                raise NotFound(f"no VM leaves in a handoff {opening.handoff.hex()}")
            await leaving.serve_memory(relay)
        elif coming is None:
            raise NotFound(f"no VM comes in a handoff {opening.handoff.hex()}")
        else:
            await coming.serve_memory(relay)

    async def close(self) -> None:
        """Takes no more connections; returns once those that are there have ended."""
        await self._connections.close()


def _refusal(error: SpvtpmError) -> bytes:
    return encode_frame(encode_migration(error_reply(error)))
