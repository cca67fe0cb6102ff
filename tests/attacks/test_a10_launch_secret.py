"""A10, A27: a VM's key goes to the VM's process, once for each boot; whoever else asks gets nothing, and is seen."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from spvtpm.wire.errors import PermissionRefused
from spvtpm.wire.ivshmem import REFUSAL
from spvtpm.wire.messages import LaunchVm, ResetVm, StopVm
from spvtpm.wire.owner_messages import Event, Events, MyVm, ReadEvents
from tests.harness import RunningSp

_VM_UID, _OTHER_UID = 200_001, 200_002


@pytest.fixture
def sp(short_path: Path) -> Iterator[RunningSp]:
    with RunningSp(short_path / "sp", config="vm_uids = [200000, 10]\n") as running:
        yield running


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("s")
    for each in (path, *path.parents):
        if each.stat().st_uid == os.geteuid() and each != Path("/"):
            each.chmod(each.stat().st_mode | 0o011)
    return path


def new_vm(sp: RunningSp) -> uuid.UUID:
    vm_id = uuid.uuid4()
    with sp.channel() as channel:
        channel.ask(sp.owner.provision(vm_id, sp.key(vm_id), inject_key=True), MyVm)
    return vm_id


def read(path: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(path)
        return connection.recv(64)


def read_as(uid: int, path: str) -> bytes:
    """SO_PEERCRED tells who connected, not who reads."""
    os.seteuid(uid)
    try:
        return read(path)
    finally:
        os.seteuid(0)


def events(sp: RunningSp, vm_id: uuid.UUID) -> list[Event]:
    with sp.channel() as channel:
        return channel.ask(ReadEvents(vm_id=vm_id), Events).events


def words(sp: RunningSp, vm_id: uuid.UUID) -> list[str]:
    return [event.what for event in events(sp, vm_id) if event.what.startswith("launch-secret")]


@pytest.mark.claim("C9")
@pytest.mark.attack("A10")
def test_the_key_is_had_once_for_each_boot_and_every_taking_is_seen(sp: RunningSp) -> None:
    vm_id = new_vm(sp)
    first = sp.info(LaunchVm(vm_id=vm_id)).launch_secret
    assert read(first) == sp.key(vm_id)
    assert words(sp, vm_id) == ["launch-secret-taken"]
    assert sp.vm(vm_id).launch_secret == ""
    assert [read(first), read(first)] == [b"", b""]
    assert words(sp, vm_id) == ["launch-secret-taken", "launch-secret-refused"]
    assert read(sp.info(ResetVm(vm_id=vm_id)).launch_secret) == sp.key(vm_id)
    sp.info(StopVm(vm_id=vm_id))
    with pytest.raises(FileNotFoundError):
        read(first)


@pytest.mark.attack("A10")
def test_what_was_taken_is_durable_before_it_leaves(sp: RunningSp) -> None:
    vm_id = new_vm(sp)
    read(sp.info(LaunchVm(vm_id=vm_id)).launch_secret)
    sp.kill()
    sp.start()
    assert words(sp, vm_id) == ["launch-secret-taken"]


def test_a_vm_whose_owner_gives_it_the_key_himself_has_no_launch_secret(sp: RunningSp) -> None:
    assert sp.vm(sp.launch()).launch_secret == ""


@pytest.mark.attack("A27")
@pytest.mark.skipif(os.geteuid() != 0, reason="other users' processes need root")
def test_another_user_gets_neither_key_nor_interface_of_a_vm_with_a_user_of_its_own(sp: RunningSp) -> None:
    vm_id = new_vm(sp)
    info = sp.info(LaunchVm(vm_id=vm_id, vm_uid=_VM_UID))
    assert info.vtpm is not None
    assert read_as(_OTHER_UID, info.launch_secret) == b""
    assert read(info.launch_secret) == b""  # not even whoever may command
    assert read_as(_OTHER_UID, info.vtpm.interface) == REFUSAL
    assert words(sp, vm_id) == ["launch-secret-refused"]
    assert read_as(_VM_UID, info.launch_secret) == sp.key(vm_id)
    assert read_as(_VM_UID, info.vtpm.interface) not in (b"", REFUSAL)


def test_a_user_that_belongs_to_no_vm_is_refused_before_the_boot(sp: RunningSp) -> None:
    vm_id = new_vm(sp)
    with pytest.raises(PermissionRefused, match="no user of VMs"):
        sp.info(LaunchVm(vm_id=vm_id, vm_uid=12_345))
    assert sp.vm(vm_id).boots == 0


@pytest.mark.attack("A23")
def test_whoever_is_refused_again_and_again_fills_no_log(sp: RunningSp) -> None:
    vm_id = new_vm(sp)
    launched = sp.info(LaunchVm(vm_id=vm_id))
    assert read(launched.launch_secret)

    for _ in range(50):
        assert read(launched.launch_secret) == b""

    assert sp.log().count("its launch secret was refused") == 1
