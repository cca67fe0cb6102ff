"""A client of a TPM emulator, as QEMU is one: a control connection, and a data channel that it hands over. Bytes by hand.

Source of all numbers: swtpm, include/swtpm/tpm_ioctl.h; libtpms/tpm_error.h.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

CMD_GET_CAPABILITY = 0x01
CMD_INIT = 0x02
CMD_SHUTDOWN = 0x03
CMD_GET_TPMESTABLISHED = 0x04
CMD_SET_LOCALITY = 0x05
CMD_HASH_START = 0x06
CMD_CANCEL_TPM_CMD = 0x09
CMD_STORE_VOLATILE = 0x0A
CMD_RESET_TPMESTABLISHED = 0x0B
CMD_GET_STATEBLOB = 0x0C
CMD_SET_STATEBLOB = 0x0D
CMD_STOP = 0x0E
CMD_GET_CONFIG = 0x0F
CMD_SET_DATAFD = 0x10
CMD_SET_BUFFERSIZE = 0x11
CMD_GET_INFO = 0x12
CMD_LOCK_STORAGE = 0x13

TPM_SUCCESS = 0x00
TPM_BAD_PARAMETER = 0x03
TPM_FAIL = 0x09
TPM_BAD_ORDINAL = 0x0A
TPM_BAD_LOCALITY = 0x3D

PATIENCE_S = 30.0


class EmulatorClient:
    """Connects; says nothing by itself.

    Args:
        path: of the control socket.
    """

    def __init__(self, path: Path | str) -> None:
        self.control = socket.socket(socket.AF_UNIX)
        self.control.settimeout(PATIENCE_S)
        self.control.connect(str(path))
        self.data, self._theirs = socket.socketpair()
        self.data.settimeout(PATIENCE_S)

    def ask(self, request: bytes, *descriptors: int) -> bytes:
        """One request, its answer; empty if the other side hangs up."""
        try:
            socket.send_fds(self.control, [request], descriptors)
            return self.control.recv(4096)
        except (ConnectionResetError, BrokenPipeError):
            return b""

    def do(self, code: int, body: bytes = b"", *descriptors: int) -> int:
        """One request; its result."""
        answer = self.ask(struct.pack(">I", code) + body, *descriptors)
        result: int = struct.unpack_from(">I", answer)[0]
        return result

    def init(self) -> int:
        """Switches the TPM on, anew."""
        return self.do(CMD_INIT, bytes(4))

    def attach(self) -> None:
        """Hands the data channel over and switches the TPM on."""
        assert self.do(CMD_SET_DATAFD, b"", self._theirs.fileno()) == TPM_SUCCESS
        self._theirs.close()  # or its end would not be seen here
        assert self.init() == TPM_SUCCESS

    def transmit(self, command: bytes) -> bytes:
        """One TPM command, its response."""
        self.data.sendall(command)
        return self.data.recv(4096)

    def close(self) -> None:
        """Hangs up, as a machine that ends."""
        for end in (self.control, self.data, self._theirs):
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
