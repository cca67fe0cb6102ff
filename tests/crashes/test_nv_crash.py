"""A16 for NV storage: kill -9 of everything at random moments; every acknowledged write is there afterwards."""

from __future__ import annotations

import os
import random
import signal
import struct
import threading
from pathlib import Path

import pytest

from spvtpm.guest.crb_driver import CrbDriver
from spvtpm.wire import messages
from spvtpm.wire.errors import SpvtpmError
from tests import tpm_commands as tpm
from tests.harness import RunningSp, has_ended

ROUNDS = 200
NV_INDEX = 0x01500016
COUNTER = struct.Struct(">Q")


class Writer:
    """A VM that writes a growing number to NV as fast as it can, and remembers the last one acknowledged."""

    def __init__(self, sp: RunningSp) -> None:
        self.sp = sp
        self.vm_id = sp.launch()
        self.sent = 0
        self.acknowledged = 0
        with sp.driver(self.vm_id) as driver:
            tpm.checked(driver.transmit(tpm.startup()))
            tpm.checked(driver.transmit(tpm.nv_define(NV_INDEX, COUNTER.size)))
            tpm.checked(driver.transmit(tpm.nv_write(NV_INDEX, COUNTER.pack(0))))

    def write_until_the_sp_dies(self, driver: CrbDriver, progress: threading.Barrier) -> None:
        progress.wait()
        try:
            while True:
                self.sent += 1
                tpm.checked(driver.transmit(tpm.nv_write(NV_INDEX, COUNTER.pack(self.sent))))
                self.acknowledged = self.sent
        except SpvtpmError:
            return

    def stored(self) -> int:
        self.sp.info(messages.StartVm(vm_id=self.vm_id))
        with self.sp.driver(self.vm_id) as driver:
            tpm.checked(driver.transmit(tpm.startup()))
            content = tpm.nv_content_in(driver.transmit(tpm.nv_read(NV_INDEX, COUNTER.size)))
        return int(COUNTER.unpack(content)[0])


@pytest.mark.claim("C5")
@pytest.mark.attack("A16")
def test_every_acknowledged_nv_write_survives_kill_9_at_random_moments(state_directory: Path) -> None:
    generator = random.Random(20_241)  # noqa: S311  # moments, not secrets
    with RunningSp(state_directory) as sp:
        writers = [Writer(sp), Writer(sp)]
        for round_number in range(ROUNDS):
            _kill_under_load(sp, writers, generator)
            sp.start()
            for writer in writers:
                stored = writer.stored()
                assert writer.acknowledged <= stored <= writer.sent, f"round {round_number}"
                writer.acknowledged = writer.sent = stored


def _kill_under_load(sp: RunningSp, writers: list[Writer], generator: random.Random) -> None:
    barrier = threading.Barrier(len(writers) + 1)
    doomed = [os.pidfd_open(pid) for pid in sp.workers()]
    target = generator.randrange(1, 40)
    first = writers[0]
    with sp.driver(writers[0].vm_id) as one, sp.driver(writers[1].vm_id) as two:
        threads = [
            threading.Thread(target=writer.write_until_the_sp_dies, args=(driver, barrier))
            for writer, driver in zip(writers, (one, two), strict=True)
        ]
        for thread in threads:
            thread.start()
        barrier.wait()
        begin = first.acknowledged
        while first.acknowledged < begin + target:  # a moment counted in writes; where in a write is left to chance
            pass
        os.kill(sp.process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
    sp.kill()
    assert all(has_ended(process) for process in doomed), "workers die with their SP"
