"""What becomes of a vTPM whose volatile state is being saved when that fails, or when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import os
import tempfile
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from spvtpm.processor.endorser import Endorser
from spvtpm.processor.fuses.keepers import load_fuses
from spvtpm.processor.group_commit import GroupCommit
from spvtpm.processor.hibernation import hibernate
from spvtpm.processor.nv_store import NvStore
from spvtpm.processor.parking import ParkingLot
from spvtpm.processor.residency import Residency
from spvtpm.processor.vtpm import Vtpm
from spvtpm.processor.vtpm_manager import Binding, VtpmManager
from spvtpm.processor.vtpm_services import Boot, VtpmServices
from spvtpm.processor.worker_pool import WorkerPool
from spvtpm.wire.errors import StorageError
from tests.harness import RunningSp

pytestmark = [pytest.mark.claim("C6b"), pytest.mark.attack("A30")]


def with_a_vtpm(use: Callable[[Vtpm, ParkingLot], Coroutine[None, None, None]]) -> None:
    """A vTPM of real parts in this process, powered on."""

    async def run(state: Path) -> None:
        fuses = load_fuses(state / "fuses")
        store, pool, lot = (
            NvStore(state / "nv.db", fuses.storage_root_key),
            WorkerPool(1, Endorser(fuses).certify),
            ParkingLot(),
        )
        await pool.open()
        commit = GroupCommit(store).commit
        services = VtpmServices(store, commit, pool, lot, state, lambda _vm, _why: None)
        vtpms = VtpmManager(services, park_after_s=86400)
        binding = Binding(("vmsb/test", b"made"), ("vmsb/test", None))
        vtpm = await vtpms.create(
            uuid.uuid4(), Boot(b"b" * 16, b"k" * 32, frozenset({os.geteuid()})), lambda _vtpm_id: binding
        )
        try:
            await use(vtpm, lot)
        finally:
            await vtpms.close()
            pool.close()
            store.close()

    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path:
        with RunningSp(Path(path) / "sp") as sp:
            sp.stop()
        asyncio.run(run(sp.state))


def test_a_state_that_could_not_be_saved_goes_on() -> None:
    async def refuse(_volatile: bytes) -> None:
        raise StorageError("the disk is full")

    async def use(vtpm: Vtpm, lot: ParkingLot) -> None:
        for _ in range(2):  # from active, and from parked
            with pytest.raises(StorageError):
                await hibernate(vtpm, refuse)
            assert (vtpm.residency, vtpm.vtpm_id in lot) == (Residency.PARKED, True)
        await vtpm.wake()
        assert vtpm.residency is Residency.ACTIVE

    with_a_vtpm(use)


def test_a_state_that_may_have_been_saved_does_not_go_on() -> None:
    """The guest would act on it, and the saved one come back later as if he had not."""

    async def use(vtpm: Vtpm, lot: ParkingLot) -> None:
        saving = asyncio.Event()

        async def never_end(_volatile: bytes) -> None:
            saving.set()
            await asyncio.Event().wait()

        hibernating = asyncio.create_task(hibernate(vtpm, never_end))
        await saving.wait()
        hibernating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hibernating
        assert (vtpm.residency, vtpm.vtpm_id in lot, vtpm.interface) == (Residency.OFF, False, None)

    with_a_vtpm(use)
