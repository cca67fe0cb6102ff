"""Landlock: no file, no network, no signal beyond this process. No well-kept Python binding exists; this is all we need of it."""

from __future__ import annotations

import errno

from spvtpm.processor.worker._linux import ffi, lib
from spvtpm.processor.worker.linux import check

_FS_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""Number of file system access rights known since each ABI version. Source: landlock(7), "Filesystem flags"."""

_NET_RIGHTS = 0b11
"""Bind and connect TCP. Source: landlock(7), LANDLOCK_ACCESS_NET_*."""
_NET_SINCE = 4

_SCOPES = 0b11
"""Abstract unix sockets, signals. Source: landlock(7), LANDLOCK_SCOPE_*."""
_SCOPES_SINCE = 6

_LATER = {"truncation": 3, "TCP": _NET_SINCE, "device ioctls": 5, "signals and abstract sockets": _SCOPES_SINCE}
"""What came after the first ABI version, and with which one. Source: landlock(7), "VERSIONS"."""


def landlock_abi() -> int:
    """Version of the running kernel's Landlock; 0 if it has none, or has it switched off.

    Source: landlock_create_ruleset(2), LANDLOCK_CREATE_RULESET_VERSION.
    """
    version: int = lib.linux_landlock_abi()
    if version < 0 and ffi.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
        check(version, "landlock_create_ruleset")
    return max(version, 0)


def forbid_everything(abi: int) -> list[str]:
    """Takes every right that Landlock knows from this thread and what it starts; there are no exceptions.

    Args:
        abi: from `landlock_abi`.

    Returns:
        Sentences naming what this kernel's Landlock cannot take away.

    Raises:
        OSError: the kernel refuses; do not go on.
    """
    if abi == 0:
        return ["this kernel has no Landlock: file access is barred by the namespace and the system call filter alone"]
    rights = max(count for since, count in _FS_RIGHTS.items() if since <= abi)
    net = _NET_RIGHTS if abi >= _NET_SINCE else 0
    scoped = _SCOPES if abi >= _SCOPES_SINCE else 0
    check(lib.linux_landlock_restrict((1 << rights) - 1, net, scoped), "landlock_restrict_self")
    missing = [name for name, since in _LATER.items() if abi < since]
    if missing:
        return [f"this kernel's Landlock (ABI {abi}) does not bar {', '.join(missing)}: other layers must hold"]
    return []
