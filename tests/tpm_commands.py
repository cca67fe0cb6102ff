"""TPM 2.0 commands and responses as bytes, put together by hand: tests trust no TPM software stack but these few lines.

Builders are named after the commands; `checked` and the `*_in` functions read responses.
Source for all codes and layouts: TCG TPM 2.0 Library, Part 2 (structures) and Part 3 (commands).
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

# Part 2, TPM_RC.
RC_SUCCESS: Final = 0x000
RC_INITIALIZE: Final = 0x100
RC_FAILURE: Final = 0x101
RC_COMMAND_SIZE: Final = 0x142
RC_LOCALITY: Final = 0x907
RC_CANCELED: Final = 0x909
RC_PP: Final = 0x090

# Part 2, TPM_RH.
OWNER: Final = 0x40000001
NULL_HIERARCHY: Final = 0x40000007
LOCKOUT: Final = 0x4000000A
ENDORSEMENT: Final = 0x4000000B
PLATFORM: Final = 0x4000000C
_PASSWORD_SESSION: Final = 0x40000009

# Part 2, TPM_ALG_ID.
RSA: Final = 0x0001
AES: Final = 0x0006
SHA256: Final = 0x000B
NULL: Final = 0x0010
RSASSA: Final = 0x0014
ECDSA: Final = 0x0018
ECC: Final = 0x0023
CFB: Final = 0x0043
_P256: Final = 0x0003

# Part 2, TPMA_OBJECT: fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA (else the first use answers
# TPM_RC_RETRY), and restricted decrypt or sign.
STORAGE_KEY: Final = 0x00030472
SIGNING_KEY: Final = 0x00040472
_SIGN: Final = 0x00040000

# Part 2, TPMA_NV: owner reads and writes, no dictionary-attack protection.
NV_OWNER_ONLY: Final = 0x02020002

# Part 2, TPM_CAP and TPM_PT.
CAP_TPM_PROPERTIES: Final = 6
PT_MAX_COMMAND_SIZE: Final = 0x11E

_NO_SESSIONS: Final = 0x8001
_SESSIONS: Final = 0x8002


class UnexpectedResponse(AssertionError):
    """A TPM response that is not the success which the caller needs."""


class Clock(NamedTuple):
    """Part 2, TPMS_TIME_INFO: milliseconds since power-on and over the TPM's life, and its two boot counters."""

    time: int
    clock: int
    reset_count: int
    restart_count: int
    is_safe: bool


def sized(content: bytes) -> bytes:
    """A TPM2B: the content after its 16-bit length."""
    return struct.pack(">H", len(content)) + content


def command(code: int, *handles: int, parameters: bytes = b"", auth: bytes | None = None) -> bytes:
    """A whole command.

    Args:
        code: TPM_CC.
        handles: its handle area.
        parameters: its parameter area, marshalled.
        auth: the password for its first handle; None for a command without sessions.
    """
    body = struct.pack(f">{len(handles)}I", *handles)
    if auth is not None:
        session = struct.pack(">IHB", _PASSWORD_SESSION, 0, 0) + sized(auth)
        body += struct.pack(">I", len(session)) + session
    body += parameters
    return struct.pack(">HII", _NO_SESSIONS if auth is None else _SESSIONS, 10 + len(body), code) + body


def startup(*, clear: bool = True) -> bytes:
    return command(0x144, parameters=struct.pack(">H", 0 if clear else 1))


def shutdown(*, clear: bool = True) -> bytes:
    return command(0x145, parameters=struct.pack(">H", 0 if clear else 1))


def self_test(*, full: bool = True) -> bytes:
    return command(0x143, parameters=bytes([full]))


def get_random(size_bytes: int) -> bytes:
    return command(0x17B, parameters=struct.pack(">H", size_bytes))


def stir_random(entropy: bytes) -> bytes:
    return command(0x146, parameters=sized(entropy))


def read_clock() -> bytes:
    return command(0x181)


def get_capability(capability: int, first: int, count: int = 1) -> bytes:
    return command(0x17A, parameters=struct.pack(">III", capability, first, count))


def clear(auth: bytes = b"") -> bytes:
    return command(0x126, LOCKOUT, auth=auth)


def pp_commands(set_code: int) -> bytes:
    """TPM2_PP_Commands that asks for physical presence on one more command; needs physical presence itself."""
    return command(0x12D, PLATFORM, auth=b"", parameters=struct.pack(">III", 1, set_code, 0))


def pcr_extend(pcr: int, digest: bytes) -> bytes:
    return command(0x182, pcr, auth=b"", parameters=struct.pack(">IH", 1, SHA256) + digest)


def pcr_read(pcr: int) -> bytes:
    return command(0x17E, parameters=struct.pack(">IHB", 1, SHA256, 3) + (1 << pcr).to_bytes(3, "little"))


def pcr_reset(pcr: int) -> bytes:
    return command(0x13D, pcr, auth=b"")


def nv_define(index: int, size_bytes: int, attributes: int = NV_OWNER_ONLY) -> bytes:
    public = struct.pack(">IHI", index, SHA256, attributes) + sized(b"") + struct.pack(">H", size_bytes)
    return command(0x12A, OWNER, auth=b"", parameters=sized(b"") + sized(public))


