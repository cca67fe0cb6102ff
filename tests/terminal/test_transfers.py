"""Exports and imports between real chips: in order, cut off at every frame, and with a terminal that dies at every step."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from msgspec.structs import replace

from spvtpm.terminal.exports import export_vtpm
from spvtpm.terminal.imports import import_vtpm
from spvtpm.terminal.keyring import Keyring
from spvtpm.terminal.whereabouts import AtChip, Destroyed, Exporting, Importing, InFile
from spvtpm.wire import messages
from spvtpm.wire.errors import (
    AlreadyExists,
    ChannelError,
    ChipNotAllowed,
    InstanceDamaged,
    KeyringError,
    NotFound,
    SpvtpmError,
    StaleInstance,
    StorageError,
    UsageError,
    WrongInstanceKeys,
    WrongState,
)
from spvtpm.wire.instance_file import MAX_FILE_BYTES, parse_instance_header
from tests.relay import Cut, Hook, Relay, Side, honest
from tests.terminal.estate import VM_KEY, Estate, new_keyring

SIGKILLED = -9


def cut_at(side: Side, number: int) -> Hook:
    """Ends the connection instead of handing on the n-th frame of one side."""

    def hook(sender: Side, count: int, frame: bytes) -> list[bytes]:
        if (sender, count) == (side, number):
            raise Cut
        return [frame]

    return hook


# In order


@pytest.mark.claim("C6b")
@pytest.mark.claim("C6a")
def test_a_vtpm_goes_from_one_chip_into_a_file_and_on_to_another(estate: Estate) -> None:
    vm_id = estate.stopped_vm()
    vtpm_id, seen = estate.vtpm_of(vm_id), []
    done = export_vtpm(estate.desk(), vm_id, estate.directory / "tour", lambda *so_far: seen.append(so_far))

    size = (estate.directory / "tour").stat().st_size
    assert seen[-1] == (size, size)
    assert not done.resumed
    assert estate.place(vtpm_id) == done.file == InFile(1, estate.sha256("tour"), str(estate.directory / "tour"))
    assert (estate.directory / "tour").stat().st_mode & 0o777 == 0o600
    assert estate.desk().fate(vtpm_id).state == "exported"
    assert vm_id not in {vm.vm_id for vm in estate.desk().list_mine()}

    made = estate.bring(vm_id, "tour", chip=1)
    assert (made.vtpm_id, made.label, made.version) == (vtpm_id, "mine", 1)
    assert isinstance(estate.place(vtpm_id), AtChip)
    estate.run_and_stop(vm_id, 1, messages.LaunchVm(vm_id=vm_id))
    again = estate.export(vm_id, "tour again", chip=1)
    assert again.file.version == 2
    assert again.known.label == "mine"


def test_an_output_that_exists_or_cannot_be_is_refused_before_anything_is_asked(estate: Estate) -> None:
    vm_id = estate.stopped_vm()
    (estate.directory / "mine").write_bytes(b"mine")
    (estate.directory / "link").symlink_to("nowhere")
    for name in ("mine", "link"):
        with pytest.raises(AlreadyExists):
            estate.export(vm_id, name)
    with pytest.raises(StorageError):
        estate.export(vm_id, "none/file")
    assert (estate.directory / "mine").read_bytes() == b"mine"
    assert estate.export(vm_id, "afterwards").file.version == 1  # no version was used up


def test_a_path_that_the_keyring_could_not_remember_is_refused_before_anything_is_asked(estate: Estate) -> None:
    vm_id = estate.stopped_vm()
    with pytest.raises(UsageError, match="no UTF-8"):
        estate.export(vm_id, "\udcff")
    assert estate.export(vm_id, "in-utf-8").file.version == 1  # no version was used up


def test_a_vm_that_runs_is_not_exported(estate: Estate) -> None:
    vm_id = estate.stopped_vm()
    estate.sps[0].info(messages.StartVm(vm_id=vm_id))
    with pytest.raises(WrongState):
        estate.export(vm_id, "running")
    assert not (estate.directory / "running").exists()


@pytest.mark.claim("C4")
def test_a_file_sealed_under_an_older_secret_still_opens(estate: Estate) -> None:
    vm_id = estate.stopped_vm()
    estate.export(vm_id, "older secret")
    for _ in range(2):
        estate.keyring.add_user_secret()
    assert estate.bring(vm_id, "older secret").vm_id == vm_id


@pytest.mark.claim("C4")
def test_a_rotated_secret_is_what_the_next_file_is_sealed_under(estate: Estate, tmp_path: Path) -> None:
    vm_id = estate.stopped_vm()
    (before, *_), count = estate.keyring.content.user_secrets, estate.desk().rotate()
    assert (count >= 1, estate.keyring.content.user_secrets[1]) == (True, before)
    assert estate.desk().rotate(same=True) == count
    vtpm_id = estate.export(vm_id, "new secret").known.vtpm_id
    content = estate.keyring.content
    estate.keyring.update(lambda old: replace(old, user_secrets=old.user_secrets[1:]))
    try:
        with pytest.raises(WrongInstanceKeys):
            estate.bring(vm_id, "new secret")
        assert isinstance(estate.place(vtpm_id), InFile)
    finally:
        estate.keyring.update(lambda old: replace(old, user_secrets=content.user_secrets))
    estate.bring(vm_id, "new secret")


# What is refused


@pytest.mark.attack("A08")
@pytest.mark.claim("B3")
def test_an_older_file_is_refused_by_the_terminal_where_the_chip_would_take_it(estate: Estate) -> None:
    vm_id = estate.stopped_vm()
    estate.export(vm_id, "old")
    estate.bring(vm_id, "old", chip=1)
    estate.run_and_stop(vm_id, 1, messages.LaunchVm(vm_id=vm_id))
    vtpm_id = estate.export(vm_id, "new", chip=1).known.vtpm_id

    with pytest.raises(StaleInstance, match="expected was 2 or newer"):
        estate.bring(vm_id, "old")
    forgetful = forgetting(estate, vtpm_id)
    assert import_vtpm(forgetful.desk(), vm_id, VM_KEY, estate.directory / "old").version == 1  # the attack works
    forgetful.desk().destroy(vm_id)
    estate.bring(vm_id, "new", chip=1)


def forgetting(estate: Estate, vtpm_id: uuid.UUID) -> Estate:
    """The same owner with another keyring, which remembers nothing of this vTPM."""
    other = object.__new__(Estate)
    other.__dict__.update(estate.__dict__)
    other.keyring = Keyring.create(estate.directory / f"copy {uuid.uuid4()}")
    content = estate.keyring.content
    other.keyring.update(lambda _new: content)
    other.keyring.put_revocation_list(estate.keyring.revocation_lists()[0].encode())
    other.keyring.forget(vtpm_id)
    return other


@pytest.mark.attack("A09")
def test_a_file_is_not_imported_twice_nor_while_its_vtpm_lives(estate: Estate) -> None:
    vm_id = estate.stopped_vm()
    vtpm_id = estate.export(vm_id, "once").known.vtpm_id
    estate.bring(vm_id, "once")
    for chip in (0, 1):
        with pytest.raises(StaleInstance, match="lives at the chip"):
            estate.bring(uuid.uuid4(), "once", chip)
    assert isinstance(estate.place(vtpm_id), AtChip)
    estate.desk().destroy(vm_id)
    assert estate.place(vtpm_id) == Destroyed()
    with pytest.raises(StaleInstance, match="was destroyed"):
        estate.bring(vm_id, "once", 1)


def test_a_damaged_file_is_refused_and_the_good_one_is_still_welcome(estate: Estate) -> None:
    vm_id = estate.stopped_vm()
    vtpm_id = estate.export(vm_id, "good").known.vtpm_id
    good = (estate.directory / "good").read_bytes()
    (estate.directory / "bad").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))

    with pytest.raises(StaleInstance, match="is not the file that was exported"):
        estate.bring(vm_id, "bad")
    forgetful = forgetting(estate, vtpm_id)
    with pytest.raises(InstanceDamaged):
        import_vtpm(forgetful.desk(), vm_id, VM_KEY, estate.directory / "bad")
    assert forgetful.place(vtpm_id) == InFile(1, estate.sha256("good"), "")  # as the chip remembers
    estate.bring(vm_id, "good")


def test_a_forged_header_poisons_nothing(estate: Estate) -> None:
    vm_id = estate.stopped_vm()
    vtpm_id = estate.export(vm_id, "genuine").known.vtpm_id
    forged = bytearray((estate.directory / "genuine").read_bytes())
    version = forged.index((1).to_bytes(8, "big"), 60)
    forged[version] = 0x40
    assert parse_instance_header(bytes(forged)).version > 1 << 60
    (estate.directory / "forged").write_bytes(forged)

    with pytest.raises(SpvtpmError):
        estate.bring(vm_id, "forged")
    assert estate.known(vtpm_id).newest == 1
    estate.bring(vm_id, "genuine")


def test_a_file_that_is_none(estate: Estate) -> None:
    (estate.directory / "long").write_bytes(bytes(MAX_FILE_BYTES + 1))
    for name in ("none", "long"):
        with pytest.raises(StorageError):
            estate.bring(uuid.uuid4(), name)


def test_the_second_channel_of_an_import_leads_to_the_same_chip(estate: Estate, tmp_path: Path) -> None:
    vm_id = estate.stopped_vm()
    vtpm_id = estate.export(vm_id, "two chips").known.vtpm_id
    with Relay(tmp_path / "relay", estate.channel(0)) as relay:

        def swap(side: Side, number: int, frame: bytes) -> list[bytes]:
            if (side, number) == ("sp", 1):
                relay.target = estate.channel(1)
            return [frame]

        relay.hook = swap
        with pytest.raises(ChipNotAllowed):
            estate.bring(vm_id, "two chips", channel=relay.path)
    place = estate.place(vtpm_id)
    assert isinstance(place, Importing)
    with pytest.raises(StaleInstance, match="ask there first"):
        estate.bring(vm_id, "two chips", chip=1)
    estate.bring(vm_id, "two chips")


# Broken off


@pytest.mark.attack("A02")
@pytest.mark.attack("A16")
def test_an_export_cut_off_at_any_frame_is_finished_by_the_same_export(estate: Estate, tmp_path: Path) -> None:
    with Relay(tmp_path / "relay", estate.channel()) as relay:
        sides: tuple[Side, ...] = ("owner", "sp")
        for side in sides:
            for number in range(100):
                vm_id, name = estate.stopped_vm(), f"cut {side} {number}"
                vtpm_id = estate.vtpm_of(vm_id)
                relay.hook = cut_at(side, number)
                try:
                    estate.export(vm_id, name, channel=relay.path)
                    break
                except ChannelError:
                    pass
                place = estate.place(vtpm_id)
                assert (estate.desk().fate(vtpm_id).state == "here") == (not isinstance(estate.place(vtpm_id), InFile))
                relay.hook = honest
                done = estate.export(vm_id, name, channel=relay.path)
                assert done.file.sha256 == estate.sha256(name), (side, number, place)
                assert estate.desk().fate(vtpm_id).sha256 == estate.sha256(name)
                assert estate.bring(vm_id, name).vtpm_id == vtpm_id
            assert number > 5


@pytest.mark.attack("A02")
@pytest.mark.attack("A16")
def test_an_import_cut_off_at_any_frame_is_finished_by_the_same_import(estate: Estate, tmp_path: Path) -> None:
    with Relay(tmp_path / "relay", estate.channel(1)) as relay:
        sides: tuple[Side, ...] = ("owner", "sp")
        for side in sides:
            for number in range(100):
                vm_id, name = estate.stopped_vm(), f"import cut {side} {number}"
                vtpm_id = estate.export(vm_id, name).known.vtpm_id
                relay.hook = cut_at(side, number)
                try:
                    estate.bring(vm_id, name, channel=relay.path)
                    break
                except ChannelError:
                    pass
                if isinstance(estate.place(vtpm_id), Importing):
                    with pytest.raises(StaleInstance):
                        estate.bring(vm_id, name, 0)
                relay.hook = honest
                assert estate.bring(vm_id, name, channel=relay.path).vtpm_id == vtpm_id
                assert isinstance(estate.place(vtpm_id), AtChip)
                assert estate.desk(1).fate(vtpm_id).state == "here"
            assert number > 3


def run_and_die(step: int, estate: Estate, *words: str | Path) -> subprocess.CompletedProcess[bytes]:
    own = ("--keyring", estate.keyring.directory)
    command = [sys.executable, "-m", "tests.terminal.dying", str(step), "terminal", *words, *own]
    root = Path(__file__).parent.parent.parent
    return subprocess.run([str(word) for word in command], cwd=root, capture_output=True, timeout=60)


@pytest.mark.attack("A16")
def test_a_terminal_that_dies_at_any_step_of_an_export_leaves_one_life(estate: Estate) -> None:
    for step in range(1, 100):
        vm_id, name = estate.stopped_vm(), f"dying export {step}"
        vtpm_id, output = estate.vtpm_of(vm_id), estate.directory / f"dying export {step}"
        words = ("export", str(vm_id), output, "--channel", estate.sps[0].state)
        died = run_and_die(step, estate, *words)
        state = fate_of_without_remembering(estate, vtpm_id)
        place = estate.place(vtpm_id)
        assert state in ("here", "exported")
        if state == "exported":  # then the file is there, whole, and the keyring knows it
            assert isinstance(place, (Exporting, InFile))
            assert place.sha256 == estate.sha256(name)
        else:
            assert not isinstance(place, InFile)
        if died.returncode == 0:
            break
        assert died.returncode == SIGKILLED, died.stderr
        done = estate.export(vm_id, name)
        assert done.resumed == (state == "exported")
        assert estate.bring(vm_id, name, 1).vtpm_id == vtpm_id
    assert step > 12


@pytest.mark.attack("A16")
def test_a_terminal_that_dies_at_any_step_of_an_import_leaves_one_life(estate: Estate, tmp_path: Path) -> None:
    key = tmp_path / "vm.key"
    key.touch(mode=0o600)
    key.write_bytes(VM_KEY)
    for step in range(1, 100):
        vm_id, name = estate.stopped_vm(), f"dying import {step}"
        vtpm_id = estate.export(vm_id, name).known.vtpm_id
        words = ("provision", str(vm_id), "--import", estate.directory / name, "--vm-key", key)
        died = run_and_die(step, estate, *words, "--channel", estate.sps[1].state)
        state = fate_of_without_remembering(estate, vtpm_id, 1)
        assert state in ("here", "unknown")
        if state == "here":
            assert isinstance(estate.place(vtpm_id), (Importing, AtChip))
        if not isinstance(estate.place(vtpm_id), InFile):
            with pytest.raises(StaleInstance):
                estate.bring(vm_id, name, 0)
        if died.returncode == 0:
            break
        assert died.returncode == SIGKILLED, died.stderr
        assert estate.bring(vm_id, name, 1).vtpm_id == vtpm_id
        assert isinstance(estate.place(vtpm_id), AtChip)
    assert step > 8


def fate_of_without_remembering(estate: Estate, vtpm_id: uuid.UUID, chip: int = 0) -> str:
    with estate.desk(chip).connect() as session:
        return session.ask_fate(vtpm_id).state


@pytest.mark.attack("A16")
@pytest.mark.claim("C6c")
def test_after_a_power_cut_the_owner_exports_and_imports_elsewhere(estate: Estate) -> None:
    vm_id = estate.stopped_vm()
    estate.sps[0].info(messages.StartVm(vm_id=vm_id))
    estate.sps[0].kill()
    estate.sps[0].start()
    vtpm_id = estate.export(vm_id, "recovered").known.vtpm_id
    assert estate.bring(vm_id, "recovered", 1).vtpm_id == vtpm_id


def test_an_export_whose_file_was_lost_after_the_acknowledgement_says_so(estate: Estate) -> None:
    vm_id = estate.stopped_vm()
    done = estate.export(vm_id, "lost")
    with estate.desk().connect() as session:
        chip_id = session.verified.chip_id
    place = Exporting(chip_id, 1, done.file.sha256, done.file.path)
    estate.keyring.remember(replace(done.known, place=place))
    (estate.directory / "lost").unlink()
    with pytest.raises(KeyringError, match="nothing else is left"):
        estate.export(vm_id, "lost")


def test_an_export_that_is_begun_again_elsewhere_takes_the_void_file_away(estate: Estate, tmp_path: Path) -> None:
    vm_id = estate.stopped_vm()
    cut = cut_acknowledgement(estate, vm_id)
    with Relay(tmp_path / "relay", estate.channel(), cut) as relay, pytest.raises(ChannelError):
        estate.export(vm_id, "void", channel=relay.path)
    assert (estate.directory / "void").exists()
    assert estate.export(vm_id, "other").file.version == 2
    assert not (estate.directory / "void").exists()


def cut_acknowledgement(estate: Estate, vm_id: uuid.UUID) -> Hook:
    """What the owner says goes through until he has the file."""

    def hook(side: Side, _number: int, frame: bytes) -> list[bytes]:
        places = [known.place for known in estate.keyring.content.vtpms if known.vm_id == vm_id]
        if side == "owner" and any(isinstance(place, Exporting) for place in places):
            raise Cut
        return [frame]

    return hook


def test_an_export_is_finished_at_the_chip_where_it_was_begun(estate: Estate, tmp_path: Path) -> None:
    vm_id = estate.stopped_vm()
    cut = cut_acknowledgement(estate, vm_id)
    with Relay(tmp_path / "relay", estate.channel(), cut) as relay, pytest.raises(ChannelError):
        estate.export(vm_id, "where", channel=relay.path)
    with pytest.raises(NotFound, match="does not have the vTPM"):
        estate.export(vm_id, "where", chip=1)
    assert estate.export(vm_id, "where").file.version == 2


@pytest.mark.attack("A15")
def test_a_chip_put_back_to_an_older_state_is_noticed_by_its_versions(estate: Estate) -> None:
    vm_id = estate.stopped_vm()
    vtpm_id = estate.vtpm_of(vm_id)
    estate.desk().list_mine()
    known = estate.known(vtpm_id)
    estate.keyring.remember(replace(known, newest=9))
    with pytest.raises(StaleInstance, match="put back to an older state"):
        estate.export(vm_id, "put back")
    assert not (estate.directory / "put back").exists()
    assert estate.desk().fate(vtpm_id).state == "here"


def test_a_keyring_of_another_owner_sees_nothing_of_it(estate: Estate, tmp_path: Path) -> None:
    vm_id = estate.stopped_vm()
    vtpm_id = estate.vtpm_of(vm_id)
    stranger = object.__new__(Estate)
    stranger.__dict__.update(estate.__dict__)
    stranger.keyring = new_keyring(tmp_path / "stranger")
    assert stranger.desk().fate(vtpm_id).state == "unknown"
    assert not stranger.desk().list_mine()
    with pytest.raises(NotFound):
        stranger.export(vm_id, "theirs")
    with pytest.raises(NotFound):
        stranger.desk().destroy(vm_id)
