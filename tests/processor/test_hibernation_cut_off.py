"""A hibernation whose caller is cut off while the state becomes durable. The vTPM is one that is parked; no worker is needed."""

from __future__ import annotations

import asyncio
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from spvtpm.processor.hibernation import hibernate
from spvtpm.processor.interfaces.direct_path import DirectPath
from spvtpm.processor.parking import ParkingLot
from spvtpm.processor.residency import Residency
from spvtpm.processor.vtpm import Vtpm
from spvtpm.processor.worker.messages import Parked
from spvtpm.wire.errors import StorageError


class Scene:
    """A parked vTPM."""

    def __init__(self, directory: Path) -> None:
        self.parking = ParkingLot()
        services: Any = type("Services", (), {"parking": self.parking})
        self.vtpm = Vtpm(uuid.uuid4(), uuid.uuid4(), services)
        self.vtpm.interface = DirectPath(directory / "vm.sock", frozenset([os.geteuid()]), "vTPM")
        self.vtpm.residency = Residency.PARKED
        self.parking.put(self.vtpm.vtpm_id, Parked(b"volatile", None))


@pytest.mark.attack("A30")
def test_whoever_is_cut_off_while_it_becomes_durable_leaves_nothing_that_goes_on_beside_it(
    state_directory: Path,
) -> None:
    async def act() -> None:
        scene = Scene(state_directory.parent)
        saving = asyncio.Event()

        async def save(_volatile: bytes) -> None:
            saving.set()
            await asyncio.Event().wait()

        hibernating = asyncio.ensure_future(hibernate(scene.vtpm, save))
        await saving.wait()
        hibernating.cancel()
        with suppress(asyncio.CancelledError):
            await hibernating
        assert scene.vtpm.residency is Residency.OFF
        assert scene.vtpm.vtpm_id not in scene.parking

    asyncio.run(act())


def test_a_state_that_storage_refuses_is_parked_as_it_was(state_directory: Path) -> None:
    async def act() -> None:
        scene = Scene(state_directory.parent)

        async def save(_volatile: bytes) -> None:
            raise StorageError("full")

        with pytest.raises(StorageError):
            await hibernate(scene.vtpm, save)
        assert scene.vtpm.residency is Residency.PARKED
        assert scene.parking.take(scene.vtpm.vtpm_id) == Parked(b"volatile", None)
        await scene.vtpm.abandon()

    asyncio.run(act())
