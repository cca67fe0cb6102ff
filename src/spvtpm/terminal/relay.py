"""The way to a secure processor, or to a VM: frames, handed on by somebody who may do anything with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol


class Relay(Protocol):
    """A connection to whoever carries frames to the other end of a channel. One thread may receive while others send or close."""

    def deadline(self) -> float:
        """Until when a message that begins now has to be through; by `time.monotonic`."""

    def send(self, frames: Iterable[bytes]) -> None:
        """Hands frames over. If the connection has ended, says nothing: what was said before is still to be read, and worth more.

        Raises:
            ChannelError: nobody takes them.
        """

    def receive(self, deadline: float) -> bytes:
        """The next frame.

        Raises:
            ChannelError: there is none until the deadline, or none any more.
            FrameError: what came is no frame.
        """

    def close(self) -> None:
        """Ends the connection. Who waits for a frame is told that there is none."""


OpenRelay = Callable[[float], Relay]
"""Opens a new connection, in which each message, one way, may take so many seconds.

Raises:
    SpvtpmError: nobody takes the connection.
"""
