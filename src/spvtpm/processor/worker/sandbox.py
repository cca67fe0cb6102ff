"""What a worker cannot do, and from when on: before it has seen one byte from a guest.

Two steps. The zygote enters namespaces of its own once, for itself and every worker it will fork (a thousand network
namespaces would cost more than the vTPMs). Each worker then takes everything else from itself. What the kernel does not
give is not passed over in silence: both steps return sentences for the log.
"""

from __future__ import annotations

import os
import resource
import signal
from contextlib import suppress
from pathlib import Path
from typing import Self

from spvtpm.processor.worker import linux
from spvtpm.processor.worker.landlock import forbid_everything, landlock_abi
from spvtpm.processor.worker.seccomp import compile_filter, load_filter, load_rules

_NOBODY = 65534
"""The overflow user id: owns nothing. Source: user_namespaces(7)."""

_LIMITS = {
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_MEMLOCK: 0,
    resource.RLIMIT_MSGQUEUE: 0,
    resource.RLIMIT_NOFILE: 32,
    resource.RLIMIT_AS: 256 << 20,
}
"""Source: setrlimit(2). A worker needs ten descriptors and 40 MiB of address space, most of it shared code."""

_MAX_THREADS = 8
"""A worker needs two. Counted per user and user namespace. Source: setrlimit(2), RLIMIT_NPROC."""

_NAMESPACES = {
    "mount": linux.CLONE_NEWNS,
    "network": linux.CLONE_NEWNET,
    "IPC": linux.CLONE_NEWIPC,
    "process": linux.CLONE_NEWPID,
}


def enter_namespaces() -> list[str]:
    """Puts this process, and what it forks, into namespaces of its own, with an empty read-only root and no network.

    A process namespace begins with the next fork; that child is its first process. After this call no file can be opened:
    everything must have been imported.

    Returns:
        Sentences naming what this kernel does not give.
    """
    missing = _become_nobody()
    # /proc/self belongs to root otherwise, and ids could not be mapped.
    linux.set_dumpable(True)
    missing += _unshare_all()
    # The ids may be shared with strangers, and a zygote in a stranger's hand would hand over its workers.
    linux.set_dumpable(False)
    return missing


def _unshare_all() -> list[str]:
    try:
        linux.unshare(linux.CLONE_NEWUSER)
    except OSError as error:
        return [f"this kernel gives workers no namespaces of their own ({error}): other layers must hold"]
    _map_own_ids()
    missing = []
    for name, flag in _NAMESPACES.items():
        try:
            linux.unshare(flag)
            if flag == linux.CLONE_NEWNS:
                linux.enter_empty_root()
        except OSError as error:
            missing.append(
                f"this kernel gives workers no {name} namespace of their own ({error}): other layers must hold"
            )
    return missing


def _become_nobody() -> list[str]:
    """A worker of a root daemon is not root's; other users keep their id, having no other."""
    if os.geteuid() != 0:
        return []
    try:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    except OSError as error:
        return [
            f"workers keep root's user id, which no limit on threads binds ({error}): give the SP a user of its own"
        ]
    return []


def _map_own_ids() -> None:
    """Source: user_namespaces(7), "Defining user and group ID mappings"."""
    uid, gid = os.getresuid()[0], os.getresgid()[0]
    with suppress(OSError):  # without a map the ids show as nobody's, and mounting decides whether that will do
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


class Sandbox:
    """What `confine` needs, made ready in the zygote.

    Args:
        program: the compiled system call filter.
        abi: version of the kernel's Landlock.
    """

    def __init__(self, program: bytes, abi: int) -> None:
        self._program = program
        self._abi = abi

    @classmethod
    def prepare(cls) -> Self:
        """Reads and compiles the rules."""
        return cls(compile_filter(load_rules()), landlock_abi())

    def confine(self, expected_parent: int) -> list[str]:
        """Confines this process for good.

        Args:
            expected_parent: process id of the zygote; if it is gone already, this process ends.

        Returns:
            Sentences naming each layer that this kernel does not give.

        Raises:
            OSError: a layer that the kernel has does not take; do not go on.
        """
        missing = _bound_threads()  # first: new credentials may reset what follows
        linux.set_dumpable(False)
        linux.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != expected_parent:  # it died before the signal was asked for
            os._exit(1)
        for limit, value in _LIMITS.items():
            _soft, hard = resource.getrlimit(limit)
            bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (bound, bound))
        linux.drop_capabilities()
        # Landlock and the filter need it, and it must come before them; the filter comes last, as it bars all of these calls.
        linux.set_no_new_privileges()
        missing += forbid_everything(self._abi)
        load_filter(self._program)
        return missing


def _bound_threads() -> list[str]:
    """Workers share a user, so each is counted in a user namespace of its own: none can use up another's threads."""
    try:
        linux.unshare(linux.CLONE_NEWUSER)
    except OSError as error:
        return [f"nothing bounds the number of a worker's threads ({error}): bound the service's (TasksMax=)"]
    resource.setrlimit(resource.RLIMIT_NPROC, (_MAX_THREADS, _MAX_THREADS))
    return []
