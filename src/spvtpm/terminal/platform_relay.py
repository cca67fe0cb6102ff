"""A relay behind the platform: a WebSocket to a chip, or to a VM's console; one binary message is one frame.

The platform hands the frames on to a host, and that to the other end. Both may do anything with them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from spvtpm.terminal.own_loop import OwnLoop
from spvtpm.terminal.platform import Platform
from spvtpm.terminal.relay import OpenRelay, Relay
from spvtpm.wire.decoding import printable
from spvtpm.wire.errors import ChannelError, FrameError, SpvtpmError, TooMany
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES
from spvtpm.wire.platform_errors import NoSuchToken, PlatformUntrusted, ScopeMissing, Unavailable
from spvtpm.wire.problems import error_of

_CLOSE_S: Final = 2.0

_quiet = logging.getLogger(f"{__name__}.websocket")
_quiet.setLevel(logging.WARNING)  # below, the library tells headers: the token is one


class PlatformRelay:
    """A connection through the platform. It is read while a message is sent: the other side may say much before it listens.

    Args:
        platform: the platform.
        path: what is asked for.
        timeout_s: how long a message, one way, may take.

    Raises:
        Unavailable: the platform is away.
        SpvtpmError: the platform's refusal.
    """

    def __init__(self, platform: Platform, path: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        connection = platform.address.connect(timeout_s)  # our own: no proxy, no redirection
        self._loop = OwnLoop("platform-relay")
        try:
            self._websocket = self._loop.run(self._opened(platform, path, connection))
        except BaseException:
            self._loop.close()
            connection.close()
            raise

    def deadline(self) -> float:
        """As `Relay` has it; so the others."""
        return time.monotonic() + self._timeout_s

    def send(self, frames: Iterable[bytes]) -> None:
        with suppress(CancelledError):  # this side has closed it: as at a socket
            self._loop.run(self._send(list(frames)))

    def receive(self, deadline: float) -> bytes:
        try:
            frame = self._loop.run(self._receive(deadline))
        except CancelledError:
            raise ChannelError("the connection was closed here") from None
        if not isinstance(frame, bytes) or not frame:
            raise FrameError("what the platform hands on is no frame of a channel")
        return frame

    def close(self) -> None:
        with suppress(CancelledError):  # once more does nothing
            self._loop.run(self._websocket.close())
        self._loop.close()

    async def _send(self, frames: list[bytes]) -> None:
        try:
            for frame in frames:
                async with asyncio.timeout(self._timeout_s):
                    await self._websocket.send(frame)
        except ConnectionClosed:
            return  # as at a socket
        except TimeoutError:
            raise ChannelError("the platform takes nothing more") from None

    async def _receive(self, deadline: float) -> str | bytes:
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                return await self._websocket.recv()
        except TimeoutError:
            raise ChannelError("the other side did not answer in time") from None
        except ConnectionClosed as closed:
            why = printable(closed.rcvd.reason) if closed.rcvd is not None else ""
            why = f"; somebody on the way says: {why}" if why else ""
            raise ChannelError(f"the connection was closed before the other side had answered{why}") from None

    async def _opened(self, platform: Platform, path: str, connection: socket.socket) -> ClientConnection:
        try:
            return await connect(
                platform.address.base.replace("http", "ws", 1) + path,
                sock=connection,
                ssl=platform.tls,
                compression=None,  # it is ciphertext
                additional_headers=platform.authorization(),
                open_timeout=self._timeout_s,
                close_timeout=_CLOSE_S,
                max_size=MAX_CHANNEL_FRAME_BYTES,
                logger=_quiet,
            )
        except InvalidStatus as refusal:
            response = refusal.response
            raise _refused(error_of(bytes(response.body or b""), response.status_code)) from None
        except (OSError, ValueError, EOFError, WebSocketException) as error:
            raise _error(platform, error) from None


def to_chip(platform: Platform, chip_id: bytes) -> OpenRelay:
    """The way to a chip, 16 bytes; whether it leads there shows when the chip is verified."""

    def open_relay(timeout_s: float) -> Relay:
        return PlatformRelay(platform, f"/v1/chips/{chip_id.hex()}/channel", timeout_s)

    return open_relay


def to_console(platform: Platform, vm_id: uuid.UUID) -> OpenRelay:
    """The way to a VM's console."""

    def open_relay(timeout_s: float) -> Relay:
        return PlatformRelay(platform, f"/v1/vms/{vm_id}/console", timeout_s)

    return open_relay


def _refused(error: SpvtpmError) -> SpvtpmError:
    """What the platform says on the way may not sound like the secure processor's word: that there is no such VM, for one."""
    if isinstance(error, (NoSuchToken, ScopeMissing, Unavailable, TooMany)):
        return error
    return ChannelError(f"the platform opens no channel: {error}")


def _error(platform: Platform, error: Exception) -> SpvtpmError:
    verify_message = getattr(error, "verify_message", None)  # of ssl.SSLCertVerificationError
    if verify_message is not None:
        return PlatformUntrusted(f"the certificate of {platform.address} is not trusted: {verify_message}")
    return ChannelError(f"the platform at {platform.address} opens no channel: {printable(str(error))}")
