"""The whole on one machine, from the first file to the last process that has ended."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import socket
from pathlib import Path
from typing import Final, Protocol

from spvtpm.stack import making
from spvtpm.stack.lock import stack_lock
from spvtpm.stack.places import Places, make_places
from spvtpm.stack.process import Part
from spvtpm.stack.screen import Row, Up
from spvtpm.stack.supervisor import Supervisor
from spvtpm.terminal.owned import Account
from spvtpm.terminal.platform import Platform
from spvtpm.wire.errors import SpvtpmError

PORT: Final = 7580

_ONLINE_PATIENCE_S: Final = 30.0
_LOOK_AGAIN_S: Final = 0.1


class Screen(Protocol):
    """Where a person, or a script, reads."""

    def tell(self, sentence: str) -> None:
        """Something has happened."""

    def ready(self, up: Up) -> None:
        """All of it is up."""


def run_stack(directory: Path, screen: Screen, port: int = PORT) -> None:
    """Makes what is missing, runs it all until a signal to end comes, and ends it in order.

    Args:
        directory: of all that it keeps.
        screen: told what happens.
        port: where the platform listens on this machine; another one if somebody has it.

    Raises:
        StateInUse: a stack runs on the directory.
        PartFailed: a part does not start, or ends again and again; the others were ended in order.
        StorageError: something cannot be read or written.
    """
    if shutil.which("tpm2_pcrread") is None:
        screen.tell(
            "tpm2-tools is not installed, so VMs have no TPM tools: apt-get install tpm2-tools libtss2-tcti-swtpm0"
        )
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the user's keyring is opened here
    places = make_places(directory)
    with stack_lock(places.directory, screen.tell) as lock:
        making.make_vendor(places, screen.tell)
        for host in places.hosts:
            making.make_secure_processor(places, host, screen.tell)
            making.make_agent(places, host, screen.tell)
        free = _free_port(port, screen)
        making.make_platform(places, free, screen.tell)
        account = making.make_keyring(places, f"http://{making.LOOPBACK}:{free}", screen.tell)
        asyncio.run(_Stack(places, screen, lock, account).run())


class _Stack:
    def __init__(self, places: Places, screen: Screen, lock: int, account: Account) -> None:
        self._places = places
        self._screen = screen
        self._lock = lock
        self._account = account

    async def run(self) -> None:
        supervisor = Supervisor(self._screen)
        try:
            await self._start(supervisor)
            await supervisor.watch()
            self._screen.tell("ending it in order: the platform, the agents with their VMs, the secure processors")
        finally:
            await supervisor.stop()

    async def _start(self, supervisor: Supervisor) -> None:
        hosts = self._places.hosts
        await supervisor.start(*(self._part(host.sp.name, "sp", "run", str(host.sp)) for host in hosts))
        await supervisor.start(*(self._part(host.agent.name, "agent", "run", str(host.agent)) for host in hosts))
        await supervisor.start(self._part("cloud", "cloud", "run", str(self._places.cloud)))
        await supervisor.until_ending(self._hosts_are_online())
        if not supervisor.is_ending:
            rows = [Row(part.name, part.address, part.log) for part in supervisor.parts]
            self._screen.ready(Up(self._places, self._account.url, rows))

    async def _hosts_are_online(self) -> None:
        """Asks the platform, as its first user, until it has heard of every host."""
        with Platform(self._account) as platform:
            try:
                async with asyncio.timeout(_ONLINE_PATIENCE_S):
                    while sum(chip.is_online for chip in await asyncio.to_thread(platform.chips)) < len(
                        self._places.hosts
                    ):
                        await asyncio.sleep(_LOOK_AGAIN_S)
            except (TimeoutError, SpvtpmError) as error:
                why = f": {error}" if isinstance(error, SpvtpmError) else ""
                self._screen.tell(
                    f"the platform does not see every host yet{why}; its log is {self._places.log('cloud')}"
                )

    def _part(self, name: str, *words: str) -> Part:
        return Part(name, words, self._places.log(name), self._lock)


def _free_port(port: int, screen: Screen) -> int:
    for candidate in (port, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that is just ended does not count
            try:
                probe.bind((making.LOOPBACK, candidate))
            except OSError:
                continue
            found = int(probe.getsockname()[1])
        if found != port:
            screen.tell(f"port {port} is in use: the platform listens on port {found} this time")
        return found
    raise AssertionError("the kernel gives no port")
