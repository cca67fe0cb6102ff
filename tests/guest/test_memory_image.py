"""A VM's memory as a sealed file: what comes back is what went in; nothing altered does, or gets out of its directory."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import uuid
from pathlib import Path

import pytest

from spvtpm.files.removal import remove_tree
from spvtpm.guest.memory_image import open_image, pack, seal, unpack
from spvtpm.wire.agent_api import MAX_IMAGE_BYTES
from spvtpm.wire.errors import StorageError
from spvtpm.wire.platform_errors import ImageDamaged
from tests.vectors import generate_memory_image

FOLDER = Path(generate_memory_image.__file__).parent / "memory_image"
FILES = sorted(FOLDER.glob("*.txt"))
KEY, VM = b"k" * 32, uuid.UUID(int=7)


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    """A VM's memory with something of everything in it."""
    memory = tmp_path / "memory"
    (memory / "deep" / "deeper").mkdir(parents=True)
    (memory / "empty").mkdir()
    (memory / "note").write_text("a note")
    (memory / "deep" / "deeper" / "script").write_text("#!/bin/sh\n")
    (memory / "deep" / "deeper" / "script").chmod(0o755)
    (memory / "deep").chmod(0o750)
    (memory / "nothing").touch()
    (memory / ("long " * 40 + "name")).write_bytes(os.urandom(70_000))
    (memory / "Gr\u00fc\u00dfe\nin two lines").write_text("a name")
    (memory / os.fsdecode(b"no \xff text")).write_text("another")
    os.utime(memory / "note", (1_600_000_000, 1_600_000_000))
    return memory


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """An empty directory."""
    path = tmp_path / "elsewhere"
    path.mkdir()
    return path


