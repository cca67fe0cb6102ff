"""QEMU's monitor: QMP, through the package `qemu.qmp`. What it raises is typed.

Source of commands and answers: QEMU, qapi/*.json.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

import msgspec
from qemu.qmp import ExecuteError, QMPClient, QMPError

from spvtpm.files.unix_sockets import peer_of
from spvtpm.wire.decoding import UNDECODABLE, in_words, printable
from spvtpm.wire.platform_errors import MachineFailed

_PATIENCE_S: Final = 10.0
_LOOK_S: Final = 0.05

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # the errors that it logs are raised, too

_Answer = TypeVar("_Answer")


class Empty(msgspec.Struct, frozen=True):
    """Done."""


class RunStatus(msgspec.Struct, frozen=True):
    """Of `query-status`."""

    status: str


class KvmInfo(msgspec.Struct, frozen=True):
    """Of `query-kvm`."""

    enabled: bool


class MigrationInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """Of `query-migrate`. Empty as long as there is nothing to say."""

    status: str = ""
    error_desc: str = "it does not say why"


class QemuMonitor:
    """One machine's. Connects when it is needed, and again after it was cut off: an agent that comes later does the same.

    Args:
        path: of the socket.
        pid: process id of QEMU; nobody else is spoken to.
    """

    def __init__(self, path: Path, pid: int) -> None:
        self._path = path
        self._pid = pid
        self._client: QMPClient | None = None
        self._speaking = asyncio.Lock()

    async def execute(self, command: str, answer: type[_Answer], **arguments: object) -> _Answer:
        """One command; what it returns.

        Args:
            command: its name.
            answer: what kind of answer it has.
            arguments: of the command.

        Raises:
            MachineFailed: it is refused, or QEMU does not answer, or something else.
        """
        async with self._speaking:
            returned = await self._execute(command, arguments)
        try:
            return msgspec.convert(returned, answer)
        except UNDECODABLE as error:
            raise MachineFailed(f"QEMU answers {command} with something else: {in_words(error)}") from None

    async def _execute(self, command: str, arguments: dict[str, object], descriptor: int | None = None) -> object:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                client = await self._connected()
                if descriptor is not None:
                    client.send_fd_scm(descriptor)
                return await client.execute(command, arguments)
        except ExecuteError as error:
            raise MachineFailed(f"QEMU refuses {command}: {printable(str(error))[:512]}") from None
        except TimeoutError:
            await self._drop()
            raise MachineFailed(f"QEMU does not answer {command} within {_PATIENCE_S:g} s") from None
        except (QMPError, OSError, EOFError) as error:
            await self._drop()
            raise MachineFailed(f"QEMU's monitor cannot be had: {printable(str(error))[:512]}") from None

    async def hand_over(self, descriptor: int, name: str) -> None:
        """Gives QEMU a descriptor, of which commands then speak as `fd:NAME`.

        Raises:
            MachineFailed: as of `execute`.
        """
        async with self._speaking:
            await self._execute("getfd", {"fdname": name}, descriptor)

    async def wait_for_migration(self) -> None:
        """Returns once the memory is written, or read.

        Raises:
            MachineFailed: it failed.
        """
        while True:
            info = await self.execute("query-migrate", MigrationInfo)
            if info.status == "completed":
                return
            if info.status in ("failed", "cancelled"):
                raise MachineFailed(f"QEMU could not move the machine's memory: {printable(info.error_desc)[:512]}")
            await asyncio.sleep(_LOOK_S)

    async def _connected(self) -> QMPClient:
        if self._client is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            try:
                await asyncio.get_running_loop().sock_connect(connection, str(self._path))
                if peer_of(connection).pid != self._pid:
                    raise MachineFailed(f"another process than QEMU listens on {self._path}")
                client = QMPClient()
                await client.connect(connection)
            except BaseException:
                connection.close()
                raise
            self._client = client
        return self._client

    async def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with suppress(QMPError, OSError, EOFError):
                await client.disconnect()

    async def close(self) -> None:
        """Hangs up."""
        async with self._speaking:
            await self._drop()
