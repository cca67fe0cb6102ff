"""One process at a time on a state directory; the lock goes with the process that held it, however it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spvtpm.files.state_lock import lock_state
from spvtpm.processor.daemon import SecureProcessor
from spvtpm.wire.errors import StateInUse, StorageError
from tests.harness import RunningSp
from tests.throwaway import run_in_child

HOLD = """
import sys
from pathlib import Path
from spvtpm.files.state_lock import lock_state
lock_state(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def holder(state: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(state)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_state_that_another_process_has_is_refused_until_that_process_has_gone(
    tmp_path: Path, ending: signal.Signals | None
) -> None:
    with holder(tmp_path) as process:
        for _ in range(2):
            with pytest.raises(StateInUse, match=str(tmp_path)):
                lock_state(tmp_path)
        if ending is not None:
            process.send_signal(ending)
        process.communicate(timeout=60)
    os.close(lock_state(tmp_path))


def test_closing_the_descriptor_gives_the_state_back(tmp_path: Path) -> None:
    descriptor = lock_state(tmp_path)
    with pytest.raises(StateInUse):
        lock_state(tmp_path)
    os.close(descriptor)
    os.close(lock_state(tmp_path))


def test_a_refused_lock_leaves_no_descriptor_open(tmp_path: Path) -> None:
    descriptor = lock_state(tmp_path)
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(10):
        with pytest.raises(StateInUse):
            lock_state(tmp_path)
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    os.close(descriptor)


def test_a_program_that_is_started_does_not_inherit_the_lock(tmp_path: Path) -> None:
    descriptor = lock_state(tmp_path)
    command = [sys.executable, "-c", "print('runs', flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"runs\n"
        os.close(descriptor)
        os.close(lock_state(tmp_path))
        child.communicate(b"\n", timeout=60)


def test_states_do_not_exclude_each_other(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    descriptors = [lock_state(tmp_path / name) for name in ("one", "two")]
    for descriptor in descriptors:
        os.close(descriptor)


def test_the_lock_is_private_and_is_never_taken_through_a_link(tmp_path: Path) -> None:
    os.close(lock_state(tmp_path))
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600

    (tmp_path / "lock").unlink()
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="cannot open"):
        lock_state(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=str(tmp_path / "none" / "lock")):
        lock_state(tmp_path / "none")


def test_a_second_secure_processor_on_the_same_state_is_refused_and_touches_nothing(sp: RunningSp) -> None:
    before = {path: path.stat().st_mtime_ns for path in sp.state.rglob("*") if path.is_file()}

    def second() -> None:
        with pytest.raises(StateInUse, match=str(sp.state)):
            SecureProcessor(sp.state)

    run_in_child(second)
    assert {path: path.stat().st_mtime_ns for path in sp.state.rglob("*") if path.is_file()} == before
    assert sp.vm(sp.launch()).state == "running"
