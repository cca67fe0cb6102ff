"""What an instance file keeps secret: a vTPM's state, policy and EK certificates, as values and as MessagePack. No keys.

There is one encoding of each content: whoever decodes encodes again and compares, so bytes that say a thing twice, or
in another order, are refused.

Source: docs/formats/instance-file.md, "Content".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import InstanceFileError
from spvtpm.wire.instance_header import (
    ID_BYTES,
    MAX_PERMANENT_BYTES,
    MAX_VOLATILE_BYTES,
    InstanceHeader,
)
from spvtpm.wire.vtpm_endorsement import VtpmEndorsement

MAX_CHIPS: Final[int] = 256
MAX_PCR_BANKS: Final[int] = 16
"""Source: tpm2-tss, tss2_tpm2_types.h, TPM2_NUM_PCR_BANKS."""

MAX_LABEL_CHARACTERS: Final[int] = 256

_ChipId = Annotated[bytes, Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
_PcrBank = Annotated[str, Meta(pattern=r"\A[a-z0-9_]{1,16}\Z")]
Label = Annotated[str, Meta(max_length=MAX_LABEL_CHARACTERS, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
_State = Annotated[bytes, Meta(min_length=1, max_length=MAX_PERMANENT_BYTES)]
_VolatileState = Annotated[bytes, Meta(min_length=1, max_length=MAX_VOLATILE_BYTES)]


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the owner allows to be done with the vTPM. It goes with the vTPM, and each SP applies it.

    Attributes:
        migration_allowed: whether a running vTPM may be handed to another SP.
        chips: ids of the chips that may run it, 16 bytes each, 1 to 256 of them; None: any of the fleet.
        minimum_firmware: the oldest firmware version that may run it, 0 to 2^32 - 1.
        direct_path_only: whether it may be reached through encrypted VM memory alone.
        pcr_banks: names of the PCR banks it has, such as `sha256`; up to 16; none: as it was manufactured.
    """

    migration_allowed: bool
    chips: Annotated[frozenset[_ChipId], Meta(min_length=1, max_length=MAX_CHIPS)] | None
    minimum_firmware: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
    direct_path_only: bool
    pcr_banks: Annotated[frozenset[_PcrBank], Meta(max_length=MAX_PCR_BANKS)]


@dataclass(frozen=True, slots=True)
class Instance:
    """An exported vTPM, whole. Its `repr` shows no state.

    Attributes:
        header: what its file says in clear.
        permanent: the permanent state as the engine gives it, 1 byte to 256 KiB. Secret.
        volatile: the volatile state, 1 byte to 64 KiB, if it was hibernated; otherwise None. Secret.
        policy: what the owner allows.
        endorsement: the certificates of its EKs, by the chip that made it.
        label: the owner's words for it, up to 256 characters, none of them a control character; may be empty.
    """

    header: InstanceHeader
    permanent: bytes = field(repr=False)
    volatile: bytes | None = field(repr=False)
    policy: Policy
    endorsement: VtpmEndorsement
    label: str = ""


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    permanent: _State
    volatile: _VolatileState | None
    policy: Policy
    endorsement: VtpmEndorsement
    label: Label

    def __repr__(self) -> str:
        return "_Content()"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return []


_encoder = msgspec.msgpack.Encoder(order="deterministic")
_decoder = msgspec.msgpack.Decoder(_Content)


def encode_content(instance: Instance) -> bytes:
    """The content of the instance's file; secret. What a reader would refuse is never written.

    Raises:
        InstanceFileError: a part of the instance is out of its bounds.
    """
    content = _Content(instance.permanent, instance.volatile, instance.policy, instance.endorsement, instance.label)
    try:
        encoded = _encoder.encode(content)
    except (UnicodeEncodeError, OverflowError):
        raise InstanceFileError("a text or a number of the instance cannot be encoded") from None
    decode_content(instance.header, encoded)
    return encoded


def decode_content(header: InstanceHeader, content: bytes) -> Instance:
    """The instance that the content of a file stands for. The errors quote nothing of it.

    Args:
        header: of the same file, authentic.
        content: authentic, and yet by somebody who may have erred.

    Raises:
        InstanceFileError: it is not encoded as the format says, out of bounds, or does not fit the header.
    """
    try:
        decoded = _decoder.decode(content)
    except UNDECODABLE:
        raise InstanceFileError("the instance file's content is not what its format allows") from None
    if _encoder.encode(decoded) != content:
        raise InstanceFileError("the instance file's content is not encoded in the one way that its format allows")
    if header.hibernated != (decoded.volatile is not None):
        kept = "a volatile state" if decoded.volatile is not None else "no volatile state"
        kind = "hibernated" if header.hibernated else "shut down"
        raise InstanceFileError(f"the instance file holds {kept}, but its header says that the vTPM was {kind}")
    return Instance(header, decoded.permanent, decoded.volatile, decoded.policy, decoded.endorsement, decoded.label)
