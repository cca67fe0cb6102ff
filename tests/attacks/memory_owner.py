"""What the owner of the host can do to a VM's interface: read and write its memory, ring its doorbells."""

from __future__ import annotations

from spvtpm.guest.memory import InterfaceMemory
from spvtpm.wire import crb, mailbox
from spvtpm.wire.crb import AttachError, CtrlReq, CtrlSts, Register


def frame_at(interface: InterfaceMemory, address: int) -> bytes:
    """A copy of whatever frame lies there, with all that may follow."""
    return interface.memory[address : address + mailbox.MAX_FRAME_BYTES]


def put(interface: InterfaceMemory, address: int, content: bytes) -> None:
    """Overwrites memory."""
    interface.memory[address : address + len(content)] = content


def write(interface: InterfaceMemory, register: Register, value: int) -> None:
    """Overwrites a 32-bit register."""
    crb.U32.pack_into(interface.memory, register, value)


def start_command(interface: InterfaceMemory) -> AttachError:
    """Starts whatever lies at the command address; returns what the SP made of it (`NONE`: it was executed)."""
    crb.REQ_TO_START.pack_into(interface.memory, Register.CTRL_REQ, CtrlReq.CMD_READY, 0, 0, crb.START)
    interface.ring()
    while True:
        _req, status, _cancel, start = crb.REQ_TO_START.unpack_from(interface.memory, Register.CTRL_REQ)
        if start == 0:
            break
        assert interface.wait(30), "the SP did not answer"
    if not status & CtrlSts.TPM_STS:
        return AttachError.NONE
    return AttachError(crb.U32.unpack_from(interface.memory, crb.ATTACH_ERROR_OFFSET)[0])


def replay(interface: InterfaceMemory, frame: bytes, address: int = crb.COMMAND_ADDRESS) -> AttachError:
    """Writes a frame to `address`, points the registers there, and starts it."""
    put(interface, address, frame)
    write(interface, Register.CTRL_CMD_LADDR, address)
    try:
        return start_command(interface)
    finally:
        write(interface, Register.CTRL_CMD_LADDR, crb.COMMAND_ADDRESS)
