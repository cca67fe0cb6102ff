"""The VM security block (VMSB): what the SP knows of one VM, its owner, and the one vTPM it is bound to.

Pure: transitions return a new block or raise. The binding VM ↔ vTPM is made here and nowhere else; neither the hypervisor nor
a file name can change it.

    provision ──▶ STOPPED ──launch, start──▶ RUNNING ──stop──▶ STOPPED
                                              │  │  ▲
                                      hibernate  │  │reset
                                              │  │vTPM died
                                              ▼  ▼
    provision, importing ──▶ HIBERNATED ──start──▶ RUNNING      FAILED ──stop──▶ STOPPED

    RUNNING ──leave──▶ LEAVING ──stay──▶ RUNNING       arrive ──▶ ARRIVING ──go_live──▶ RUNNING or HIBERNATED

A loaded block is STOPPED, HIBERNATED or ARRIVING: if the SP went down under a running VM, or one that was leaving, that was a
power cut for its vTPM.
"""

from __future__ import annotations

import os
import time
import uuid
from enum import Enum
from typing import Annotated, Literal, Self

import msgspec
from msgspec import Meta

from spvtpm.processor.arrival import Arrival
from spvtpm.processor.ownership import Ownership
from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import (
    AlreadyExists,
    DirectPathOnly,
    IntegrityError,
    MessageError,
    MigrationForbidden,
    WrongState,
)
from spvtpm.wire.launch_secret import ComingMemory, LaunchSecret
from spvtpm.wire.mailbox import derive_boot_key
from spvtpm.wire.owner_messages import MAX_EVENTS, Event

_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Sha256 = Annotated[bytes, Meta(min_length=32, max_length=32)]
_BOOT_ID_BYTES = 16


def new_moves_key() -> bytes:
    """Another one, 32 bytes."""
    return os.urandom(32)


class VmState(Enum):
    """State of a VM as its SP sees it."""

    RUNNING = "running"
    STOPPED = "stopped"
    FAILED = "failed"
    HIBERNATED = "hibernated"
    LEAVING = "leaving"
    ARRIVING = "arriving"


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Annotated[int, Meta(ge=5, le=5)]
    vm_id: uuid.UUID
    ownership: Ownership
    vtpm_id: uuid.UUID | None
    boots: _Count
    version: _Count
    state: Literal["stopped", "hibernated", "arriving"]
    events: Annotated[tuple[Event, ...], Meta(max_length=MAX_EVENTS)]
    moves_key: _Sha256
    arrival: Arrival | None


