"""The few TPM commands that a worker gives its own new TPM, as bytes, and what is read in the responses. Pure.

Source: TCG TPM 2.0 Library Part 3, the section of each command's name; Part 2 for structures and constants.
"""

from __future__ import annotations

import struct
from typing import Final

PLATFORM: Final = 0x4000000C
_ENDORSEMENT = 0x4000000B
_PASSWORD_SESSION = 0x40000009
"""Source: Part 2, table TPM_RH."""

_NO_SESSIONS, _SESSIONS = 0x8001, 0x8002
_SHA256 = 0x000B
_CAP_PCRS, _CAP_TPM_PROPERTIES = 5, 6

NV_ATTRIBUTES: Final = 0x42072001
"""Platform-created, written by the platform, read by platform, owner and the index's own authorization, no dictionary-attack
protection, lockable for good. Source: Part 2, table TPMA_NV; TCG EK Credential Profile 2.5, section 2.2.1.4."""

MAX_NV_PIECE_BYTES: Final = 1024
"""At most this much is written at once. Source: libtpms, MAX_NV_BUFFER_SIZE (TpmProfile.h)."""

_PCR_SELECT_BYTES = 3
"""24 PCRs. Source: TCG PC Client Platform TPM Profile, section "PCR Requirements"."""

STARTUP_CLEAR: Final = bytes.fromhex("80010000000c000001440000")
"""TPM2_Startup(TPM_SU_CLEAR)."""

SHUTDOWN_CLEAR: Final = bytes.fromhex("80010000000c000001450000")
"""TPM2_Shutdown(TPM_SU_CLEAR)."""

_CC_SHUTDOWN = 0x145
_CAN_RUN_LONG = frozenset({0x131, 0x153, 0x191})
"""TPM2_CreatePrimary, TPM2_Create, TPM2_CreateLoaded: as in `interfaces/direct.h`."""


def _code(command: bytes) -> int:
    return int.from_bytes(command[6:10], "big") if len(command) >= 10 else 0


def can_run_long(command: bytes) -> bool:
    """Whether it may generate an RSA key."""
    return _code(command) in _CAN_RUN_LONG


def is_shutdown(command: bytes) -> bool:
    """Whether it is TPM2_Shutdown."""
    return _code(command) == _CC_SHUTDOWN


def _sized(content: bytes) -> bytes:
    return struct.pack(">H", len(content)) + content


def _command(code: int, *handles: int, parameters: bytes, authorized: bool) -> bytes:
    """A command; the authorization of its first handle is the empty password of a new TPM."""
    body = struct.pack(f">{len(handles)}I", *handles)
    if authorized:
        session = struct.pack(">IHBH", _PASSWORD_SESSION, 0, 0, 0)
        body += struct.pack(">I", len(session)) + session
    body += parameters
    return struct.pack(">HII", _SESSIONS if authorized else _NO_SESSIONS, 10 + len(body), code) + body


def create_primary_ek(template: bytes) -> bytes:
    """TPM2_CreatePrimary in the endorsement hierarchy; `template` is a TPMT_PUBLIC."""
    no_sensitive, no_data, no_pcrs = _sized(bytes(4)), _sized(b""), bytes(4)
    parameters = no_sensitive + _sized(template) + no_data + no_pcrs
    return _command(0x131, _ENDORSEMENT, parameters=parameters, authorized=True)


def created_primary(response: bytes) -> tuple[int, bytes]:
    """Handle and TPMT_PUBLIC of what TPM2_CreatePrimary made."""
    handle, _parameter_bytes, size = struct.unpack_from(">IIH", response, 10)
    return handle, response[20 : 20 + size]


def flush_context(handle: int) -> bytes:
    """TPM2_FlushContext."""
    return _command(0x165, parameters=struct.pack(">I", handle), authorized=False)


def nv_define(index: int, size_bytes: int) -> bytes:
    """TPM2_NV_DefineSpace, by the platform, with the attributes of a certificate."""
    public = struct.pack(">IHI", index, _SHA256, NV_ATTRIBUTES) + _sized(b"") + struct.pack(">H", size_bytes)
    return _command(0x12A, PLATFORM, parameters=_sized(b"") + _sized(public), authorized=True)


def nv_write(index: int, piece: bytes, offset: int) -> bytes:
    """TPM2_NV_Write, by the platform; `piece` has at most `MAX_NV_PIECE_BYTES`."""
    return _command(0x137, PLATFORM, index, parameters=_sized(piece) + struct.pack(">H", offset), authorized=True)


def get_properties(first: int, count: int) -> bytes:
    """TPM2_GetCapability(TPM_CAP_TPM_PROPERTIES)."""
    return _command(0x17A, parameters=struct.pack(">III", _CAP_TPM_PROPERTIES, first, count), authorized=False)


def properties_in(response: bytes) -> dict[int, int]:
    """Each TPM_PT and its value."""
    (count,) = struct.unpack_from(">I", response, 15)
    return dict(struct.iter_unpack(">II", response[19 : 19 + 8 * count]))


def get_pcr_banks() -> bytes:
    """TPM2_GetCapability(TPM_CAP_PCRS)."""
    return _command(0x17A, parameters=struct.pack(">III", _CAP_PCRS, 0, 1), authorized=False)


def pcr_banks_in(response: bytes) -> tuple[int, ...]:
    """The hash algorithms of all banks that the TPM can have, TPM_ALG_ID, allocated or not."""
    (count,), offset, found = struct.unpack_from(">I", response, 15), 19, []
    for _ in range(count):
        algorithm, size = struct.unpack_from(">HB", response, offset)
        found.append(algorithm)
        offset += 3 + size
    return tuple(found)


def pcr_allocate(banks: dict[int, bool]) -> bytes:
    """TPM2_PCR_Allocate, by the platform; it takes effect when the power comes again.

    Args:
        banks: hash algorithm (TPM_ALG_ID) of each bank that the TPM can have, and whether it gets PCRs.
    """
    selections = b"".join(
        struct.pack(">HB", algorithm, _PCR_SELECT_BYTES) + (b"\xff" if wanted else b"\0") * _PCR_SELECT_BYTES
        for algorithm, wanted in banks.items()
    )
    return _command(0x12B, PLATFORM, parameters=struct.pack(">I", len(banks)) + selections, authorized=True)


def pcrs_allocated(response: bytes) -> bool:
    """What TPM2_PCR_Allocate answered: whether there is room for these banks."""
    return response[14] == 1


def response_code(response: bytes) -> int:
    """TPM_RC."""
    code: int = struct.unpack_from(">I", response, 6)[0]
    return code
