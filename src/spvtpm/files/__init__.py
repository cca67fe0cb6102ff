"""Files that domains keep: made whole or not at all, durable; private ones read only when nobody else can. Below all domains."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spvtpm.wire.errors import AlreadyExists, StorageError

PRIVATE, PUBLIC = 0o600, 0o644


def create_file(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Writes a new file, durably; an existing one is never replaced.

    Raises:
        AlreadyExists: there is one.
        StorageError: it cannot be written.
    """
    try:
        temporary = _write_beside(path, content, mode)
        try:
            os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)
    except FileExistsError:
        raise AlreadyExists(f"{path} exists already") from None
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None


def replace_file(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Puts a file in the place of another one, durably: at any moment one of both is there, whole.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        _write_beside(path, content, mode).replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None


def read_file(path: Path, max_bytes: int, *, private: bool = True) -> bytes:
    """Reads a regular file; a private one must belong to this user (or root) and be closed to all others.

    Raises:
        StorageError: it is missing, a link, longer than `max_bytes`, or somebody else can read what is private.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error.strerror}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise StorageError(f"{path} is no regular file")
    with os.fdopen(descriptor, "rb") as file:
        if private and (status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o077):
            mode = stat.S_IMODE(status.st_mode)
            raise StorageError(f"{path} can be read by others (owner {status.st_uid}, mode {mode:04o}; needed: 0600)")
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise StorageError(f"{path} is longer than {max_bytes} bytes")
    return content


def sync_directory(path: Path) -> None:
    """Makes the directory's entries durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the directory for one change at a time; waits for whoever has it.

    Raises:
        StorageError: there is none.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"cannot open {directory}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_beside(path: Path, content: bytes, mode: int) -> Path:
    """The content, synced, in a new file beside `path`, which the caller moves there."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # whatever the umask took
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
