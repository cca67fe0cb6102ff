"""VMs at a platform, from the owner's side: their whole life, and each step of it broken off."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from spvtpm.terminal.comeback import begin, bring
from spvtpm.terminal.creation import create
from spvtpm.terminal.departure import end, recover
from spvtpm.terminal.destruction import destroy
from spvtpm.terminal.exports import Exported
from spvtpm.terminal.machines import Site, vtpm_of
from spvtpm.terminal.overview import compare, list_all, survey
from spvtpm.terminal.owned import Account, OwnedVm
from spvtpm.terminal.pcrs import parse_pcrs
from spvtpm.terminal.platform import Platform
from spvtpm.terminal.whereabouts import AtChip, InFile
from spvtpm.wire.errors import AlreadyExists, ChannelError, MessageError, NotFound, StaleInstance, WrongState
from spvtpm.wire.platform_errors import NoHost
from tests.owner import ANYTHING
from tests.terminal.estate import VM_KEY, Estate
from tests.terminal.platform_double import TOKEN, PlatformDouble


def new(name: str) -> OwnedVm:
    return OwnedVm(name=name, vm_id=uuid.uuid4(), vm_key=VM_KEY, policy=ANYTHING, label="mine")


@pytest.fixture
def cloud(estate: Estate) -> Iterator[PlatformDouble]:
    with PlatformDouble(estate.sps) as cloud:
        yield cloud


@pytest.fixture
def site(estate: Estate, cloud: PlatformDouble) -> Iterator[Site]:
    with Platform(Account(url=cloud.url, token=TOKEN), patience_s=2) as platform:
        yield Site(estate.keyring, platform, timeout_s=30)


@pytest.mark.claim("C6a")
@pytest.mark.claim("C6b")
def test_the_whole_life_of_a_vm(site: Site) -> None:
    name = f"life-{uuid.uuid4().hex[:8]}"
    made = create(site, new(name))
    assert (made.state, made.boots) == ("running", 1)
    vm_id = site.keyring.owned(name).vm_id
    with pytest.raises(AlreadyExists):
        create(site, new(name))

    gone = end(site, name, "shutdown")
    assert isinstance(gone, Exported)
    path = Path(gone.file.path)
    assert path == site.keyring.instances() / f"{name}-1.vtpm"
    assert path.stat().st_mode & 0o777 == 0o600
    assert site.platform.vm(vm_id).state == "away"
    with pytest.raises(WrongState, match="not hibernated"):
        begin(site, name, "resume")

    assert begin(site, name, "start").state == "running"
    assert begin(site, name, "start").state == "running"  # said again
    asleep = end(site, name, "hibernate")
    assert isinstance(asleep, Exported)
    with pytest.raises(WrongState, match="is hibernated"):
        begin(site, name, "start")
    assert begin(site, name, "resume").state == "running"

    stopped = end(site, name, "shutdown", stay=True)
    assert not isinstance(stopped, Exported)
    assert begin(site, name, "start").boots == 2
    destroy(site, name)
    assert site.keyring.vm(name) is None
    with pytest.raises(NotFound):
        site.platform.vm(vm_id)
    known = vtpm_of(site.keyring, vm_id)
    assert known is not None and not isinstance(known.place, (AtChip, InFile))


@pytest.mark.claim("C6b")
def test_a_file_becomes_a_vm_of_a_new_name_and_an_exported_one_moves(site: Site, tmp_path: Path) -> None:
    name, other = f"old-{uuid.uuid4().hex[:8]}", f"new-{uuid.uuid4().hex[:8]}"
    create(site, new(name))
    end(site, name, "shutdown")
    moved = recover(site, name, tmp_path / "moved")
    assert moved.file.path == str(tmp_path / "moved")
    assert not list(site.keyring.instances().glob(f"{name}-*"))
    destroyed_with = site.keyring.owned(name)

    made = bring(site, new(other), tmp_path / "moved")
    assert (made.state, made.label) == ("stopped", "mine")
    assert site.keyring.owned(other).is_made
    assert begin(site, other, "start").vtpm_id == moved.known.vtpm_id
    with pytest.raises(StaleInstance):
        bring(site, destroyed_with, tmp_path / "moved")  # it lives already
    destroy(site, other)


def test_another_vtpms_file_is_not_brought_into_a_vm(site: Site, tmp_path: Path) -> None:
    names = [f"x-{uuid.uuid4().hex[:8]}" for _ in range(2)]
    for name in names:
        create(site, new(name))
    end(site, names[0], "shutdown")
    recover(site, names[0], tmp_path / "first")
    with pytest.raises(StaleInstance, match="has the vTPM"):
        bring(site, site.keyring.owned(names[1]), tmp_path / "first")
    for name in names:
        destroy(site, name)


def test_a_vm_whose_chip_is_lost_can_be_forgotten(site: Site, cloud: PlatformDouble) -> None:
    name = f"lost-{uuid.uuid4().hex[:8]}"
    create(site, new(name))
    owned, known = site.keyring.owned(name), vtpm_of(site.keyring, site.keyring.owned(name).vm_id)
    assert known is not None and isinstance(known.place, AtChip)
    lost = cloud.sps.pop(known.place.chip_id.hex())
    cloud.vms[owned.vm_id] = replace(
        cloud.vms[owned.vm_id], host=None, chip_id=None
    )  # its administrator has removed the host
    with pytest.raises(ChannelError):
        destroy(site, name)
    destroy(site, name, chip_lost=True)
    assert site.keyring.vm(name) is None and owned.vm_id not in cloud.vms
    assert owned.vm_id in {vm.vm_id for vm in lost.vms()}


def test_a_creation_that_finds_no_host_leaves_nothing(site: Site) -> None:
    wanted = replace(new("nowhere"), policy=replace(ANYTHING, chips=frozenset([bytes(16)])))
    with pytest.raises(NoHost):
        create(site, wanted)
    assert site.keyring.vm("nowhere") is None


def test_a_creation_goes_on_only_as_it_was_begun(site: Site) -> None:
    begun = new(f"begun-{uuid.uuid4().hex[:8]}")
    site.keyring.keep_vm(begun)
    with pytest.raises(AlreadyExists, match="other options"):
        create(site, replace(begun, label="another"))
    assert create(site, replace(begun, vm_id=uuid.uuid4(), vm_key=bytes(32))).vm_id == begun.vm_id
    destroy(site, begun.name)


def test_the_overview_shows_each_vm_and_each_chip(site: Site, cloud: PlatformDouble) -> None:
    name = f"seen-{uuid.uuid4().hex[:8]}"
    create(site, new(name))
    (line,) = [line for line in list_all(site) if line.name == name]
    assert line.says is not None and line.differences == []
    found = compare(site, name)
    assert found.here is not None and found.chip is not None and found.silence is None
    assert {chip.verified.chip_id.hex() for chip in survey(site) if chip.verified} == set(cloud.sps)
    destroy(site, name)


@pytest.mark.attack("A25")
@pytest.mark.parametrize(
    "output",
    [
        b"",
        b"nonsense\n",
        b"  sha256:\n",
        b"  sha256:\n    0 : 0xabc\n",
        b"  sha256:\n    99: 0x" + b"ab" * 32,
    ],
)
def test_what_is_no_list_of_pcrs_is_not_published(output: bytes) -> None:
    with pytest.raises(MessageError):
        parse_pcrs(output, 0)


def test_pcrs_as_tpm2_tools_write_them() -> None:
    output = b"  sha256:\n    0 : 0x" + b"AB" * 32 + b"\n    16: 0x" + b"00" * 32 + b"\n  sha1:\n"
    assert parse_pcrs(output, 5).banks == {"sha256": {"0": "ab" * 32, "16": "00" * 32}}
