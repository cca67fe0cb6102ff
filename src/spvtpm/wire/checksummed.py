"""JSON files that carry a checksum against damage (not against attackers). Pure: bytes in, content out, and back."""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import Meta

_Content = TypeVar("_Content", bound=msgspec.Struct)
_Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class WrongChecksum(Exception):
    """The content is not that which the checksum was made of. Each reader says so in its own words."""


class ChecksummedFile(Generic[_Content]):
    """One kind of file: `{"format": number, name: content as it was encoded, "sha256": of the encoded content}`.

    Args:
        name: the content's key.
        number: the only format that is read and written.
        content_type: the content's type.
    """

    def __init__(self, name: str, number: int, content_type: type[_Content]) -> None:
        self._name = name
        self._number = number
        self._content_type = content_type
        fields = [("format", Annotated[int, Meta(ge=number, le=number)]), (name, msgspec.Raw), ("sha256", _Sha256)]
        self._file_type: Any = msgspec.defstruct("File", fields, frozen=True, forbid_unknown_fields=True)

    def encode(self, content: _Content) -> bytes:
        """The file."""
        encoded = msgspec.json.encode(content)
        digest = hashlib.sha256(encoded).hexdigest()
        return msgspec.json.encode(self._file_type(self._number, msgspec.Raw(encoded), digest))

    def decode(self, file: bytes) -> _Content:
        """The file's content.

        Raises:
            WrongChecksum: it is damaged.
            UNDECODABLE: one of these; it is damaged, or no such file.
        """
        decoded = msgspec.json.decode(file, type=self._file_type)
        encoded: msgspec.Raw = getattr(decoded, self._name)
        if not hmac.compare_digest(hashlib.sha256(bytes(encoded)).hexdigest(), decoded.sha256):
            raise WrongChecksum
        return msgspec.json.decode(encoded, type=self._content_type)
