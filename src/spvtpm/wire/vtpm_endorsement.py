"""A vTPM's endorsement as its secure processor keeps it: the certificates of its EKs and the chain of who issued them. Public.

Bounds alone are checked here; what a certificate says is read by `endorsement_certificates.py`.

Source: docs/formats/instance-file.md, "Content"; docs/formats/nv-store.md.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import MessageError

MAX_CERTIFICATE_BYTES: Final = 2048
"""Also what one NV index of a TPM holds, so that a chain can be stored there (TCG EK Credential Profile 2.5, section 2.2.1.5)."""

MAX_ENDORSEMENTS: Final = 8

DerCertificate = Annotated[bytes, Meta(min_length=1, max_length=MAX_CERTIFICATE_BYTES)]
"""DER."""


class VtpmEndorsement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a chip said of a vTPM when it made it. It goes with the vTPM to other chips, and never changes.

    Attributes:
        certificates: of its EKs, one for each standard template; 0 to 8 of them.
        issuer: the chain of the chip that made the vTPM: chip EK, the vendor's intermediate, the vendor's root.
    """

    certificates: Annotated[tuple[DerCertificate, ...], Meta(max_length=MAX_ENDORSEMENTS)]
    issuer: tuple[DerCertificate, DerCertificate, DerCertificate]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(VtpmEndorsement)


def encode_endorsement(endorsement: VtpmEndorsement) -> bytes:
    """The endorsement as MessagePack."""
    return _encoder.encode(endorsement)


def parse_endorsement(data: bytes) -> VtpmEndorsement:
    """An endorsement from MessagePack.

    Raises:
        MessageError: it is none, or out of bounds.
    """
    try:
        return _decoder.decode(data)
    except UNDECODABLE:
        raise MessageError("not understood: no endorsement of a vTPM, or out of bounds") from None
