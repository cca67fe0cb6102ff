"""What the agent has of an emulated VM on disk; below it the machine's own directory, which may be another user's."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from spvtpm.files import read_file, replace_file, sync_directory
from spvtpm.files.removal import remove_tree
from spvtpm.hypervisor.virtual_machine import Boot
from spvtpm.hypervisor.vm_users import VmUsers
from spvtpm.wire.agent_api import MAX_IMAGE_BYTES
from spvtpm.wire.decoding import printable
from spvtpm.wire.errors import StorageError
from spvtpm.wire.memory_records import MAX_ROUND_BYTES

_MAX_LOG_BYTES: Final = 65_536
_MAX_BOOT_BYTES: Final = 4096


class _BootRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    boots: int
    resumes: bool


class MachineDirectory:
    """One VM's.

    Args:
        path: of all that the agent has of it.
        users: whose processes machines are.
    """

    def __init__(self, path: Path, users: VmUsers) -> None:
        self.path = path
        self.own = path / "machine"
        self.image = self.own / "image"
        self._users = users

    @property
    def uid(self) -> int:
        """Whose the machine is."""
        return self.own.stat().st_uid

    def make_room(self) -> None:
        """Makes it, if it is not there.

        Raises:
            OSError: there is no room.
        """
        self.path.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.path.chmod(0o711)  # whatever the umask took
        if not self.own.exists():
            new = self.own.with_name("machine.new")  # a machine's directory is its user's, or not there
            remove_tree(new)
            uid = self._users.next_uid()
            new.mkdir(mode=0o700)
            os.chown(new, uid, -1)
            new.rename(self.own)

    def note_boot(self, boot: Boot) -> None:
        """Keeps in which boot its machine takes part.

        Raises:
            StorageError: it cannot be written.
        """
        replace_file(self.path / "boot", msgspec.json.encode(_BootRecord(boot.boots, boot.resumes)))

    def boots(self) -> int:
        """Number of that boot.

        Raises:
            StorageError, msgspec.DecodeError: it is not known.
        """
        return self._boot().boots

    def resumes(self) -> bool:
        """Whether it goes on from its image in that boot.

        Raises:
            StorageError, msgspec.DecodeError: it is not known.
        """
        return self._boot().resumes

    def _boot(self) -> _BootRecord:
        return msgspec.json.decode(read_file(self.path / "boot", _MAX_BOOT_BYTES), type=_BootRecord)

    async def clear(self) -> None:
        """Removes what a machine that is gone has left behind: sockets, and memory in clear. Its image stays."""
        if self.own.is_dir():
            await asyncio.to_thread(self._clear)

    def _clear(self) -> None:
        for path in self.own.iterdir():
            if path.name == "image":
                continue
            if path.is_dir() and not path.is_symlink():
                with suppress(StorageError):  # the machine that comes next says so
                    remove_tree(path)
            else:
                path.unlink(missing_ok=True)

    async def remove(self) -> None:
        """Removes all of it.

        Raises:
            StorageError: something cannot be removed.
        """
        await asyncio.to_thread(remove_tree, self.path)

    async def forget_image(self) -> None:
        """Removes the image, durably."""
        try:
            self.image.unlink(missing_ok=True)
            if self.own.is_dir():
                await asyncio.to_thread(sync_directory, self.own)
        except OSError as error:
            raise StorageError(f"cannot remove {self.image}: {error.strerror}") from None

    async def put_image(self, image: bytes) -> None:
        """Stores an image that was brought from elsewhere, durably.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            self.make_room()
            await asyncio.to_thread(replace_file, self.image, image)
            os.chown(self.image, self.uid, -1, follow_symlinks=False)
            await asyncio.to_thread(sync_directory, self.path.parent)
        except OSError as error:
            raise StorageError(f"cannot write {self.image}: {error.strerror}") from None

    async def read_image(self) -> bytes:
        """The image.

        Raises:
            StorageError: there is none, or it is too long.
        """
        return await asyncio.to_thread(read_file, self.image, MAX_IMAGE_BYTES, private=False)

    async def read_copy(self) -> bytes:
        """What the machine has written of its memory in this round.

        Raises:
            StorageError: there is none, or it is too long.
        """
        return await asyncio.to_thread(read_file, self.own / "copy", MAX_ROUND_BYTES, private=False)

    def last_words(self) -> str:
        """The end of what the machine has said, for a sentence."""
        try:
            words = read_file(self.path / "log", _MAX_LOG_BYTES)
        except StorageError:
            return ""
        lines = words.decode(errors="replace").strip().splitlines()
        return f" ({printable(lines[-1])[:512]})" if lines else ""
