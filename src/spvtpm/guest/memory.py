"""The VM's hold on its vTPM's interface: the shared memory and the two doorbells, got from the SP's socket."""

from __future__ import annotations

import os
import select
import socket
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from types import TracebackType
from typing import Self

from spvtpm.wire import crb
from spvtpm.wire.errors import InterfaceError, SpvtpmError, StateInUse
from spvtpm.wire.ivshmem import MESSAGE_BYTES, Offer, OfferParser

_MEMORY_GONE = "the secure processor has closed the vTPM's interface: it stopped, or the VM was powered off"


class InterfaceMemory:
    """A connected interface. Life: `connect()` → read and write `memory`, `ring()`, `wait()` → `close()`.

    Attributes:
        memory: `crb.MEMORY_BYTES` bytes shared with the SP, and with whoever owns the host.
        is_open: until `close()`.
        descriptors: of the memory file and the doorbells.
    """

    def __init__(self, connection: socket.socket, offer: Offer) -> None:
        self._connection = connection
        self.is_open = True
        self.descriptors = offer
        if os.fstat(offer.memory).st_size < crb.MEMORY_BYTES:
            raise InterfaceError("the offered memory is too small to be a vTPM interface")
        self.memory = mmap(offer.memory, crb.MEMORY_BYTES)
        self._poll = select.poll()
        self._poll.register(offer.vm_doorbell, select.POLLIN)
        self._poll.register(connection, select.POLLIN)

    @property
    def doorbell(self) -> int:
        """The eventfd that rings the SP."""
        return self.descriptors.sp_doorbell

    @property
    def doorbell_register(self) -> int:
        """There is none: it is an eventfd."""
        return 0

    @property
    def connection(self) -> socket.socket:
        """Readable when the SP has closed the interface."""
        return self._connection

    @classmethod
    def connect(cls, path: Path, timeout_s: float = 30.0) -> Self:
        """Gets the interface that the SP offers at `path`; waits while another process of the VM holds it.

        Args:
            path: the interface's socket.
            timeout_s: how long to wait.

        Raises:
            InterfaceError: there is no interface, or it is not for this user.
            StateInUse: another process holds it.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        received: list[int] = []
        error: SpvtpmError
        try:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            offer = cls._receive_offer(connection, received)
            return cls(connection, offer)
        except TimeoutError:
            error = StateInUse(f"another process holds the interface {path}: no answer within {timeout_s:g} s")
        except OSError as os_error:
            error = InterfaceError(f"cannot connect to the interface {path}: {os_error.strerror or os_error}")
        except InterfaceError as interface_error:
            error = interface_error
        for descriptor in received:
            os.close(descriptor)
        connection.close()
        raise error

    @staticmethod
    def _receive_offer(connection: socket.socket, received: list[int]) -> Offer:
        parser = OfferParser()
        while True:
            message, descriptors, _flags, _address = socket.recv_fds(connection, MESSAGE_BYTES, 1)
            received += descriptors
            if not message:
                raise InterfaceError(_MEMORY_GONE)
            offer = parser.feed(message, descriptors[0] if descriptors else None)
            if offer is not None:
                return offer

    def ring(self) -> None:
        """Tells the SP to look at the registers."""
        with suppress(BlockingIOError):  # the counter is full: the SP is awake
            os.eventfd_write(self.descriptors.sp_doorbell, 1)

    def wait(self, timeout_s: float) -> bool:
        """Waits until the SP rings.

        Returns:
            False if it did not within `timeout_s`.

        Raises:
            InterfaceError: the SP has gone.
        """
        ready = self._poll.poll(timeout_s * 1000)
        for descriptor, _event in ready:
            if descriptor == self.descriptors.vm_doorbell:
                with suppress(BlockingIOError):
                    os.eventfd_read(descriptor)
                return True
        if ready:
            raise InterfaceError(_MEMORY_GONE)
        return False

    def close(self) -> None:
        """Gives the interface back."""
        self.is_open = False
        with suppress(OSError):  # the SP has gone
            self._connection.shutdown(socket.SHUT_RDWR)  # another thread may wait for it, and would keep it open
        self._connection.close()
        with suppress(BufferError):  # a driver still refers to it: unmapped when that goes
            self.memory.close()
        for descriptor in self.descriptors:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
