"""The direct path: the CRB interface in memory shared with the VM, served by the worker without anyone in between.

Everything in that memory is hostile and may change at any moment. Registers are read in one copy, the command frame in
one copy; both are checked and used from there (no second fetch). What comes out is ciphertext.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from mmap import mmap

from spvtpm.processor.interfaces.crb_device import CrbDevice, CrbState, Effect
from spvtpm.processor.worker.messages import DirectPort, InterfaceSnapshot
from spvtpm.wire import crb, mailbox
from spvtpm.wire.crb import AttachError, Register, Registers
from spvtpm.wire.errors import MailboxError, StorageError
from spvtpm.wire.mailbox import Direction, FrameHeader, Session


class TpmFailedError(Exception):
    """The TPM behind the interface cannot execute commands any more."""


class DirectInterface:
    """Serves one interface. Life: construct (publishes the registers) → `service()` on every doorbell → `snapshot()`.

    Args:
        memory: the shared memory, `crb.MEMORY_BYTES` long, mapped writable.
        port: whom it serves, under which key, and as it was parked.
        execute: runs one TPM command. May raise `StorageError` (not durable, not acknowledged) or `TpmFailedError`.
        on_refused: told of every frame that was not executed.
    """

    def __init__(
        self,
        memory: mmap,
        port: DirectPort,
        execute: Callable[[bytes], bytes],
        on_refused: Callable[[AttachError], None],
    ) -> None:
        self._memory = memory
        self._port = port
        self._execute = execute
        self._on_refused = on_refused
        self._device = CrbDevice()
        self._session: Session | None = None
        self._sequence = 0
        self._sp_nonce = os.urandom(mailbox.NONCE_BYTES)
        if port.snapshot is not None:
            self._restore(port.snapshot)
        else:
            publish_power_on(memory, port.vm_id, port.boot_id, self._sp_nonce)

    def _restore(self, snapshot: InterfaceSnapshot) -> None:
        self._device.state = CrbState[snapshot.state]
        self._device.granted = snapshot.granted
        self._device.error = AttachError(snapshot.error)
        self._sp_nonce = snapshot.sp_nonce
        self._sequence = snapshot.sequence
        if snapshot.session is not None:
            self._session = Session(*snapshot.session)

    def snapshot(self) -> InterfaceSnapshot:
        """The interface between two commands, for parking."""
        session = self._session
        return InterfaceSnapshot(
            state=self._device.state.name,  # type: ignore[arg-type]  # never EXECUTION between two commands
            granted=self._device.granted,
            error=self._device.error,
            sp_nonce=self._sp_nonce,
            sequence=self._sequence,
            session=None if session is None else (*session.dangerous_keys(), session.vm_nonce),
        )

    def service(self) -> bool:
        """Takes the VM's register writes since the last call and runs the command if one was started.

        Returns:
            Whether anything was written, that is whether the VM waits for its doorbell.
        """
        registers = Registers._make(crb.REGISTERS.unpack_from(self._memory))
        device = self._device
        if registers.loc_ctrl:
            device.write(Register.LOC_CTRL, registers.loc_ctrl)
            self._publish_locality()
        elif not registers.ctrl_req and not registers.ctrl_start:
            return False
        if registers.ctrl_req:
            device.write(Register.CTRL_REQ, registers.ctrl_req)
        if registers.ctrl_start and device.write(Register.CTRL_START, registers.ctrl_start) is Effect.EXECUTE:
            self._run(registers)
        crb.REQ_TO_START.pack_into(self._memory, Register.CTRL_REQ, 0, device.ctrl_sts, 0, device.ctrl_start)
        return True

    def cancel_requested(self) -> bool:
        """Whether the VM has written CTRL_CANCEL while a command runs; asked from another thread."""
        (value,) = crb.U32.unpack_from(self._memory, Register.CTRL_CANCEL)
        return self._device.write(Register.CTRL_CANCEL, value) is Effect.CANCEL

    def _publish_locality(self) -> None:
        crb.U32.pack_into(self._memory, Register.LOC_STATE, self._device.loc_state)
        crb.U32.pack_into(self._memory, Register.LOC_STS, self._device.loc_sts)
        crb.U32.pack_into(self._memory, Register.LOC_CTRL, 0)

    def _run(self, registers: Registers) -> None:
        error = self._try_run(registers)
        if error is AttachError.NONE:
            self._device.complete()
        else:
            self._device.fail(error)
            self._on_refused(error)
            crb.U32.pack_into(self._memory, crb.ATTACH_ERROR_OFFSET, error)

    def _try_run(self, registers: Registers) -> AttachError:
        address, response_address = registers.cmd_addr, registers.rsp_addr
        size = min(registers.cmd_size, mailbox.MAX_FRAME_BYTES)
        if not crb.is_frame_area(address, size):
            return AttachError.BAD_ADDRESS
        if not crb.is_frame_area(response_address, min(registers.rsp_size, mailbox.MAX_FRAME_BYTES)):
            return AttachError.BAD_ADDRESS
        frame = self._memory[address : address + size]
        try:
            header = mailbox.parse_header(frame, Direction.COMMAND)
        except MailboxError:
            return AttachError.BAD_FRAME
        session = self._session
        if session is None or header.vm_nonce != session.vm_nonce:
            session = mailbox.derive_session(self._port.boot_key, self._sp_nonce, header.vm_nonce)
        elif header.sequence <= self._sequence:
            return AttachError.REPLAYED
        try:
            command = session.open(Direction.COMMAND, header, address, frame)
        except MailboxError:
            return AttachError.NOT_AUTHENTIC
        return self._answer(session, header, command, response_address, registers.rsp_size)

    def _answer(
        self, session: Session, header: FrameHeader, command: bytes, response_address: int, room: int
    ) -> AttachError:
        self._accept(session, header.sequence)
        try:
            response = self._execute(command)
        except StorageError:
            return AttachError.STORAGE
        except TpmFailedError:
            return AttachError.TPM_FAILED
        sealed = session.seal(Direction.RESPONSE, header.sequence, response_address, response)
        if len(sealed) > room:
            return AttachError.RESPONSE_TOO_LONG
        self._memory[response_address : response_address + len(sealed)] = sealed
        return AttachError.NONE

    def _accept(self, session: Session, sequence: int) -> None:
        self._sequence = sequence
        if session is not self._session:
            # The nonce that this session used is spent: the same frame can never open a session again.
            self._session = session
            self._sp_nonce = os.urandom(mailbox.NONCE_BYTES)
            self._memory[crb.ATTACH_NONCE_OFFSET : crb.ATTACH_NONCE_OFFSET + mailbox.NONCE_BYTES] = self._sp_nonce


def publish_power_on(memory: mmap, vm_id: bytes, boot_id: bytes, sp_nonce: bytes) -> None:
    """Writes registers and attach page as they are after power-on. Frames of an earlier boot may lie on; they are dead."""
    memory[: crb.COMMAND_ADDRESS] = bytes(crb.COMMAND_ADDRESS)
    device = CrbDevice()
    registers = Registers(
        loc_state=device.loc_state,
        loc_ctrl=0,
        loc_sts=device.loc_sts,
        intf_id=crb.INTF_ID_LOW,
        intf_id_vendor=crb.VENDOR_ID,
        ctrl_ext=0,
        ctrl_req=0,
        ctrl_sts=device.ctrl_sts,
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
    crb.REQ_TO_START.pack_into(memory, Register.CTRL_REQ, 0, crb.CtrlSts.TPM_STS, 0, 0)