class _Moving(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ownership: Ownership
    vtpm_id: uuid.UUID
    boots: _Count
    version: _Count
    events: Annotated[tuple[Event, ...], Meta(max_length=MAX_EVENTS)]


class VmSecurityBlock(msgspec.Struct, frozen=True):
    """One VM's block. Its `repr` shows no secret.

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
        emulated: whether this boot reaches its vTPM by the TPM emulator interface; otherwise by the direct path.
        moves_key: from which the tokens of its handoffs to other chips are derived; new in each chip that it comes to. Secret.
        arrival: how it came here, if it came from another chip.
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
    emulated: bool = False
    moves_key: bytes = msgspec.field(default_factory=new_moves_key)
    arrival: Arrival | None = None

    def __repr__(self) -> str:
        return f"VmSecurityBlock(vm_id={self.vm_id}, state={self.state.value}, ownership={self.ownership})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("vm_id", self.vm_id), ("state", self.state.value), ("ownership", self.ownership)]

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

    def launch(self, vm_uid: int | None = None, *, emulated: bool = False) -> Self:
        """The first boot.

        Raises:
            AlreadyExists: it has been launched before.
            DirectPathOnly: its owner does not allow the TPM emulator interface.
            WrongState: it goes on where it was hibernated, which it cannot by the TPM emulator interface.
        """
        if self.boots:
            raise AlreadyExists(f"launch: VM {self.vm_id} has been launched before; start it")
        return self._boot("launched", vm_uid, emulated=emulated)

    def start(self, vm_uid: int | None = None, *, emulated: bool = False) -> Self:
        """Another boot: new boot id, so every frame of an earlier boot is dead.

        Raises:
            WrongState: it is neither stopped nor hibernated, or was never launched; or as `launch`.
            DirectPathOnly: its owner does not allow the TPM emulator interface.
        """
        self._require("start", VmState.STOPPED, VmState.HIBERNATED)
        if not self.boots:
            raise WrongState(f"start: VM {self.vm_id} has never been launched")
        return self._boot("started", vm_uid, emulated=emulated)

    def _boot(self, word: str, vm_uid: int | None, *, emulated: bool = False) -> Self:
        if emulated:
            self._check_emulated()
        word = "resumed" if self.state is VmState.HIBERNATED else word
        boots = self.boots + 1
        boot = {"state": VmState.RUNNING, "boot_id": os.urandom(_BOOT_ID_BYTES), "boots": boots}
        block = msgspec.structs.replace(self, **boot, vm_uid=vm_uid, emulated=emulated)
        return block.noting(word, f"boot {boots}, by the TPM emulator interface" if emulated else f"boot {boots}")

    def _check_emulated(self) -> None:
        if self.ownership.policy.direct_path_only:
            raise DirectPathOnly(f"the owner of VM {self.vm_id} does not allow the TPM emulator interface")
        if self.state is VmState.HIBERNATED:
            raise WrongState(f"VM {self.vm_id} goes on where it was hibernated: that takes the direct path")

    def _require_direct_path(self, command: str) -> None:
        if self.emulated:
            raise WrongState(
                f"{command}: VM {self.vm_id} is on the TPM emulator interface, whose state stays where it is"
            )

    def stop(self) -> Self:
        """The VM is powered off.

        Raises:
            WrongState: it is stopped already, or hibernated: that would throw its state away.
        """
        self._require("stop", VmState.RUNNING, VmState.FAILED)
        return msgspec.structs.replace(self, state=VmState.STOPPED, boot_id=None).noting("stopped")

    def hibernate(self, *, is_untouched: bool = False) -> Self:
        """The VM is suspended for a later start that goes on where it was.

        Args:
            is_untouched: nobody has had the VM key in this boot. The next one goes on with the same memory then.

        Raises:
            WrongState: it is not running, has no vTPM, or is on the TPM emulator interface.
        """
        self._require("hibernate", VmState.RUNNING)
        if self.vtpm_id is None:
            raise WrongState(f"hibernate: VM {self.vm_id} has no vTPM")
        self._require_direct_path("hibernate")
        come = self.arrival
        if is_untouched and come is not None and self._goes_on_with(come):
            come = msgspec.structs.replace(come, boots=self.boots)
        return msgspec.structs.replace(self, state=VmState.HIBERNATED, boot_id=None, arrival=come).noting("hibernated")

    def leave(self) -> Self:
        """Its vTPM is still, and moves to another chip.

        Raises:
            WrongState: it is not running, has no vTPM, or is on the TPM emulator interface.
            MigrationForbidden: its owner does not want it.
        """
        self.check_movable()
        return msgspec.structs.replace(self, state=VmState.LEAVING)

    def check_movable(self) -> None:
        """Whether it may leave now.

        Raises:
            WrongState: it is not running, has no vTPM, or is on the TPM emulator interface.
            MigrationForbidden: its owner does not want it.
        """
        self._require("migration", VmState.RUNNING)
        if self.vtpm_id is None:
            raise WrongState(f"migration: VM {self.vm_id} has no vTPM")
        self._require_direct_path("migration")
        if not self.ownership.policy.migration_allowed:
            raise MigrationForbidden(f"the owner of VM {self.vm_id} does not allow its migration")

    def stay(self) -> Self:
        """It does not leave after all."""
        self._require("migration", VmState.LEAVING)
        return msgspec.structs.replace(self, state=VmState.RUNNING).noting("migration-ended", "the vTPM stays here")

    def moving_part(self, chip_id: bytes) -> bytes:
        """What of it goes to another chip, 16 bytes. Secret. The boot does not: frames of it are dead there."""
        assert self.vtpm_id is not None  # noqa: S101  # or it could not leave
        events = self.noting("migrated", f"to chip {chip_id.hex()}").events
        return msgspec.msgpack.encode(_Moving(self.ownership, self.vtpm_id, self.boots, self.version, events))

    @classmethod
    def arrive(cls, vm_id: uuid.UUID, moving_part: bytes, arrival: Arrival, moves_key: bytes) -> Self:
        """A VM that came from another chip, and waits for the word of that one.

        Args:
            vm_id: the VM.
            moving_part: as that chip has made it.
            arrival: how it came.
            moves_key: in this chip, 32 bytes.

        Raises:
            MessageError: it is no such part.
        """
        try:
            part = msgspec.msgpack.decode(moving_part, type=_Moving)
        except UNDECODABLE:
            raise MessageError("the part of the security block that moves is not what its format allows") from None
        rest = (part.boots, part.vtpm_id, part.version, part.events)
        come = msgspec.structs.replace(arrival, boots=part.boots)
        return cls(vm_id, part.ownership, VmState.ARRIVING, None, *rest, moves_key=moves_key, arrival=come)

    @property
    def is_arriving(self) -> bool:
        """Whether it waits for its source's word."""
        return self.state is VmState.ARRIVING

    def go_live(self, vm_uid: int | None, *, running: bool) -> Self:
        """It is this chip's now; `running` in a new boot, or hibernated for the next one.

        Raises:
            WrongState: it does not wait for that.
        """
        self._require("migration", VmState.ARRIVING)
        assert self.arrival is not None  # noqa: S101  # or it could not arrive
        noted = self.noting("arrived", f"from chip {self.arrival.source.hex()}")
        return noted._boot("resumed", vm_uid) if running else msgspec.structs.replace(noted, state=VmState.HIBERNATED)

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
        return self.with_ownership(ownership).noting("secret-rotated")

    def with_ownership(self, ownership: Ownership) -> Self:
        """What its owner brought, changed."""
        return msgspec.structs.replace(self, ownership=ownership)

    def noting(self, what: str, detail: str = "") -> Self:
        """The same, with one more event."""
        clean = "".join(character for character in detail if character.isprintable())[:256]
        event = Event(time_s=int(time.time()), what=what, detail=clean)
        return msgspec.structs.replace(self, events=(*self.events, event)[-MAX_EVENTS:])

    def launch_secret(self) -> LaunchSecret:
        """What the VM gets for the boot under way: in the first one after it came, the memory that came with it."""
        come = self.arrival
        if come is None or not self._goes_on_with(come):
            return LaunchSecret(self.ownership.vm_key)
        return LaunchSecret(self.ownership.vm_key, ComingMemory(come.handoff, come.stop_nonce))

    def _goes_on_with(self, come: Arrival) -> bool:
        return self.boots == come.boots + 1

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
        kept: dict[VmState, Literal["hibernated", "arriving"]] = {
            VmState.HIBERNATED: "hibernated",
            VmState.ARRIVING: "arriving",
        }
        record = _Record(
            format=5,
            vm_id=self.vm_id,
            ownership=self.ownership,
            vtpm_id=self.vtpm_id,
            boots=self.boots,
            version=self.version,
            state=kept.get(self.state, "stopped"),
            events=self.events,
            moves_key=self.moves_key,
            arrival=self.arrival,
        )
        return msgspec.msgpack.encode(record)

    @classmethod
    def from_record(cls, vm_id: uuid.UUID, record: bytes) -> Self:
        """The block as it was stored: stopped, hibernated or arriving.

        Raises:
            IntegrityError: the record is damaged or another VM's.
        """
        try:
            stored = msgspec.msgpack.decode(record, type=_Record)
        except UNDECODABLE:
            raise IntegrityError(f"the security block of VM {vm_id} is damaged") from None
        if stored.vm_id != vm_id:
            raise IntegrityError(f"the security block of VM {vm_id} is that of VM {stored.vm_id}")
        rest = (stored.boots, stored.vtpm_id, stored.version, stored.events)
        block = cls(vm_id, stored.ownership, VmState(stored.state), None, *rest, moves_key=stored.moves_key)
        return msgspec.structs.replace(block, arrival=stored.arrival)
