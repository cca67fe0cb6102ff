"""The whole on one machine, from the first file to the last process that has ended."""

from __future__ import annotations

import asyncio
import resource
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Protocol

from spvtpm.stack import making
from spvtpm.stack.lock import stack_lock
from spvtpm.stack.places import Places, make_places
from spvtpm.stack.process import Part
from spvtpm.stack.screen import Row, Up
from spvtpm.stack.supervisor import Supervisor
from spvtpm.wire.errors import UsageError

PORT: Final = 7580

_EXTRA: Final = ("alembic", "dbos", "httpx", "sqlalchemy", "starlette", "uvicorn", "websockets")


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
        UsageError: what the platform is made of is not installed.
        StateInUse: a stack runs on the directory.
        PartFailed: a part does not start, or ends again and again; the others were ended in order.
        StorageError: something cannot be read or written.
    """
    missing = [module for module in _EXTRA if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"this needs what a base installation leaves out ({missing[0]}): pip install 'spvtpm[platform]'"
        )
    if shutil.which("tpm2_pcrread") is None:
        screen.tell(
            "tpm2-tools is not installed, so VMs have no TPM tools to run: apt-get install tpm2-tools libtss2-tcti-swtpm0"
        )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the user's keyring is opened here
    places = make_places(directory)
    with stack_lock(places.directory, screen.tell) as lock:
        making.make_vendor(places, screen.tell)
        for host in places.hosts:
            making.make_secure_processor(places, host, screen.tell)
            making.make_agent(host, screen.tell)
        free = _free_port(port, screen)
        making.make_platform(places, free, screen.tell)
        making.make_keyring(places, screen.tell)
        asyncio.run(_Stack(places, screen, lock, f"http://{making.LOOPBACK}:{free}").run())


class _Stack:
    def __init__(self, places: Places, screen: Screen, lock: int, url: str) -> None:
        self._places = places
        self._screen = screen
        self._lock = lock
        self._url = url

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
        await supervisor.until_ending(asyncio.to_thread(making.log_in, self._places, self._url))
        if not supervisor.is_ending:
            rows = [Row(part.name, part.address, part.log) for part in supervisor.parts]
            self._screen.ready(Up(self._places, self._url, rows))

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
