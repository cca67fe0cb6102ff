"""Doors for unmodified TPM clients inside the VM: tpm2-tss' `cmd` TCTI over pipes, its `swtpm` TCTI over sockets."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from spvtpm.wire.errors import AlreadyExists, FrameError, SpvtpmError
from spvtpm.wire.swtpm_control import MAX_REQUEST_BYTES, ControlCommand, answer_control
from spvtpm.wire.tpm_stream import TPM_RC_FAILURE, CommandDecoder, Transmit, error_response

log = logging.getLogger(__name__)

MAX_CLIENTS = 32
_READ_BYTES = 4096
_ACCEPT_PAUSE_S = 0.05


def serve_pipe(transmit: Transmit, source: int, sink: int) -> None:
    """Serves one `cmd` TCTI: commands from descriptor `source`, responses to `sink`, until the source ends.

    Raises:
        FrameError: what came is no TPM command.
        SpvtpmError: from `transmit`.
    """
    decoder = CommandDecoder()
    while data := os.read(source, _READ_BYTES):
        for command in decoder.feed(data):
            response = memoryview(transmit(command))
            while response:
                response = response[os.write(sink, response) :]


class _Server:
    """Accepts on a socket that listens already, with a thread for each client; at most `MAX_CLIENTS` at a time."""

    def __init__(self, listener: socket.socket, handle: Callable[[socket.socket], None]) -> None:
        self._listener = listener
        self._handle = handle
        self._room = threading.BoundedSemaphore(MAX_CLIENTS)
        self._closing = False
        self._thread = threading.Thread(target=self._accept_for_ever, name="tcti", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _accept_for_ever(self) -> None:
        while not self._closing:
            try:
                connection, _address = self._listener.accept()
            except OSError:  # closing; or a client that went again, or no descriptor is left: others may fare better
                time.sleep(0 if self._closing else _ACCEPT_PAUSE_S)
                continue
            if self._room.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(connection,), name="tcti", daemon=True).start()
            else:
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, suppress(OSError):
                self._handle(connection)
        finally:
            self._room.release()

    def close(self) -> None:
        self._closing = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends the accept under way
        if self._thread.is_alive():
            self._thread.join()
        self._listener.close()


class TctiServer:
    """Offers one vTPM to many clients on a data and a control socket. Commands of all clients queue in `transmit`.

    Args:
        transmit: sends one command; thread-safe.
        cancel: cancels the running command.
        data: listening stream socket for TPM commands.
        control: listening stream socket for swtpm control requests.
    """

    def __init__(
        self, transmit: Transmit, cancel: Callable[[], None], data: socket.socket, control: socket.socket
    ) -> None:
        self._transmit = transmit
        self._cancel = cancel
        self._told = ""
        self._servers = (_Server(data, self._serve_data), _Server(control, self._serve_control))

    def start(self) -> None:
        """Serves in threads of its own."""
        for server in self._servers:
            server.start()

    def close(self) -> None:
        """Takes no more clients."""
        for server in self._servers:
            server.close()

    def _serve_data(self, connection: socket.socket) -> None:
        decoder = CommandDecoder()
        while data := connection.recv(_READ_BYTES):
            try:
                commands = decoder.feed(data)
            except FrameError:
                connection.sendall(error_response(TPM_RC_FAILURE))
                return
            for command in commands:
                connection.sendall(self._answer(command))

    def _answer(self, command: bytes) -> bytes:
        try:
            return self._transmit(command)
        except SpvtpmError as error:
            if str(error) != self._told:
                self._told = str(error)
                log.warning("clients get TPM_RC_FAILURE: %s", error)
            return error_response(TPM_RC_FAILURE)

    def _serve_control(self, connection: socket.socket) -> None:
        while request := connection.recv(MAX_REQUEST_BYTES):
            answer, command = answer_control(request)
            if command is ControlCommand.CANCEL_TPM_CMD:
                self._cancel()
            connection.sendall(answer)


def listen_unix(path: Path) -> tuple[socket.socket, socket.socket]:
    """Data socket at `path`, control socket at `path`.ctrl, as the swtpm TCTI expects; mode 0600.

    A socket on which nobody listens any more is replaced, anything else stays as it is.

    Raises:
        AlreadyExists: something else lies there.
        OSError: they cannot be had.
    """
    with ExitStack() as undo:
        data, control = (undo.enter_context(listen_at(address)) for address in unix_paths(path))
        undo.pop_all()
        return data, control


def listen_at(path: Path) -> socket.socket:
    """One socket there, as `listen_unix` has two."""
    _remove_stale_socket(path)
    with ExitStack() as undo:
        listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(MAX_CLIENTS)
        undo.pop_all()
        return listener


def unix_paths(path: Path) -> tuple[Path, Path]:
    """Where `listen_unix` listens: data, control."""
    return path, path.with_name(f"{path.name}.ctrl")


def _remove_stale_socket(path: Path) -> None:
    if not os.path.lexists(path):
        return
    with socket.socket(socket.AF_UNIX) as probe:
        if not path.is_socket() or probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise AlreadyExists(f"{path} exists, and is no socket that was left behind")
    path.unlink()


def listen_tcp(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """Data socket at `port`, control socket at `port` + 1, as the swtpm TCTI expects.

    Raises:
        OSError: they cannot be had.
    """
    return socket.create_server((host, port)), socket.create_server((host, port + 1))
