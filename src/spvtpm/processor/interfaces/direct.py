"""The direct path: the CRB interface in memory shared with the VM, served by the worker without anyone in between.

The work is done by `direct.h`; this gives it its memory and keys, and hands out what needs more than that.
"""

from __future__ import annotations

import os
from contextlib import suppress
from enum import IntEnum
from mmap import mmap
from typing import Final, Literal, NamedTuple

from spvtpm.processor.interfaces._direct import ffi, lib
from spvtpm.processor.worker.messages import DirectPort, InterfaceSnapshot
from spvtpm.wire import crb
from spvtpm.wire.crb import AttachError, Register, Registers

CrbStateName = Literal["IDLE", "READY", "COMPLETION"]
_STATES: Final[dict[CrbStateName, int]] = {
    "IDLE": lib.CRB_IDLE,
    "READY": lib.CRB_READY,
    "COMPLETION": lib.CRB_COMPLETION,
}


class TpmFailedError(Exception):
    """The TPM behind the interface cannot execute commands any more."""


class TpmAccess(NamedTuple):
    """How compiled code reaches the TPM, without Python in between.

    Attributes:
        execute: address of a function that executes a command: `direct_execute_function` of `direct.h`.
        stores: address of a 32-bit number that grows whenever a changed permanent state was handed out.
    """

    execute: int
    stores: int


class DirectEvent(IntEnum):
    """Why `serve` returned."""

    CONTROL = lib.DIRECT_CONTROL
    COMMAND = lib.DIRECT_COMMAND
    STORED = lib.DIRECT_STORED
    FAILED = lib.DIRECT_FAILED
    REFUSED = lib.DIRECT_REFUSED


class DirectInterface:
    """Serves one interface. Life: construct (publishes the registers) → `serve()` … → `snapshot()`.

    After `COMMAND`, `STORED` and `FAILED` a command is under way: `answer()` or `refuse()` it before the next `serve()`.

    Args:
        memory: the shared memory, `crb.MEMORY_BYTES` long, mapped writable.
        doorbells: descriptors of the SP's and the VM's.
        port: whom it serves, under which key, and as it was parked.
        tpm: executes ordinary commands.
    """

    def __init__(self, memory: mmap, doorbells: tuple[int, int], port: DirectPort, tpm: TpmAccess) -> None:
        interface = self._interface = ffi.new("struct direct_interface *")
        self._shared = ffi.from_buffer("uint8_t[]", memory, require_writable=True)
        interface.memory = self._shared
        interface.sp_doorbell, interface.vm_doorbell = doorbells
        interface.execute = ffi.cast("direct_execute_function *", tpm.execute)
        interface.stores = ffi.cast("uint32_t *", tpm.stores)
        interface.boot_key = port.boot_key
        if port.snapshot is not None:
            self._restore(port.snapshot)
        elif not lib.direct_fresh_nonce(interface):
            raise TpmFailedError("the kernel gives no random numbers")
        else:
            publish_power_on(memory, port.vm_id, port.boot_id, bytes(interface.sp_nonce))
            with suppress(BlockingIOError):
                os.eventfd_write(
                    doorbells[1], 1
                )  # whoever waits for an answer of the boot before learns that it is over

    def _restore(self, snapshot: InterfaceSnapshot) -> None:
        interface = self._interface
        interface.device = (_STATES[snapshot.state], snapshot.granted, snapshot.error)
        interface.sp_nonce = snapshot.sp_nonce
        interface.sequence = snapshot.sequence
        if snapshot.session is None:
            return
        *keys, vm_nonce = snapshot.session
        if not lib.mailbox_session_open(ffi.addressof(interface.session), ffi.new("uint8_t[2][32]", keys), vm_nonce):
            raise TpmFailedError("OpenSSL cannot open the session again")
        interface.has_session = True

    def snapshot(self) -> InterfaceSnapshot:
        """The interface between two commands, for parking."""
        interface, device = self._interface, self._interface.device
        session = interface.session
        return InterfaceSnapshot(
            state=next(name for name, value in _STATES.items() if value == device.state),
            granted=device.granted,
            error=device.error,
            sp_nonce=bytes(interface.sp_nonce),
            sequence=interface.sequence,
            session=(bytes(session.keys[0]), bytes(session.keys[1]), bytes(session.vm_nonce))
            if interface.has_session
            else None,
        )

    def serve(self, control: int, *, hold: bool) -> DirectEvent:
        """Serves the VM until something needs the caller.

        Args:
            control: descriptor that is readable when the SP has something to say.
            hold: hand every command out, execute none.
        """
        return DirectEvent(lib.direct_serve(self._interface, control, hold))

    @property
    def command(self) -> bytes:
        """The command under way, 1 to 4,096 bytes."""
        interface = self._interface
        return bytes(ffi.buffer(interface.command, interface.command_size))

    @property
    def response(self) -> bytes:
        """After `STORED`: the response that waits."""
        interface = self._interface
        return bytes(ffi.buffer(interface.response, interface.response_size))

    @property
    def error(self) -> AttachError:
        """How the last command ended."""
        return AttachError(self._interface.device.error)

    @property
    def refused(self) -> int:
        """How many commands were refused."""
        count: int = self._interface.refused
        return count

    @property
    def executed(self) -> int:
        """How many commands were accepted."""
        count: int = self._interface.executed
        return count

    def answer(self, response: bytes) -> bool:
        """Ends the command under way with its response; returns as `refuse`."""
        interface = self._interface
        ffi.memmove(interface.response, response, min(len(response), len(interface.response)))
        return bool(lib.direct_answer(interface, len(response)) == lib.DIRECT_REFUSED)

    def refuse(self, error: AttachError) -> bool:
        """Ends the command under way without one; returns whether the number of refusals is worth telling."""
        return bool(lib.direct_refuse(self._interface, error) == lib.DIRECT_REFUSED)

    def cancel_requested(self) -> bool:
        """Whether the VM has written CTRL_CANCEL while a command runs; asked from another thread."""
        return bool(lib.direct_cancel_requested(self._interface))


