"""Payloads of one byte with the version, then MessagePack: what crosses a border between domains. Pure, hostile bytes.

Another version is refused, never converted or guessed.
"""

from __future__ import annotations

from typing import Any, Final, Generic, TypeVar

import msgspec

from spvtpm.wire.decoding import UNDECODABLE, in_words
from spvtpm.wire.errors import MessageError

_Message = TypeVar("_Message")
_encoder = msgspec.msgpack.Encoder()


def encode_versioned(version: int, message: msgspec.Struct) -> bytes:
    """The message as one frame's payload."""
    return bytes([version]) + _encoder.encode(message)


class VersionedDecoder(Generic[_Message]):
    """Reads one direction of a conversation.

    Args:
        version: the only one that is read.
        messages: type of the messages, mostly a union.
        name: what the version is one of, for the sentence: " of the channel"; or nothing.
        unreadable: told of what cannot be read, where the decoder's own words could quote a secret; None: its words.
    """

    def __init__(self, version: int, messages: Any, name: str = "", unreadable: str | None = None) -> None:
        self._version: Final = bytes([version])
        self._expected = f"version {version}{name} was expected"
        self._unreadable = unreadable
        self._decoder: msgspec.msgpack.Decoder[_Message] = msgspec.msgpack.Decoder(messages)

    def decode(self, payload: bytes) -> _Message:
        """Reads a payload.

        Raises:
            MessageError: it is no such message of this version, or out of bounds.
        """
        if payload[:1] != self._version:
            found = f"version {payload[0]}" if payload else "nothing"
            raise MessageError(f"not understood: {found} where {self._expected}")
        try:
            return self._decoder.decode(memoryview(payload)[1:])
        except UNDECODABLE as error:
            raise MessageError(f"not understood: {self._unreadable or in_words(error)}") from None
