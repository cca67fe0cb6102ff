"""A VM's vTPM behind a TCTI socket of the test process, which can park it after every command."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spvtpm.guest.crb_driver import CrbDriver
from spvtpm.guest.tcti import TctiServer, listen_unix
from spvtpm.wire import messages
from spvtpm.wire.tpm_stream import ensure_started
from tests.harness import RunningSp


class RecordedVtpm:
    """Transmits for one VM, and notes what was asked and answered.

    Args:
        sp: its secure processor.
        vm_id: the VM.
        driver: the VM's driver.
        parks: take the vTPM's process away after every command.

    Attributes:
        vm_id: the VM.
        transcript: command code and response code of every command.
    """

    def __init__(self, sp: RunningSp, vm_id: uuid.UUID, driver: CrbDriver, *, parks: bool) -> None:
        self._sp = sp
        self.vm_id = vm_id
        self._driver = driver
        self._parks = parks
        self.transcript: list[tuple[int, int]] = []

    def transmit(self, command: bytes) -> bytes:
        """One command."""
        response = self._driver.transmit(command)
        self.transcript.append((struct.unpack_from(">I", command, 6)[0], struct.unpack_from(">I", response, 6)[0]))
        if self._parks:
            vtpm = self._sp.info(messages.ParkVtpm(vm_id=self.vm_id)).vtpm
            if vtpm is None or vtpm.residency != "parked":
                self.transcript.append((-1, -1))  # a test that compares transcripts fails on this
        return response


@contextmanager
def served(sp: RunningSp, directory: Path, *, parks: bool = False) -> Iterator[tuple[str, RecordedVtpm]]:
    """A new VM with a new vTPM, started: its TCTI string, and the record of what goes through.

    Args:
        sp: where to launch it.
        directory: for the sockets.
        parks: take the vTPM's process away after every command.
    """
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        vtpm = RecordedVtpm(sp, vm_id, driver, parks=parks)
        ensure_started(vtpm.transmit)
        path = directory / "tpm"
        server = TctiServer(vtpm.transmit, driver.cancel, *listen_unix(path))
        server.start()
        try:
            yield f"swtpm:path={path}", vtpm
        finally:
            server.close()
    sp.destroy(vm_id)
