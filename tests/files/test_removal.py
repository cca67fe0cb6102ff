"""Removing what strangers have filled: whole, however deep it is; and nothing that a link leads to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spvtpm.files.removal import remove_tree
from spvtpm.wire.errors import StorageError
from tests.harness import is_root
from tests.throwaway import run_in_child

DEPTH = 3000


def nest(directory: Path) -> None:
    """Deeper than Python recurses, and than a path may be long."""
    program = "import os\nfor _ in range(int(__import__('sys').argv[1])): os.mkdir('deep'); os.chdir('deep')\n"
    directory.mkdir()
    subprocess.run([sys.executable, "-c", program, str(DEPTH)], cwd=directory, check=True)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Files and links in directories."""
    path = tmp_path / "filled"
    (path / "a" / "b" / "c").mkdir(parents=True)
    (path / "a" / "b" / "file").write_text("x")
    (path / "file").write_text("x")
    (path / "a" / "link").symlink_to(tmp_path / "kept")
    os.mkfifo(path / "pipe")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("not to be removed")
    return path


def test_a_tree_goes_and_what_its_links_lead_to_stays(filled: Path, tmp_path: Path) -> None:
    remove_tree(filled)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "file").read_text() == "not to be removed"


@pytest.mark.attack("A21")
def test_a_tree_goes_however_deep_it_is(tmp_path: Path) -> None:
    nest(tmp_path / "nested")
    remove_tree(tmp_path / "nested")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_as_good_as_removed(tmp_path: Path) -> None:
    remove_tree(tmp_path / "nothing")


def test_a_link_in_place_of_the_tree_is_not_followed(filled: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(filled)
    with pytest.raises(StorageError):
        remove_tree(tmp_path / "link")
    assert (filled / "file").exists()


@pytest.mark.skipif(not is_root(), reason="becomes another user")
def test_modes_that_forbid_it_are_changed_by_their_owner(tmp_path: Path) -> None:
    for path in (tmp_path, *tmp_path.parents):
        if not path.stat().st_mode & 0o001:
            path.chmod(0o711)
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 200_001, 200_001)

    def fill_and_remove() -> int:
        os.setuid(200_001)
        (home / "tree" / "a" / "b" / "c").mkdir(parents=True)
        for path in (home / "tree/a/b/c", home / "tree/a/b", home / "tree/a", home / "tree"):
            path.chmod(0)
        remove_tree(home / "tree")
        return len(list(home.iterdir()))

    assert run_in_child(fill_and_remove) == 0
