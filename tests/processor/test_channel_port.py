"""Who speaks through a channel, and how, does not decide over what others get. The port alone, before a session that counts."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from spvtpm.processor import channel_port
from spvtpm.processor.channel_identity import ChannelKeys
from spvtpm.processor.channel_order import Turn
from spvtpm.processor.channel_port import ChannelPort
from spvtpm.processor.daemon import initialise
from spvtpm.wire.framing import encode_frame
from tests.owner import Owner, OwnerChannel
from tests.papers import put_chip_file

pytestmark = pytest.mark.attack("A23")


class Counting:
    """A session that answers each message with one byte, and notes how many turns others had by then."""

    def __init__(self) -> None:
        self.turns = 0
        self.heard: list[int] = []

    def open(self, _owner: bytes, _turn: Turn) -> Counting:
        return self

    async def answers(self, _payload: bytes) -> AsyncIterator[bytes]:
        self.heard.append(self.turns)
        yield b"."

    def close(self) -> None:
        pass

    async def count_turns(self) -> None:
        while True:
            self.turns += 1
            await asyncio.sleep(0)


def play(directory: Path, act: Callable[[Counting, OwnerChannel], Awaitable[None]]) -> None:
    async def run() -> None:
        session = Counting()
        put_chip_file(directory.with_name("chip"))
        fuses = initialise(directory, directory.with_name("chip"))
        path = directory / "channel.sock"
        port = ChannelPort(path, frozenset([os.geteuid()]), ChannelKeys(fuses), session.open)
        channel = await asyncio.to_thread(OwnerChannel, path, Owner())
        try:
            async with asyncio.timeout(60):
                await act(session, channel)
        finally:
            channel.close()
            await port.close()

    asyncio.run(run())


def frames_of(channel: OwnerChannel, messages: list[bytes]) -> list[bytes]:
    for message in messages:
        channel.channel.send(message)
    return channel.channel.frames()


def test_who_says_a_thousand_things_at_once_waits_for_others_in_between(state_directory: Path) -> None:
    async def act(session: Counting, channel: OwnerChannel) -> None:
        counting = asyncio.ensure_future(session.count_turns())
        await asyncio.to_thread(channel.send_frames, frames_of(channel, [b"x"] * 1000))
        reading = asyncio.ensure_future(asyncio.to_thread(_read_to_the_end, channel))
        while len(session.heard) < 1000:
            await asyncio.sleep(0)
        counting.cancel()
        channel._socket.shutdown(socket.SHUT_RDWR)
        await reading
        assert all(later > earlier for earlier, later in zip(session.heard, session.heard[1:], strict=False))

    play(state_directory, act)


@pytest.mark.attack("A02")
def test_a_message_that_is_held_back_is_not_kept_fresh_by_drops_of_it(
    state_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a relay could bring what an owner has long given up, a destruction for one, hours later."""
    monkeypatch.setattr(channel_port, "_IDLE_S", 0.2)

    async def act(session: Counting, channel: OwnerChannel) -> None:
        (frame,) = frames_of(channel, [bytes(2000)])
        ended = asyncio.ensure_future(asyncio.to_thread(_read_to_the_end, channel))
        with suppress(OSError):
            for byte in frame:
                if ended.done():
                    break
                channel._socket.sendall(encode_frame(bytes([byte])))
                await asyncio.sleep(0.01)
        await ended
        assert session.heard == []

    play(state_directory, act)


def _read_to_the_end(channel: OwnerChannel) -> None:
    with suppress(OSError):
        while channel._socket.recv(1 << 16):
            pass
