"""The VM security block (VMSB): what the SP knows of one VM, and the one vTPM it is bound to.

Pure: transitions return a new block or raise. The binding VM ↔ vTPM is made here and nowhere else; neither the hypervisor nor
a file name can change it.

    launch ──▶ RUNNING ──stop──▶ STOPPED ──start──▶ RUNNING
                  │  ▲
         vTPM died│  │reset
                  ▼  │
                FAILED ──stop──▶ STOPPED

A loaded block is STOPPED: if the SP went down under a running VM, that was a power cut for its vTPM.
"""

from __future__ import annotations

import os
import uuid
from enum import Enum
from typing import Annotated, Self

import msgspec
from msgspec import Meta

from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import AlreadyExists, IntegrityError, WrongState


class VmState(Enum):
    """State of a VM as its SP sees it."""

    RUNNING = "running"
    STOPPED = "stopped"
    FAILED = "failed"


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Annotated[int, Meta(ge=1, le=1)]
    vm_id: uuid.UUID
    vtpm_id: uuid.UUID | None
    boots: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class VmSecurityBlock(msgspec.Struct, frozen=True):
    """One VM's block.

    Attributes:
        vm_id: the VM.
        state: where it is in its life.
        boot_id: 16 random bytes, new at every boot; None while no boot is under way.
        boots: boots so far.
        vtpm_id: the one vTPM bound to this VM, if it has one.
        lost_vtpm: whether a vTPM was destroyed in this boot: another one would be a PCR reset under a running guest.
    """

    vm_id: uuid.UUID
    state: VmState = VmState.STOPPED
    boot_id: bytes | None = None
    boots: int = 0
    vtpm_id: uuid.UUID | None = None
    lost_vtpm: bool = False

    @classmethod
    def launch(cls, vm_id: uuid.UUID) -> Self:
        """A new VM's block, running its first boot."""
        return cls(vm_id).start()

    def start(self) -> Self:
        """A new boot of a stopped VM: new boot id, so every frame of an earlier boot is dead.

        Raises:
            WrongState: it is not stopped.
        """
        self._require("start", VmState.STOPPED)
        return msgspec.structs.replace(
            self, state=VmState.RUNNING, boot_id=os.urandom(16), boots=self.boots + 1, lost_vtpm=False
        )

    def stop(self) -> Self:
        """The VM is powered off.

        Raises:
            WrongState: it is stopped already.
        """
        self._require("stop", VmState.RUNNING, VmState.FAILED)
        return msgspec.structs.replace(self, state=VmState.STOPPED, boot_id=None)

    def fail(self) -> Self:
        """Its vTPM died: a new boot is needed, or PCRs could be reset under a running guest."""
        self._require("fail", VmState.RUNNING)
        return msgspec.structs.replace(self, state=VmState.FAILED)

    def bind(self, vtpm_id: uuid.UUID) -> Self:
        """Binds the VM's one vTPM, for good.

        Raises:
            AlreadyExists: it has one.
            WrongState: it is not running, or has lost a vTPM in this boot.
        """
        if self.vtpm_id is not None:
            raise AlreadyExists(f"VM {self.vm_id} has a vTPM already: {self.vtpm_id}")
        self._require("create-vtpm", VmState.RUNNING)
        if self.lost_vtpm:
            raise WrongState(f"create-vtpm: VM {self.vm_id} has lost a vTPM in this boot; stop and start it first")
        return msgspec.structs.replace(self, vtpm_id=vtpm_id)

    def unbind(self) -> Self:
        """The vTPM is destroyed.

        Raises:
            WrongState: there is none.
        """
        if self.vtpm_id is None:
            raise WrongState(f"VM {self.vm_id} has no vTPM")
        return msgspec.structs.replace(self, vtpm_id=None, lost_vtpm=self.state is not VmState.STOPPED)

    def _require(self, command: str, *states: VmState) -> None:
        if self.state not in states:
            wanted = " or ".join(state.value for state in states)
            raise WrongState(f"{command}: VM {self.vm_id} is {self.state.value}, not {wanted}")

    def to_record(self) -> bytes:
        """What outlives the SP's process."""
        return msgspec.msgpack.encode(_Record(1, self.vm_id, self.vtpm_id, self.boots))

    @classmethod
    def from_record(cls, vm_id: uuid.UUID, record: bytes) -> Self:
        """The block as it was stored, stopped.

        Raises:
            IntegrityError: the record is damaged or another VM's.
        """
        try:
            stored = msgspec.msgpack.decode(record, type=_Record)
        except UNDECODABLE as error:
            raise IntegrityError(f"the security block of VM {vm_id} is damaged: {error}") from None
        if stored.vm_id != vm_id:
            raise IntegrityError(f"the security block of VM {vm_id} is that of VM {stored.vm_id}")
        return cls(vm_id, boots=stored.boots, vtpm_id=stored.vtpm_id)
