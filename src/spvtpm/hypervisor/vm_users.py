"""Which user a VM's machine runs as: one of its own where the host allows it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Final, TypedDict

from spvtpm.wire.errors import ResourceError

log = logging.getLogger(__name__)

_TRY_S: Final = 60.0


class Identity(TypedDict, total=False):
    """Whose process one shall be, as `subprocess.Popen` wants it told."""

    user: int
    group: int
    extra_groups: list[int]


class VmUsers:
    """User ids for VMs.

    Args:
        directory: of the VMs: each has a directory `machine` below its own, that belongs to its user.
        uids: the first user id, and how many there are; None: VMs run as this process's user.
    """

    def __init__(self, directory: Path, uids: tuple[int, int] | None) -> None:
        self._directory = directory
        self._uids = uids
        if uids is None:
            return
        why = self._why_not(uids[0])
        if why:
            log.warning("VMs run as user %d, not as users of their own: %s", os.geteuid(), why)
            self._uids = None

    def _why_not(self, uid: int) -> str:
        if os.geteuid() != 0:
            return "only root may start processes of other users"
        command = [sys.executable, "-c", "import spvtpm.guest"]
        try:
            subprocess.run(
                command,
                user=uid,
                group=uid,
                extra_groups=[],
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
                timeout=_TRY_S,
            )
        except (OSError, subprocess.SubprocessError):
            return f"user {uid} cannot reach the program {sys.executable}, or the directory {self._directory}"
        return ""

    def next_uid(self) -> int:
        """A user id for another VM: the first that no VM has.

        Raises:
            ResourceError: there is none left, and two VMs never share one: whoever is its user gets a VM's key.
        """
        if self._uids is None:
            return os.geteuid()
        first, count = self._uids
        used = {path.stat().st_uid for path in self._directory.glob("*/machine")}
        free = (uid for uid in range(first, first + count) if uid not in used)
        uid = next(free, None)
        if uid is None:
            raise ResourceError(f"all {count} user ids for VMs are taken: `vm_uids` in the agent's configuration")
        return uid

    def alone(self, uid: int) -> int | None:
        """The user id, if it is one VM's alone; otherwise None."""
        sharing = [path for path in self._directory.glob("*/machine") if path.stat().st_uid == uid]
        return uid if uid != os.geteuid() and len(sharing) == 1 else None

    def identity(self, uid: int) -> Identity:
        """What makes a process one of this user."""
        if uid == os.geteuid():
            return {}
        return {"user": uid, "group": uid, "extra_groups": []}
