"""A15 for whole state directories: what was altered is named, nothing begins anew, and what was put right works again."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from spvtpm.embedded import VTPM
from spvtpm.processor.daemon import initialise
from spvtpm.wire import messages
from spvtpm.wire.errors import (
    AlreadyExists,
    AlreadyInitialised,
    ChipFileError,
    IntegrityError,
    StorageError,
)
from tests import tpm_commands as tpm
from tests.harness import RunningSp
from tests.papers import put_chip_file

pytestmark = pytest.mark.attack("A15")


def change_records(state: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(state / "nv.db")) as database, database:
        assert database.execute(statement, values).rowcount > 0


def lose_store(state: Path) -> None:
    (state / "nv.db").unlink()


def lose_fuses(state: Path) -> None:
    shutil.rmtree(state / "fuses")


def lose_chip(state: Path) -> None:
    (state / "fuses" / "chip").unlink()


def damage_chip(state: Path) -> None:
    (state / "fuses" / "chip").write_bytes(b"{}")


def show_chip(state: Path) -> None:
    (state / "fuses" / "chip").chmod(0o644)


def take_anothers_chip(state: Path) -> None:
    (state / "fuses" / "chip").unlink()
    put_chip_file(state / "fuses" / "chip")


def lose_counter(state: Path) -> None:
    (state / "fuses" / "counter").unlink()


def damage_counter(state: Path) -> None:
    (state / "fuses" / "counter").write_bytes(b"many")


def lose_root_key(state: Path) -> None:
    (state / "root-key").unlink()


def shorten_root_key(state: Path) -> None:
    (state / "root-key").write_bytes(bytes(31))


def lengthen_root_key(state: Path) -> None:
    (state / "root-key").write_bytes(bytes(33))


def show_root_key(state: Path) -> None:
    (state / "root-key").chmod(0o644)


def take_anothers_root_key(state: Path) -> None:
    VTPM(state.with_name("another")).close()
    shutil.copy(state.with_name("another") / "root-key", state / "root-key")


def take_anothers_store(state: Path) -> None:
    VTPM(state.with_name("another")).close()
    shutil.copy(state.with_name("another") / "nv.db", state / "nv.db")


def alter_vtpm(state: Path) -> None:
    change_records(state, "UPDATE records SET sealed = zeroblob(5000) WHERE name LIKE 'vtpm/%'")


def remove_vtpm(state: Path) -> None:
    change_records(state, "DELETE FROM records WHERE name LIKE 'vtpm/%'")


def add_vtpm(state: Path) -> None:
    change_records(
        state, "INSERT INTO records SELECT name || '0', version, salt, sealed FROM records WHERE name LIKE 'vtpm/%'"
    )


def alter_index(state: Path) -> None:
    change_records(state, "UPDATE records SET sealed = zeroblob(50) WHERE name = 'index/00'")


def everything_in(state: Path) -> dict[str, bytes]:
    return {str(path.relative_to(state)): path.read_bytes() for path in state.rglob("*") if path.is_file()}


def put_right(state: Path, backup: Path) -> None:
    shutil.rmtree(state)
    shutil.copytree(backup, state)


# A secure processor


class StoppedSp:
    """A secure processor that was stopped in order, and the ids of its two VMs.

    Attributes:
        sp: it, to be started again with the same owner and keys.
    """

    def __init__(self, state: Path) -> None:
        with RunningSp(state) as self.sp:
            self.vms = [self.sp.launch(), self.sp.launch()]
            assert self.sp.stop() == 0
        self.state = state

    def refusal(self) -> str:
        """What the daemon says when it does not start."""
        done = subprocess.run(
            [sys.executable, "-m", "spvtpm.cli", "sp", "run", str(self.state)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (4, "")
        assert "Traceback" not in done.stderr
        return done.stderr


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lose_store, "nv.db is missing"),
        (lose_fuses, "fuses"),
        (lose_chip, "fuses/chip"),
        (damage_chip, "fuses"),
        (show_chip, "can be read by others"),
        (take_anothers_chip, "index/root is altered, or belongs to another secure processor"),
        (lose_counter, "fuses/counter"),
        (damage_counter, "fuses/counter holds no number"),
        (take_anothers_store, "index/root is altered, or belongs to another secure processor"),
        (remove_vtpm, "NV record vtpm/"),
        (add_vtpm, "was added to the store from outside"),
        (alter_index, "index/00 is altered"),
    ],
)
def test_a_daemon_refuses_a_damaged_state_by_name_and_leaves_it_as_it_is(
    state_directory: Path, damage: Callable[[Path], None], named: str
) -> None:
    stopped = StoppedSp(state_directory)
    backup = state_directory.with_name("backup")
    shutil.copytree(state_directory, backup)
    damage(state_directory)
    damaged = everything_in(state_directory)

    assert named in stopped.refusal()
    assert named in stopped.refusal()
    assert everything_in(state_directory) == damaged

    put_right(state_directory, backup)
    with RunningSp(state_directory) as sp:
        for vm_id in stopped.vms:
            assert sp.info(messages.StartVm(vm_id=vm_id)).state == "running"


def test_a_removed_security_block_is_missed(state_directory: Path) -> None:
    stopped = StoppedSp(state_directory)
    change_records(state_directory, "DELETE FROM records WHERE name = ?", f"vmsb/{stopped.vms[0]}")
    assert f"NV record vmsb/{stopped.vms[0]} was removed" in stopped.refusal()


@pytest.mark.attack("A10")
def test_a_damaged_security_block_is_named_and_refused_and_its_neighbour_is_not_disturbed(
    state_directory: Path,
) -> None:
    stopped = StoppedSp(state_directory)
    victim, neighbour = stopped.vms
    name = f"vmsb/{victim}"
    with closing(sqlite3.connect(state_directory / "nv.db")) as database:
        kept = database.execute("SELECT version, salt, sealed FROM records WHERE name = ?", (name,)).fetchone()
    # The neighbour's block in its place would hand the VM another vTPM.
    change_records(
        state_directory,
        "UPDATE records SET (version, salt, sealed) = (SELECT version, salt, sealed FROM records WHERE name = ?) "
        "WHERE name = ?",
        f"vmsb/{neighbour}",
        name,
    )
    with stopped.sp as sp:
        sp.start()
        assert f"vmsb/{victim} is version" in sp.log()
        assert (sp.vm(victim).state, sp.vm(victim).vtpm) == ("damaged", None)
        with sp.channel() as channel, pytest.raises(AlreadyExists):
            channel.provision(victim, bytes(32))
        commands = (messages.LaunchVm, messages.StartVm, messages.StopVm, messages.ResetVm, messages.HibernateVm)
        for refused in (*commands, messages.CreateVtpm, messages.ParkVtpm, messages.GetEndorsement):
            with pytest.raises(IntegrityError, match=name):
                sp.call(refused(vm_id=victim))
        with pytest.raises(IntegrityError, match=name):
            sp.destroy(victim)  # nobody can tell whose it is
        sp.info(messages.StartVm(vm_id=neighbour))
        with sp.driver(neighbour) as driver:
            tpm.checked(driver.transmit(tpm.startup()))

        assert sp.stop() == 0
        change_records(
            state_directory, "UPDATE records SET (version, salt, sealed) = (?, ?, ?) WHERE name = ?", *kept, name
        )
        sp.start()
        assert sp.info(messages.StartVm(vm_id=victim)).boots == 2


def test_a_vtpm_whose_record_is_altered_while_it_runs_fails_at_its_next_boot_and_not_its_neighbour(
    sp: RunningSp,
) -> None:
    victim, neighbour = sp.launch(), sp.launch()
    vtpm = sp.vm(victim).vtpm
    assert vtpm is not None
    sp.call(messages.StopVm(vm_id=victim))
    name = f"vtpm/{vtpm.vtpm_id}"
    change_records(sp.state, "UPDATE records SET sealed = ? WHERE name = ?", os.urandom(5000), name)
    for _ in range(2):
        with pytest.raises(IntegrityError, match=name):
            sp.call(messages.StartVm(vm_id=victim))
        assert sp.vm(victim).state == "stopped"
    with sp.driver(neighbour) as driver:
        tpm.checked(driver.transmit(tpm.startup()))


def test_a_state_in_which_nothing_was_initialised_is_refused(state_directory: Path) -> None:
    state_directory.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "spvtpm.cli", "sp", "run", str(state_directory)], capture_output=True, timeout=60
    )
    assert done.returncode == 3
    assert {path.name for path in state_directory.iterdir()} <= {"lock"}


@pytest.mark.attack("A16")
def test_a_state_is_initialised_once(state_directory: Path) -> None:
    chip_file = state_directory.with_name("chip")
    put_chip_file(chip_file)
    initialise(state_directory, chip_file)
    before = everything_in(state_directory)
    put_chip_file(chip_file)
    with pytest.raises(AlreadyInitialised):
        initialise(state_directory, chip_file)
    assert everything_in(state_directory) == before
    assert chip_file.exists()


def test_nothing_is_made_of_what_is_no_chip_file(state_directory: Path) -> None:
    chip_file = state_directory.with_name("chip")
    chip_file.touch(mode=0o600)
    with pytest.raises(ChipFileError):
        initialise(state_directory, chip_file)
    assert not state_directory.exists()


# An embedded vTPM

NV_INDEX = 0x01500021


@pytest.mark.claim("B8")
@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lose_store, IntegrityError),
        (lose_root_key, StorageError),
        (shorten_root_key, IntegrityError),
        (lengthen_root_key, StorageError),
        (show_root_key, StorageError),
        (take_anothers_root_key, IntegrityError),
        (take_anothers_store, IntegrityError),
        (alter_vtpm, IntegrityError),
        (remove_vtpm, IntegrityError),
        (add_vtpm, IntegrityError),
        (alter_index, IntegrityError),
    ],
)
def test_a_damaged_directory_of_an_embedded_vtpm_is_refused_until_it_is_as_it_was(
    state_directory: Path, damage: Callable[[Path], None], error: type[StorageError]
) -> None:
    with VTPM(state_directory) as vtpm:
        tpm.checked(vtpm.transmit(tpm.nv_define(NV_INDEX, 4)))
        tpm.checked(vtpm.transmit(tpm.nv_write(NV_INDEX, b"kept")))
    backup = state_directory.with_name("backup")
    shutil.copytree(state_directory, backup)
    damage(state_directory)
    for _ in range(2):
        with pytest.raises(error):
            VTPM(state_directory)
    put_right(state_directory, backup)
    with VTPM(state_directory) as vtpm:
        assert tpm.nv_content_in(vtpm.transmit(tpm.nv_read(NV_INDEX, 4))) == b"kept"
