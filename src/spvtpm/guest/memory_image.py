"""The memory of a suspended VM as one sealed file: its hypervisor keeps it, and can neither read nor alter it.

    "SPVTPMEM"   8 bytes
    version      u16, little-endian: 1
    VM id        16 bytes
    nonce        12 bytes, random
    content      AES-256-GCM of a tar archive, tag of 16 bytes behind it; the 38 bytes before are its associated data

    key = HKDF-SHA-256(VM key, salt = VM id, info = "spvtpm memory image v1", 32 bytes)

Source: AES-GCM: NIST SP 800-38D; HKDF: RFC 5869; tar: POSIX.1-2008, pax. Format: docs/formats/memory-image.md.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import tarfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from spvtpm.wire.agent_api import MAX_IMAGE_BYTES
from spvtpm.wire.errors import StorageError
from spvtpm.wire.memory_records import MAX_MEMORY_BYTES
from spvtpm.wire.platform_errors import ImageDamaged

_HEADER: Final = struct.Struct("<8sH16s12s")
_MAGIC: Final = b"SPVTPMEM"
_VERSION: Final = 1
_TAG_BYTES: Final = 16
_MAX_ENTRIES: Final = 10_000
_GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)  # or a link or a socket is in its place
_MAX_ARCHIVE_BYTES: Final = MAX_MEMORY_BYTES  # what can sleep can move, too


def pack(directory: Path) -> bytes:
    """Regular files and directories below it as an archive; the same for the same content.

    Programs may run meanwhile: what goes while it is read is left out.

    Raises:
        StorageError: it is too much, or cannot be read.
    """
    archive = io.BytesIO()
    try:
        with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for number, path in enumerate(_walk(directory), 1):
                if number > _MAX_ENTRIES:
                    raise StorageError(f"the VM's memory has more than {_MAX_ENTRIES} files")
                _add(tar, path, str(path.relative_to(directory)))
                if archive.tell() > _MAX_ARCHIVE_BYTES:
                    raise StorageError(f"the VM's memory is more than {_MAX_ARCHIVE_BYTES} bytes")
    except OSError as error:
        raise StorageError(f"the VM's memory cannot be read: {error.strerror}") from None
    packed = archive.getvalue()
    if len(packed) > _MAX_ARCHIVE_BYTES:
        raise StorageError(f"the VM's memory is more than {_MAX_ARCHIVE_BYTES} bytes")
    return packed


def _walk(directory: Path) -> Iterator[Path]:
    """Each directory before what is in it. Without recursion: a program in the VM may have nested as it likes."""
    queue = sorted(directory.iterdir(), reverse=True)
    while queue:
        path = queue.pop()
        with suppress(FileNotFoundError, NotADirectoryError):
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                below = sorted(path.iterdir(), reverse=True)
                yield path
                queue += below
            elif stat.S_ISREG(mode):
                yield path


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _GONE:
            return
        raise
    try:
        status = os.fstat(descriptor)
        entry = tarfile.TarInfo(name)
        entry.mode = stat.S_IMODE(status.st_mode) & 0o777
        entry.mtime = int(status.st_mtime)
        if stat.S_ISDIR(status.st_mode):
            entry.type = tarfile.DIRTYPE
            tar.addfile(entry)
        elif stat.S_ISREG(status.st_mode):
            content = _content(descriptor)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    finally:
        os.close(descriptor)


def _content(descriptor: int) -> bytes:
    if os.fstat(descriptor).st_size <= _MAX_ARCHIVE_BYTES:
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(_MAX_ARCHIVE_BYTES + 1)  # it may grow meanwhile
        if len(content) <= _MAX_ARCHIVE_BYTES:
            return content
    raise StorageError(f"the VM's memory is more than {_MAX_ARCHIVE_BYTES} bytes")


def unpack(archive: bytes, directory: Path) -> None:
    """Makes the files of an archive in an empty directory.

    Raises:
        ImageDamaged: it is no such archive, or has what no such archive has. Some files may be there.
        StorageError: a file cannot be written.
    """
    modes: list[tuple[Path, int]] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for number, entry in enumerate(tar, 1):
                if number > _MAX_ENTRIES:
                    raise ImageDamaged("the memory image has too many files")
                path = _place(entry, directory)
                modes.append((path, entry.mode & 0o777))
                if entry.isdir():
                    path.mkdir(mode=0o700)
                else:
                    _extract(tar, entry, path)
        for path, mode in reversed(modes):  # a directory last: its mode may forbid what is done in it
            path.chmod(mode)
    except (tarfile.TarError, ValueError, OverflowError):
        raise ImageDamaged("the memory image holds no archive") from None
    except OSError as error:
        raise StorageError(f"the VM's memory cannot be restored: {error.strerror}") from None


def _place(entry: tarfile.TarInfo, directory: Path) -> Path:
    name = PurePosixPath(entry.name)
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise ImageDamaged("the memory image names a file outside of the VM's memory")
    if not (entry.isdir() or (entry.isreg() and not entry.issparse())):
        raise ImageDamaged("the memory image holds something else than files and directories")
    return directory / name


def _extract(tar: tarfile.TarFile, entry: tarfile.TarInfo, path: Path) -> None:
    source = tar.extractfile(entry)
    assert source is not None  # noqa: S101  # a regular file has content
    content = source.read()
    if len(content) != entry.size:
        raise ImageDamaged("the memory image ends inside a file")
    with path.open("xb") as file:
        file.write(content)
    os.utime(path, (entry.mtime, entry.mtime))


def seal(vm_key: bytes, vm_id: uuid.UUID, archive: bytes) -> bytes:
    """The image of an archive.

    Args:
        vm_key: 32 bytes.
        vm_id: of the VM.
        archive: as `pack` has made it.
    """
    header = _HEADER.pack(_MAGIC, _VERSION, vm_id.bytes, os.urandom(12))
    return header + _cipher(vm_key, vm_id).encrypt(header[-12:], archive, header)


def open_image(vm_key: bytes, vm_id: uuid.UUID, image: bytes) -> bytes:
    """The archive in an image; hostile bytes.

    Raises:
        ImageDamaged: it is none, of another VM or version, or was altered.
    """
    if len(image) > MAX_IMAGE_BYTES or len(image) < _HEADER.size + _TAG_BYTES:
        raise ImageDamaged("the memory image is too long or too short")
    magic, version, of_vm, nonce = _HEADER.unpack_from(image)
    if magic != _MAGIC or version != _VERSION:
        raise ImageDamaged("it is no memory image of a version known here")
    if of_vm != vm_id.bytes:
        raise ImageDamaged("the memory image is another VM's")
    try:
        return _cipher(vm_key, vm_id).decrypt(nonce, image[_HEADER.size :], image[: _HEADER.size])
    except InvalidTag:
        raise ImageDamaged("the memory image was altered, or made under another VM key") from None


def _cipher(vm_key: bytes, vm_id: uuid.UUID) -> AESGCM:
    return AESGCM(HKDF(SHA256(), 32, vm_id.bytes, b"spvtpm memory image v1").derive(vm_key))
