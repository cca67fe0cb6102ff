"""Files that hold a secret: whole or not there, and read only when nobody else can."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spvtpm.files import create_file, read_file
from spvtpm.wire.errors import AlreadyExists, StorageError
from tests.harness import is_root
from tests.throwaway import run_in_child

SECRET = b"thirty-two bytes, or about that."


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A private file."""
    path = tmp_path / "secret"
    create_file(path, SECRET)
    return path


@pytest.mark.attack("A24")
def test_a_new_file_can_be_read_by_its_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    def create() -> int:
        os.umask(0)
        create_file(tmp_path / "secret", SECRET)
        return (tmp_path / "secret").stat().st_mode & 0o7777

    assert run_in_child(create) == 0o600


def test_a_new_file_leaves_nothing_beside_it(path: Path) -> None:
    assert [file.name for file in path.parent.iterdir()] == ["secret"]
    assert read_file(path, len(SECRET)) == SECRET


def test_a_new_file_never_replaces_one(path: Path) -> None:
    with pytest.raises(AlreadyExists):
        create_file(path, b"another secret")
    assert read_file(path, 100) == SECRET
    assert [file.name for file in path.parent.iterdir()] == ["secret"]


def test_a_new_file_never_goes_where_a_link_points(tmp_path: Path) -> None:
    (tmp_path / "secret").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AlreadyExists):
        create_file(tmp_path / "secret", SECRET)
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_cannot_be_written_whole_is_not_there(tmp_path: Path) -> None:
    def create() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(SECRET) // 2, resource.RLIM_INFINITY))
        with pytest.raises(StorageError, match="File too large"):
            create_file(tmp_path / "secret", SECRET)

    run_in_child(create)
    assert not list(tmp_path.iterdir())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mode=st.integers(0, 0o7777))
def test_a_file_with_any_permission_for_others_is_not_read(path: Path, mode: int) -> None:
    path.chmod(mode | 0o400)
    if mode & 0o077:
        with pytest.raises(StorageError, match="can be read by others"):
            read_file(path, 100)
    else:
        assert read_file(path, 100) == SECRET


@pytest.mark.attack("A27")
@pytest.mark.skipif(not is_root(), reason="only root can give a file away")
def test_a_file_of_another_user_is_not_read(path: Path) -> None:
    os.chown(path, 65533, 65533)
    with pytest.raises(StorageError, match="owner 65533"):
        read_file(path, 100)


def test_a_link_is_not_followed(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(StorageError, match=str(link)):
        read_file(link, 100)


def test_a_pipe_is_not_read_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(StorageError, match="no regular file"):
        read_file(tmp_path / "pipe", 100)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=str(tmp_path / "none")):
        read_file(tmp_path / "none", 100)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=64), bound=st.integers(0, 64))
def test_no_more_is_read_than_allowed(tmp_path: Path, content: bytes, bound: int) -> None:
    path = tmp_path / "secret"
    path.unlink(missing_ok=True)
    create_file(path, content)
    if len(content) > bound:
        with pytest.raises(StorageError, match=f"longer than {bound} bytes"):
            read_file(path, bound)
    else:
        assert read_file(path, bound) == content
