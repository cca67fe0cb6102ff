"""The VM security block (VMSB): what the SP knows of one VM, its owner, and the one vTPM it is bound to.

Pure: transitions return a new block or raise. The binding VM ↔ vTPM is made here and nowhere else; neither the hypervisor nor
a file name can change it.

    provision ──▶ STOPPED ──launch, start──▶ RUNNING ──stop──▶ STOPPED
                                              │  │  ▲
                                      hibernate  │  │reset
                                              │  │vTPM died
                                              ▼  ▼
    provision, importing ──▶ HIBERNATED ──start──▶ RUNNING      FAILED ──stop──▶ STOPPED

A loaded block is STOPPED or HIBERNATED: if the SP went down under a running VM, that was a power cut for its vTPM.
"""

from __future__ import annotations

import os
import time
import uuid
from enum import Enum
from typing import Annotated, Self

import msgspec
from msgspec import Meta

from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import AlreadyExists, IntegrityError, WrongState
from spvtpm.wire.instance_content import Label, Policy
from spvtpm.wire.instance_file import SECRET_BYTES
from spvtpm.wire.mailbox import KEY_BYTES, derive_boot_key
from spvtpm.wire.owner_certificates import FINGERPRINT_BYTES
from spvtpm.wire.owner_messages import MAX_EVENTS, Event

_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_BOOT_ID_BYTES = 16


class VmState(Enum):
    """State of a VM as its SP sees it."""

    RUNNING = "running"
    STOPPED = "stopped"
    FAILED = "failed"
    HIBERNATED = "hibernated"