def warm_up() -> None:
    """Opens a session, so that all that OpenSSL loads lazily for it is in memory before a fork.

    Raises:
        TpmFailedError: this machine's OpenSSL lacks what sessions need.
    """
    session = ffi.new("struct mailbox_session *")
    if not lib.mailbox_session_derive(session, bytes(32), bytes(32), bytes(32)):
        raise TpmFailedError("this machine's OpenSSL has no AES-256-GCM, or no HKDF")
    lib.mailbox_session_close(session)


def publish_power_on(memory: mmap, vm_id: bytes, boot_id: bytes, sp_nonce: bytes) -> None:
    """Writes registers and attach page as they are after power-on. Frames of an earlier boot may lie on; they are dead."""
    memory[: crb.COMMAND_ADDRESS] = bytes(crb.COMMAND_ADDRESS)
    device = ffi.new("struct crb_device *")
    registers = Registers(
        loc_state=lib.crb_loc_state(device),
        loc_ctrl=0,
        loc_sts=lib.crb_loc_sts(device),
        intf_id=crb.INTF_ID_LOW,
        intf_id_vendor=crb.VENDOR_ID,
        ctrl_ext=0,
        ctrl_req=0,
        ctrl_sts=lib.crb_ctrl_sts(device),
        ctrl_cancel=0,
        ctrl_start=0,
        int_enable=0,
        int_sts=0,
        cmd_size=crb.COMMAND_BYTES,
        cmd_laddr=crb.COMMAND_ADDRESS,
        cmd_haddr=0,
        rsp_size=crb.RESPONSE_BYTES,
        rsp_addr=crb.RESPONSE_ADDRESS,
    )
    crb.REGISTERS.pack_into(memory, 0, *registers)
    attach = crb.Attach(crb.ATTACH_MAGIC, crb.LAYOUT_VERSION, AttachError.NONE, vm_id, boot_id, sp_nonce)
    crb.ATTACH.pack_into(memory, crb.ATTACH_OFFSET, *attach)


def publish_outage(memory: mmap, reason: AttachError) -> None:
    """Tells the VM that nobody serves the interface any more, and why; a command under way ends with tpmSts."""
    crb.U32.pack_into(memory, crb.ATTACH_ERROR_OFFSET, reason)
    # One by one: `pack_into` clears all that it will write first, and a VM that watches CTRL_START would find no error.
    for register, value in ((Register.CTRL_STS, crb.CtrlSts.TPM_STS), (Register.CTRL_REQ, 0), (Register.CTRL_START, 0)):
        crb.U32.pack_into(memory, register, value)
