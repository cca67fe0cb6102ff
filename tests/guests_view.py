"""A guest that leaves traces in its vTPM, and looks for them later."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from spvtpm.wire import messages
from tests import tpm_commands as tpm
from tests.harness import RunningSp

NV_INDEX = 0x0150001A
NV_BYTES = 8
PCR = 16  # one that starts as zeros


@dataclass(frozen=True)
class Traces:
    """What a guest sees.

    Attributes:
        nv: content of its NV index.
        pcr: SHA-256 PCR 16.
        identity: a public key that follows from the endorsement seed.
    """

    nv: bytes
    pcr: bytes
    identity: bytes


def leave_traces(sp: RunningSp, vm_id: uuid.UUID, nv: bytes, *, start: bool = True) -> Traces:
    """The running VM's guest writes 8 bytes to NV and extends a PCR."""
    with sp.driver(vm_id) as driver:
        if start:
            tpm.checked(driver.transmit(tpm.startup()))
        if tpm.response_code(driver.transmit(tpm.nv_read(NV_INDEX, NV_BYTES))):
            tpm.checked(driver.transmit(tpm.nv_define(NV_INDEX, NV_BYTES)))
        tpm.checked(driver.transmit(tpm.nv_write(NV_INDEX, nv)))
        tpm.checked(driver.transmit(tpm.pcr_extend(PCR, nv.ljust(32, b"\0"))))
    return find_traces(sp, vm_id, start=False)


def find_traces(sp: RunningSp, vm_id: uuid.UUID, *, start: bool) -> Traces:
    """What the running VM's guest finds.

    Args:
        sp: where it runs.
        vm_id: the VM.
        start: whether the TPM needs TPM2_Startup; one that goes on where it was does not.
    """
    with sp.driver(vm_id) as driver:
        if start:
            tpm.checked(driver.transmit(tpm.startup()))
        nv = tpm.nv_content_in(driver.transmit(tpm.nv_read(NV_INDEX, NV_BYTES)))
        pcr = tpm.pcr_in(driver.transmit(tpm.pcr_read(PCR)))
        made = driver.transmit(tpm.create_primary(tpm.ecc_p256(), tpm.ENDORSEMENT))
        identity = tpm.public_in(made)
        tpm.checked(driver.transmit(tpm.flush_context(tpm.handle_in(made))))
    return Traces(nv, pcr, identity)


def stopped_with_traces(sp: RunningSp, nv: bytes = b"traces 1") -> tuple[uuid.UUID, Traces]:
    """A new VM that ran, left traces, and is stopped."""
    vm_id = sp.launch()
    traces = leave_traces(sp, vm_id, nv)
    sp.info(messages.StopVm(vm_id=vm_id))
    return vm_id, traces


def hibernated_with_traces(sp: RunningSp, nv: bytes = b"traces 1") -> tuple[uuid.UUID, Traces]:
    """A new VM that ran, left traces, and is hibernated."""
    vm_id = sp.launch()
    traces = leave_traces(sp, vm_id, nv)
    sp.info(messages.HibernateVm(vm_id=vm_id))
    return vm_id, traces
