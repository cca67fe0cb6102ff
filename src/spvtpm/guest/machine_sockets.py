"""The machine's two sockets: its hypervisor's control, and its owner's console. A thread a connection, so many at a time."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from spvtpm.files.unix_sockets import peer_of
from spvtpm.guest.frame_stream import FrameStream
from spvtpm.wire.errors import PeerError, ResourceError, SpvtpmError
from spvtpm.wire.machine_control import (
    MAX_CONTROL_BYTES,
    ControlReply,
    ControlRequest,
    encode_control,
    parse_control_request,
)
from spvtpm.wire.messages import error_reply

log = logging.getLogger(__name__)

_IDLE_S: Final = 300.0
_CLOSE_S: Final = 5.0
_PAUSE_S: Final = 0.05


class MachineSocket:
    """A unix socket, mode 0600: this user's processes and root's may connect.

    Args:
        path: of the socket.
        limit: connections at a time.

    Raises:
        ResourceError: it cannot be had.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self._room = threading.BoundedSemaphore(limit)
        self._closing = False
        self._open = set[threading.Thread]()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            path.unlink(missing_ok=True)
            self._listener.bind(os.fspath(path))
            path.chmod(0o600)
            self._listener.listen(limit)
        except OSError as error:
            self._listener.close()
            raise ResourceError(f"cannot listen on {path}: {error.strerror or error}") from None

    def serve(self, handle: Callable[[socket.socket], None]) -> None:
        """Handles each connection in a thread of its own."""
        threading.Thread(target=self._accept, args=(handle,), daemon=True, name=self._path.name).start()

    def serve_control(self, carry_out: Callable[[ControlRequest], ControlReply]) -> None:
        """Has requests of the hypervisor carried out."""
        self.serve(lambda connection: _serve_control(connection, carry_out))

    def _accept(self, handle: Callable[[socket.socket], None]) -> None:
        while not self._closing:
            try:
                connection, _address = self._listener.accept()
            except OSError:  # closing; or no descriptor is left, and others may fare better
                time.sleep(0 if self._closing else _PAUSE_S)
                continue
            if peer_of(connection).uid not in (0, os.geteuid()) or not self._room.acquire(blocking=False):
                log.warning("turned a connection to %s away", self._path.name)
                connection.close()
                continue
            thread = threading.Thread(target=self._run, args=(handle, connection), daemon=True, name=self._path.name)
            self._open.add(thread)
            thread.start()

    def _run(self, handle: Callable[[socket.socket], None], connection: socket.socket) -> None:
        try:
            with connection, suppress(OSError):
                handle(connection)
        finally:
            self._room.release()
            self._open.discard(threading.current_thread())

    def close(self) -> None:
        """Takes no more connections; those that are open may say their last words."""
        self._closing = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        deadline = time.monotonic() + _CLOSE_S
        for thread in list(self._open):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))


def _serve_control(connection: socket.socket, carry_out: Callable[[ControlRequest], ControlReply]) -> None:
    stream = FrameStream(connection, MAX_CONTROL_BYTES)
    try:
        while (frame := stream.receive(time.monotonic() + _IDLE_S)) is not None:
            stream.send(encode_control(_answer(frame, carry_out)))
    except PeerError as error:
        log.debug("a control connection ended: %s", error)


def _answer(frame: bytes, carry_out: Callable[[ControlRequest], ControlReply]) -> ControlReply:
    try:
        return carry_out(parse_control_request(frame))
    except SpvtpmError as error:
        return error_reply(error)
