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
import threading
from collections import deque
from contextlib import suppress
from mmap import mmap
from pathlib import Path

from spvtpm.files.unix_sockets import peer_of
from spvtpm.processor.unix_sockets import Acceptor, listen
from spvtpm.wire import crb
from spvtpm.wire.errors import ResourceError
from spvtpm.wire.ivshmem import REFUSAL, Offer, encode_offer

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 8
"""Connections to one interface at a time, the served one included; more are closed at once."""


def _new_memory() -> int:
    memory = os.memfd_create("spvtpm-crb", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, crb.MEMORY_BYTES)
    # Whoever else holds this file could otherwise cut it short and kill the worker with SIGBUS.
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return memory


def _new_offer() -> Offer:
    flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
    made: list[int] = []
    try:
        made.append(_new_memory())
        made.append(os.eventfd(0, flags))
        made.append(os.eventfd(0, flags))
    except OSError as error:
        for descriptor in made:
            os.close(descriptor)
        raise ResourceError(f"no memory or doorbell can be had for an interface: {error.strerror}") from None
    return Offer(*made)


def _ring_and_close(doorbell: int) -> None:
    with suppress(BlockingIOError):
        os.eventfd_write(doorbell, 1)
    os.close(doorbell)


def _refuse(connection: socket.socket) -> None:
    with suppress(OSError):  # nobody waits for it any more
        connection.send(REFUSAL)
    connection.close()


class InterfaceOffer:
    """One vTPM's interface. Life: construct (allocates) → `listen()` → `close()`.

    Args:
        path: where its socket will listen.
        allowed_uids: whose processes may take it.

    Raises:
        ResourceError: no memory or descriptors can be had.
    """

    def __init__(self, path: Path, allowed_uids: frozenset[int]) -> None:
        self.path = path
        self._allowed_uids = allowed_uids
        self._holder: socket.socket | None = None
        self._waiting: deque[socket.socket] = deque()
        self._ringing: threading.Thread | None = None
        self._acceptor: Acceptor | None = None
        self.offer = _new_offer()

    def listen(self) -> None:
        """Offers it.

        Raises:
            ResourceError: no socket can be had.
        """
        listener = listen(self.path, self._allowed_uids, MAX_CONNECTIONS)
        self._acceptor = Acceptor(listener, self.path.name, self._admit)

    @property
    def connected(self) -> bool:
        """Whether a process holds the interface."""
        return self._holder is not None

    def map(self) -> mmap:
        """The interface's memory, for the short moments in which the SP itself writes registers."""
        return mmap(self.offer.memory, crb.MEMORY_BYTES)

    # Whoever has been given the doorbells shares their flags, and can make reading and writing them block. The event loop
    # must not be held up by that.

    def ring_vm(self) -> None:
        """Rings the VM's doorbell; one that blocks blocks a thread of its own, and no other is begun meanwhile."""
        if self._ringing is None or not self._ringing.is_alive():
            doorbell = os.dup(self.offer.vm_doorbell)
            self._ringing = threading.Thread(target=_ring_and_close, args=(doorbell,), daemon=True)
            self._ringing.start()

    def drain_doorbell(self) -> None:
        """Takes the VM's rings."""
        with suppress(BlockingIOError):
            os.preadv(self.offer.sp_doorbell, [bytearray(8)], -1, os.RWF_NOWAIT)

    def _admit(self, connection: socket.socket) -> None:
        uid = peer_of(connection).uid
        if uid not in self._allowed_uids or len(self._waiting) + self.connected >= MAX_CONNECTIONS:
            reason = "too many wait" if uid in self._allowed_uids else "not allowed"
            log.warning("refused a connection of uid %d to interface %s: %s", uid, self.path.name, reason)
            _refuse(connection)
            return
        asyncio.get_running_loop().add_reader(connection, self._dismiss, connection)
        self._waiting.append(connection)
        self._give()

    def _give(self) -> None:
        """Gives the interface to whoever has waited longest, if nobody holds it."""
        while self._holder is None and self._waiting:
            connection = self._holder = self._waiting.popleft()
            try:
                for message, descriptor in encode_offer(self.offer):
                    socket.send_fds(connection, [message], [] if descriptor is None else [descriptor])
            except OSError:
                self._dismiss(connection)

    def _dismiss(self, connection: socket.socket) -> None:
        """A client says nothing in this protocol: anything, or its end, gives the interface back, or its place."""
        asyncio.get_running_loop().remove_reader(connection)
        connection.close()
        if connection is self._holder:
            self._holder = None
        else:
            self._waiting.remove(connection)
        self._give()

    def close(self) -> None:
        """Takes the interface away; a VM that still maps the memory keeps it, and nobody answers there."""
        if self._acceptor is not None:
            self._acceptor.close()
            self.path.unlink(missing_ok=True)
        for connection in self._waiting:
            asyncio.get_running_loop().remove_reader(connection)
            _refuse(connection)
        if self._holder is not None:
            asyncio.get_running_loop().remove_reader(self._holder)
            self._holder.close()
        for descriptor in self.offer:
            os.close(descriptor)
