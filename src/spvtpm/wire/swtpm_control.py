"""The part of swtpm's control protocol that TPM clients use (tpm2-tss' swtpm TCTI): answers, without state.

A request is a 32-bit big-endian command code and its body; an answer starts with a 32-bit result.

Source: swtpm, include/swtpm/tpm_ioctl.h; results: libtpms/tpm_error.h.
"""

from __future__ import annotations

import struct
from enum import IntEnum

MAX_REQUEST_BYTES = 64


class ControlCommand(IntEnum):
    """Command codes answered here."""

    GET_CAPABILITY = 0x01
    SET_LOCALITY = 0x05
    CANCEL_TPM_CMD = 0x09


class ControlResult(IntEnum):
    """Results."""

    SUCCESS = 0
    BAD_PARAMETER = 0x03
    BAD_ORDINAL = 0x0A
    BAD_LOCALITY = 0x3D


_CAPABILITIES = 1 << 3 | 1 << 5
"""PTM_CAP_SET_LOCALITY | PTM_CAP_CANCEL_TPM_CMD"""

_U32 = struct.Struct(">I")


def answer_control(request: bytes) -> tuple[bytes, ControlCommand | None]:
    """The answer to one control request, and the command if it is to be carried out.

    Only locality 0 exists; power and state are not the client's to control, so every other command is refused.

    Args:
        request: hostile bytes.
    """
    if len(request) < _U32.size:
        return _U32.pack(ControlResult.BAD_PARAMETER), None
    (code,) = _U32.unpack_from(request)
    body = request[_U32.size :]
    if code == ControlCommand.GET_CAPABILITY:
        return struct.pack(">II", ControlResult.SUCCESS, _CAPABILITIES), None
    if code == ControlCommand.SET_LOCALITY:
        if not body:
            return _U32.pack(ControlResult.BAD_PARAMETER), None
        result = ControlResult.SUCCESS if body[0] == 0 else ControlResult.BAD_LOCALITY
        return _U32.pack(result), None
    if code == ControlCommand.CANCEL_TPM_CMD:
        return _U32.pack(ControlResult.SUCCESS), ControlCommand.CANCEL_TPM_CMD
    return _U32.pack(ControlResult.BAD_ORDINAL), None
