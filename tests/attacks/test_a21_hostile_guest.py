"""A21: a hostile guest: malformed commands, floods, key generation in a loop. Its own vTPM errs or slows; others go on."""

from __future__ import annotations

import os
import signal
import threading
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spvtpm.embedded import VTPM
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.wire import messages
from spvtpm.wire.errors import InterfaceError, WrongState
from tests import tpm_commands as tpm
from tests.harness import RunningSp


@pytest.mark.attack("A21")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(min_size=1, max_size=300), code=st.integers(0x11F, 0x197), sessions=st.booleans())
def test_malformed_commands_get_a_tpm_error_and_the_vtpm_goes_on(
    vtpm: VTPM, body: bytes, code: int, sessions: bool
) -> None:
    command = (0x8002 if sessions else 0x8001).to_bytes(2, "big") + (10 + len(body)).to_bytes(4, "big")
    response = vtpm.transmit(command + code.to_bytes(4, "big") + body)

    assert len(response) >= 10
    assert int.from_bytes(response[2:6], "big") == len(response)


@pytest.mark.attack("A21")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(command=st.binary(min_size=1, max_size=4096))
def test_arbitrary_bytes_get_a_tpm_error(vtpm: VTPM, command: bytes) -> None:
    assert tpm.response_code(vtpm.transmit(command)) != tpm.RC_SUCCESS


def _generate_keys(sp: RunningSp, vm_id: uuid.UUID, stop: threading.Event, rounds: list[int]) -> None:
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        while not stop.is_set():
            unique = len(rounds).to_bytes(4, "big")
            response = tpm.checked(driver.transmit(tpm.create_primary(tpm.rsa2048(unique=unique.ljust(256, b"\1")))))
            tpm.checked(driver.transmit(tpm.flush_context(tpm.handle_in(response))))
            rounds.append(1)


@pytest.mark.attack("A21")
def test_guests_that_generate_keys_in_a_loop_do_not_keep_another_guest_from_its_vtpm(sp: RunningSp) -> None:
    stop, rounds = threading.Event(), list[int]()
    hostile = [threading.Thread(target=_generate_keys, args=(sp, sp.launch(), stop, rounds)) for _ in range(3)]
    victim = sp.launch()
    for thread in hostile:
        thread.start()
    try:
        with sp.driver(victim) as driver:
            tpm.checked(driver.transmit(tpm.startup()))
            for _ in range(500):
                tpm.checked(driver.transmit(tpm.get_random(8)))
        assert sp.info(messages.ParkVtpm(vm_id=victim)).vtpm.residency == "parked"  # type: ignore[union-attr]
    finally:
        stop.set()
        for thread in hostile:
            thread.join()
    assert rounds, "the hostile guests got their share too"


@pytest.mark.attack("A21")
def test_a_flood_of_doorbells_keeps_neither_the_vtpm_nor_its_neighbour_from_working(sp: RunningSp) -> None:
    flooded, neighbour = sp.launch(), sp.launch()
    stop = threading.Event()
    with sp.driver(flooded) as driver, sp.driver(neighbour) as other:
        interface = driver.interface
        assert isinstance(interface, InterfaceMemory)

        def flood() -> None:
            while not stop.is_set():
                interface.ring()

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            for one in (driver, other):
                tpm.checked(one.transmit(tpm.startup()))
                for _ in range(100):
                    tpm.checked(one.transmit(tpm.get_random(8)))
        finally:
            stop.set()
            thread.join()


@pytest.mark.attack("A21")
@pytest.mark.attack("A22")
def test_a_dead_worker_is_noticed_reported_and_brought_back_by_a_new_boot_while_others_never_notice(
    sp: RunningSp,
) -> None:
    vm_id = sp.launch()
    neighbour = sp.launch()
    with sp.driver(neighbour) as other, sp.driver(vm_id) as driver:
        tpm.checked(other.transmit(tpm.startup()))
        tpm.checked(driver.transmit(tpm.startup()))
        tpm.checked(driver.transmit(tpm.nv_define(0x01500001, 8)))
        tpm.checked(driver.transmit(tpm.nv_write(0x01500001, b"survives")))
        os.kill(sp.worker_of(driver.interface), signal.SIGKILL)

        with pytest.raises(InterfaceError, match="has failed"):
            driver.transmit(tpm.get_random(8))
        tpm.checked(other.transmit(tpm.get_random(8)))

    failed = sp.vm(vm_id)
    assert (failed.state, failed.vtpm.residency if failed.vtpm else "") == ("failed", "failed")
    with pytest.raises(WrongState):
        sp.call(messages.WakeVtpm(vm_id=vm_id))  # waking inside the boot would be a PCR reset
    sp.info(messages.ResetVm(vm_id=vm_id))
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        assert tpm.nv_content_in(driver.transmit(tpm.nv_read(0x01500001, 8))) == b"survives"
