"""The TPM emulator interface: what QEMU's `-tpmdev emulator`, and so libvirt, connects to as if it were swtpm.

Everything passes the hypervisor's process in clear here. So a VM's owner must have allowed it, and a boot has either this
interface or the direct path, never both: as the hypervisor said when it began.

One client at a time. It switches the TPM on and off within the boot, as QEMU does when its machine is reset; when it hangs up
the TPM is off.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Final

from spvtpm.files.unix_sockets import peer_of
from spvtpm.processor.interfaces.control_connection import ControlConnection
from spvtpm.processor.interfaces.emulation import Emulation, Switch
from spvtpm.processor.unix_sockets import Acceptor, listen
from spvtpm.processor.vtpm_services import Boot
from spvtpm.processor.worker.messages import InterfaceSnapshot, StreamPort
from spvtpm.wire import swtpm_control as wire
from spvtpm.wire.swtpm_control import ControlCommand, ControlResult

log = logging.getLogger(__name__)

SUFFIX: Final = ".emulator.sock"
"""The socket is named after the VM's id."""

_BACKLOG = 8


class EmulatorInterface(Emulation):
    """One vTPM's. Life: as of `Interface`.

    Args:
        path: where its socket will listen.
        allowed_uids: whose processes may take it.
        switch: of the TPM.

    Raises:
        ResourceError: no descriptors can be had.
    """

    switched_by_vm: ClassVar[bool] = True

    def __init__(self, path: Path, allowed_uids: frozenset[int], switch: Switch) -> None:
        super().__init__(switch, path.name)
        self.path = path
        self._allowed_uids = allowed_uids
        self._acceptor: Acceptor | None = None
        self._client: ControlConnection | None = None
        self._next: ControlConnection | None = None
        self._conversation: asyncio.Task[None] | None = None

    def listen(self) -> None:
        """Offers it.

        Raises:
            ResourceError: no socket can be had.
        """
        listener = listen(self.path, self._allowed_uids, _BACKLOG)
        self._acceptor = Acceptor(listener, self.path.name, self._admit)

    @property
    def connected(self) -> bool:
        """Whether a process holds the interface."""
        return self._client is not None

    def port(self, _vm_id: bytes, _boot: Boot, _snapshot: InterfaceSnapshot | None) -> StreamPort:
        """What a worker is to serve."""
        return self.stream_port()

    def close(self) -> None:
        """Takes the interface away."""
        if self._acceptor is not None:
            self._acceptor.close()
            self.path.unlink(missing_ok=True)
        if self._conversation is not None:
            self._conversation.cancel()
        for client in (self._client, self._next):
            if client is not None:
                client.close()
        self.close_ends()

    def _admit(self, connection: socket.socket) -> None:
        uid = peer_of(connection).uid
        is_held = any(held is not None and not held.has_ended() for held in (self._client, self._next))
        if uid not in self._allowed_uids or is_held:
            reason = "another process holds it" if uid in self._allowed_uids else "not allowed"
            log.warning("refused a connection of uid %d to interface %s: %s", uid, self.path.name, reason)
            connection.close()
            return
        if self._next is not None:
            self._next.close()
        self._next = ControlConnection(connection)
        if self._client is None:
            self._begin()

    def _begin(self) -> None:
        """Serves whoever waits: one alone, while the TPM of the client before is being switched off."""
        if self._next is not None:
            self._client, self._next = self._next, None
            self._conversation = asyncio.get_running_loop().create_task(self._converse(self._client))

    async def _converse(self, client: ControlConnection) -> None:
        with suppress(OSError):  # it hung up in the middle
            await self._hear(client)
        await self.switched(on=False)  # the client is gone: so is the machine that had the TPM
        self.close_data_channel()
        client.close()
        self._client = None
        self._begin()

    async def _hear(self, client: ControlConnection) -> None:
        while data := await client.receive():
            request = wire.parse_request(data)
            if request is None:
                await client.send(wire.result_answer(ControlResult.BAD_PARAMETER))
                return
            await client.send(await self.answer(client, request))
            if request.code == ControlCommand.SET_STATEBLOB:
                return  # a state comes behind it, which nobody reads
