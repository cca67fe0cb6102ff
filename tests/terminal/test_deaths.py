"""A terminal that dies at any step at a platform: the same again ends it, and nothing is lost or doubled.

From one step on, nothing that this terminal does has any effect: no file of it is made, no byte of it is sent.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from spvtpm.terminal.comeback import begin
from spvtpm.terminal.creation import create
from spvtpm.terminal.departure import end, recover
from spvtpm.terminal.destruction import destroy
from spvtpm.terminal.machines import Site, vtpm_of
from spvtpm.terminal.migration import migrate
from spvtpm.terminal.owned import Account, OwnedVm
from spvtpm.terminal.platform import Platform
from spvtpm.terminal.whereabouts import AtChip, InFile
from spvtpm.wire.errors import AlreadyExists, NotFound, SpvtpmError
from tests.owner import ANYTHING
from tests.terminal.estate import VM_KEY, Estate
from tests.terminal.platform_double import TOKEN, PlatformDouble

STRIDE = 3
"""Every step would take minutes; which ones are left out differs by operation."""


class Dying:
    """Counts the steps that anybody else could notice; from one of them on, there are none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.steps, self.at = 0, at
        for name in ("fsync", "link", "replace", "rename", "unlink"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(socket.socket, "sendall", self._counted(socket.socket.sendall, sends=True))

    def _counted(self, effect: Callable[..., Any], *, sends: bool = False) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if sends and not self._is_ours(arguments[0]):
                return effect(*arguments, **options)
            self.steps += 1
            if self.steps >= self.at:
                raise OSError("dead")
            return effect(*arguments, **options)

        return counted

    @staticmethod
    def _is_ours(connection: socket.socket) -> bool:
        """The double's own connections, in this process as well, live on."""
        return connection.family == socket.AF_INET


@pytest.fixture
def cloud(estate: Estate) -> Iterator[PlatformDouble]:
    with PlatformDouble(estate.sps) as cloud:
        yield cloud


def site_at(estate: Estate, cloud: PlatformDouble) -> Site:
    return Site(estate.keyring, Platform(Account(url=cloud.url, token=TOKEN), patience_s=0), timeout_s=10)


def with_deaths(
    estate: Estate,
    cloud: PlatformDouble,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Site], str],
    act: Callable[[Site, str], object],
) -> Iterator[tuple[Site, str]]:
    """For each place to die at: what was prepared, acted on by a terminal that dies there, then by one that does not."""
    at = 1
    while True:
        site = site_at(estate, cloud)
        name = prepare(site)
        with monkeypatch.context() as patch:
            dying = Dying(patch, at)
            dead = site_at(estate, cloud)
            try:
                act(dead, name)
                survived = True
            except (SpvtpmError, OSError):
                survived = False
        dead.platform.close()
        if not survived:
            act(site, name)
        yield site, name
        site.platform.close()
        if dying.steps < at:
            return
        at += STRIDE


def a_name(_site: Site | None = None) -> str:
    return f"vm-{uuid.uuid4().hex[:12]}"


def make(site: Site, name: str) -> None:
    try:
        create(site, OwnedVm(name=name, vm_id=uuid.uuid4(), vm_key=VM_KEY, policy=ANYTHING))
    except AlreadyExists:
        assert site.keyring.owned(name).is_made


def running(site: Site) -> str:
    name = a_name()
    make(site, name)
    return name


def away(site: Site) -> str:
    name = running(site)
    end(site, name, "shutdown")
    return name


def lives(cloud: PlatformDouble, vm_id: uuid.UUID) -> list[str]:
    return [vm.state for sp in cloud.sps.values() for vm in sp.vms() if vm.vm_id == vm_id]


def clean(site: Site, name: str) -> None:
    destroy(site, name)


