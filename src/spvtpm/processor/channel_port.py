"""The socket to which the platform relays confidential channels, one a connection. Every byte from it is hostile.

The relay decides who gets through, and in which order frames arrive; the channel notices all else. So that nobody holds what
others need: so many channels in all, so many of one owner, a time for the introductions, and an end to those that fall silent.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from cryptography.hazmat.primitives.serialization import Encoding

from spvtpm.processor.channel_identity import ChannelKeys
from spvtpm.processor.channel_order import ChannelOrder, Turn
from spvtpm.processor.connections import Connections
from spvtpm.processor.relay_socket import RelaySocket
from spvtpm.wire.channel import ChannelEnded, SecureChannel
from spvtpm.wire.errors import MessageError, PeerError, ResourceError, SpvtpmError
from spvtpm.wire.framing import encode_frame
from spvtpm.wire.introductions import (
    ClearMessage,
    Introduce,
    Knock,
    Papers,
    encode_clear,
    parse_clear,
)
from spvtpm.wire.messages import error_reply
from spvtpm.wire.owner_certificates import fingerprint, parse_owner_certificate
from spvtpm.wire.owner_messages import MAX_OWNER_MESSAGE_BYTES, encode_owner_message

log = logging.getLogger(__name__)

MAX_CHANNELS = 64
MAX_CHANNELS_OF_ONE_OWNER = 8
_INTRODUCTION_S = 20.0
_IDLE_S = 300.0

_Clear = TypeVar("_Clear", Knock, Introduce)


class Session(Protocol):
    """What is on the other side of a channel, for one owner."""

    def answers(self, payload: bytes) -> AsyncIterator[bytes]:
        """The replies to one message, as they come."""


class ChannelPort:
    """Accepts relayed channels at `path`.

    Args:
        path: of the socket.
        allowed_uids: whose processes may relay.
        keys: who the SP is.
        open_session: for an owner, known by the fingerprint of its key, 32 bytes, and its channel's turn.

    Raises:
        ResourceError: the socket cannot be had.
    """

    def __init__(
        self,
        path: Path,
        allowed_uids: frozenset[int],
        keys: ChannelKeys,
        open_session: Callable[[bytes, Turn], Session],
    ) -> None:
        self._keys = keys
        self._open_session = open_session
        self._of_owner: Counter[bytes] = Counter()
        self._order = ChannelOrder()
        self._connections = Connections(path, allowed_uids, MAX_CHANNELS, self._serve, _refusal)

    async def _serve(self, connection: socket.socket) -> None:
        with ExitStack() as until_it_ends:
            await self._serve_relay(RelaySocket(connection), until_it_ends)

    async def _serve_relay(self, relay: RelaySocket, until_it_ends: ExitStack) -> None:
        try:
            async with asyncio.timeout(_INTRODUCTION_S):
                owner, turn, channel, early = await self._introduce(relay, until_it_ends)
        except TimeoutError:
            return
        except SpvtpmError as error:
            log.warning("a channel was not opened: %s", error)
            await relay.send(_clear(error))
            return
        if self._of_owner[owner] >= MAX_CHANNELS_OF_ONE_OWNER:
            refusal = ResourceError(f"this owner has {MAX_CHANNELS_OF_ONE_OWNER} channels open already")
            channel.send(encode_owner_message(error_reply(refusal)))
            await relay.send(*channel.frames())
            return
        with self._counted(owner):
            await self._converse(relay, channel, self._open_session(owner, turn), early)

    async def _introduce(
        self, relay: RelaySocket, until_it_ends: ExitStack
    ) -> tuple[bytes, Turn, SecureChannel, list[bytes]]:
        """Up to the end of the handshake: the owner, the channel and its turn, and messages that came along already.

        Raises:
            PeerError: the other side does not do as it should.
        """
        _expect(Knock, parse_clear(await relay.receive()))
        identity = self._keys.current()
        await relay.send(encode_clear(Papers(identity.chain)))
        certificate = parse_owner_certificate(_expect(Introduce, parse_clear(await relay.receive())).certificate)
        owner = fingerprint(certificate)
        turn = until_it_ends.enter_context(self._order.turn_of(owner))
        channel = SecureChannel(
            identity.key,
            identity.certificate,
            certificate.public_bytes(Encoding.DER),
            is_server=True,
            max_message_bytes=MAX_OWNER_MESSAGE_BYTES,
        )
        early: list[bytes] = []
        while not channel.is_open:
            early += channel.receive(await relay.receive())
            await relay.send(*channel.frames())
        return owner, turn, channel, early

    @contextmanager
    def _counted(self, owner: bytes) -> Iterator[None]:
        self._of_owner[owner] += 1
        try:
            yield
        finally:
            self._of_owner[owner] -= 1
            if not self._of_owner[owner]:
                del self._of_owner[owner]

    async def _converse(self, relay: RelaySocket, channel: SecureChannel, session: Session, early: list[bytes]) -> None:
        try:
            messages = early
            while True:
                for message in messages:
                    async for answer in session.answers(message):
                        channel.send(answer)
                        await relay.send(*channel.frames())
                    await asyncio.sleep(0)  # who sends a thousand at once waits for the others in between
                messages = []
                # For a whole message: what is held back is not kept fresh by drops of it.
                async with asyncio.timeout(_IDLE_S):
                    while not messages:
                        messages = channel.receive(await relay.receive())
        except ChannelEnded as ended:
            log.debug("a channel ended: %s", ended)
        except (PeerError, TimeoutError) as error:
            log.info("a channel ended: %s", error or "it fell silent")
        finally:
            channel.close()
        await relay.send(*channel.frames())

    async def close(self) -> None:
        """Takes no more channels; returns once the requests under way are carried out."""
        await self._connections.close()


def _expect(kind: type[_Clear], message: ClearMessage) -> _Clear:
    if not isinstance(message, kind):
        raise MessageError(f"{type(message).__name__} where {kind.__name__} was expected")
    return message


def _clear(error: SpvtpmError) -> bytes:
    return encode_clear(error_reply(error))


def _refusal(error: SpvtpmError) -> bytes:
    return encode_frame(_clear(error))
