"""The vTPM's side of the CRB interface as a pure state machine: register writes in, register values and effects out.

No memory, no process, no cryptography: `direct.py` is the thin shell that finds the writes in shared memory. States and
transitions are those of the PTP; "Command Reception" is part of READY here, because writes to the buffer are not
trapped. A write that the PTP leaves undefined changes nothing.

Source: TCG PC Client Platform TPM Profile Specification 1.05, section 6.5.3.8, "CRB state machine".
"""

from __future__ import annotations

from enum import Enum, auto

from spvtpm.wire.crb import CANCEL, START, AttachError, CtrlReq, CtrlSts, LocCtrl, LocState, LocSts, Register


class CrbState(Enum):
    """Where the interface is in the life of a command."""

    IDLE = auto()
    READY = auto()
    EXECUTION = auto()
    COMPLETION = auto()


class Effect(Enum):
    """What the shell has to do after a write."""

    NONE = auto()
    EXECUTE = auto()
    CANCEL = auto()


WRITABLE = (Register.LOC_CTRL, Register.CTRL_REQ, Register.CTRL_CANCEL, Register.CTRL_START)
"""The registers whose writes drive the machine. Addresses and sizes are plain memory, checked when a command starts."""


class CrbDevice:
    """Locality 0 of one interface.

    Life: IDLE without locality → the VM requests access → cmdReady → READY → start → EXECUTION → `complete()` or
    `fail()` → COMPLETION → cmdReady (READY) or goIdle (IDLE). Relinquishing the locality leads to IDLE.
    """

    def __init__(self) -> None:
        self.state = CrbState.IDLE
        self.granted = False
        self.error = AttachError.NONE

    def write(self, register: Register, value: int) -> Effect:
        """One register write by the VM.

        Args:
            register: one of `WRITABLE`; a write to any other changes nothing.
            value: 32 bits, anything.
        """
        if self.state is CrbState.EXECUTION:
            return Effect.CANCEL if register is Register.CTRL_CANCEL and value == CANCEL else Effect.NONE
        if register is Register.LOC_CTRL:
            self._write_loc_ctrl(value)
        elif register is Register.CTRL_REQ and self.granted:
            self._write_ctrl_req(value)
        elif register is Register.CTRL_START and value == START and self.granted and self.state is CrbState.READY:
            self.state = CrbState.EXECUTION
            return Effect.EXECUTE
        return Effect.NONE

    def _write_loc_ctrl(self, value: int) -> None:
        if value == LocCtrl.REQUEST_ACCESS:
            self.granted = True
        elif value == LocCtrl.RELINQUISH and self.granted:
            self.granted = False
            self.state = CrbState.IDLE
            self.error = AttachError.NONE
        # Seize needs a higher locality than 0, and resetting the established bit locality 3 or 4: neither exists here.

    def _write_ctrl_req(self, value: int) -> None:
        if value == CtrlReq.CMD_READY:
            self.state = CrbState.READY
            self.error = AttachError.NONE
        elif value == CtrlReq.GO_IDLE:
            self.state = CrbState.IDLE
            self.error = AttachError.NONE

    def complete(self) -> None:
        """The response lies in memory."""
        self.state = CrbState.COMPLETION

    def fail(self, error: AttachError) -> None:
        """The command was not executed, or its response cannot be given: the VM sees tpmSts and the reason."""
        self.state = CrbState.COMPLETION
        self.error = error

    @property
    def loc_state(self) -> int:
        """LOC_STATE."""
        assigned = LocState.LOC_ASSIGNED if self.granted else 0
        return LocState.TPM_ESTABLISHED | LocState.TPM_REG_VALID | assigned

    @property
    def loc_sts(self) -> int:
        """LOC_STS."""
        return LocSts.GRANTED if self.granted else 0

    @property
    def ctrl_sts(self) -> int:
        """CTRL_STS."""
        idle = CtrlSts.TPM_IDLE if self.state is CrbState.IDLE else 0
        return idle | (CtrlSts.TPM_STS if self.error else 0)

    @property
    def ctrl_start(self) -> int:
        """CTRL_START: 1 while a command runs."""
        return START if self.state is CrbState.EXECUTION else 0
