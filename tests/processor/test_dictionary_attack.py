"""A VM that dies or is reset without TPM2_Shutdown does not run its vTPM into dictionary-attack lockout."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest

from spvtpm.wire import messages
from tests import tpm_commands as tpm
from tests.harness import RunningSp

_TPM_CAP_TPM_PROPERTIES = 6
_TPM_PT_LOCKOUT_COUNTER = 0x20E
"""Source: TCG TPM 2.0 Library Part 2, table TPM_PT."""

_TPM_RC_RETRY = 0x922

BOOTS = 40
"""More than the tries that libtpms allows before lockout, 32 at most."""


def failed_tries(sp: RunningSp, vm_id: uuid.UUID) -> int:
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        return tpm.property_in(driver.transmit(tpm.get_capability(_TPM_CAP_TPM_PROPERTIES, _TPM_PT_LOCKOUT_COUNTER)))


def use_something_protected(sp: RunningSp, vm_id: uuid.UUID) -> None:
    """Authorises with an object under dictionary-attack protection: then a boot without an orderly end counts as a failed try.

    Source: TCG TPM 2.0 Library Part 1, "Dictionary Attack Protection", "Non-orderly Shutdown".
    """
    with sp.driver(vm_id) as driver:
        made = driver.transmit(tpm.create_primary(tpm.ecc_p256(tpm.SIGNING_KEY & ~0x400), key_auth=b"word"))
        sign = tpm.sign(tpm.handle_in(made), bytes(32), key_auth=b"word")
        response = driver.transmit(sign)
        while tpm.response_code(response) == _TPM_RC_RETRY:  # it notes in NV first that protection is in use
            response = driver.transmit(sign)
        tpm.checked(response)


def reset(sp: RunningSp, vm_id: uuid.UUID) -> None:
    sp.info(messages.ResetVm(vm_id=vm_id))


def stop_and_start(sp: RunningSp, vm_id: uuid.UUID) -> None:
    sp.info(messages.StopVm(vm_id=vm_id))
    sp.info(messages.StartVm(vm_id=vm_id))


def park_then_reset(sp: RunningSp, vm_id: uuid.UUID) -> None:
    sp.info(messages.ParkVtpm(vm_id=vm_id))
    sp.info(messages.ResetVm(vm_id=vm_id))


def stop_the_sp(sp: RunningSp, vm_id: uuid.UUID) -> None:
    sp.stop()
    sp.start()
    sp.info(messages.StartVm(vm_id=vm_id))


@pytest.mark.parametrize(
    ("end", "boots"), [(reset, BOOTS), (stop_and_start, 5), (park_then_reset, 5), (stop_the_sp, 2)]
)
def test_the_secure_processor_sends_the_orderly_shutdown_that_the_guest_did_not(
    sp: RunningSp, end: Callable[[RunningSp, uuid.UUID], None], boots: int
) -> None:
    vm_id = sp.launch()
    for _ in range(boots):
        assert failed_tries(sp, vm_id) == 0
        use_something_protected(sp, vm_id)
        end(sp, vm_id)
    assert failed_tries(sp, vm_id) == 0


def test_a_power_cut_of_the_host_does_count(sp: RunningSp) -> None:
    """The test can fail: nobody can send an orderly shutdown when the power goes."""
    vm_id = sp.launch()
    assert failed_tries(sp, vm_id) == 0
    use_something_protected(sp, vm_id)
    sp.kill()
    sp.start()
    sp.info(messages.StartVm(vm_id=vm_id))
    assert failed_tries(sp, vm_id) == 1
