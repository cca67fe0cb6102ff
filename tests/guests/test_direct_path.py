"""A real Linux guest under QEMU uses its vTPM on the direct path as a TPM of its kernel; its host has what lies between them."""

from __future__ import annotations

import mmap
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from spvtpm.wire import crb, messages
from spvtpm.wire.crb import Register
from tests import tpm_commands as tpm
from tests.guests.direct_path import DirectGuest, make_initramfs
from tests.guests.kernel import needs_guests
from tests.harness import RunningSp

pytestmark = needs_guests

PCR = 16
DRTM_PCR = 20
"""Resettable from locality 2 up. Source: TCG PC Client PTP 1.05, table "PCR attributes"."""

NV_INDEX = 0x01500001
SECRET = b"nobody but guest and vTPM see it"
SET_LOCALITY_2 = r"\x80\x01\x00\x00\x00\x0b\x20\x00\x10\x00\x02"
TCTI = "device:/dev/tpmrm0"


@contextmanager
def shared_memory(qemu: int) -> Iterator[mmap.mmap]:
    """The memory between guest and vTPM, as whoever owns QEMU's process has it."""
    (path,) = (
        path for path in Path(f"/proc/{qemu}/fd").iterdir() if str(path.readlink()).startswith("/memfd:spvtpm-crb")
    )
    with path.open("r+b") as file, mmap.mmap(file.fileno(), crb.MEMORY_BYTES) as memory:
        yield memory


class Watcher:
    """Copies the memory again and again, while the block lasts."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.copies = set[bytes]()

    def _run(self) -> None:
        while not self._is_over.is_set():
            self.copies.add(self._memory[:])

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


def wait_for_command(memory: mmap.mmap) -> None:
    """Returns while a command is under way."""
    while crb.U32.unpack_from(memory, Register.CTRL_START) == (0,):
        pass


def pcr_in(said: str) -> bytes:
    """The one value that `tpm2_pcrread` shows."""
    (value,) = re.findall(r"0x([0-9A-F]{64})", said)
    return bytes.fromhex(value)


@pytest.mark.claim("B2")
@pytest.mark.claim("C9")
@pytest.mark.attack("A13")
@pytest.mark.attack("A14")
def test_a_guest_has_its_vtpm_as_dev_tpm_and_its_host_sees_ciphertext_alone(sp: RunningSp, tmp_path: Path) -> None:
    vm_id = sp.launch()
    initramfs = make_initramfs(tmp_path / "guest", sp.key(vm_id))

    with DirectGuest(sp, vm_id, initramfs) as guest:
        guest.await_tpm()
        guest.remove_python()
        with shared_memory(guest.guest.pid) as memory:
            with Watcher(memory) as watcher:
                guest.tool(f"tpm2_pcrextend {PCR}:sha256={SECRET.hex()}")
                guest.tool(f"tpm2_nvdefine {NV_INDEX:#x} -C o -s {len(SECRET)}")
                assert guest.run(f"printf '{SECRET.decode()}' | tpm2 nvwrite {NV_INDEX:#x} -C o -i - -T {TCTI}")[0] == 0
                assert guest.tool(f"tpm2_nvread {NV_INDEX:#x} -C o -s {len(SECRET)}").strip() == SECRET.decode()
            assert len(watcher.copies) > 10
            assert all(vm_id.bytes in copy for copy in watcher.copies), "what is in clear is found"
            assert not any(SECRET in copy for copy in watcher.copies)
            of_kernel = guest.run(f"cat /sys/class/tpm/tpm0/pcr-sha256/{PCR}")[1]
            of_tools = guest.tool(f"tpm2_pcrread sha256:{PCR}")
            guest.guest.enter(f"while tpm2 createprimary -G rsa -T {TCTI}; do :; done")
            wait_for_command(memory)
    # Killed in the middle of a command. What it measured is in its vTPM, and nowhere else.
    with sp.driver(vm_id) as driver:
        of_vtpm = tpm.pcr_in(driver.transmit(tpm.pcr_read(PCR)))
    assert of_vtpm == sha256(bytes(32) + SECRET).digest()
    assert of_vtpm == bytes.fromhex(of_kernel) == pcr_in(of_tools)

    sp.info(messages.ResetVm(vm_id=vm_id))
    with DirectGuest(sp, vm_id, initramfs) as guest:
        guest.await_tpm()
        assert pcr_in(guest.tool(f"tpm2_pcrread sha256:{PCR}")) == bytes(32)
        assert guest.tool(f"tpm2_nvread {NV_INDEX:#x} -C o -s {len(SECRET)}").strip() == SECRET.decode()

        # Parked, its vTPM has no process; a ring of the guest's brings it back.
        sp.info(messages.ParkVtpm(vm_id=vm_id))
        assert len(guest.tool("tpm2_getrandom --hex 32").strip()) == 64

        # Neither the TPM nor the kernel gives a higher locality than 0.
        code, said = guest.run(f"tpm2 pcrreset {DRTM_PCR} -T {TCTI}")
        assert code != 0
        assert "0x907" in said
        code, said = guest.run(f"printf '{SET_LOCALITY_2}' > /dev/tpm0")
        assert code != 0
        assert "send(): error -14" in said

        # The host powers the vTPM on anew while the guest runs on: its PCRs are zero, and the guest has none of it.
        guest.tool(f"tpm2_pcrextend {PCR}:sha256={SECRET.hex()}")
        sp.info(messages.ResetVm(vm_id=vm_id))
        assert guest.run(f"tpm2 pcrread sha256:{PCR} -T {TCTI}")[0] != 0
        guest.guest.wait_for(r"the vTPM was powered on anew while this system ran")
        assert guest.run("ls /dev/tpm0")[0] != 0
        assert guest.run("start; wait $DEVICE")[0] == 5

        # Without the note of which start of the TPM is this system's, the attack works.
        guest.run("rm /run/spvtpm/starts; start; while ! [ -e /dev/tpmrm0 ]; do sleep 0.1; done")
        assert pcr_in(guest.tool(f"tpm2_pcrread sha256:{PCR}")) == bytes(32)
