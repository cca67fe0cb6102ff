"""VMs at a platform, from the owner's side: their whole life, and each step of it broken off."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from spvtpm.terminal.comeback import begin
from spvtpm.terminal.creation import create
from spvtpm.terminal.departure import end
from spvtpm.terminal.destruction import destroy
from spvtpm.terminal.exports import Exported
from spvtpm.terminal.machines import Site, vtpm_of
from spvtpm.terminal.owned import Account, OwnedVm
from spvtpm.terminal.platform import Platform
from spvtpm.terminal.whereabouts import AtChip, InFile
from spvtpm.wire.errors import AlreadyExists, NotFound, WrongState
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
