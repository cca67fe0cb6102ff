"""A vTPM for a test or a script: `with spvtpm.VTPM() as tpm:`. No daemon; the same sandboxed worker process as in the SP.

A door: it sees the domains that it puts together.
"""

from __future__ import annotations

import atexit
import os
import select
import shutil
import socket
import tempfile
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from spvtpm.files import create_file, read_file
from spvtpm.files.state_lock import lock_state
from spvtpm.guest.tcti import TctiServer, listen_unix
from spvtpm.processor.nv_store import NvStore
from spvtpm.processor.worker import messages
from spvtpm.processor.worker.messages import (
    Commit,
    Committed,
    Failed,
    FromWorker,
    Off,
    PacketPort,
    PowerOff,
    Ready,
    Start,
)
from spvtpm.processor.zygote_link import ZygoteLink
from spvtpm.wire.errors import IntegrityError, StorageError, WorkerError
from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.mailbox import MAX_PAYLOAD_BYTES
from spvtpm.wire.tpm_stream import ensure_started

_ROOT_KEY = "root-key"
_ROOT_KEY_BYTES = 32
_RECORD = "vtpm/embedded"


class _Storage(Protocol):
    """Where the permanent state lives."""

    def load(self) -> bytes | None:
        """The state, or none for a new TPM."""

    def save(self, permanent: bytes) -> None:
        """Returns once it is kept."""

    def close(self) -> None:
        """Ends use."""


class _InMemory:
    def __init__(self) -> None:
        self._permanent: bytes | None = None

    def load(self) -> bytes | None:
        return self._permanent

    def save(self, permanent: bytes) -> None:
        self._permanent = permanent

    def close(self) -> None:
        pass


class StateDirectory:
    """Sealed and durable, as in the SP.

    Args:
        directory: made if it is missing.

    Raises:
        StorageError: it cannot be used, or is damaged.
        StateInUse: another process uses it.
    """

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot use {directory}: {error.strerror}") from None
        if (directory / "sp.toml").exists():
            raise StorageError(f"{directory} belongs to a secure processor")
        self._lock = lock_state(directory)
        try:
            if not (directory / _ROOT_KEY).exists():
                if (directory / "nv.db").exists():
                    raise StorageError(
                        f"{directory} has lost its {_ROOT_KEY}: what is in it cannot be opened, remove it"
                    )
                root_key = os.urandom(_ROOT_KEY_BYTES)
                NvStore.create(directory / "nv.db", root_key)
                create_file(directory / _ROOT_KEY, root_key)
            self._store = NvStore(directory / "nv.db", _read_root_key(directory / _ROOT_KEY))
        except BaseException:
            os.close(self._lock)
            raise

    def load(self) -> bytes | None:
        """The permanent state, or none for a new TPM."""
        return self._store.read(_RECORD) if _RECORD in self._store else None

    def save(self, permanent: bytes) -> None:
        """Returns once it is durable.

        Raises:
            StorageError: it is not.
        """
        self._store.commit([(_RECORD, permanent)]).result()

    def close(self) -> None:
        """Ends use."""
        self._store.close()
        os.close(self._lock)


def _read_root_key(path: Path) -> bytes:
    root_key = read_file(path, _ROOT_KEY_BYTES)
    if len(root_key) != _ROOT_KEY_BYTES:
        raise IntegrityError(f"{path} is damaged: it has {len(root_key)} bytes, not {_ROOT_KEY_BYTES}")
    return root_key


