"""Where the SP has a VM's key from: a private file, and only of this VM."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spvtpm.guest.vm_key import create_vm_key, read_vm_key
from spvtpm.processor.vm_keys import VmKeyFiles
from spvtpm.wire import mailbox
from spvtpm.wire.errors import StorageError

VM = uuid.UUID("11111111-1111-4111-8111-111111111111")
BOOT = b"first boot, 16 b"


def put_key(directory: Path, vm_id: uuid.UUID, key: bytes) -> Path:
    path = directory / f"{vm_id}.key"
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(key)
    return path


@pytest.mark.claim("C9")
def test_the_vm_derives_the_same_boot_key_from_the_file_that_it_made(tmp_path: Path) -> None:
    create_vm_key(tmp_path / f"{VM}.key")
    vms = mailbox.derive_boot_key(read_vm_key(tmp_path / f"{VM}.key"), VM.bytes, BOOT)
    assert VmKeyFiles(tmp_path).boot_key(VM, BOOT) == vms
    assert len(vms) == 32


@pytest.mark.attack("A10")
@pytest.mark.attack("A13")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cases=st.lists(
        st.tuples(st.uuids(), st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32)),
        min_size=2,
        max_size=4,
        unique=True,
    )
)
def test_another_vm_another_boot_or_another_key_gives_another_boot_key(
    tmp_path: Path, cases: list[tuple[uuid.UUID, bytes, bytes]]
) -> None:
    keys = set()
    for vm_id, boot_id, key in cases:
        put_key(tmp_path, vm_id, key)
        keys.add(VmKeyFiles(tmp_path).boot_key(vm_id, boot_id))
        assert key not in keys, "the VM key itself goes no further"
    assert len(keys) == len(cases)


@pytest.mark.parametrize("size", [0, 1, 31, 33, 64, 4096])
def test_a_key_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    path = put_key(tmp_path, VM, bytes(size))
    with pytest.raises(StorageError, match=str(path)):
        VmKeyFiles(tmp_path).boot_key(VM, BOOT)


@pytest.mark.attack("A24")
def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    put_key(tmp_path, VM, bytes(32)).chmod(0o644)
    with pytest.raises(StorageError, match="can be read by others"):
        VmKeyFiles(tmp_path).boot_key(VM, BOOT)


@pytest.mark.attack("A10")
def test_a_link_to_another_vms_key_is_not_followed(tmp_path: Path) -> None:
    other = uuid.uuid4()
    put_key(tmp_path, other, os.urandom(32))
    (tmp_path / f"{VM}.key").symlink_to(tmp_path / f"{other}.key")
    with pytest.raises(StorageError, match=f"{VM}.key"):
        VmKeyFiles(tmp_path).boot_key(VM, BOOT)


def test_a_vm_whose_key_is_not_there_is_named(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(StorageError, match=f"{VM}.key"):
            VmKeyFiles(directory).boot_key(VM, BOOT)


def test_a_key_is_read_anew_for_each_boot(tmp_path: Path) -> None:
    keys = VmKeyFiles(tmp_path)
    put_key(tmp_path, VM, bytes(32))
    before = keys.boot_key(VM, BOOT)
    put_key(tmp_path, VM, b"\1" * 32)
    assert keys.boot_key(VM, BOOT) != before
