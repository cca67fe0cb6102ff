"""Files that hold a secret: created whole or not at all, read only when nobody else can."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from spvtpm.wire.errors import StorageError


def create_private_file(path: Path, content: bytes) -> None:
    """Writes a new file with mode 0600, durably; an existing one is never replaced.

    Raises:
        FileExistsError: there is one.
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def read_private_file(path: Path, max_bytes: int) -> bytes:
    """Reads a regular file that belongs to this user (or root) and that nobody else can read.

    Raises:
        StorageError: it is missing, a link, somebody else's, readable by others, or longer than `max_bytes`.
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
        if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o077:
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
