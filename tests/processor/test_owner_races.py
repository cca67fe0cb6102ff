"""Owners' commands that meet each other, or a vTPM's end, half-way. The store, the table and the ledger are real; no daemon."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spvtpm.processor.admission import Admission
from spvtpm.processor.allowed import Here
from spvtpm.processor.channel_order import ChannelOrder
from spvtpm.processor.fuses.file import FileCounter, counter_at
from spvtpm.processor.group_commit import GroupCommit
from spvtpm.processor.instances import Import
from spvtpm.processor.launch_secrets import LaunchSecrets
from spvtpm.processor.ledger import Ledger
from spvtpm.processor.nv_store import Change, NvStore
from spvtpm.processor.owner_commands import Estate, OwnerCommands
from spvtpm.processor.ownership import Ownership
from spvtpm.processor.parking import ParkingLot
from spvtpm.processor.rollback_guard import RollbackGuard
from spvtpm.processor.security_block import VmSecurityBlock, VmState
from spvtpm.processor.security_manager import SecurityManager
from spvtpm.processor.sp_secret import SpSecret
from spvtpm.processor.users import Users
from spvtpm.processor.vm_table import VmTable, block_change
from spvtpm.processor.vtpm_manager import VtpmManager
from spvtpm.processor.vtpm_records import record_name
from spvtpm.wire.errors import NotFound, StorageError
from spvtpm.wire.instance_file import Instance, InstanceHeader, InstanceSecrets, UserSecret, seal_instance
from spvtpm.wire.owner_messages import PIECE_BYTES, ImportVtpm, MyVm, Piece, Provision
from tests.owner import ANYTHING
from tests.wire.instances import ENDORSEMENT

FLEET, SP, USER, OWNER, OTHER = bytes(16), b"s" * 32, b"u" * 32, b"o" * 32, b"p" * 32


class Scene:
    """An estate whose milestones wait for `may_commit`."""

    def __init__(self, directory: Path) -> None:
        NvStore.create(directory / "nv.db", bytes(32))
        (directory / "counter").write_bytes(counter_at(0))
        (directory / "counter").chmod(0o600)
        self.store = NvStore(directory / "nv.db", bytes(32))
        self.may_commit, self.committing = asyncio.Event(), asyncio.Event()
        self.may_commit.set()
        self.refusal: StorageError | None = None
        self.table = VmTable(Admission(10, 10, is_required=False))
        services: Any = type(
            "Services", (), {"store": self.store, "parking": ParkingLot()}
        )  # no vTPM is powered on here
        self.vtpms = VtpmManager(services, 60.0)
        self._commit = GroupCommit(self.store).commit
        self.counter = FileCounter(directory / "counter")
        guard = RollbackGuard(self.store, self.commit, self.counter)
        secret, here = SpSecret(FLEET, 1, SP), Here(bytes(16), 1)
        secrets = LaunchSecrets(directory, partial(self.table.note, self.commit))
        users = Users(frozenset({os.geteuid()}), range(0))
        self.estate = Estate(self.store, guard, self.table, self.vtpms, Ledger(self.store), secrets, here, secret)
        self.hypervisor = SecurityManager(self.store, self.commit, guard, self.table, self.vtpms, secrets, users, here)
        self.order = ChannelOrder()

    async def commit(self, changes: Sequence[Change]) -> None:
        self.committing.set()
        await self.may_commit.wait()
        if self.refusal is not None:
            raise self.refusal
        await self._commit(changes)

    def commands(self, owner: bytes = OWNER) -> OwnerCommands:
        return OwnerCommands(self.estate, owner, self.order.turn_of(owner).__enter__())

    async def add(self, state: VmState = VmState.STOPPED) -> VmSecurityBlock:
        """A VM with a vTPM."""
        ownership = Ownership(
            owner=OWNER, user_secret=USER, vm_key=bytes(32), policy=ANYTHING, label="", inject_key=False
        )
        block = VmSecurityBlock(uuid.uuid4(), ownership, state, vtpm_id=uuid.uuid4(), boots=1)
        assert block.vtpm_id is not None
        await self._commit([block_change(block), (record_name(block.vtpm_id), b"permanent")])
        self.table.put(block)
        self.vtpms.load(block.vtpm_id, block.vm_id)
        return block

    def begin_import(self, vm_id: uuid.UUID, vtpm_id: uuid.UUID) -> tuple[Import, list[Piece]]:
        header = InstanceHeader(vtpm_id, vm_id, FLEET, 1, 1, 0, hibernated=False)
        instance = Instance(header, bytes(100_000), None, ANYTHING, ENDORSEMENT, "")
        file = seal_instance(instance, InstanceSecrets(UserSecret(USER), SP))
        announced = ImportVtpm(size_bytes=len(file), newest_version=0)
        request = Provision(vm_id=vm_id, user_secret=USER, vm_key=bytes(32), vtpm=announced)
        pieces = [Piece(data=file[at : at + PIECE_BYTES]) for at in range(0, len(file), PIECE_BYTES)]
        return Import(self.estate, OWNER, self.order.turn_of(OWNER).__enter__(), request, announced), pieces


def play(directory: Path, act: Callable[[Scene], Awaitable[None]]) -> None:
    async def run() -> None:
        scene = Scene(directory)
        try:
            async with asyncio.timeout(30):
                await act(scene)
        finally:
            scene.store.close()

    asyncio.run(run())


async def feed(importing: Import, pieces: list[Piece]) -> MyVm | None:
    done = None
    for piece in pieces:
        done = await importing.feed(piece)
    return done


@pytest.mark.parametrize("fails", [False, True])
def test_an_import_that_is_not_durable_yet_hinders_nobody_from_listing_vms(tmp_path: Path, fails: bool) -> None:
    async def act(scene: Scene) -> None:
        vm_id, vtpm_id = uuid.uuid4(), uuid.uuid4()
        importing, pieces = scene.begin_import(vm_id, vtpm_id)
        scene.may_commit.clear()
        bringing = asyncio.ensure_future(feed(importing, pieces))
        await scene.committing.wait()
        assert scene.commands().list(None).vms == []
        assert scene.hypervisor.list(None).vms == []
        scene.refusal = StorageError("full") if fails else None
        scene.may_commit.set()
        if fails:
            with pytest.raises(StorageError):
                await bringing
            assert scene.hypervisor.list(None).vms == []
            with pytest.raises(NotFound):
                scene.vtpms.get(vtpm_id)
        else:
            assert await bringing == scene.commands().list(None).vms[0]

    play(tmp_path, act)


def test_an_import_reads_the_ledger_only_while_nobody_writes_it(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        importing, pieces = scene.begin_import(uuid.uuid4(), uuid.uuid4())
        async with scene.estate.ledger.lock:
            feeding = asyncio.ensure_future(importing.feed(pieces[0]))
            for _ in range(5):
                await asyncio.sleep(0)
            assert not feeding.done()
        assert await feeding is None

    play(tmp_path, act)


def test_a_vtpm_that_dies_while_its_secret_is_rotated_has_failed(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        block = await scene.add(VmState.RUNNING)
        scene.may_commit.clear()
        rotating = asyncio.ensure_future(scene.commands().rotate(b"v" * 32))
        await scene.committing.wait()
        scene.table.fail(block.vm_id, "the worker died")
        scene.may_commit.set()
        assert (await rotating).vms == 1
        now = scene.table.get(block.vm_id)
        assert (now.state, now.ownership.user_secret) == (VmState.FAILED, b"v" * 32)
        assert [event.what for event in now.events] == ["failed", "secret-rotated"]

    play(tmp_path, act)


@pytest.mark.attack("A23")
def test_an_owner_who_has_nothing_here_does_not_wear_the_chips_counter(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        await scene.add()
        assert (await scene.commands(OTHER).rotate(b"v" * 32)).vms == 0
        assert scene.counter.read() == 0
        assert (await scene.commands().rotate(b"v" * 32)).vms == 1
        assert scene.counter.read() == 1

    play(tmp_path, act)


@pytest.mark.attack("A22")
def test_a_vtpm_that_hangs_while_it_is_destroyed_keeps_no_other_owner_waiting(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        block = await scene.add()
        assert block.vtpm_id is not None
        async with scene.vtpms.get(block.vtpm_id)._lock:  # its worker has been given an order, and does not answer
            destroying = asyncio.ensure_future(scene.commands().destroy(block.vm_id))
            for _ in range(5):
                await asyncio.sleep(0)
            async with asyncio.timeout(10):
                assert (await scene.commands(OTHER).fate(uuid.uuid4())).state == "unknown"
            assert not destroying.done()
        await destroying
        assert (await scene.commands().fate(block.vtpm_id)).state == "destroyed"

    play(tmp_path, act)
