"""An interface as a resource: memory, doorbells, and the socket on which the VM that it belongs to gets them.

The SP speaks QEMU's ivshmem server protocol there (`wire/ivshmem.py`). One process holds the interface at a time; another one
waits its turn, so that short-lived clients inside one VM can follow each other.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import struct
from contextlib import suppress
from mmap import mmap
from pathlib import Path

from spvtpm.wire import crb
from spvtpm.wire.errors import ResourceError
from spvtpm.wire.ivshmem import Offer, encode_offer

log = logging.getLogger(__name__)

MAX_WAITING = 8
"""Connections to one interface at a time, the served one included; more are closed at once."""

MAX_SOCKET_PATH_BYTES = 107
"""Source: unix(7), sockaddr_un."""

_UCRED = struct.Struct("3i")


def peer_uid(connection: socket.socket) -> int:
    """User id of the process on the other end of a unix socket. Source: unix(7), SO_PEERCRED."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _pid, uid, _gid = _UCRED.unpack(credentials)
    return int(uid)


def listen(path: Path, allowed_uids: frozenset[int]) -> socket.socket:
    """A unix stream socket that listens at `path`; a stale file there is replaced.

    Whom it lets connect is a first hurdle; whoever accepts a connection looks at `peer_uid`.

    Args:
        path: of the socket.
        allowed_uids: mode 0600 lets this process's own user and root in, who may be all; mode 0666 everybody.

    Raises:
        ResourceError: the path is too long, or cannot be used.
    """
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise ResourceError(f"the socket path {path} is longer than {MAX_SOCKET_PATH_BYTES} bytes")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        path.unlink(missing_ok=True)
        old = os.umask(0o111 if allowed_uids - {0, os.geteuid()} else 0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old)
        listener.listen(MAX_WAITING)
    except OSError as error:
        listener.close()
        raise ResourceError(f"cannot listen on {path}: {error.strerror}") from None
    return listener


def _new_memory() -> int:
    memory = os.memfd_create("spvtpm-crb", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, crb.MEMORY_BYTES)
    # Whoever else holds this file could otherwise cut it short and kill the worker with SIGBUS.
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return memory


class InterfaceOffer:
    """One vTPM's interface. Life: construct (allocates and listens) → `close()`.

    Args:
        path: where its socket listens.
        allowed_uids: whose processes may take it.

    Raises:
        ResourceError: no memory, descriptors or socket can be had.
    """

    def __init__(self, path: Path, allowed_uids: frozenset[int]) -> None:
        self.path = path
        self._allowed_uids = allowed_uids
        self._turn = asyncio.Lock()
        self._connections: set[asyncio.Task[None]] = set()
        self._listener = listen(path, allowed_uids)
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self.offer = Offer(_new_memory(), os.eventfd(0, flags), os.eventfd(0, flags))
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    @property
    def connected(self) -> bool:
        """Whether a process holds the interface."""
        return self._turn.locked()

    def map(self) -> mmap:
        """The interface's memory, for the short moments in which the SP itself writes registers."""
        return mmap(self.offer.memory, crb.MEMORY_BYTES)

    def ring_vm(self) -> None:
        """Rings the VM's doorbell."""
        with suppress(BlockingIOError):
            os.eventfd_write(self.offer.vm_doorbell, 1)

    def drain_doorbell(self) -> None:
        """Takes the VM's rings."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.offer.sp_doorbell)

    def _accept(self) -> None:
        try:
            connection, _address = self._listener.accept()
        except OSError as error:
            log.warning("cannot accept a connection to %s: %s", self.path.name, error.strerror)
            return
        connection.setblocking(False)
        uid = peer_uid(connection)
        if uid not in self._allowed_uids or len(self._connections) >= MAX_WAITING:
            reason = "too many wait" if uid in self._allowed_uids else "not allowed"
            log.warning("refused a connection of uid %d to interface %s: %s", uid, self.path.name, reason)
            connection.close()
            return
        task = asyncio.get_running_loop().create_task(self._hold(connection))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _hold(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with connection:
            async with self._turn:
                with suppress(OSError):
                    for message, descriptor in encode_offer(self.offer):
                        descriptors = [] if descriptor is None else [descriptor]
                        socket.send_fds(connection, [message], descriptors)
                    # The client says nothing in this protocol: anything, or the end, gives the interface back.
                    await loop.sock_recv(connection, 1)

    def close(self) -> None:
        """Takes the interface away; a VM that still maps the memory keeps it, and nobody answers there."""
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        self.path.unlink(missing_ok=True)
        for task in list(self._connections):
            task.cancel()
        for descriptor in self.offer:
            os.close(descriptor)
