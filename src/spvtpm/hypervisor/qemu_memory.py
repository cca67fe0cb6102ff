"""A QEMU machine's memory as a file, and what of the vTPM's interface must not come out of it again.

The memory that the machine shares with its vTPM is saved and read back with the rest. After a vTPM has gone on from hibernation
there is something new in it, the attach page, that the guest has to find: so that part is looked at before, and put back.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from mmap import mmap
from pathlib import Path
from typing import Final

from spvtpm.files import sync_directory
from spvtpm.hypervisor.qemu_monitor import Empty, QemuMonitor
from spvtpm.wire import crb
from spvtpm.wire.errors import ResourceError, StorageError
from spvtpm.wire.ivshmem import MESSAGE_BYTES, Offer, OfferParser

_NAME: Final = "memory"
_PATIENCE_S: Final = 10.0


async def save_memory(monitor: QemuMonitor, image: Path) -> None:
    """Writes the memory of a machine that is stopped, durably.

    Raises:
        MachineFailed: QEMU cannot.
        StorageError: there is no room.
    """
    new = image.with_name(f"{image.name}.new")
    try:
        new.unlink(missing_ok=True)  # the directory is the machine's: nothing that lies there is written to
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            await monitor.hand_over(descriptor, _NAME)
            await monitor.execute("migrate", Empty, uri=f"fd:{_NAME}")
            await monitor.wait_for_migration()
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        new.rename(image)
        sync_directory(image.parent)
    except OSError as error:
        raise StorageError(f"cannot write {image}: {error.strerror}") from None


async def load_memory(monitor: QemuMonitor, image: Path) -> None:
    """Reads it into a machine that waits for it; the machine stays stopped.

    Raises:
        MachineFailed: QEMU cannot.
        StorageError: there is none.
    """
    try:
        descriptor = os.open(image, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"cannot read {image}: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StorageError(f"{image} is no regular file")
        await monitor.hand_over(descriptor, _NAME)
    finally:
        os.close(descriptor)
    await monitor.execute("migrate-incoming", Empty, uri=f"fd:{_NAME}")
    await monitor.wait_for_migration()


class InterfaceBeginning:
    """Registers and attach page of an interface, as the secure processor has them when a boot begins.

    Args:
        interface: its socket; nobody holds it yet.

    Raises:
        ResourceError: it cannot be had.
        InterfaceError: it is none, or not for this user.
    """

    def __init__(self, interface: Path) -> None:
        with _offer(interface) as offer:
            self._memory = mmap(offer.memory, crb.MEMORY_BYTES)
        self._beginning = self._memory[: crb.COMMAND_ADDRESS]

    def put_back(self) -> None:
        """Has them there again."""
        self._memory[: crb.COMMAND_ADDRESS] = self._beginning
        self._memory.close()


@contextmanager
def _offer(interface: Path) -> Iterator[Offer]:
    with ExitStack() as received, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(_PATIENCE_S)
        parser, offer = OfferParser(), None
        try:
            connection.connect(str(interface))
            while offer is None:
                message, descriptors, _flags, _address = socket.recv_fds(connection, MESSAGE_BYTES, 1)
                for descriptor in descriptors:
                    received.callback(os.close, descriptor)
                offer = parser.feed(message, descriptors[0] if descriptors else None)
        except OSError as error:
            raise ResourceError(f"cannot look at the interface {interface}: {error.strerror or error}") from None
        yield offer
