"""TPM commands on a byte stream: each begins with a tag, its whole size and a code, all big-endian.

Source: TCG TPM 2.0 Library Part 1, section "Command/Response Structure"; Part 3, section "TPM2_Startup".
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from spvtpm.wire.errors import FrameError, InterfaceError

HEADER = struct.Struct(">HII")
MAX_COMMAND_BYTES = 4096

Transmit = Callable[[bytes], bytes]
"""Sends one TPM command, returns its response."""

TPM_ST_NO_SESSIONS = 0x8001
TPM_RC_SUCCESS = 0
TPM_RC_INITIALIZE = 0x100
TPM_RC_FAILURE = 0x101

_STARTUP_CLEAR = bytes.fromhex("80010000000c000001440000")


class CommandDecoder:
    """Cuts a stream into commands. After an error the stream is lost."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Takes the next bytes; returns the commands they complete.

        Raises:
            FrameError: a command announces less than its header, or more than 4,096 bytes.
        """
        self._buffer += data
        commands: list[bytes] = []
        while len(self._buffer) >= HEADER.size:
            _tag, size, _code = HEADER.unpack_from(self._buffer)
            if not HEADER.size <= size <= MAX_COMMAND_BYTES:
                raise FrameError(
                    f"a TPM command announces {size} bytes; allowed are {HEADER.size} to {MAX_COMMAND_BYTES}"
                )
            if len(self._buffer) < size:
                break
            commands.append(bytes(self._buffer[:size]))
            del self._buffer[:size]
        return commands


def error_response(code: int) -> bytes:
    """A response that carries nothing but a TPM_RC."""
    return HEADER.pack(TPM_ST_NO_SESSIONS, HEADER.size, code)


def ensure_started(transmit: Transmit) -> None:
    """Does what a VM's firmware does first: TPM2_Startup(CLEAR). A TPM that has been started stays as it is.

    Raises:
        InterfaceError: the TPM refuses to start.
    """
    response = transmit(_STARTUP_CLEAR)
    code = HEADER.unpack_from(response)[2] if len(response) >= HEADER.size else TPM_RC_FAILURE
    if code not in (TPM_RC_SUCCESS, TPM_RC_INITIALIZE):
        raise InterfaceError(f"the vTPM does not start: TPM2_Startup answers {code:#05x}")