def everything(directory: Path) -> dict[str, tuple[int, bytes | None]]:
    """Modes and contents of all that is below."""
    return {
        str(path.relative_to(directory)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in directory.rglob("*")
    }


def archive(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """An archive as no VM makes it."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for entry, content in entries:
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return sink.getvalue()


def special(name: str, kind: bytes, leads_to: str = "") -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, leads_to
    return entry, b""


def _read(file: Path) -> dict[str, str]:
    lines = (line.partition(": ") for line in file.read_text().splitlines() if not line.startswith("#"))
    return {name.removesuffix(":"): value for name, _, value in lines}


def _opened(vector: dict[str, str]) -> bytes:
    image = bytes.fromhex(vector["image"])
    return open_image(bytes.fromhex(vector["vm-key"]), uuid.UUID(vector["vm-id"]), image)


@pytest.mark.parametrize("file", [file for file in FILES if file.stem.startswith("ok-")], ids=lambda file: file.stem)
def test_a_good_vector_opens_and_is_written_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = _read(file)
    assert _opened(vector).hex() == vector["archive"]
    monkeypatch.setattr(os, "urandom", lambda size: bytes.fromhex(vector["nonce"])[:size])
    made = seal(bytes.fromhex(vector["vm-key"]), uuid.UUID(vector["vm-id"]), bytes.fromhex(vector["archive"]))
    assert made.hex() == vector["image"]


@pytest.mark.attack("A25")
@pytest.mark.parametrize("file", [file for file in FILES if file.stem.startswith("bad-")], ids=lambda file: file.stem)
def test_a_bad_vector_is_refused(file: Path) -> None:
    vector = _read(file)
    with pytest.raises(ImageDamaged) as refused:
        _opened(vector)
    assert refused.value.code == vector["expect"]


def test_the_files_are_what_the_independent_implementation_writes() -> None:
    assert {file.stem: file.read_text() for file in FILES} == generate_memory_image.vectors()


def test_what_comes_back_is_what_went_in(memory: Path, elsewhere: Path) -> None:
    unpack(open_image(KEY, VM, seal(KEY, VM, pack(memory))), elsewhere)
    assert everything(elsewhere) == everything(memory)
    assert (elsewhere / "note").stat().st_mtime == 1_600_000_000


def test_the_same_memory_makes_the_same_archive_and_never_the_same_image(memory: Path) -> None:
    assert pack(memory) == pack(memory)
    assert seal(KEY, VM, pack(memory)) != seal(KEY, VM, pack(memory))


def test_what_is_no_file_stays_behind(memory: Path, elsewhere: Path) -> None:
    whole = everything(memory)
    (memory / "link").symlink_to("/etc/passwd")
    (memory / "link to a directory").symlink_to("/etc")
    os.mkfifo(memory / "pipe")
    unpack(pack(memory), elsewhere)
    assert everything(elsewhere) == whole


def test_directories_may_be_nested_deeper_than_python_recurses(tmp_path: Path, elsewhere: Path) -> None:
    memory, deep = tmp_path / "memory", "/".join("d" * 1500)
    subprocess.run(["mkdir", "-p", memory / deep], check=True)
    try:
        unpack(pack(memory), elsewhere)
        assert (elsewhere / deep).is_dir()
    finally:
        for path in (memory, elsewhere):  # others that clean up here recurse
            remove_tree(path)


def test_too_much_memory_is_refused_before_it_is_read(memory: Path) -> None:
    with (memory / "huge").open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES * 1000)
    with pytest.raises(StorageError, match="more than"):
        pack(memory)


def test_too_much_memory_in_many_files_is_refused(memory: Path) -> None:
    for number in range(5):
        (memory / f"part {number}").write_bytes(bytes(MAX_IMAGE_BYTES // 4))
    with pytest.raises(StorageError, match="more than"):
        pack(memory)


def test_memory_that_changes_while_it_is_read_is_an_archive_all_the_same(memory: Path, elsewhere: Path) -> None:
    script = "while :; do mkdir -p n/n; echo > n/n/f; ln -s / n/l; mkfifo n/p; rm -r n; ln -s / n; rm n; mkfifo n; rm n; done"
    busy = subprocess.Popen(["sh", "-c", script], cwd=memory, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            archive = pack(memory)
    finally:
        busy.kill()
        busy.wait()
    unpack(archive, elsewhere)
    assert (elsewhere / "note").read_text() == "a note"
    assert not any(path.is_symlink() for path in elsewhere.rglob("*"))


def test_the_longest_memory_has_an_image_that_the_agent_takes(memory: Path) -> None:
    room = MAX_IMAGE_BYTES - len(seal(KEY, VM, pack(memory)))
    (memory / "rest").write_bytes(bytes(room - 50_000))
    assert len(seal(KEY, VM, pack(memory))) <= MAX_IMAGE_BYTES


@pytest.mark.attack("A25")
@pytest.mark.parametrize(
    "entries",
    [
        [(tarfile.TarInfo("../outside"), b"!")],
        [(tarfile.TarInfo("a/../../outside"), b"!")],
        [special("link", tarfile.SYMTYPE, ".."), (tarfile.TarInfo("link/outside"), b"!")],
        [special("link", tarfile.LNKTYPE, "../outside")],
        [special("device", tarfile.CHRTYPE)],
        [special("pipe", tarfile.FIFOTYPE)],
        [special(".", tarfile.DIRTYPE)],
        [special("sparse", tarfile.GNUTYPE_SPARSE)],
    ],
    ids=["above", "above by a detour", "through a link", "hard link", "device", "pipe", "itself", "sparse"],
)
def test_an_archive_that_would_make_more_than_files_below_its_directory_is_refused(
    entries: list[tuple[tarfile.TarInfo, bytes]], elsewhere: Path
) -> None:
    before = everything(elsewhere.parent)
    with pytest.raises(ImageDamaged):
        unpack(archive(*entries), elsewhere)
    assert everything(elsewhere.parent) == before


@pytest.mark.attack("A25")
def test_an_archive_with_an_absolute_name_is_refused(elsewhere: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageDamaged):
        unpack(archive((tarfile.TarInfo(str(tmp_path / "outside")), b"!")), elsewhere)
    assert not (tmp_path / "outside").exists()


@pytest.mark.attack("A25")
@pytest.mark.parametrize(
    "damaged",
    [archive((tarfile.TarInfo("file"), b"x" * 2000))[:700], b"?" * 1024],
    ids=["cut", "no archive"],
)
def test_what_is_no_whole_archive_is_refused(damaged: bytes, elsewhere: Path) -> None:
    with pytest.raises(ImageDamaged):
        unpack(damaged, elsewhere)


def test_a_file_named_twice_is_refused(elsewhere: Path) -> None:
    with pytest.raises(StorageError):
        unpack(archive((tarfile.TarInfo("file"), b"1"), (tarfile.TarInfo("file"), b"2")), elsewhere)
