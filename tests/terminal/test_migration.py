"""A VM moves between two real chips, by its owner's wish or the platform's; what the owner believes, he has from the chips."""

from __future__ import annotations

import signal
import threading
import uuid
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from spvtpm.terminal.comeback import begin
from spvtpm.terminal.creation import create
from spvtpm.terminal.departure import end, recover
from spvtpm.terminal.destruction import destroy
from spvtpm.terminal.exports import Exported
from spvtpm.terminal.machines import Site, vtpm_of
from spvtpm.terminal.migration import migrate
from spvtpm.terminal.overview import compare, list_all
from spvtpm.terminal.owned import Account, OwnedVm
from spvtpm.terminal.platform import Platform
from spvtpm.terminal.whereabouts import AtChip, InFile
from spvtpm.wire.errors import MigrationForbidden, WrongState
from spvtpm.wire.platform_errors import NoHost
from tests.owner import ANYTHING
from tests.terminal.estate import VM_KEY, Estate
from tests.terminal.platform_double import TOKEN, PlatformDouble

pytestmark = pytest.mark.claim("C8")


@pytest.fixture
def cloud(estate: Estate) -> Iterator[PlatformDouble]:
    with PlatformDouble(estate.sps) as cloud:
        yield cloud


@pytest.fixture
def site(estate: Estate, cloud: PlatformDouble) -> Iterator[Site]:
    with Platform(Account(url=cloud.url, token=TOKEN), patience_s=2) as platform:
        yield Site(estate.keyring, platform, timeout_s=30)


@pytest.fixture
def web(site: Site) -> OwnedVm:
    """A VM that runs."""
    name = f"vm-{uuid.uuid4().hex[:12]}"
    create(site, OwnedVm(name=name, vm_id=uuid.uuid4(), vm_key=VM_KEY, policy=ANYTHING))
    return site.keyring.owned(name)


def known_chip(site: Site, owned: OwnedVm) -> bytes:
    known = vtpm_of(site.keyring, owned.vm_id)
    assert known is not None and isinstance(known.place, AtChip)
    return known.place.chip_id


def other_chip(cloud: PlatformDouble, chip_id: bytes) -> bytes:
    return next(bytes.fromhex(chip) for chip in cloud.sps if chip != chip_id.hex())


def moved_unasked(cloud: PlatformDouble, owned: OwnedVm) -> None:
    """As when a host is drained."""
    vm = cloud.vms[owned.vm_id]
    cloud.move(vm, cloud.sps[cloud.destination(vm)])


def test_a_vm_moves_and_both_chips_say_so(site: Site, cloud: PlatformDouble, web: OwnedVm) -> None:
    first = known_chip(site, web)
    second = other_chip(cloud, first)
    moved = migrate(site, web.name)
    assert (moved.source, moved.chip_id, moved.source_says) == (first, second, "migrated")
    assert (moved.here.state, moved.host) == ("running", cloud.vms[web.vm_id].host)
    assert known_chip(site, web) == second
    assert compare(site, web.name).line.differences == []

    back = migrate(site, web.name, f"host-{list(cloud.sps).index(first.hex())}")
    assert (back.source, back.chip_id) == (second, first)
    again = migrate(site, web.name, back.host)  # said again: it is there
    assert not again.has_moved and again.chip_id == first
    with pytest.raises(NoHost):
        migrate(site, web.name, "nowhere")
    destroy(site, web.name)
    assert all(vm.vm_id != web.vm_id for sp in cloud.sps.values() for vm in sp.vms())


def test_a_policy_without_migration_is_kept_here_and_by_the_chip(site: Site, cloud: PlatformDouble) -> None:
    stays = OwnedVm(name="stays", vm_id=uuid.uuid4(), vm_key=VM_KEY, policy=replace(ANYTHING, migration_allowed=False))
    create(site, stays)
    with pytest.raises(MigrationForbidden, match="the policy of stays"):
        migrate(site, "stays")
    assert not [asked for asked in cloud.asked if asked.endswith("/migrate")]
    with pytest.raises(MigrationForbidden, match="the owner of VM"):
        moved_unasked(cloud, stays)
    end(site, "stays", "shutdown", stay=True)
    with pytest.raises(WrongState, match="only a VM that runs moves"):
        migrate(site, "stays")
    destroy(site, "stays")


