"""QEMU's monitor: QMP, through the package `qemu.qmp`. What it raises is typed."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from qemu.qmp import ExecuteError, QMPClient, QMPError

from spvtpm.files.unix_sockets import peer_of
from spvtpm.wire.decoding import printable
from spvtpm.wire.platform_errors import MachineFailed

_PATIENCE_S: Final = 10.0
_LOOK_S: Final = 0.05


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

    async def execute(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """One command; what it returns.

        Raises:
            MachineFailed: it is refused, or QEMU does not answer.
        """
        async with self._speaking:
            return await self._execute(command, arguments)

    async def _execute(self, command: str, arguments: dict[str, object] | None, descriptor: int | None = None) -> Any:
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
            info = await self.execute("query-migrate")
            match info.get("status"):
                case "completed":
                    return
                case "failed" | "cancelled":
                    reason = printable(str(info.get("error-desc", "it does not say why")))[:512]
                    raise MachineFailed(f"QEMU could not move the machine's memory: {reason}")
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
