"""A29: a hostile or damaged state blob reaches libtpms, which checks little itself."""

from __future__ import annotations

import sqlite3
import uuid
from contextlib import closing

import pytest

from spvtpm.engine.libtpms import Engine
from spvtpm.wire import messages
from spvtpm.wire.errors import IntegrityError
from tests import tpm_commands as tpm
from tests.harness import RunningSp
from tests.hostile_state import Verdict, bare_verdicts, flip_bit, sampled_bits
from tests.throwaway import run_in_child

NV_INDEX = 0x01500029
GOLDEN_MEASUREMENT = bytes(range(0xA0, 0xC0))


def state_of_a_used_tpm() -> bytes:
    def use() -> bytes:
        with Engine(lambda _permanent: None) as engine:
            engine.manufacture()
            tpm.checked(engine.process(tpm.startup()))
            tpm.checked(engine.process(tpm.nv_define(NV_INDEX, len(GOLDEN_MEASUREMENT))))
            tpm.checked(engine.process(tpm.nv_write(NV_INDEX, GOLDEN_MEASUREMENT)))
            return engine.permanent_state()

    return run_in_child(use)


@pytest.mark.attack("A29")
def test_bare_libtpms_accepts_a_good_share_of_flipped_bits() -> None:
    permanent = state_of_a_used_tpm()

    verdicts = bare_verdicts(permanent, sampled_bits(permanent, 200))

    assert verdicts[Verdict.ACCEPTED] > verdicts.total() / 3, verdicts  # measured: a half to two thirds


@pytest.mark.attack("A29")
def test_bare_libtpms_serves_altered_nv_content_as_the_truth() -> None:
    permanent = state_of_a_used_tpm()
    assert permanent.count(GOLDEN_MEASUREMENT) == 1
    altered = flip_bit(permanent, permanent.index(GOLDEN_MEASUREMENT) * 8)

    def read() -> bytes:
        with Engine(lambda _permanent: None) as engine:
            engine.resume(altered)
            tpm.checked(engine.process(tpm.startup()))
            return tpm.nv_content_in(engine.process(tpm.nv_read(NV_INDEX, len(GOLDEN_MEASUREMENT))))

    assert run_in_child(read) == flip_bit(GOLDEN_MEASUREMENT, 0)


def _sealed_rows(sp: RunningSp) -> list[tuple[str, bytes]]:
    with closing(sqlite3.connect(sp.state / "nv.db")) as database:
        return database.execute("SELECT name, sealed FROM records WHERE name LIKE 'vtpm/%'").fetchall()


def _write_row(sp: RunningSp, name: str, sealed: bytes) -> None:
    with closing(sqlite3.connect(sp.state / "nv.db")) as database, database:
        database.execute("UPDATE records SET sealed = ? WHERE name = ?", (sealed, name))


def _used_vm(sp: RunningSp) -> uuid.UUID:
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        tpm.checked(driver.transmit(tpm.nv_define(NV_INDEX, len(GOLDEN_MEASUREMENT))))
        tpm.checked(driver.transmit(tpm.nv_write(NV_INDEX, GOLDEN_MEASUREMENT)))
    sp.info(messages.StopVm(vm_id=vm_id))
    return vm_id


@pytest.mark.attack("A29")
def test_the_sp_refuses_every_flipped_bit_before_libtpms_sees_it(sp: RunningSp) -> None:
    vm_id = _used_vm(sp)
    ((name, sealed),) = _sealed_rows(sp)

    for bit in sampled_bits(sealed, 60):
        _write_row(sp, name, flip_bit(sealed, bit))
        with pytest.raises(IntegrityError, match=name):
            sp.call(messages.StartVm(vm_id=vm_id))
        assert sp.vm(vm_id).state == "stopped"

    _write_row(sp, name, sealed)
    sp.info(messages.StartVm(vm_id=vm_id))
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        content = driver.transmit(tpm.nv_read(NV_INDEX, len(GOLDEN_MEASUREMENT)))
    assert tpm.nv_content_in(content) == GOLDEN_MEASUREMENT


@pytest.mark.attack("A29")
@pytest.mark.attack("A10")
def test_the_sp_refuses_another_vtpms_state_in_its_place_and_serves_the_others(sp: RunningSp) -> None:
    first, second = _used_vm(sp), _used_vm(sp)
    (one, sealed_one), (two, sealed_two) = _sealed_rows(sp)
    _write_row(sp, one, sealed_two)
    _write_row(sp, two, sealed_one)
    for vm_id in (first, second):
        with pytest.raises(IntegrityError, match="vtpm/"):
            sp.call(messages.StartVm(vm_id=vm_id))

    _write_row(sp, one, sealed_one)
    _write_row(sp, two, sealed_two)
    neighbour = sp.launch()
    _write_row(sp, one, sealed_two)
    with sp.driver(neighbour) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
