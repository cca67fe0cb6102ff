"""The confidential channel between two secure processors, over frames that others relay (`wire/migration.py`)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from spvtpm.processor.channel_identity import ChannelKeys
from spvtpm.processor.migration.peers import Peers
from spvtpm.processor.relay_socket import RelaySocket
from spvtpm.wire.certificates import Chain
from spvtpm.wire.channel import SecureChannel
from spvtpm.wire.decoding import printable
from spvtpm.wire.errors import ChannelError, MessageError, SpvtpmError, error_from_code
from spvtpm.wire.messages import ErrorReply, error_reply
from spvtpm.wire.migration import (
    MAX_PEER_MESSAGE_BYTES,
    Meet,
    PeerMessage,
    encode_migration,
    parse_meeting,
    parse_peer_message,
)

_MEETING_S: Final = 20.0
_RECORD: Final = b"\0"
"""The first byte of a message that is a record of memory; every other message begins with its version, which is not 0."""


class PeerLink:
    """One end of a link. Life: `meet` → `send`, `receive` … → `end`.

    Args:
        relay: carries the frames.
        channel: open.
        chain: of the other secure processor, verified.
        early: messages that came along with the handshake.
    """

    def __init__(self, relay: RelaySocket, channel: SecureChannel, chain: Chain, early: list[bytes]) -> None:
        self.chain = chain
        self._relay = relay
        self._channel = channel
        self._messages = deque(early)
        self._sending = asyncio.Lock()

    @property
    def peer(self) -> bytes:
        """Id of the other chip, 16 bytes."""
        return self.chain.chip.chip_id

    async def send(self, message: PeerMessage) -> None:
        """Sends a message.

        Raises:
            ChannelError: nobody takes it; the link has ended.
        """
        await self._send(encode_migration(message))

    async def send_records(self, records: Sequence[bytes]) -> None:
        """Sends records of memory.

        Raises:
            ChannelError: nobody takes it; the link has ended.
        """
        await self._send(*(_RECORD + record for record in records))

    async def _send(self, *messages: bytes) -> None:
        async with self._sending:
            self._channel.send(*messages)
            try:
                await self._relay.send(*self._channel.frames())
            except OSError:  # or half a frame may have gone
                self.hang_up()
                raise ChannelError("nobody takes what goes by the link to the other secure processor") from None

    async def receive(self) -> PeerMessage | list[bytes]:
        """The next message, or records of memory that have come together.

        Raises:
            ChannelError: the other side has closed the link, or somebody between has altered it.
            PeerError: it is no message.
            OSError: the link is cut.
        """
        while not self._messages:
            self._messages.extend(self._channel.receive(await self._relay.receive()))
        records: list[bytes] = []
        while self._messages and self._messages[0][:1] == _RECORD:
            records.append(self._messages.popleft()[1:])
        return records or parse_peer_message(self._messages.popleft())

    def hang_up(self) -> None:
        """Ends it; what was sent may still arrive."""
        self._relay.hang_up()

    async def end(self) -> None:
        """Ends it; returns once nobody is sending: a connection must not be closed under whoever waits to write to it."""
        self.hang_up()
        async with self._sending:
            pass


async def meet(
    relay: RelaySocket,
    handoff: bytes,
    keys: ChannelKeys,
    peers: Peers,
    verify: Callable[[tuple[bytes, ...]], Chain],
    *,
    is_source: bool,
) -> PeerLink:
    """Both sides show who they are, and verify each other.

    Args:
        relay: carries the frames.
        handoff: its id, 16 bytes.
        keys: who this secure processor is.
        peers: knows which chips are revoked.
        verify: whether a chain may take part in this handoff.
        is_source: whether the vTPM is here.

    Raises:
        SpvtpmError: the other side is not who it has to be, or refuses; it was told why.
        TimeoutError: it does not answer.
        OSError: the link is cut.
    """
    async with asyncio.timeout(_MEETING_S):
        try:
            return await _meet(relay, handoff, keys, peers, verify, is_source)
        except SpvtpmError as error:
            with suppress(OSError):  # it may have gone for the same reason
                await relay.send(encode_migration(error_reply(error)))
            raise


async def _meet(
    relay: RelaySocket,
    handoff: bytes,
    keys: ChannelKeys,
    peers: Peers,
    verify: Callable[[tuple[bytes, ...]], Chain],
    is_source: bool,
) -> PeerLink:
    identity = keys.current()
    await relay.send(encode_migration(Meet(handoff, _four(identity.chain), peers.revoked)))
    said = _unless_refused(parse_meeting(await relay.receive()))
    if said.handoff != handoff:
        raise MessageError("the other secure processor is there for another handoff")
    await peers.learn(said.revoked)
    chain = verify(said.chain)
    channel = SecureChannel(
        identity.key,
        identity.certificate,
        said.chain[0],
        is_server=not is_source,
        max_message_bytes=MAX_PEER_MESSAGE_BYTES,
    )
    early: list[bytes] = []
    await relay.send(*channel.frames())
    while not channel.is_open:
        early += channel.receive(_heard(await relay.receive()))
        await relay.send(*channel.frames())
    return PeerLink(relay, channel, chain, early)


def _heard(frame: bytes) -> bytes:
    """A frame of the handshake; the other side may have said in clear why there is none."""
    try:
        said = parse_meeting(frame)
    except MessageError:
        return frame
    _unless_refused(said)
    raise MessageError("the other secure processor says twice who it is")


def _unless_refused(said: Meet | ErrorReply) -> Meet:
    if isinstance(said, ErrorReply):
        raise error_from_code(said.code, f"the other secure processor refuses: {printable(said.message)}")
    return said


def _four(chain: tuple[bytes, ...]) -> tuple[bytes, bytes, bytes, bytes]:
    channel, chip, intermediate, root = chain
    return channel, chip, intermediate, root
