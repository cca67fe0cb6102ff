"""Linux calls by name, raising `OSError`: a thin layer over the compiled `_linux`."""

from __future__ import annotations

import os

from spvtpm.processor.worker._linux import ffi, lib

CLONE_NEWUSER: int = lib.CLONE_NEWUSER
CLONE_NEWNS: int = lib.CLONE_NEWNS
CLONE_NEWNET: int = lib.CLONE_NEWNET
CLONE_NEWIPC: int = lib.CLONE_NEWIPC
CLONE_NEWPID: int = lib.CLONE_NEWPID


def check(result: int, what: str) -> int:
    """Raises `OSError` for a C call that returned -1."""
    if result < 0:
        raise OSError(ffi.errno, f"{what}: {os.strerror(ffi.errno)}")
    return result


def unshare(flags: int) -> None:
    """Source: unshare(2)."""
    check(lib.unshare(flags), "unshare")


def set_dumpable(dumpable: bool) -> None:
    """Whether a core dump, and /proc for the same user, may show this process. Source: prctl(2), PR_SET_DUMPABLE."""
    check(lib.linux_prctl(lib.PR_SET_DUMPABLE, int(dumpable)), "PR_SET_DUMPABLE")


def set_no_new_privileges() -> None:
    """Source: prctl(2), PR_SET_NO_NEW_PRIVS."""
    check(lib.linux_prctl(lib.PR_SET_NO_NEW_PRIVS, 1), "PR_SET_NO_NEW_PRIVS")


def drop_capabilities() -> None:
    """Gives up every capability, those in the process's own user namespace too. Source: capset(2)."""
    check(lib.linux_drop_capabilities(), "capset")


def set_parent_death_signal(number: int) -> None:
    """Source: prctl(2), PR_SET_PDEATHSIG."""
    check(lib.linux_prctl(lib.PR_SET_PDEATHSIG, number), "PR_SET_PDEATHSIG")


def lock_memory() -> None:
    """Keeps every page out of swap, those to come too, once they are touched. Source: mlockall(2)."""
    check(lib.mlockall(lib.MCL_CURRENT | lib.MCL_FUTURE | lib.MCL_ONFAULT), "mlockall")


def enter_empty_root() -> None:
    """Makes an empty, read-only file system this process's root; the host's is out of reach. Needs a mount namespace of its own.

    Source: pivot_root(2), "pivot_root(".", ".")".
    """
    flags = lib.MS_NOSUID | lib.MS_NODEV | lib.MS_NOEXEC
    check(lib.mount(ffi.NULL, b"/", ffi.NULL, lib.MS_REC | lib.MS_PRIVATE, ffi.NULL), "making mounts private")
    check(lib.mount(b"empty", b"/tmp", b"tmpfs", flags, b"size=4k,nr_inodes=1,mode=555"), "mounting an empty root")
    os.chdir("/tmp")  # noqa: S108  # any directory will do to hang the empty root on
    check(lib.linux_pivot_root(b".", b"."), "pivot_root")
    check(lib.umount2(b".", lib.MNT_DETACH), "leaving the old root")
    os.chdir("/")
    check(lib.mount(ffi.NULL, b"/", ffi.NULL, flags | lib.MS_REMOUNT | lib.MS_RDONLY, ffi.NULL), "remounting read-only")
