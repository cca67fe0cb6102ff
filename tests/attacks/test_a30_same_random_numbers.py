"""A30: two copies of one hibernated vTPM, made to draw the same random numbers: keys and nonces of one are those of the other."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

import pytest

from spvtpm.engine.libtpms import Engine
from spvtpm.processor.worker.messages import Endorse, Endorsed, PacketPort, Start
from spvtpm.processor.worker.packing import pack_volatile
from spvtpm.processor.worker.tpm import WorkerTpm
from spvtpm.wire import messages
from tests import tpm_commands as tpm
from tests.harness import RunningSp
from tests.throwaway import in_throwaway_process, run_in_child

pytestmark = pytest.mark.attack("A30")

State = tuple[bytes, bytes]


def hibernated(*, started: bool = True) -> State:
    """The states of a TPM that sleeps."""
    with Engine(lambda _permanent: None) as engine:
        engine.manufacture()
        if started:
            tpm.checked(engine.process(tpm.startup()))
        return engine.permanent_state(), engine.volatile_state()


def draw_by_engine(state: State, *, cold: bool = False) -> bytes:
    """What a TPM draws that nobody protects."""
    with Engine(lambda _permanent: None) as engine:
        engine.resume(state[0], None if cold else state[1])
        if cold:
            tpm.checked(engine.process(tpm.startup()))
        return tpm.random_in(engine.process(tpm.get_random(32)))


def draw_by_worker(state: State, *, reseed: bool, starts: bool = False) -> bytes:
    """What the TPM of a worker draws first."""

    def no_new_tpm(_request: Endorse) -> Endorsed:
        raise AssertionError

    worker = WorkerTpm(lambda _permanent, meanwhile: meanwhile(), no_new_tpm)
    worker.start(Start(PacketPort(), state[0], pack_volatile(state[1]), reseed=reseed), lambda: None)
    if starts:
        tpm.checked(worker.execute(tpm.startup()))
    number = tpm.random_in(worker.execute(tpm.get_random(32)))
    worker.close()
    return number


@in_throwaway_process
def test_two_copies_of_one_volatile_state_do_draw_the_same_numbers() -> None:
    state = hibernated()
    assert run_in_child(lambda: draw_by_engine(state)) == run_in_child(lambda: draw_by_engine(state))
    draws = [run_in_child(lambda: draw_by_worker(state, reseed=False)) for _ in range(2)]
    assert draws[0] == draws[1], "as a parked vTPM does, of which there is one copy"


@in_throwaway_process
def test_a_worker_that_is_told_of_copies_draws_other_numbers() -> None:
    state = hibernated()
    draws = {run_in_child(lambda: draw_by_worker(state, reseed=True)) for _ in range(4)}
    assert len(draws | {run_in_child(lambda: draw_by_engine(state))}) == 5


@in_throwaway_process
def test_a_copy_that_was_not_started_yet_takes_new_randomness_when_it_is() -> None:
    state = hibernated(started=False)
    assert len({run_in_child(lambda: draw_by_worker(state, reseed=True, starts=True)) for _ in range(4)}) == 4


@in_throwaway_process
def test_a_cold_start_takes_new_randomness_by_itself() -> None:
    """So a vTPM that was shut down needs no more than its TPM2_Startup."""
    state = hibernated()
    assert len({run_in_child(lambda: draw_by_engine(state, cold=True)) for _ in range(4)}) == 4


@pytest.mark.parametrize("is_started", [True, False], ids=["started", "not started"])
def test_the_original_and_an_imported_copy_draw_different_numbers(sp: RunningSp, is_started: bool) -> None:
    """The owner exports, does not acknowledge, goes on here, and imports the file into another chip of the fleet."""

    def draw(at: RunningSp, vm_id: uuid.UUID) -> bytes:
        with at.driver(vm_id) as driver:
            if not is_started:
                tpm.checked(driver.transmit(tpm.startup()))
            return tpm.random_in(driver.transmit(tpm.get_random(32)))

    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        if is_started:
            tpm.checked(driver.transmit(tpm.startup()))
    sp.info(messages.HibernateVm(vm_id=vm_id))
    with sp.channel() as channel:
        _begins, file = channel.take_export(vm_id)
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path, RunningSp(Path(path) / "sp") as other:
        with other.channel(sp.owner) as channel:
            channel.bring(vm_id, other.key(vm_id), file)
        sp.info(messages.StartVm(vm_id=vm_id))
        other.info(messages.LaunchVm(vm_id=vm_id))
        assert draw(sp, vm_id) != draw(other, vm_id)
