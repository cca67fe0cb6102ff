"""Hands each VM its key, once for each boot (`wire/launch_secret.py`). That it was taken is durable before it leaves."""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from spvtpm.files.unix_sockets import peer_of
from spvtpm.processor.security_block import VmSecurityBlock
from spvtpm.processor.unix_sockets import Acceptor, listen
from spvtpm.wire.errors import SpvtpmError
from spvtpm.wire.launch_secret import SUFFIX

log = logging.getLogger(__name__)

_BACKLOG = 8

Note = Callable[[uuid.UUID, bytes, str, str], Awaitable[VmSecurityBlock | None]]
"""Makes an event durable, if the boot is still under way: VM, boot id, word, sentence. Gives the block then, or None."""


class LaunchSecrets:
    """The launch secrets of all VMs that run.

    Args:
        runtime: directory of the sockets.
        note: makes an event durable.
    """

    def __init__(self, runtime: Path, note: Note) -> None:
        self._runtime = runtime
        self._note = note
        self._offers: dict[uuid.UUID, _Offer] = {}

    def offer(self, block: VmSecurityBlock, uids: frozenset[int]) -> None:
        """A boot has begun. Without `inject_key` there is nothing to be had.

        Args:
            block: of the VM, running.
            uids: whose process may have it.

        Raises:
            ResourceError: no socket can be had.
        """
        self.withdraw(block.vm_id)
        if block.ownership.inject_key and block.boot_id is not None:
            path = self._runtime / f"{block.vm_id}{SUFFIX}"
            self._offers[block.vm_id] = _Offer(path, block.vm_id, block.boot_id, uids, self._note)

    def path(self, vm_id: uuid.UUID) -> str:
        """The socket, while there is a secret to be had; otherwise empty."""
        offer = self._offers.get(vm_id)
        return "" if offer is None or offer.is_taken else str(offer.path)

    def withdraw(self, vm_id: uuid.UUID) -> None:
        """The boot has ended."""
        offer = self._offers.pop(vm_id, None)
        if offer is not None:
            offer.close()

    def close(self) -> None:
        """No more secrets."""
        for vm_id in list(self._offers):
            self.withdraw(vm_id)


class _Offer:
    """Of one boot. The socket stays after the secret was taken, so that a second attempt is seen."""

    def __init__(self, path: Path, vm_id: uuid.UUID, boot_id: bytes, uids: frozenset[int], note: Note) -> None:
        self.path = path
        self.is_taken = False
        self._vm_id = vm_id
        self._boot_id = boot_id
        self._uids = uids
        self._note = note
        self._has_refused = False
        self._tasks = set[asyncio.Task[None]]()
        self._acceptor = Acceptor(listen(path, uids, _BACKLOG), path.name, self._admit)

    def _admit(self, connection: socket.socket) -> None:
        uid = peer_of(connection).uid
        if uid not in self._uids:
            self._refuse(connection, f"user {uid} is not the VM's")
        elif self.is_taken:
            self._refuse(connection, f"taken before; tried again by user {uid}")
        else:
            self.is_taken = True
            self._begin(self._give(connection, uid))

    def _refuse(self, connection: socket.socket, why: str) -> None:
        connection.close()
        if not self._has_refused:  # once a boot: who tries a thousand times washes nothing away, and fills no disk
            self._has_refused = True
            log.warning("VM %s: its launch secret was refused: %s", self._vm_id, why)
            self._begin(self._tell(why))

    def _begin(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, why: str) -> None:
        with suppress(SpvtpmError):  # the log has it
            await self._note(self._vm_id, self._boot_id, "launch-secret-refused", why)

    async def _give(self, connection: socket.socket, uid: int) -> None:
        with connection:
            try:
                block = await self._note(self._vm_id, self._boot_id, "launch-secret-taken", f"by user {uid}")
                if block is not None:
                    connection.send(block.launch_secret().encode())
            except (SpvtpmError, OSError) as error:
                log.error("VM %s: its launch secret was not handed over: %s", self._vm_id, error)

    def close(self) -> None:
        """Nothing more is to be had."""
        self._acceptor.close()
        self.path.unlink(missing_ok=True)
