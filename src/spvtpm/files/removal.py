"""Removes a directory that strangers have filled: however deep they have nested it, whatever they change meanwhile."""

from __future__ import annotations

import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Final

from spvtpm.wire.errors import StorageError

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: Path) -> None:
    """Removes a directory and all in it; one that is not there is as good as removed.

    Without recursion, and with at most two directories open: what lies deeper is moved up before it goes. Links are never
    followed.

    Raises:
        StorageError: something cannot be removed.
    """
    try:
        parent = os.open(path.parent, _DIRECTORY & ~os.O_NOFOLLOW)
        try:
            _empty(parent, path.name)
            os.rmdir(path.name, dir_fd=parent)
        finally:
            os.close(parent)
    except FileNotFoundError:
        if path.exists():  # somebody else removes, too
            raise StorageError(f"cannot remove {path}: it changes meanwhile") from None
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror}") from None


def _empty(parent: int, name: str) -> None:
    top = _open(parent, name)
    try:
        while names := os.listdir(top):  # noqa: PTH208  # of a descriptor
            for inner in names:
                _remove(top, inner)
    finally:
        os.close(top)


def _remove(top: int, name: str) -> None:
    if not _is_directory(top, name):
        os.unlink(name, dir_fd=top)
        return
    descriptor = _open(top, name)
    try:
        for inner in os.listdir(descriptor):  # noqa: PTH208  # of a descriptor
            if _is_directory(descriptor, inner):
                os.close(_open(descriptor, inner))  # or it could not be moved
                os.rename(inner, uuid.uuid4().hex, src_dir_fd=descriptor, dst_dir_fd=top)
            else:
                os.unlink(inner, dir_fd=descriptor)
    finally:
        os.close(descriptor)
    os.rmdir(name, dir_fd=top)


def _is_directory(parent: int, name: str) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


def _open(parent: int, name: str) -> int:
    """A directory, with a mode that lets its owner empty and move it."""
    try:
        descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
    except PermissionError:
        os.chmod(
            name, stat.S_IRWXU, dir_fd=parent
        )  # not root, who is refused nothing: at worst another file of this user's
        descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
    with suppress(PermissionError):  # somebody else's, whom root may pass
        os.fchmod(descriptor, stat.S_IRWXU)
    return descriptor
