"""The data channel of a TPM emulator, as the SP holds it: who looks at it when no worker does."""

from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from os import fstat

from spvtpm.wire.tpm_stream import MAX_COMMAND_BYTES, TPM_RC_FAILURE, error_response

_DONT_WAIT = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


def is_stream_socket(descriptor: int) -> bool:
    """Whether a stranger's descriptor is a connected unix stream socket: anything else could hold up whoever reads it."""
    if not stat.S_ISSOCK(fstat(descriptor).st_mode):
        return False
    with socket.socket(fileno=descriptor) as probe:
        try:
            return (probe.family, probe.type) == (socket.AF_UNIX, socket.SOCK_STREAM) and _has_peer(probe)
        finally:
            probe.detach()


def _has_peer(probe: socket.socket) -> bool:
    try:
        probe.getpeername()
    except OSError:
        return False
    return True


class DataChannel:
    """One client's. While nobody serves it every command is answered with TPM_RC_FAILURE.

    Args:
        descriptor: a unix stream socket; the channel's from now on.
    """

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)

    def fileno(self) -> int:
        """For a worker."""
        return self._socket.fileno()

    def leave(self) -> None:
        """Somebody else looks at it from now on."""
        asyncio.get_running_loop().remove_reader(self._socket)

    def watch(self, wake: Callable[[], None]) -> None:
        """Calls `wake` once a command comes, which stays for a worker to find."""
        asyncio.get_running_loop().add_reader(self._socket, self._look, wake)

    def _look(self, wake: Callable[[], None]) -> None:
        self.leave()
        with suppress(OSError):
            if self._socket.recv(1, socket.MSG_PEEK | _DONT_WAIT):
                wake()

    def refuse(self) -> None:
        """Nobody serves it from now on."""
        asyncio.get_running_loop().add_reader(self._socket, self._refuse_once)

    def _refuse_once(self) -> None:
        try:
            command = self._socket.recv(MAX_COMMAND_BYTES + 1, _DONT_WAIT)
            if command:
                self._socket.send(error_response(TPM_RC_FAILURE), _DONT_WAIT)
        except OSError:
            command = b""  # it does not read, or has gone
        if not command:
            self.leave()

    def close(self) -> None:
        """Hangs up."""
        self.leave()
        with suppress(OSError):  # whoever else holds it, a worker that ends for one, does not keep it open
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