class _SharedZygote:
    """One zygote per process, started at the first vTPM: the next ones take milliseconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._link: ZygoteLink | None = None
        self._owner = 0

    def fork(self) -> tuple[ZygoteLink, int, socket.socket]:
        """The link, and a new worker's tag and control socket.

        Raises:
            WorkerError: no worker can be had.
        """
        with self._lock:
            if self._link is None or self._owner != os.getpid():
                self._link = self._start()
            self._drain(self._link)
            try:
                return self._link, *self._link.fork()
            except WorkerError:
                self._link = self._start()
                return self._link, *self._link.fork()

    def _start(self) -> ZygoteLink:
        link = ZygoteLink()
        link.wait_ready()
        link.set_blocking(False)
        self._owner = os.getpid()
        atexit.register(self._end, link)
        return link

    def _end(self, link: ZygoteLink) -> None:
        if self._owner == os.getpid():
            link.close()

    @staticmethod
    def _drain(link: ZygoteLink) -> None:
        with suppress(BlockingIOError, ConnectionError):
            while link.receive_exit() is not None:
                pass


_zygote = _SharedZygote()


class _Process:
    """One worker: commands as packets on one socket, its storage requests on another."""

    def __init__(self, storage: _Storage) -> None:
        self._storage = storage
        self._decoder = FrameDecoder()
        self._link, self._tag, self._control = _zygote.fork()
        self._data, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._data, select.POLLIN)
        self._poll.register(self._control, select.POLLIN)
        try:
            with theirs:
                socket.send_fds(self._control, [b"\0"], [theirs.fileno()])
            self._tell(Start(PacketPort(), storage.load()))
            self._await(Ready)
        except BaseException:
            self.kill()
            raise

    def transmit(self, command: bytes) -> bytes:
        try:
            self._data.send(command)
        except OSError:
            raise WorkerError("the vTPM's process died") from None
        while True:
            for descriptor, _event in self._poll.poll():
                if descriptor == self._control.fileno():
                    self._hear()
                elif response := self._receive():
                    return response

    def _receive(self) -> bytes:
        try:
            return self._data.recv(MAX_PAYLOAD_BYTES)
        except OSError:
            raise WorkerError("the vTPM's process died") from None

    def shut_down(self) -> None:
        """Orderly, then gone."""
        with suppress(WorkerError):
            self._tell(PowerOff())
            self._await(Off)
        self.kill()

    def kill(self) -> None:
        self._link.kill(self._tag)
        self._control.close()
        self._data.close()

    def _tell(self, message: messages.ToWorker) -> None:
        try:
            self._control.sendall(encode_frame(messages.encode(message)))
        except OSError:
            raise WorkerError("the vTPM's process died") from None

    def _await(self, kind: type[FromWorker]) -> None:
        while True:
            for message in self._hear():
                if isinstance(message, kind):
                    return

    def _hear(self) -> list[FromWorker]:
        """Reads what the worker says and does what it asks; returns the rest."""
        try:
            data = self._control.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            raise WorkerError("the vTPM's process died")
        heard: list[FromWorker] = []
        for frame in self._decoder.feed(data):
            message = messages.parse_from_worker(frame)
            if isinstance(message, Commit):
                self._tell(self._commit(message.permanent))
            elif isinstance(message, Failed):
                raise WorkerError(f"the vTPM failed: {message.reason}")
            else:
                heard.append(message)
        return heard

    def _commit(self, permanent: bytes) -> Committed:
        try:
            self._storage.save(permanent)
        except StorageError as error:
            return Committed(str(error))
        return Committed()


def _remove_tree(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # not at the end of a fork
        shutil.rmtree(path, ignore_errors=True)


class VTPM:
    """A TPM 2.0 of your own, manufactured, powered on and started.

        with VTPM() as tpm:
            tpm.transmit(command)                                   # raw bytes
            subprocess.run(["tpm2_getrandom", "8", "-T", tpm.tcti])     # or any TPM client

    Thread-safe: commands queue. Runs in a sandboxed process; ends with this object, in order (TPM2_Shutdown).

    Args:
        state: a directory that keeps the TPM (sealed, durable before each answer); made if missing. None: in memory.

    Raises:
        StorageError: the directory cannot be used, or is damaged.
        StateInUse: another process uses it.
        WorkerError: the process does not start.
    """

    def __init__(self, state: Path | str | None = None) -> None:
        self._lock = threading.RLock()
        self._storage: _Storage = _InMemory() if state is None else StateDirectory(Path(state))
        self._server: TctiServer | None = None
        self._sockets: Path | None = None
        self._process: _Process | None = None
        try:
            self._power_on()
        except BaseException:
            self._storage.close()
            raise

    def _power_on(self) -> None:
        self._process = _Process(self._storage)
        ensure_started(self._process.transmit)

    def transmit(self, command: bytes) -> bytes:
        """Sends one TPM command, returns its response.

        Args:
            command: 1 to 4,096 bytes.

        Raises:
            ValueError: the length is out of bounds.
            WorkerError: the vTPM's process died (`reset` starts it again), or this object is closed.
        """
        if not 0 < len(command) <= MAX_PAYLOAD_BYTES:
            raise ValueError(f"a TPM command has 1 to {MAX_PAYLOAD_BYTES} bytes, not {len(command)}")
        with self._lock:
            return self._running().transmit(command)

    def _running(self) -> _Process:
        if self._process is None:
            raise WorkerError("this vTPM is closed")
        return self._process

    @property
    def tcti(self) -> str:
        """A TCTI string for tpm2-tools (`TPM2TOOLS_TCTI`), tpm2-pytss (`ESAPI(tpm.tcti)`) and every other tpm2-tss client."""
        with self._lock:
            self._running()
            if self._server is None:
                self._sockets = Path(tempfile.mkdtemp(prefix="spvtpm-"))
                self._remove_sockets = weakref.finalize(self, _remove_tree, self._sockets, os.getpid())
                data, control = listen_unix(self._sockets / "tpm")
                self._server = TctiServer(self.transmit, lambda: None, data, control)
                self._server.start()
            return f"swtpm:path={self._sockets}/tpm"

    def reset(self) -> None:
        """Power-cycles the TPM: orderly shutdown, then a new start. PCRs and sessions are gone, NV and keys stay."""
        with self._lock:
            self._running().shut_down()
            self._power_on()

    def close(self) -> None:
        """Shuts the TPM down in order; one in memory is gone for good."""
        with self._lock:
            if self._process is None:
                return
            if self._server is not None:
                self._server.close()
                self._remove_sockets()
            self._process.shut_down()
            self._process = None
            self._storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
