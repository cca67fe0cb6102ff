"""Messages over a channel over a relay: what sessions with a secure processor and consoles of a VM have in common.

One thread may receive while others send, or close.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TypeVar

from spvtpm.terminal.relay import Relay
from spvtpm.wire.channel import SecureChannel
from spvtpm.wire.decoding import printable
from spvtpm.wire.errors import ChannelError, MessageError, SpvtpmError
from spvtpm.wire.introductions import Introduce, Papers, parse_clear
from spvtpm.wire.messages import ErrorReply

_Said = TypeVar("_Said", Papers, Introduce)


class Conversation:
    """Whole messages, both ways. Life: construct → `shake_hands` → `send`, `receive` … → `close`; after an error, dead.

    Args:
        relay: a connection on which both ends have introduced themselves.
        channel: this end.
    """

    def __init__(self, relay: Relay, channel: SecureChannel) -> None:
        self._relay = relay
        self._channel = channel
        self._messages: list[bytes] = []
        self._turn = threading.Lock()  # held for one use of the channel
        self._sending = (
            threading.Lock()
        )  # held until all frames of a message are gone; meanwhile another thread may receive

    def shake_hands(self) -> None:
        """Opens the channel.

        Raises:
            ChannelError, FrameError: the other side is not the one that it was taken for, or something is between. So all below.
        """
        deadline = self._relay.deadline()
        self._relay.send(self._channel.frames())
        while not self._channel.is_open:
            self._take(deadline)
            self._relay.send(self._channel.frames())

    def send(self, message: bytes) -> None:
        """Sends a message. If the other side has closed the channel, says nothing: as `Relay.send`."""
        with self._sending:
            with self._turn:
                if not self._channel.is_open:
                    return
                self._channel.send(message)
                frames = self._channel.frames()
            self._relay.send(frames)

    def receive(self, deadline: float | None = None) -> bytes:
        """The next message.

        Args:
            deadline: until when it has to be here, by `time.monotonic`; None: as the relay has it.
        """
        if deadline is None:
            deadline = self._relay.deadline()
        while not self._messages:
            self._take(deadline)
        return self._messages.pop(0)

    def close(self) -> None:
        """Says that nothing more comes, and ends the connection."""
        with self._turn:
            self._channel.close()
            frames = self._channel.frames()
        with suppress(SpvtpmError):
            self._relay.send(frames)
        self._relay.close()

    def _take(self, deadline: float) -> None:
        """One frame from the relay into the channel."""
        frame = self._relay.receive(deadline)
        try:
            with self._turn:
                self._messages += self._channel.receive(frame)
        except ChannelError:
            _raise_if_refused(frame)
            raise


def hear_clear(relay: Relay, kind: type[_Said]) -> _Said:
    """What the other side says in clear; nothing of it is believed.

    Raises:
        ChannelError, FrameError: it refuses, or says nothing.
        MessageError: it says something else.
    """
    frame = relay.receive(relay.deadline())
    _raise_if_refused(frame)
    message = parse_clear(frame)
    if not isinstance(message, kind):
        raise MessageError(f"{type(message).__name__} where {kind.__name__} was expected, in clear")
    return message


def _raise_if_refused(frame: bytes) -> None:
    """Whoever is there may say in clear why there will be no channel. It may be a lie, so it is never taken for the SP's word."""
    with suppress(MessageError):
        message = parse_clear(frame)
        if isinstance(message, ErrorReply):
            raise ChannelError(f"the channel was refused, in clear: {printable(message.message)}")
