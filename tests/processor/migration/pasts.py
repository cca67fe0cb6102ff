"""vTPMs that have a past, and whether they still have it."""

from __future__ import annotations

import uuid

from spvtpm.guest.crb_driver import CrbDriver
from tests import tpm_commands as tpm
from tests.harness import RunningSp

NV_INDEX, PCR, PERSISTENT, TRANSIENT = 0x1500016, 16, 0x81000001, 0x80000000


def furnish(driver: CrbDriver) -> dict[str, bytes]:
    """A little of all that a vTPM can have; what of it must be the same afterwards."""
    tpm.checked(driver.transmit(tpm.startup()))
    tpm.checked(driver.transmit(tpm.pcr_extend(PCR, b"\xab" * 32)))
    tpm.checked(driver.transmit(tpm.nv_define(NV_INDEX, 8)))
    tpm.checked(driver.transmit(tpm.nv_write(NV_INDEX, b"in truth")))
    made = tpm.checked(driver.transmit(tpm.create_primary(tpm.ecc_p256())))
    tpm.checked(driver.transmit(tpm.evict_control(tpm.handle_in(made), PERSISTENT)))
    return seen_of(driver)


def seen_of(driver: CrbDriver) -> dict[str, bytes]:
    """What a guest sees of its vTPM."""
    return {
        "pcr": tpm.pcr_in(tpm.checked(driver.transmit(tpm.pcr_read(PCR)))),
        "nv": tpm.nv_content_in(tpm.checked(driver.transmit(tpm.nv_read(NV_INDEX, 8)))),
        "persistent": tpm.checked(driver.transmit(tpm.read_public(PERSISTENT))),
        "transient": tpm.checked(driver.transmit(tpm.read_public(TRANSIENT))),
    }


def furnished(sp: RunningSp) -> tuple[uuid.UUID, dict[str, bytes]]:
    """A new VM whose vTPM has a past."""
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        return vm_id, furnish(driver)


def nv_of(driver: CrbDriver) -> bytes:
    """What was written into its NV."""
    driver.transmit(tpm.startup())  # unless it goes on
    return tpm.nv_content_in(tpm.checked(driver.transmit(tpm.nv_read(NV_INDEX, 8))))


def runs(sp: RunningSp, vm_id: uuid.UUID, seen: dict[str, bytes]) -> None:
    """The vTPM answers there, and is what it was."""
    with sp.driver(vm_id) as driver:
        assert seen_of(driver) == seen
        assert tpm.random_in(tpm.checked(driver.transmit(tpm.get_random(16))))


def is_nowhere(sp: RunningSp, vm_id: uuid.UUID) -> bool:
    """Whether a secure processor knows no such VM."""
    return vm_id not in {vm.vm_id for vm in sp.vms()}
