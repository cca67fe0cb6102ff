"""Network namespaces of the test's own: hosts that are apart from each other and from us but for cables that can be cut.

Source: ip-netns(8), veth(4), setns(2).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_CLONE_NEWNET: Final = 0x40000000
"""Source: linux/sched.h."""


class NoNetworks(Exception):
    """They cannot be made here; the text says why."""


class Network:
    """A network namespace with a cable to ours.

    Args:
        number: 1 to 50; no other network of this process has it at the time.

    Raises:
        NoNetworks: it cannot be made.
    """

    def __init__(self, number: int) -> None:
        self._name = f"spvtpm-{os.getpid()}-{number}"
        self._cable = f"sv{os.getpid() % 100_000}n{number}"  # at most 15 letters
        subnet = f"10.{200 + number}.{os.getpid() % 250}"  # those of other test processes are others
        self.address = f"{subnet}.2"
        here = f"{subnet}.1/30"
        try:
            _ip("netns", "add", self._name)
            _ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", self._name)
            _ip("addr", "add", here, "dev", self._cable)
            _ip("-n", self._name, "addr", "add", f"{self.address}/30", "dev", "eth0")
            _ip("-n", self._name, "link", "set", "lo", "up")
            _ip("link", "set", self._cable, "up")
            self.mend()
        except NoNetworks:
            self.close()
            raise

    def cut(self) -> None:
        """Nothing goes through any more, and nobody is told: it is cut at its far end, so that the way there stays."""
        _ip("-n", self._name, "link", "set", "eth0", "down")

    def mend(self) -> None:
        """It does again."""
        _ip("-n", self._name, "link", "set", "eth0", "up")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What this thread starts in here is in the network."""
        ours = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        theirs = os.open(Path("/run/netns", self._name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            _set_namespace(theirs)
            yield
        finally:
            _set_namespace(ours)
            os.close(ours)
            os.close(theirs)

    def close(self) -> None:
        """It goes, with its cable, once nobody is in it any more."""
        for words in (("link", "del", self._cable), ("netns", "del", self._name)):
            with suppress(NoNetworks):
                _ip(*words)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _ip(*words: str) -> None:
    try:
        done = subprocess.run(["ip", *words], capture_output=True, check=False, timeout=30)
    except OSError as error:
        raise NoNetworks(f"ip: {error.strerror}") from None
    if done.returncode:
        raise NoNetworks(f"ip {' '.join(words)}: {done.stderr.decode().strip()}")


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
