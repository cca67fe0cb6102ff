"""The attacks of an actively malicious platform: the terminal notices, or it is harmless; and no secret leaves."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from spvtpm.terminal.comeback import begin
from spvtpm.terminal.creation import create
from spvtpm.terminal.departure import end, recover
from spvtpm.terminal.destruction import destroy
from spvtpm.terminal.exports import Exported
from spvtpm.terminal.keyring import Keyring
from spvtpm.terminal.machines import Site, vtpm_of
from spvtpm.terminal.overview import compare, list_all, survey
from spvtpm.terminal.owned import Account, OwnedVm
from spvtpm.terminal.platform import Platform
from spvtpm.terminal.whereabouts import AtChip, InFile
from spvtpm.wire import messages
from spvtpm.wire.errors import (
    CertificateRefused,
    ChannelError,
    ChipNotAllowed,
    FirmwareTooOld,
    SpvtpmError,
    StaleInstance,
    WrongState,
)
from spvtpm.wire.platform_errors import PlatformContradicts
from tests.owner import ANYTHING
from tests.relay import Cut, Side, honest
from tests.terminal.conftest import estate  # noqa: F401  # the fixture
from tests.terminal.estate import Estate, new_keyring
from tests.terminal.malicious_platform import MaliciousPlatform
from tests.terminal.platform_double import TOKEN


def new(name: str = "") -> OwnedVm:
    return OwnedVm(
        name=name or f"vm-{uuid.uuid4().hex[:12]}", vm_id=uuid.uuid4(), vm_key=uuid.uuid4().bytes * 2, policy=ANYTHING
    )


@pytest.fixture
def evil(estate: Estate) -> Iterator[MaliciousPlatform]:  # noqa: F811
    with MaliciousPlatform(estate.sps) as evil:
        yield evil


def site_of(keyring: Keyring, evil: MaliciousPlatform) -> Iterator[Site]:
    with Platform(Account(url=evil.url, token=TOKEN), patience_s=1) as platform:
        yield Site(keyring, platform, timeout_s=10)


@pytest.fixture
def site(estate: Estate, evil: MaliciousPlatform) -> Iterator[Site]:  # noqa: F811
    yield from site_of(estate.keyring, evil)


@pytest.fixture
def running(site: Site) -> OwnedVm:
    """A VM that runs."""
    vm = new()
    create(site, vm)
    return site.keyring.owned(vm.name)


def chip_of(site: Site, owned: OwnedVm) -> str:
    known = vtpm_of(site.keyring, owned.vm_id)
    assert known is not None and isinstance(known.place, AtChip)
    return known.place.chip_id.hex()


def nothing_is_provisioned(evil: MaliciousPlatform, owned: OwnedVm) -> bool:
    return all(vm.vm_id != owned.vm_id for sp in evil.sps.values() for vm in sp.vms())


# Names and ids


@pytest.mark.attack("A05")
@pytest.mark.attack("A10")
def test_vms_whose_names_are_swapped_are_told_apart_by_their_ids(site: Site, evil: MaliciousPlatform) -> None:
    """Unprotected, whoever asks by name would destroy the other VM."""
    first, second = new("first"), new("second")
    create(site, first)
    create(site, second)
    evil.swapped = (first.vm_id, second.vm_id)
    by_name = {vm.name: vm.vm_id for vm in site.platform.vms()}
    assert by_name["first"] == second.vm_id  # what one would get who believes names

    found = {line.name: line.differences for line in list_all(site)}
    assert found["first"] == ["the platform calls it second"]
    with pytest.raises(PlatformContradicts, match="is second; it is first"):
        end(site, "first", "shutdown")
    with pytest.raises(PlatformContradicts):
        destroy(site, "first")
    assert nothing_is_provisioned(evil, first) and not nothing_is_provisioned(evil, second)  # the right one
    evil.swapped = None
    for vm in (first, second):
        destroy(site, vm.name)
    assert not evil.vms


@pytest.mark.attack("A05")
@pytest.mark.attack("A10")
def test_vms_whose_ids_are_swapped_are_asked_after_at_their_chips(site: Site, evil: MaliciousPlatform) -> None:
    first, second = new("one"), new("two")
    create(site, first)
    create(site, second)
    evil.swapped_ids = (first.vm_id, second.vm_id)
    differences = compare(site, "one").line.differences
    assert "the platform calls it two" in differences
    with pytest.raises(PlatformContradicts):
        begin(site, "one", "start")
    evil.swapped_ids = None
    for vm in (first, second):
        destroy(site, vm.name)


@pytest.mark.attack("A05")
def test_a_vm_that_is_not_the_owners_is_told_as_such(
    site: Site, evil: MaliciousPlatform, running: OwnedVm, tmp_path: Path
) -> None:
    (line,) = [
        line for line in list_all(replace_keyring(site, new_keyring(tmp_path / "other"))) if line.name == running.name
    ]
    assert line.differences == [f"your keyring has no VM {running.vm_id}"]


def replace_keyring(site: Site, keyring: Keyring) -> Site:
    return Site(keyring, site.platform, timeout_s=site.timeout_s)


@pytest.mark.attack("A05")
def test_another_owner_gets_nothing_of_a_vm_though_the_platform_serves_him(
    site: Site, running: OwnedVm, tmp_path: Path
) -> None:
    """He even has the VM's name and id, as the platform can tell him; not the owner's key."""
    mallory = replace_keyring(site, new_keyring(tmp_path / "mallory"))
    chip_id = bytes.fromhex(chip_of(site, running))
    mallory.keyring.keep_vm(replace(running, chip_id=chip_id, vm_key=bytes(32)))
    with pytest.raises(SpvtpmError):
        end(mallory, running.name, "shutdown")
    with pytest.raises(SpvtpmError):
        recover(mallory, running.name)
    assert site.desk(chip_id).look(running.vm_id) is not None


# Chips


@pytest.mark.attack("A01")
@pytest.mark.attack("A10")
def test_a_relay_that_leads_to_another_chip_gets_no_secret(site: Site, evil: MaliciousPlatform) -> None:
    here, there = evil.sps
    evil.leads_elsewhere = {here: there, there: here}
    vm = new()
    with pytest.raises(ChipNotAllowed):
        create(site, vm)
    assert nothing_is_provisioned(evil, vm)
    assert not [frame for side, frame in evil.frames if side == "owner" and len(frame) > 100]  # knocks alone
    assert site.keyring.vm(vm.name) is None  # undone
    assert [chip.refusal.code for chip in survey(site) if chip.refusal] == ["chip-not-allowed"] * 2


@pytest.mark.claim("C4")
@pytest.mark.attack("A01")
def test_a_chip_that_the_policy_forbids_gets_no_secret(site: Site, evil: MaliciousPlatform) -> None:
    allowed, forbidden = evil.sps
    evil.places_at = forbidden
    vm = replace(new(), policy=replace(ANYTHING, chips=frozenset([bytes.fromhex(allowed)])))
    with pytest.raises(ChipNotAllowed, match="which its policy does not allow"):
        create(site, vm)
    assert not evil.frames
    old = replace(new(), policy=replace(ANYTHING, minimum_firmware=99))
    with pytest.raises(FirmwareTooOld):
        create(site, old)
    other_fleet = replace(new(), fleet_id=bytes(16))
    with pytest.raises(ChipNotAllowed):
        create(site, other_fleet)
    assert all(nothing_is_provisioned(evil, one) for one in (vm, old, other_fleet))
    assert not [one for one in (vm, old, other_fleet) if site.keyring.vm(one.name)]

    evil.places_at = allowed
    create(site, vm)
    end(site, vm.name, "shutdown")
    evil.places_at = forbidden
    with pytest.raises(ChipNotAllowed):
        begin(site, vm.name, "start")
    assert nothing_is_provisioned(evil, vm)
    assert site.platform.vm(vm.vm_id).state == "away"  # given back
    evil.places_at = None
    assert begin(site, vm.name, "start").state == "running"


@pytest.mark.attack("A10")
def test_a_platform_that_names_another_chip_than_the_vtpms_is_contradicted(
    site: Site, evil: MaliciousPlatform, running: OwnedVm
) -> None:
    here = chip_of(site, running)
    there = next(chip for chip in evil.sps if chip != here)
    end(site, running.name, "shutdown", stay=True)
    evil.says_chip[running.vm_id] = there
    with pytest.raises(PlatformContradicts, match=f"its vTPM lives at the chip {here}"):
        begin(site, running.name, "start")
    assert "your keyring knows its vTPM at the chip" in compare(site, running.name).line.differences[0]
    assert isinstance(recover(site, running.name), Exported)  # whatever it says, the chip is asked that has it


# Operations that were not done


@pytest.mark.attack("A10")
@pytest.mark.parametrize("how", ["shutdown", "hibernate"])
def test_an_end_that_is_claimed_and_not_done_is_noticed(
    site: Site, evil: MaliciousPlatform, running: OwnedVm, how: str
) -> None:
    evil.claims_done = {"shutdown", "hibernate", "release"}
    with pytest.raises(PlatformContradicts, match="its secure processor says that it is running"):
        end(site, running.name, "shutdown" if how == "shutdown" else "hibernate")
    assert "its secure processor says running" in compare(site, running.name).line.differences[0]
    with pytest.raises(WrongState, match="shut it down"):
        recover(site, running.name)
    assert not list(site.keyring.instances().glob(f"{running.name}-*"))


@pytest.mark.attack("A10")
def test_a_start_that_is_claimed_and_not_done_is_noticed(site: Site, evil: MaliciousPlatform) -> None:
    evil.claims_done = {"start"}
    vm = new()
    with pytest.raises(PlatformContradicts, match="its secure processor says that it is stopped"):
        create(site, vm)
    evil.claims_done = set()
    for double in evil.vms.values():
        if double.vm_id == vm.vm_id:
            evil.become(double, "placed")
    assert create(site, vm).state == "running"  # said again


@pytest.mark.attack("A09")
def test_a_release_that_is_claimed_and_not_done_makes_no_second_life(
    site: Site, evil: MaliciousPlatform, running: OwnedVm
) -> None:
    end(site, running.name, "shutdown", stay=True)
    evil.claims_done = {"release"}
    evil.says_state[running.vm_id] = "away"
    with pytest.raises(PlatformContradicts, match="at the chip"):
        evil.says_chip[running.vm_id] = "00" * 16
        begin(site, running.name, "start")
    lives = [vm for sp in evil.sps.values() for vm in sp.vms() if vm.vm_id == running.vm_id]
    assert len(lives) == 1


# Hidden, destroyed


@pytest.mark.attack("A04")
def test_a_vm_that_is_hidden_or_claimed_destroyed_is_still_its_owners(
    site: Site, evil: MaliciousPlatform, running: OwnedVm
) -> None:
    evil.hidden = {running.vm_id}
    assert [line.differences for line in list_all(site) if line.name == running.name] == [
        [f"the platform does not know {running.name}, which your keyring has"]
    ]
    found = compare(site, running.name)
    assert (found.here.state if found.here else None, found.line.says) == ("running", None)
    with pytest.raises(PlatformContradicts, match="says that there is no VM"):
        begin(site, running.name, "start")
    with pytest.raises(PlatformContradicts, match="says that there is no VM"):
        end(site, running.name, "shutdown")
    destroy(site, running.name)  # at the chip, whatever the platform says
    assert nothing_is_provisioned(evil, running)


@pytest.mark.attack("A04")
def test_what_the_platform_says_of_a_chip_is_not_taken_for_the_chips_word(
    site: Site, evil: MaliciousPlatform, running: OwnedVm
) -> None:
    """That there is no such VM is believed of the chip alone; else a platform could have an owner forget a VM that lives."""
    chip = chip_of(site, running)
    sp = evil.sps.pop(chip)
    with pytest.raises(ChannelError, match="opens no channel"):
        destroy(site, running.name)
    assert site.keyring.vm(running.name) is not None
    evil.sps[chip] = sp
    assert compare(site, running.name).here is not None


@pytest.mark.attack("A04")
def test_the_platform_alone_destroys_nothing(site: Site, evil: MaliciousPlatform, running: OwnedVm) -> None:
    with pytest.raises(WrongState):
        site.run(site.platform.destroy(running.vm_id))
    assert compare(site, running.name).here is not None


# Older files


@pytest.mark.attack("A08")
@pytest.mark.attack("A09")
def test_an_older_file_put_back_is_refused(
    site: Site, evil: MaliciousPlatform, running: OwnedVm, tmp_path: Path
) -> None:
    from spvtpm.terminal.comeback import bring

    first = end(site, running.name, "shutdown")
    assert isinstance(first, Exported)
    older = tmp_path / "older"
    older.write_bytes(Path(first.file.path).read_bytes())
    begin(site, running.name, "start")
    assert bring(site, running, older).state == "running"  # it is there already: nothing is done
    end(site, running.name, "shutdown")
    with pytest.raises(StaleInstance):
        bring(site, running, older)
    assert isinstance(getattr(vtpm_of(site.keyring, running.vm_id), "place", None), InFile)


# Frames


def flip(side: Side, at: int) -> Callable[[Side, int, bytes], list[bytes]]:
    def hook(sender: Side, number: int, frame: bytes) -> list[bytes]:
        if (sender, number) != (side, at):
            return [frame]
        return [frame[:-1] + bytes([frame[-1] ^ 1])]

    return hook


def drop(side: Side, at: int) -> Callable[[Side, int, bytes], list[bytes]]:
    return lambda sender, number, frame: [] if (sender, number) == (side, at) else [frame]


def double(side: Side, at: int) -> Callable[[Side, int, bytes], list[bytes]]:
    return lambda sender, number, frame: [frame, frame] if (sender, number) == (side, at) else [frame]


def cut(side: Side, at: int) -> Callable[[Side, int, bytes], list[bytes]]:
    def hook(sender: Side, number: int, frame: bytes) -> list[bytes]:
        if (sender, number) == (side, at):
            raise Cut
        return [frame]

    return hook


@pytest.mark.attack("A02")
@pytest.mark.parametrize("evil_deed", [flip, double, cut])
@pytest.mark.parametrize(("side", "at"), [("owner", 2), ("owner", 3), ("sp", 1), ("sp", 2)])
def test_frames_that_are_altered_doubled_or_withheld_break_the_channel_and_nothing_else(
    site: Site,
    evil: MaliciousPlatform,
    evil_deed: Callable[..., Callable[[Side, int, bytes], list[bytes]]],
    side: Side,
    at: int,
) -> None:
    vm = new()
    evil.hook = evil_deed(side, at)
    if evil_deed is double and (side, at) == ("sp", 2):  # behind the last word that anybody waits for
        create(site, vm)
    else:
        with pytest.raises(SpvtpmError):
            create(site, vm)
        evil.hook = honest
        create(site, vm)
    evil.hook = honest
    assert compare(site, vm.name).line.differences == []
    destroy(site, vm.name)


@pytest.mark.attack("A02")
@pytest.mark.attack("A24")
def test_no_secret_is_in_what_the_platform_sees(site: Site, evil: MaliciousPlatform) -> None:
    vm = new()
    create(site, vm)
    secrets = [vm.vm_key, *site.keyring.content.user_secrets]
    seen = b"".join(frame for _side, frame in evil.frames)
    assert len(seen) > 2000
    for secret in secrets:
        assert secret not in seen and secret.hex().encode() not in seen
    destroy(site, vm.name)


@pytest.mark.attack("A03")
def test_a_recorded_channel_opens_nothing(site: Site, evil: MaliciousPlatform, running: OwnedVm) -> None:
    """The platform answers for the chip with what the chip said in an earlier channel."""
    chip_id = bytes.fromhex(chip_of(site, running))
    evil.frames.clear()
    assert site.desk(chip_id).look(running.vm_id) is not None
    recorded = [frame for side, frame in evil.frames if side == "sp"]

    def replay(side: Side, number: int, frame: bytes) -> list[bytes]:
        return [frame] if side == "owner" else recorded[number : number + 1]

    evil.hook = replay
    with pytest.raises(ChannelError):
        site.desk(chip_id).look(running.vm_id)
    evil.hook = honest
    assert site.desk(chip_id).look(running.vm_id) is not None


def test_refusals_of_a_chip_are_of_one_kind() -> None:
    """What `create` undoes a placement for."""
    assert issubclass(ChipNotAllowed, CertificateRefused) and issubclass(FirmwareTooOld, CertificateRefused)


@pytest.mark.attack("A10")
def test_a_vm_that_the_host_restarts_behind_its_owners_back_is_seen(
    site: Site, evil: MaliciousPlatform, running: OwnedVm
) -> None:
    sp = evil.sps[chip_of(site, running)]
    sp.info(messages.StopVm(vm_id=running.vm_id))
    assert "its secure processor says stopped" in compare(site, running.name).line.differences[0]
