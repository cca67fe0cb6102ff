"""A15: the whole NV store put back to an older copy of itself. Each record in it is authentic; the chip's counter tells."""

from __future__ import annotations

import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from spvtpm.processor.fuses.file import FileCounter, counter_at
from spvtpm.wire import messages
from spvtpm.wire.owner_messages import DestroyVm, Done
from tests.guests_view import find_traces, leave_traces, stopped_with_traces
from tests.harness import RunningSp

pytestmark = [pytest.mark.attack("A15"), pytest.mark.claim("B3")]


def keep(sp: RunningSp) -> Path:
    """A copy of the store, taken while the SP is down."""
    copy = sp.state.with_name("yesterday")
    copy.mkdir()
    for file in sp.state.glob("nv.db*"):
        shutil.copy(file, copy)
    return copy


def put_back(sp: RunningSp, copy: Path) -> None:
    for file in sp.state.glob("nv.db*"):
        file.unlink()
    for file in copy.iterdir():
        shutil.copy(file, sp.state)


def refusal(state: Path) -> str:
    """What a daemon says that does not start."""
    words = [sys.executable, "-m", "spvtpm.cli", "sp", "run", str(state)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def stopped(sp: RunningSp) -> Iterator[tuple[RunningSp, uuid.UUID]]:
    """An SP that is down, with a VM whose vTPM holds `traces 1`."""
    vm_id, _traces = stopped_with_traces(sp)
    sp.stop()
    yield sp, vm_id


def test_without_the_counter_an_older_copy_is_believed(stopped: tuple[RunningSp, uuid.UUID]) -> None:
    """The attack on the unprotected value: counter and store put back together, which takes writing the fuses."""
    sp, vm_id = stopped
    copy, counter = keep(sp), (sp.state / "fuses" / "counter").read_bytes()
    sp.start()
    sp.info(messages.StartVm(vm_id=vm_id))
    leave_traces(sp, vm_id, b"traces 2")
    sp.stop()
    put_back(sp, copy)
    (sp.state / "fuses" / "counter").write_bytes(counter)
    sp.start()
    sp.info(messages.StartVm(vm_id=vm_id))
    assert find_traces(sp, vm_id, start=True).nv == b"traces 1"


def test_an_older_copy_is_refused_after_an_orderly_stop_and_named(stopped: tuple[RunningSp, uuid.UUID]) -> None:
    sp, vm_id = stopped
    copy = keep(sp)
    sp.start()
    sp.info(messages.StartVm(vm_id=vm_id))
    leave_traces(sp, vm_id, b"traces 2")
    sp.stop()
    newest = sp.state.with_name("newest")
    shutil.copytree(sp.state, newest)
    put_back(sp, copy)
    assert "put back to an older copy" in refusal(sp.state)
    assert "put back to an older copy" in refusal(sp.state), "it is not repaired by trying again"
    put_back(sp, newest_store(newest))
    sp.start()
    sp.info(messages.StartVm(vm_id=vm_id))
    assert find_traces(sp, vm_id, start=True).nv == b"traces 2"


def newest_store(state: Path) -> Path:
    for path in list(state.iterdir()):
        if not path.name.startswith("nv.db"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return state


def test_a_vtpm_that_was_destroyed_or_exported_does_not_come_back_with_an_older_copy_even_after_a_power_cut(
    stopped: tuple[RunningSp, uuid.UUID],
) -> None:
    sp, vm_id = stopped
    sp.start()
    sp.kill()
    copy = keep(sp)  # of the same start's predecessor: nothing happened since but the kill
    sp.start()
    with sp.channel() as channel:
        channel.ask(DestroyVm(vm_id=vm_id), Done)
    sp.kill()
    put_back(sp, copy)
    assert "put back to an older copy" in refusal(sp.state)


def test_a_milestone_is_acknowledged_only_once_an_older_copy_is_refused(sp: RunningSp) -> None:
    """The copy is taken from the running SP right before the milestone, and put back right after its acknowledgement."""
    vm_id, _traces = stopped_with_traces(sp)
    copy = keep(sp)
    with sp.channel() as channel:
        channel.export(vm_id)
    sp.kill()
    put_back(sp, copy)
    assert "put back to an older copy" in refusal(sp.state)


def test_a_hibernated_state_is_good_for_one_resumption_whatever_copy_is_put_back(sp: RunningSp) -> None:
    vm_id = sp.launch()
    leave_traces(sp, vm_id, b"asleep !")
    sp.info(messages.HibernateVm(vm_id=vm_id))
    copy = keep(sp)
    sp.info(messages.StartVm(vm_id=vm_id))
    sp.kill()
    put_back(sp, copy)
    assert "put back to an older copy" in refusal(sp.state)


@pytest.mark.parametrize("ahead", [2, 1000])
def test_a_counter_that_was_set_back_is_refused(stopped: tuple[RunningSp, uuid.UUID], ahead: int) -> None:
    sp, _vm_id = stopped
    counter = sp.state / "fuses" / "counter"
    counter.write_bytes(counter_at(max(0, FileCounter(counter).read() - ahead)))
    assert "counter was set back" in refusal(sp.state)


@pytest.mark.attack("A16")
def test_a_crash_between_store_and_counter_is_made_good(stopped: tuple[RunningSp, uuid.UUID]) -> None:
    sp, vm_id = stopped
    counter = sp.state / "fuses" / "counter"
    counter.write_bytes(counter_at(FileCounter(counter).read() - 1))
    sp.start()
    sp.info(messages.StartVm(vm_id=vm_id))
    assert find_traces(sp, vm_id, start=True).nv == b"traces 1"
