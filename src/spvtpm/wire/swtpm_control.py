"""swtpm's control protocol: what QEMU, and TPM clients, say to a TPM emulator beside its commands. Pure.

A request is a 32-bit big-endian command code and its body; an answer starts with a 32-bit result. An answer that is an error is
the result alone, but for those whose readers (QEMU) always want the whole.

Source: swtpm, include/swtpm/tpm_ioctl.h, man/man3/swtpm_ioctls.pod; results: libtpms/tpm_error.h; who reads how much: QEMU,
backends/tpm/tpm_emulator.c. In our words: docs/formats/emulator-control.md.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

MAX_REQUEST_BYTES = 64
"""Longer ones carry a state or data to be hashed, and are refused before that is read."""

MIN_BUFFER_BYTES: Final = 2808
MAX_BUFFER_BYTES: Final = 4096
"""The sizes that libtpms allows for a TPM's buffers. Source: libtpms, TPMLIB_SetBufferSize(3); the smallest as measured."""


class ControlCommand(IntEnum):
    """Command codes."""

    GET_CAPABILITY = 0x01
    INIT = 0x02
    SHUTDOWN = 0x03
    GET_TPMESTABLISHED = 0x04
    SET_LOCALITY = 0x05
    HASH_START = 0x06
    HASH_DATA = 0x07
    HASH_END = 0x08
    CANCEL_TPM_CMD = 0x09
    STORE_VOLATILE = 0x0A
    RESET_TPMESTABLISHED = 0x0B
    GET_STATEBLOB = 0x0C
    SET_STATEBLOB = 0x0D
    STOP = 0x0E
    GET_CONFIG = 0x0F
    SET_DATAFD = 0x10
    SET_BUFFERSIZE = 0x11
    GET_INFO = 0x12
    LOCK_STORAGE = 0x13


class Capability(IntFlag):
    """What an emulator can; one bit for each command that it may lack."""

    INIT = 1 << 0
    SHUTDOWN = 1 << 1
    GET_TPMESTABLISHED = 1 << 2
    SET_LOCALITY = 1 << 3
    HASHING = 1 << 4
    CANCEL_TPM_CMD = 1 << 5
    STORE_VOLATILE = 1 << 6
    RESET_TPMESTABLISHED = 1 << 7
    GET_STATEBLOB = 1 << 8
    SET_STATEBLOB = 1 << 9
    STOP = 1 << 10
    GET_CONFIG = 1 << 11
    SET_DATAFD = 1 << 12
    SET_BUFFERSIZE = 1 << 13
    GET_INFO = 1 << 14
    SEND_COMMAND_HEADER = 1 << 15
    LOCK_STORAGE = 1 << 16


class ControlResult(IntEnum):
    """Results."""

    SUCCESS = 0
    BAD_PARAMETER = 0x03
    FAIL = 0x09
    BAD_ORDINAL = 0x0A
    IOERROR = 0x1F
    BAD_LOCALITY = 0x3D


class ConfigFlag(IntFlag):
    """What GET_CONFIG tells."""

    FILE_KEY = 1 << 0
    MIGRATION_KEY = 1 << 1


_KNOWN: frozenset[int] = frozenset(ControlCommand)
_CLIENT_CAPABILITIES = Capability.SET_LOCALITY | Capability.CANCEL_TPM_CMD

_U32 = struct.Struct(">I")
_LOCALITY_BYTES = (1, 4)  # tpm2-tss sends the locality alone, QEMU with three zero bytes behind it
_BODY_BYTES: dict[int, tuple[int, int]] = {
    ControlCommand.INIT: (4, 4),
    ControlCommand.SET_LOCALITY: _LOCALITY_BYTES,
    ControlCommand.HASH_DATA: (4, MAX_REQUEST_BYTES),
    ControlCommand.RESET_TPMESTABLISHED: _LOCALITY_BYTES,
    ControlCommand.GET_STATEBLOB: (12, 12),
    ControlCommand.SET_STATEBLOB: (12, MAX_REQUEST_BYTES),
    ControlCommand.SET_BUFFERSIZE: (4, 4),
    ControlCommand.GET_INFO: (16, 16),
    ControlCommand.LOCK_STORAGE: (4, 4),
}
"""The least and most bytes of the bodies that are not empty."""