class Ownership(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the owner brought through the confidential channel. Its `repr` shows no secret.

    Attributes:
        owner: fingerprint of the owner's key, 32 bytes, public.
        user_secret: 32 bytes.
        vm_key: 32 bytes, shared with the VM.
        policy: what the owner allows.
        label: the owner's words for the vTPM.
        inject_key: whether the VM is handed its key at each boot.
    """

    owner: Annotated[bytes, Meta(min_length=FINGERPRINT_BYTES, max_length=FINGERPRINT_BYTES)]
    user_secret: Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    vm_key: Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    policy: Policy
    label: Label
    inject_key: bool

    def __repr__(self) -> str:
        return f"Ownership(owner={self.owner.hex()})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("owner", self.owner.hex())]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Annotated[int, Meta(ge=3, le=3)]
    vm_id: uuid.UUID
    ownership: Ownership
    vtpm_id: uuid.UUID | None
    boots: _Count
    version: _Count
    hibernated: bool
    events: Annotated[tuple[Event, ...], Meta(max_length=MAX_EVENTS)]


class VmSecurityBlock(msgspec.Struct, frozen=True):
    """One VM's block.

    Attributes:
        vm_id: the VM.
        ownership: whose it is.
        state: where it is in its life.
        boot_id: 16 random bytes, new at every boot; None while no boot is under way.
        boots: boots so far.
        vtpm_id: the one vTPM bound to this VM, if it has one.
        version: of the vTPM's last export or import; 0 if there was none.
        events: the newest ones, oldest first.
        vm_uid: user id of the VM's process in this boot; None: any that may command.
    """

    vm_id: uuid.UUID
    ownership: Ownership
    state: VmState = VmState.STOPPED
    boot_id: bytes | None = None
    boots: int = 0
    vtpm_id: uuid.UUID | None = None
    version: int = 0
    events: tuple[Event, ...] = ()
    vm_uid: int | None = None

    @classmethod
    def provision(cls, vm_id: uuid.UUID, ownership: Ownership) -> Self:
        """A VM that has never been launched, without a vTPM."""
        return cls(vm_id, ownership).noting("provisioned")

    @classmethod
    def provision_imported(
        cls, vm_id: uuid.UUID, ownership: Ownership, vtpm_id: uuid.UUID, version: int, *, hibernated: bool
    ) -> Self:
        """A VM that has never been launched here, bound to a vTPM that came out of an instance file."""
        state = VmState.HIBERNATED if hibernated else VmState.STOPPED
        block = cls(vm_id, ownership, state, vtpm_id=vtpm_id, version=version)
        return block.noting("provisioned").noting("imported", f"version {version}")

    def launch(self, vm_uid: int | None = None) -> Self:
        """The first boot.

        Raises:
            AlreadyExists: it has been launched before.
        """
        if self.boots:
            raise AlreadyExists(f"launch: VM {self.vm_id} has been launched before; start it")
        return self._boot("launched", vm_uid)

    def start(self, vm_uid: int | None = None) -> Self:
        """Another boot: new boot id, so every frame of an earlier boot is dead.

        Raises:
            WrongState: it is neither stopped nor hibernated, or was never launched.
        """
        self._require("start", VmState.STOPPED, VmState.HIBERNATED)
        if not self.boots:
            raise WrongState(f"start: VM {self.vm_id} has never been launched")
        return self._boot("started", vm_uid)

    def _boot(self, word: str, vm_uid: int | None) -> Self:
        word = "resumed" if self.state is VmState.HIBERNATED else word
        boots = self.boots + 1
        boot_id = os.urandom(_BOOT_ID_BYTES)
        block = msgspec.structs.replace(self, state=VmState.RUNNING, boot_id=boot_id, boots=boots, vm_uid=vm_uid)
        return block.noting(word, f"boot {boots}")

    def stop(self) -> Self:
        """The VM is powered off.

        Raises:
            WrongState: it is stopped already, or hibernated: that would throw its state away.
        """
        self._require("stop", VmState.RUNNING, VmState.FAILED)
        return msgspec.structs.replace(self, state=VmState.STOPPED, boot_id=None).noting("stopped")

    def hibernate(self) -> Self:
        """The VM is suspended for a later start that goes on where it was.

        Raises:
            WrongState: it is not running, or has no vTPM.
        """
        self._require("hibernate", VmState.RUNNING)
        if self.vtpm_id is None:
            raise WrongState(f"hibernate: VM {self.vm_id} has no vTPM")
        return msgspec.structs.replace(self, state=VmState.HIBERNATED, boot_id=None).noting("hibernated")

    def fail(self, reason: str) -> Self:
        """Its vTPM died: a new boot is needed, or PCRs could be reset under a running guest."""
        self._require("fail", VmState.RUNNING)
        return msgspec.structs.replace(self, state=VmState.FAILED).noting("failed", reason)

    def bind(self, vtpm_id: uuid.UUID) -> Self:
        """Binds the VM's one vTPM, for good.

        Raises:
            AlreadyExists: it has one.
            WrongState: it is not running.
        """
        self.check_unbound()
        return msgspec.structs.replace(self, vtpm_id=vtpm_id)

    def check_unbound(self) -> None:
        """Whether a vTPM can be bound now.

        Raises:
            AlreadyExists: it has one.
            WrongState: it is not running.
        """
        if self.vtpm_id is not None:
            raise AlreadyExists(f"VM {self.vm_id} has a vTPM already: {self.vtpm_id}")
        self._require("create-vtpm", VmState.RUNNING)

    def begin_export(self) -> Self:
        """The vTPM is about to be given out, in a version that no file has.

        Raises:
            WrongState: it is running or failed, or has no vTPM.
        """
        self._require("export", VmState.STOPPED, VmState.HIBERNATED)
        if self.vtpm_id is None:
            raise WrongState(f"export: VM {self.vm_id} has no vTPM")
        version = self.version + 1
        return msgspec.structs.replace(self, version=version).noting("export-begun", f"version {version}")

    def rotate(self, user_secret: bytes) -> Self:
        """Another `UserSecret`, 32 bytes."""
        ownership = msgspec.structs.replace(self.ownership, user_secret=user_secret)
        return msgspec.structs.replace(self, ownership=ownership).noting("secret-rotated")

    def noting(self, what: str, detail: str = "") -> Self:
        """The same, with one more event."""
        clean = "".join(character for character in detail if character.isprintable())[:256]
        event = Event(time_s=int(time.time()), what=what, detail=clean)
        return msgspec.structs.replace(self, events=(*self.events, event)[-MAX_EVENTS:])

    def boot_key(self) -> bytes:
        """The 32-byte key of the boot under way."""
        assert self.boot_id is not None  # noqa: S101  # a running block has one
        return derive_boot_key(self.ownership.vm_key, self.vm_id.bytes, self.boot_id)

    def _require(self, command: str, *states: VmState) -> None:
        if self.state not in states:
            wanted = " or ".join(state.value for state in states)
            raise WrongState(f"{command}: VM {self.vm_id} is {self.state.value}, not {wanted}")

    def to_record(self) -> bytes:
        """What outlives the SP's process. Secret."""
        hibernated = self.state is VmState.HIBERNATED
        fields = (self.ownership, self.vtpm_id, self.boots, self.version, hibernated, self.events)
        return msgspec.msgpack.encode(_Record(3, self.vm_id, *fields))

    @classmethod
    def from_record(cls, vm_id: uuid.UUID, record: bytes) -> Self:
        """The block as it was stored, stopped or hibernated.

        Raises:
            IntegrityError: the record is damaged or another VM's.
        """
        try:
            stored = msgspec.msgpack.decode(record, type=_Record)
        except UNDECODABLE:
            raise IntegrityError(f"the security block of VM {vm_id} is damaged") from None
        if stored.vm_id != vm_id:
            raise IntegrityError(f"the security block of VM {vm_id} is that of VM {stored.vm_id}")
        state = VmState.HIBERNATED if stored.hibernated else VmState.STOPPED
        rest = (stored.boots, stored.vtpm_id, stored.version, stored.events)
        return cls(vm_id, stored.ownership, state, None, *rest)
