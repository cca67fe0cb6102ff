"""The VM's CRB driver: one TPM command in, its response out, nothing but ciphertext in the memory between.

The way of a command is `driver.h`; this opens the session, sleeps where an answer takes long, and explains refusals.
"""

from __future__ import annotations

import os
import threading
import time
from mmap import mmap
from typing import NoReturn, Protocol

from spvtpm.guest._crb_driver import ffi, lib
from spvtpm.wire import crb, mailbox
from spvtpm.wire.crb import Attach, AttachError, LocCtrl, Register
from spvtpm.wire.errors import InterfaceError, MailboxError
from spvtpm.wire.mailbox import MAX_PAYLOAD_BYTES

_REASONS = {
    AttachError.BAD_ADDRESS: "a command or response address lies outside the interface's memory",
    AttachError.BAD_FRAME: "no well-formed command frame lay at the address",
    AttachError.NOT_AUTHENTIC: "the command frame was not authentic: altered on the way, or another VM key",
    AttachError.REPLAYED: "the command frame was a replay",
    AttachError.RESPONSE_TOO_LONG: "the response does not fit where it should go",
    AttachError.STORAGE: "the change could not be made durable; it will be tried again before the next command",
    AttachError.TPM_FAILED: "the vTPM has failed; the VM must be reset",
    AttachError.POWERED_OFF: "the vTPM is powered off",
}

DEFAULT_TIMEOUT_S = 300.0
"""Longer than any TPM command takes; a vTPM that dies is reported at once, without this."""


class Interface(Protocol):
    """What a driver needs of an interface: `memory.py` for processes, `pci_interface.py` for a guest."""

    @property
    def memory(self) -> mmap:
        """`crb.MEMORY_BYTES` bytes shared with the SP, and with whoever owns the host."""

    @property
    def is_open(self) -> bool:
        """Until it is closed."""

    @property
    def doorbell(self) -> int:
        """An eventfd that rings the SP; −1: there is a register for that."""

    @property
    def doorbell_register(self) -> int:
        """Address of the register that rings the SP; 0: there is an eventfd for that."""

    def wait(self, timeout_s: float) -> bool:
        """Waits until the SP may have answered; False: it has not within `timeout_s`.

        Raises:
            InterfaceError: the SP has gone.
        """


class CrbDriver:
    """One session with the vTPM. Thread-safe: commands queue.

    The boot id is pinned: a vTPM that was powered on anew under this driver is refused, since its PCRs do not tell the story
    of this VM any more.

    Args:
        interface: connected memory; stays the caller's to close.
        vm_key: 32 bytes.

    Raises:
        InterfaceError: no vTPM interface of this version lies in the memory, or its vTPM is off.
    """

    def __init__(self, interface: Interface, vm_key: bytes) -> None:
        self.interface = interface
        self._memory = interface.memory
        self._lock = threading.Lock()
        attach = self._read_attach()
        if attach.magic != crb.ATTACH_MAGIC or attach.layout_version != crb.LAYOUT_VERSION:
            raise InterfaceError("no vTPM interface of a version known here lies in the memory")
        self._boot_id = attach.boot_id
        boot_key = mailbox.derive_boot_key(vm_key, attach.vm_id, attach.boot_id)
        self._session = mailbox.derive_session(boot_key, attach.sp_nonce, os.urandom(mailbox.NONCE_BYTES))
        driver = self._driver = ffi.new("struct crb_driver *")
        self._shared = ffi.from_buffer("uint8_t[]", self._memory, require_writable=True)
        driver.memory = self._shared
        driver.sp_doorbell = interface.doorbell
        driver.doorbell_register = ffi.cast("uint32_t *", interface.doorbell_register)
        driver.session = ffi.cast("struct mailbox_session *", self._session.address)
        crb.U32.pack_into(self._memory, Register.LOC_CTRL, LocCtrl.REQUEST_ACCESS)

    def _read_attach(self) -> Attach:
        return Attach._make(crb.ATTACH.unpack_from(self._memory, crb.ATTACH_OFFSET))

    @property
    def boot_has_ended(self) -> bool:
        """Whether the vTPM shows another boot than this driver's."""
        return self._read_attach().boot_id != self._boot_id

    def transmit(self, command: bytes, timeout_s: float = DEFAULT_TIMEOUT_S) -> bytes:
        """Sends one TPM command and waits for its response.

        Args:
            command: 1 to 4,096 bytes.
            timeout_s: how long to wait; after that the interface is in an unknown state.

        Raises:
            InterfaceError: the vTPM refused or failed, or is gone; the message says what happened. Nothing was executed
                unless the message says so.
            MailboxError: the response is forged, altered, or not that of this command.
            ValueError: the command's length is out of bounds.
        """
        if not 0 < len(command) <= MAX_PAYLOAD_BYTES:
            raise ValueError(f"a TPM command has 1 to {MAX_PAYLOAD_BYTES} bytes, not {len(command)}")
        with self._lock:
            if not self.interface.is_open:
                raise InterfaceError("this interface was closed")
            size = lib.driver_transmit(self._driver, command, len(command))
            if size == lib.DRIVER_WAITING:
                size = self._wait_for_response(timeout_s)
            if size < 0:
                self._raise_error(size)
            return bytes(ffi.buffer(self._driver.response, size))

    def _wait_for_response(self, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        while self.interface.wait(max(0.0, deadline - time.monotonic())):
            size: int = lib.driver_take(self._driver)
            if size != lib.DRIVER_WAITING:
                return size
        raise InterfaceError(f"the vTPM did not answer within {timeout_s:g} s")

    def _raise_error(self, result: int) -> NoReturn:
        attach = self._read_attach()
        if self.boot_has_ended:
            raise InterfaceError("the vTPM was powered on anew: this driver's boot has ended, start it in the new one")
        if result == lib.DRIVER_FRAME:
            mailbox.check_result(self._driver.frame_error)
        if result == lib.DRIVER_OTHER:
            raise MailboxError("the response is not that of this command")
        try:
            reason = _REASONS[AttachError(attach.error)]
        except (ValueError, KeyError):
            reason = f"unknown reason {attach.error}"
        raise InterfaceError(f"the vTPM refused: {reason}")

    @property
    def _sequence(self) -> int:
        sequence: int = self._driver.sequence
        return sequence

    def cancel(self) -> None:
        """Asks the vTPM to cancel the command that runs; from another thread than the one in `transmit`."""
        crb.U32.pack_into(self._memory, Register.CTRL_CANCEL, crb.CANCEL)
        lib.driver_ring(self._driver)