@pytest.mark.attack("A16")
def test_a_creation(estate: Estate, cloud: PlatformDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    for site, name in with_deaths(estate, cloud, monkeypatch, a_name, make):
        owned = site.keyring.owned(name)
        assert lives(cloud, owned.vm_id) == ["running"]
        known = vtpm_of(site.keyring, owned.vm_id)
        assert known is not None and isinstance(known.place, AtChip)
        clean(site, name)


@pytest.mark.attack("A16")
def test_a_shutdown(estate: Estate, cloud: PlatformDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    for site, name in with_deaths(estate, cloud, monkeypatch, running, lambda site, name: end(site, name, "shutdown")):
        owned = site.keyring.owned(name)
        known = vtpm_of(site.keyring, owned.vm_id)
        assert known is not None and isinstance(known.place, InFile)
        assert not lives(cloud, owned.vm_id)
        assert cloud.vms[owned.vm_id].state == "away"
        assert [str(path) for path in site.keyring.instances().glob(f"{name}-*")] == [known.place.path]
        clean(site, name)


@pytest.mark.attack("A09")
@pytest.mark.attack("A16")
def test_a_start_of_a_vm_that_is_away(estate: Estate, cloud: PlatformDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    for site, name in with_deaths(estate, cloud, monkeypatch, away, lambda site, name: begin(site, name, "start")):
        owned = site.keyring.owned(name)
        assert lives(cloud, owned.vm_id) == ["running"]
        assert not isinstance(getattr(vtpm_of(site.keyring, owned.vm_id), "place", None), InFile)
        clean(site, name)


@pytest.mark.claim("C6c")
@pytest.mark.attack("A16")
def test_a_recovery(estate: Estate, cloud: PlatformDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(site: Site) -> str:
        name = running(site)
        end(site, name, "shutdown", stay=True)
        return name

    for site, name in with_deaths(estate, cloud, monkeypatch, stopped, recover):
        assert not lives(cloud, site.keyring.owned(name).vm_id)
        assert begin(site, name, "start").state == "running"
        clean(site, name)


@pytest.mark.claim("C8")
@pytest.mark.attack("A16")
def test_a_migration(estate: Estate, cloud: PlatformDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    for site, name in with_deaths(estate, cloud, monkeypatch, running, migrate):
        owned = site.keyring.owned(name)
        moves = [one for one in cloud.operations.values() if (one.vm_id, one.kind) == (owned.vm_id, "migrate")]
        assert [one.state for one in moves] == ["done"]  # what the dead one began, the other has seen to its end
        assert lives(cloud, owned.vm_id) == ["running"]
        known = vtpm_of(site.keyring, owned.vm_id)
        assert known is not None and isinstance(known.place, AtChip)
        assert known.place.chip_id.hex() == cloud.vms[owned.vm_id].chip_id
        clean(site, name)


@pytest.mark.claim("C8")
@pytest.mark.attack("A16")
def test_a_shutdown_of_a_vm_that_was_moved_unasked(
    estate: Estate, cloud: PlatformDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(site: Site) -> str:
        name = running(site)
        vm = cloud.vms[site.keyring.owned(name).vm_id]
        cloud.move(vm, cloud.sps[cloud.destination(vm)])
        return name

    for site, name in with_deaths(estate, cloud, monkeypatch, moved, lambda site, name: end(site, name, "shutdown")):
        owned = site.keyring.owned(name)
        assert isinstance(getattr(vtpm_of(site.keyring, owned.vm_id), "place", None), InFile)
        assert not lives(cloud, owned.vm_id)
        clean(site, name)


@pytest.mark.attack("A16")
def test_a_destruction(estate: Estate, cloud: PlatformDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(site: Site, name: str) -> None:
        try:
            destroy(site, name)
        except NotFound:
            assert site.keyring.vm(name) is None  # it was all done

    for site, name in with_deaths(estate, cloud, monkeypatch, running, gone):
        assert site.keyring.vm(name) is None
        assert not [vm for vm in cloud.vms.values() if vm.name == name]
    assert not cloud.vms
