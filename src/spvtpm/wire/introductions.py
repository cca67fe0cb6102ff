"""What both ends of a confidential channel say in clear, before TLS: who they are. Believed by nobody until TLS has shown it.

A relay may read this, and a platform may knock to see a chip's papers; so this knows no cryptography.

Format: docs/formats/channel.md.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from spvtpm.wire.messages import ErrorReply
from spvtpm.wire.versioned import VersionedDecoder, encode_versioned
from spvtpm.wire.vtpm_endorsement import DerCertificate

VERSION: Final = 1

MAX_CHANNEL_FRAME_BYTES: Final = 1 << 16
"""The longest frame that a relay carries for a channel."""

_CHAIN_CERTIFICATES: Final = 4


class _Clear(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    pass


class Knock(_Clear, frozen=True):
    """The owner asks who is there."""


class Papers(_Clear, frozen=True):
    """The SP's chain: channel certificate, chip EK, the vendor's intermediate, the vendor's root; DER."""

    chain: Annotated[tuple[DerCertificate, ...], Meta(min_length=_CHAIN_CERTIFICATES, max_length=_CHAIN_CERTIFICATES)]


class Introduce(_Clear, frozen=True):
    """The owner's certificate, DER (`owner_certificates.py`)."""

    certificate: DerCertificate


ClearMessage = Knock | Papers | Introduce | ErrorReply
_clear: VersionedDecoder[ClearMessage] = VersionedDecoder(VERSION, ClearMessage, " of the channel")


def encode_clear(message: ClearMessage) -> bytes:
    """What is said before TLS, as one frame's payload."""
    return encode_versioned(VERSION, message)


def parse_clear(payload: bytes) -> ClearMessage:
    """What the other side says before TLS; hostile bytes.

    Raises:
        MessageError: it is no such message of this version.
    """
    return _clear.decode(payload)
