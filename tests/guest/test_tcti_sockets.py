"""Where a TCTI server listens: it takes the place of what was left behind, and of nothing else."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from spvtpm.guest.tcti import listen_unix, unix_paths
from spvtpm.wire.errors import AlreadyExists


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where to listen."""
    return tmp_path / "tpm"


def listen_and_close(path: Path) -> None:
    for listener in listen_unix(path):
        listener.close()


def test_both_sockets_are_private(path: Path) -> None:
    listen_and_close(path)
    assert [each.stat().st_mode & 0o777 for each in unix_paths(path)] == [0o600, 0o600]


def test_sockets_that_were_left_behind_are_replaced(path: Path) -> None:
    listen_and_close(path)
    listen_and_close(path)


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_is_never_replaced(path: Path, which: int) -> None:
    file = unix_paths(path)[which]
    file.write_bytes(b"a VM key")
    with pytest.raises(AlreadyExists):
        listen_unix(path)
    assert file.read_bytes() == b"a VM key"


def test_a_link_is_never_followed_or_replaced(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(AlreadyExists):
        listen_unix(path)
    assert path.is_symlink()


def test_a_socket_in_use_is_never_taken(path: Path) -> None:
    data, control = listen_unix(path)
    with data, control:
        with pytest.raises(AlreadyExists):
            listen_unix(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
