"""What `spvtpm guest device` does: inside a Linux guest, makes the vTPM on the direct path a TPM of the kernel."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spvtpm.guest.crb_driver import CrbDriver
from spvtpm.guest.kernel_tpm import KernelTpm
from spvtpm.guest.own_process import protect_own_memory
from spvtpm.guest.pci_interface import PciInterface
from spvtpm.guest.same_boot import verify_same_boot
from spvtpm.guest.vm_key import read_vm_key
from spvtpm.wire.errors import SpvtpmError
from spvtpm.wire.tpm_stream import TPM_RC_FAILURE, error_response

log = logging.getLogger(__name__)


class DirectPath:
    """The way to the vTPM, over all boots that are one for this system.

    Args:
        interface: stays the caller's to close.
        vm_key: 32 bytes.

    Raises:
        InterfaceError: no vTPM answers, or it was powered on anew while this system ran.
        MailboxError: what answers has another key.
    """

    def __init__(self, interface: PciInterface, vm_key: bytes) -> None:
        self._interface = interface
        self._vm_key = vm_key
        self._told = ""
        self._attach()

    def _attach(self) -> None:
        self._driver = CrbDriver(self._interface, self._vm_key)
        verify_same_boot(self._driver.transmit)

    def transmit(self, command: bytes) -> bytes:
        """Sends one TPM command; a refusal becomes TPM_RC_FAILURE.

        Raises:
            InterfaceError: the vTPM was powered on anew while this system ran.
        """
        if self._driver.boot_has_ended:  # VM and vTPM may have been suspended, and gone on together
            self._attach()
        try:
            return self._driver.transmit(command)
        except SpvtpmError as error:
            if str(error) != self._told:
                self._told = str(error)
                log.warning("a command gets TPM_RC_FAILURE: %s", error)
            return error_response(TPM_RC_FAILURE)


def run_device(key: Path, on_ready: Callable[[Path], None]) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Args:
        key: path of the VM key.
        on_ready: called with the path of the kernel's TPM, once programs can use it.

    Raises:
        SpvtpmError: interface, key or kernel are not what they must be; or the vTPM was powered on anew.
    """
    protect_own_memory()
    vm_key = read_vm_key(key)
    with _ending() as until, PciInterface.find() as interface:
        way = DirectPath(interface, vm_key)
        with KernelTpm() as tpm:
            tpm.serve(way.transmit, on_ready, until)


@contextmanager
def _ending() -> Iterator[int]:
    """A descriptor that becomes readable when this process is told to end."""
    news, bell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
    try:
        yield news
    finally:
        signal.set_wakeup_fd(-1)
        os.close(news)
        os.close(bell)