def nv_write(index: int, content: bytes, offset: int = 0) -> bytes:
    return command(0x137, OWNER, index, auth=b"", parameters=sized(content) + struct.pack(">H", offset))


def nv_read(index: int, size_bytes: int, offset: int = 0) -> bytes:
    return command(0x14E, OWNER, index, auth=b"", parameters=struct.pack(">HH", size_bytes, offset))


def nv_undefine(index: int) -> bytes:
    return command(0x122, OWNER, index, auth=b"")


def _public(kind: int, attributes: int, scheme: int, details: bytes, unique: bytes) -> bytes:
    signs = bool(attributes & _SIGN)
    symmetric = struct.pack(">H", NULL) if signs else struct.pack(">HHH", AES, 128, CFB)
    chosen = struct.pack(">HH", scheme, SHA256) if signs else struct.pack(">H", NULL)
    return struct.pack(">HHI", kind, SHA256, attributes) + sized(b"") + symmetric + chosen + details + unique


def ecc_p256(attributes: int = STORAGE_KEY, unique: bytes = b"") -> bytes:
    """A P-256 template. Each `unique` (at most 32 bytes) gives another key from the same seed."""
    return _public(ECC, attributes, ECDSA, struct.pack(">HH", _P256, NULL), sized(unique) + sized(b""))


def rsa2048(attributes: int = STORAGE_KEY, unique: bytes = b"") -> bytes:
    """An RSA-2048 template. Each `unique` (at most 256 bytes) gives another key from the same seed."""
    return _public(RSA, attributes, RSASSA, struct.pack(">HI", 2048, 0), sized(unique))


def create_primary(template: bytes, hierarchy: int = OWNER, *, key_auth: bytes = b"", auth: bytes = b"") -> bytes:
    """TPM2_CreatePrimary.

    Args:
        template: a TPMT_PUBLIC, as `ecc_p256` and `rsa2048` give it.
        hierarchy: whose seed.
        key_auth: the new key's password.
        auth: the hierarchy's password.
    """
    sensitive = sized(key_auth) + sized(b"")
    parameters = sized(sensitive) + sized(template) + sized(b"") + struct.pack(">I", 0)
    return command(0x131, hierarchy, auth=auth, parameters=parameters)


def flush_context(handle: int) -> bytes:
    return command(0x165, parameters=struct.pack(">I", handle))


def evict_control(handle: int, persistent_handle: int) -> bytes:
    return command(0x120, OWNER, handle, auth=b"", parameters=struct.pack(">I", persistent_handle))


def read_public(handle: int) -> bytes:
    return command(0x173, handle)


def sign(handle: int, digest: bytes, key_auth: bytes = b"") -> bytes:
    """TPM2_Sign with the key's own scheme, for a key that is not restricted."""
    no_ticket = struct.pack(">HI", 0x8024, NULL_HIERARCHY) + sized(b"")
    return command(0x15D, handle, auth=key_auth, parameters=sized(digest) + struct.pack(">H", NULL) + no_ticket)


def response_code(response: bytes) -> int:
    """The TPM_RC of any response."""
    code: int = struct.unpack_from(">I", response, 6)[0]
    return code


def base_code(response: bytes) -> int:
    """The TPM_RC of any response, without the number of the handle, session or parameter that it complains about."""
    code = response_code(response)
    return code & 0x0BF if code & 0x080 else code


def checked(response: bytes) -> bytes:
    """The response itself, if it is a well-formed success.

    Raises:
        UnexpectedResponse: with the TPM's code.
    """
    if len(response) < 10 or struct.unpack_from(">I", response, 2)[0] != len(response):
        raise UnexpectedResponse(f"no TPM response: {response[:16].hex()}...")
    if response_code(response) != RC_SUCCESS:
        raise UnexpectedResponse(f"TPM result {response_code(response):#x}")
    return response


def _sized_at(response: bytes, offset: int) -> bytes:
    size = struct.unpack_from(">H", response, offset)[0]
    content = response[offset + 2 : offset + 2 + size]
    if len(content) != size:
        raise UnexpectedResponse("a TPM response is cut off")
    return content


def random_in(response: bytes) -> bytes:
    """What TPM2_GetRandom answered."""
    return _sized_at(checked(response), 10)


def nv_content_in(response: bytes) -> bytes:
    """What TPM2_NV_Read answered."""
    return _sized_at(checked(response), 14)


def pcr_in(response: bytes) -> bytes:
    """The one SHA-256 PCR that TPM2_PCR_Read answered."""
    return checked(response)[-32:]


def handle_in(response: bytes) -> int:
    """The handle of what TPM2_CreatePrimary made."""
    handle: int = struct.unpack_from(">I", checked(response), 10)[0]
    return handle


def public_in(response: bytes) -> bytes:
    """The public area of what TPM2_CreatePrimary made."""
    return _sized_at(checked(response), 18)


def property_in(response: bytes) -> int:
    """The one property that TPM2_GetCapability(CAP_TPM_PROPERTIES) answered."""
    value: int = struct.unpack_from(">I", checked(response), 23)[0]
    return value


def clock_in(response: bytes) -> Clock:
    """What TPM2_ReadClock answered."""
    return Clock(*struct.unpack_from(">QQII?", checked(response), 10))