class ControlRequest(NamedTuple):
    """One request.

    Attributes:
        code: of the command; perhaps none of `ControlCommand`.
        body: as long as that command's may be; of an unknown command, what came with it.
    """

    code: int
    body: bytes

    @property
    def number(self) -> int:
        """The 32-bit number that the body begins with."""
        (number,) = _U32.unpack_from(self.body)
        return int(number)


def is_cut_off(data: bytes) -> bool:
    """Whether more of a request must come.

    Args:
        data: what has come of it; hostile bytes.
    """
    if len(data) < _U32.size:
        return True
    least, _most = _BODY_BYTES.get(_U32.unpack_from(data)[0], (0, 0))
    return len(data) < _U32.size + least


def parse_request(data: bytes) -> ControlRequest | None:
    """A whole request; None if it is too short or too long for its command.

    Args:
        data: hostile bytes.
    """
    if is_cut_off(data):
        return None
    (code,) = _U32.unpack_from(data)
    _least, most = _BODY_BYTES.get(code, (0, 0 if code in _KNOWN else MAX_REQUEST_BYTES))
    body = data[_U32.size :]
    return ControlRequest(code, body) if len(body) <= most else None


def result_answer(result: ControlResult) -> bytes:
    """The answer of those commands that have a result alone, and of nearly all that fail."""
    return _U32.pack(result)


def capability_answer(capabilities: Capability) -> bytes:
    """Of GET_CAPABILITY."""
    return struct.pack(">II", ControlResult.SUCCESS, capabilities)


def established_answer(result: ControlResult) -> bytes:
    """Of GET_TPMESTABLISHED: nothing was ever measured at locality 4, so the bit is 0. Whole even if it is an error."""
    return struct.pack(">IB3x", result, 0)


def config_answer(flags: ConfigFlag) -> bytes:
    """Of GET_CONFIG."""
    return struct.pack(">II", ControlResult.SUCCESS, flags)


def buffer_size_answer(result: ControlResult, size_bytes: int) -> bytes:
    """Of SET_BUFFERSIZE, with the size in force. Whole even if it is an error."""
    return struct.pack(">IIII", result, size_bytes, MIN_BUFFER_BYTES, MAX_BUFFER_BYTES)


def no_state_answer(result: ControlResult) -> bytes:
    """Of GET_STATEBLOB, without a state. Whole, as its readers want it even if it is an error."""
    return struct.pack(">IIII", result, 0, 0, 0)


def locality_result(body: bytes) -> ControlResult:
    """Of SET_LOCALITY: locality 0 is the only one."""
    if not body:
        return ControlResult.BAD_PARAMETER
    return ControlResult.SUCCESS if body[0] == 0 else ControlResult.BAD_LOCALITY


def answer_control(data: bytes) -> tuple[bytes, ControlCommand | None]:
    """The answer to one control request of a TPM client, and the command if it is to be carried out.

    Power and state are not such a client's to control, so nearly every command is refused.

    Args:
        data: hostile bytes.
    """
    if len(data) < _U32.size:
        return result_answer(ControlResult.BAD_PARAMETER), None
    (code,) = _U32.unpack_from(data)
    if code == ControlCommand.GET_CAPABILITY:
        return capability_answer(_CLIENT_CAPABILITIES), None
    if code == ControlCommand.SET_LOCALITY:
        return result_answer(locality_result(data[_U32.size :])), None
    if code == ControlCommand.CANCEL_TPM_CMD:
        return result_answer(ControlResult.SUCCESS), ControlCommand.CANCEL_TPM_CMD
    return result_answer(ControlResult.BAD_ORDINAL), None
