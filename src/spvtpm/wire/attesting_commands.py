"""The few TPM commands with which a verifier has a TPM attest, as bytes, and what their responses say. Pure, hostile bytes.

Source: TCG TPM 2.0 Library Part 3, the section of each command's name; Part 2 for structures and constants.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from spvtpm.wire.credentials import Credential
from spvtpm.wire.errors import InterfaceError, MessageError
from spvtpm.wire.quotes import MAX_ATTEST_BYTES
from spvtpm.wire.tpm_stream import HEADER, MAX_COMMAND_BYTES, TPM_RC_SUCCESS, TPM_ST_NO_SESSIONS
from spvtpm.wire.tpm_structures import DIGEST_BYTES, PcrSelection, PcrValues, Reader, read_pcr_selection, sized

ENDORSEMENT: Final = 0x4000000B
_NULL_HANDLE, _PASSWORD_SESSION = 0x40000007, 0x40000009
"""Source: Part 2, table TPM_RH."""

_TPM_ST_SESSIONS = 0x8002
_NULL, _SHA256, _POLICY_SESSION = 0x0010, 0x000B, 0x01
_PASSWORD: Final = struct.pack(">IHBH", _PASSWORD_SESSION, 0, 0, 0)
"""An authorization by the empty password: what hierarchies and keys have that nobody gave another one."""

_MAX_PUBLIC_BYTES, _MAX_SECRET_BYTES = 1024, 64
_MAX_VALUES = 8
"""So many digests are in one answer. Source: Part 2, section "TPML_DIGEST"."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command.

    Attributes:
        name: for sentences.
        data: the whole of it.
    """

    name: str
    data: bytes

    def answer(self, response: bytes) -> Reader:
        """What the answer has behind its header.

        Args:
            response: hostile bytes.

        Raises:
            MessageError: it is no response.
            InterfaceError: the TPM has refused.
        """
        if not HEADER.size <= len(response) <= MAX_COMMAND_BYTES:
            raise MessageError("what answers in the VM is no TPM")
        tag, size, code = HEADER.unpack_from(response)
        if size != len(response):
            raise MessageError("what answers in the VM is no TPM")
        if code != TPM_RC_SUCCESS:
            raise InterfaceError(f"the VM's TPM refuses {self.name}: {code:#05x}")
        if tag != HEADER.unpack_from(self.data)[0]:
            raise MessageError(f"the VM's TPM has answered something else than {self.name}")
        return Reader(response[HEADER.size :], f"the answer to {self.name}")


def _command(name: str, code: int, *handles: int, sessions: tuple[bytes, ...] = (), parameters: bytes = b"") -> Command:
    body = struct.pack(f">{len(handles)}I", *handles)
    if sessions:
        area = b"".join(sessions)
        body += struct.pack(">I", len(area)) + area
    body += parameters
    tag = _TPM_ST_SESSIONS if sessions else TPM_ST_NO_SESSIONS
    return Command(name, HEADER.pack(tag, HEADER.size + len(body), code) + body)


def create_primary(template: bytes) -> Command:
    """A key of the endorsement hierarchy; `template` is a TPMT_PUBLIC."""
    parameters = sized(bytes(4)) + sized(template) + sized(b"") + bytes(4)
    return _command("TPM2_CreatePrimary", 0x131, ENDORSEMENT, sessions=(_PASSWORD,), parameters=parameters)


def created(answer: Reader) -> tuple[int, bytes]:
    """Its handle, and its TPMT_PUBLIC."""
    handle = answer.number("I")
    answer.number("I")
    return handle, answer.sized(_MAX_PUBLIC_BYTES)


def start_policy_session(nonce: bytes) -> Command:
    """A session for an EK's policy.

    Args:
        nonce: 16 to 32 bytes.
    """
    rest = sized(nonce) + sized(b"") + struct.pack(">BHH", _POLICY_SESSION, _NULL, _SHA256)
    return _command("TPM2_StartAuthSession", 0x176, _NULL_HANDLE, _NULL_HANDLE, parameters=rest)


def started(answer: Reader) -> int:
    """The session's handle."""
    return answer.number("I")


def policy_secret(session: int) -> Command:
    """Shows the session the authorization of the endorsement hierarchy, as an EK's policy wants it."""
    rest = sized(b"") * 3 + struct.pack(">i", 0)
    return _command("TPM2_PolicySecret", 0x151, ENDORSEMENT, session, sessions=(_PASSWORD,), parameters=rest)


def activate_credential(ak: int, ek: int, session: int, credential: Credential) -> Command:
    """Opens a credential for the AK with the EK. The session ends with it."""
    policy = struct.pack(">IHBH", session, 0, 0, 0)
    rest = credential.blob + credential.secret
    return _command("TPM2_ActivateCredential", 0x147, ak, ek, sessions=(_PASSWORD, policy), parameters=rest)


def activated(answer: Reader) -> bytes:
    """The secret."""
    answer.number("I")
    return answer.sized(_MAX_SECRET_BYTES)


def quote(ak: int, nonce: bytes, selection: PcrSelection) -> Command:
    """A quote by the scheme of the AK."""
    rest = sized(nonce) + struct.pack(">H", _NULL) + selection.encode()
    return _command("TPM2_Quote", 0x158, ak, sessions=(_PASSWORD,), parameters=rest)


def quoted(answer: Reader) -> tuple[bytes, bytes]:
    """TPMS_ATTEST and TPMT_SIGNATURE."""
    size = answer.number("I")
    parameters = Reader(answer.take(size), "the answer to TPM2_Quote")
    attested = parameters.sized(MAX_ATTEST_BYTES)
    return attested, parameters.take(parameters.left)


def pcr_read(selection: PcrSelection) -> Command:
    """The values of PCRs; a TPM gives the first 8 of them."""
    return _command("TPM2_PCR_Read", 0x17E, parameters=selection.encode())


def values_read(answer: Reader) -> PcrValues:
    """Those that were given.

    Raises:
        MessageError: it is something else.
    """
    answer.number("I")  # a counter
    selection, count = read_pcr_selection(answer), answer.number("I")
    wanted = [(bank, index) for bank, indices in selection.banks for index in indices]
    if count != len(wanted) or count > _MAX_VALUES:
        raise MessageError("the VM's TPM gives more or fewer PCRs than it says")
    values: PcrValues = {}
    for bank, index in wanted:
        value = answer.sized(DIGEST_BYTES[bank])
        if len(value) != DIGEST_BYTES[bank]:
            raise MessageError(f"the VM's TPM gives a {bank} PCR of {len(value)} bytes")
        values.setdefault(bank, {})[index] = value
    return values


def flush_context(handle: int) -> Command:
    """Ends a key or a session."""
    return _command("TPM2_FlushContext", 0x165, parameters=struct.pack(">I", handle))
