"""The vTPM for the programs in a VM: its interface, held by this process, and a socket on which TPM clients find it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from spvtpm.guest.crb_driver import CrbDriver
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.guest.tcti import TctiServer, listen_unix, unix_paths
from spvtpm.wire.errors import ResourceError
from spvtpm.wire.tpm_stream import ensure_started


class VtpmDoor:
    """Life: `open()` → `close()` → `open()` …

    Args:
        interface: socket of the interface.
        socket: where TPM clients come in.
        vm_key: 32 bytes.
    """

    def __init__(self, interface: Path, socket: Path, vm_key: bytes) -> None:
        self._interface = interface
        self._socket = socket
        self._vm_key = vm_key
        self._parts = ExitStack()
        self._memory: InterfaceMemory | None = None

    @property
    def tcti(self) -> str:
        """How tpm2-tss reaches it."""
        return f"swtpm:path={self._socket}"

    @property
    def memory(self) -> InterfaceMemory | None:
        """The interface, while it is open."""
        return self._memory

    def open(self) -> None:
        """Takes the interface, starts the TPM if nobody has, and lets clients in.

        Raises:
            InterfaceError, MailboxError, StateInUse: the interface is not to be had, or the TPM does not start.
            ResourceError: no socket is to be had.
        """
        with ExitStack() as parts:
            memory = parts.enter_context(InterfaceMemory.connect(self._interface))
            driver = CrbDriver(memory, self._vm_key)
            ensure_started(driver.transmit)
            try:
                data, control = listen_unix(self._socket)
            except OSError as error:
                raise ResourceError(f"cannot listen on {self._socket}: {error.strerror}") from None
            server = TctiServer(driver.transmit, driver.cancel, data, control)
            server.start()
            parts.callback(self._remove_sockets)
            parts.callback(server.close)
            self._memory = memory
            self._parts = parts.pop_all()

    def _remove_sockets(self) -> None:
        for path in unix_paths(self._socket):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets no more clients in, and gives the interface back."""
        self._memory = None
        self._parts.close()
