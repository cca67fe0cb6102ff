"""A stack's files: closed to others, with room for sockets' paths however long its directory's name, one stack at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from spvtpm.stack.lock import stack_lock
from spvtpm.stack.places import is_data_home, make_places
from spvtpm.wire.errors import StorageError

LONGEST_SOCKET = "agent-1/vms/00000000-0000-0000-0000-000000000000/machine/control.sock"


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What XDG_RUNTIME_DIR says."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory)


def test_a_long_directory_gets_a_short_name_and_the_same_one_each_time(tmp_path: Path, runtime: Path) -> None:
    long = tmp_path / ("a" * 80)
    places = make_places(long)
    assert places.directory == long
    assert places.short.parent == runtime and places.short.readlink() == long
    assert len(os.fsencode(places.short / LONGEST_SOCKET)) <= 107
    assert places.hosts[0].sp == places.short / "sp-1"
    assert make_places(long) == places


def test_a_link_that_leads_elsewhere_is_put_right(tmp_path: Path, runtime: Path) -> None:
    long = tmp_path / ("a" * 80)
    short = make_places(long).short
    short.unlink()
    short.symlink_to(tmp_path)
    assert make_places(long).short.readlink() == long


def test_a_short_directory_is_used_as_it_is(runtime: Path) -> None:
    assert make_places(runtime / "c").short == runtime / "c"
    assert [path.name for path in runtime.iterdir()] == ["c"]


def test_a_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(StorageError, match="closed to the writing of others"):
        make_places(directory)


def test_nobody_else_reads_what_is_made(runtime: Path) -> None:
    old = os.umask(0)
    try:
        make_places(runtime / "c")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (runtime / "c", runtime / "c" / "user")} == {0o700}


def test_a_second_stack_on_the_same_directory_is_refused(tmp_path: Path, runtime: Path) -> None:
    with stack_lock(tmp_path, lambda _said: None):
        second = subprocess.run(
            [sys.executable, "-m", "spvtpm.cli", "up", str(tmp_path)], capture_output=True, text=True
        )
        assert f"another spvtpm up runs on {tmp_path}: process {os.getpid()} [in-use]" in second.stderr
        assert second.returncode == 4
    with stack_lock(tmp_path, lambda _said: None):
        pass


def test_the_next_stack_waits_for_the_parts_of_one_that_was_killed(tmp_path: Path) -> None:
    """A part holds the lock; the process that had taken it is gone."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    reader, writer = os.pipe()
    with stack_lock(tmp_path, lambda _said: None) as lock:
        (tmp_path / "lock").write_text(str(dead.pid))
        part = subprocess.Popen(["cat"], stdin=reader, stdout=subprocess.DEVNULL, pass_fds=(lock,))
    os.close(reader)
    told: list[str] = []

    def tell(sentence: str) -> None:
        told.append(sentence)
        os.close(writer)  # the part ends

    with stack_lock(tmp_path, tell):
        assert part.wait(60) == 0
    assert told == ["the last spvtpm up here was killed; its parts are still ending"]


def test_the_users_data_home_is_recognised(tmp_path: Path, runtime: Path) -> None:
    assert not is_data_home(make_places(tmp_path).data_home)
    (tmp_path / "lock").touch()
    (tmp_path / "vendor").mkdir()
    assert is_data_home(make_places(tmp_path).data_home)


def test_a_lock_in_an_unusable_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError), stack_lock(tmp_path / "nothing", lambda _said: None):
        pass