def test_every_command_follows_a_vm_that_was_moved_unasked(site: Site, cloud: PlatformDouble, web: OwnedVm) -> None:
    chip_id = known_chip(site, web)

    def is_followed() -> bool:
        nonlocal chip_id
        before, chip_id = chip_id, known_chip(site, web)
        return chip_id == other_chip(cloud, before)

    moved_unasked(cloud, web)
    assert "your keyring knows its vTPM at the chip" in next(
        line.differences[0] for line in list_all(site) if line.name == web.name
    )
    assert compare(site, web.name).line.differences == []
    assert is_followed()
    moved_unasked(cloud, web)
    assert begin(site, web.name, "start").state == "running"
    assert is_followed()
    moved_unasked(cloud, web)
    assert migrate(site, web.name).has_moved  # it has already
    assert is_followed()
    moved_unasked(cloud, web)
    end(site, web.name, "shutdown", stay=True)
    assert is_followed()
    begin(site, web.name, "start")
    moved_unasked(cloud, web)
    end(site, web.name, "hibernate")
    begin(site, web.name, "resume")
    moved_unasked(cloud, web)
    destroy(site, web.name)
    assert all(vm.vm_id != web.vm_id for sp in cloud.sps.values() for vm in sp.vms())


def test_a_vm_that_was_moved_and_stopped_comes_home(site: Site, cloud: PlatformDouble, web: OwnedVm) -> None:
    moved_unasked(cloud, web)
    vm = cloud.vms[web.vm_id]
    cloud.carry_out("shutdown", vm)
    assert isinstance(recover(site, web.name), Exported)
    assert isinstance(getattr(vtpm_of(site.keyring, web.vm_id), "place", None), InFile)
    destroy(site, web.name)


def test_a_creation_whose_vm_was_moved_before_it_was_confirmed_ends(site: Site, cloud: PlatformDouble) -> None:
    wanted = OwnedVm(name="early", vm_id=uuid.uuid4(), vm_key=VM_KEY, policy=ANYTHING)
    create(site, wanted)
    made = site.keyring.owned("early")
    site.keyring.keep_vm(replace(made, is_made=False))  # as of a terminal that died before its last step
    known = vtpm_of(site.keyring, wanted.vm_id)
    assert known is not None
    site.keyring.forget(known.vtpm_id)
    moved_unasked(cloud, wanted)
    assert create(site, wanted).state == "running"
    assert known_chip(site, made) == bytes.fromhex(str(cloud.vms[wanted.vm_id].chip_id))
    destroy(site, "early")


def test_a_source_that_does_not_answer_is_not_needed(site: Site, cloud: PlatformDouble, web: OwnedVm) -> None:
    first = known_chip(site, web)
    moved_unasked(cloud, web)
    gone = cloud.sps.pop(first.hex())
    moved = migrate(site, web.name)
    assert (moved.chip_id, moved.source_says) == (bytes.fromhex(str(cloud.vms[web.vm_id].chip_id)), "nothing")
    cloud.sps[first.hex()] = gone
    destroy(site, web.name)


def interrupt_once_begun(cloud: PlatformDouble) -> threading.Thread:
    """Ctrl-C while a migration is under way."""

    def interrupt() -> None:
        cloud.moving.begun.wait(60)
        signal.raise_signal(signal.SIGINT)

    cloud.moving.begun.clear()
    thread = threading.Thread(target=interrupt)
    thread.start()
    return thread


def test_ctrl_c_cancels_a_migration_and_the_vm_stays(site: Site, cloud: PlatformDouble, web: OwnedVm) -> None:
    first = known_chip(site, web)
    cloud.moving.may_go_on.clear()
    thread = interrupt_once_begun(cloud)
    moved = migrate(site, web.name)
    thread.join()
    assert moved.was_cancelled and not moved.has_moved
    assert (moved.chip_id, moved.source_says, moved.here.state) == (first, "here", "running")
    assert migrate(site, web.name).has_moved
    destroy(site, web.name)
