"""The TPM emulator interface: what QEMU's `-tpmdev emulator`, and so libvirt, connects to as if it were swtpm.

Everything passes the hypervisor's process in clear here. So a VM's owner must have allowed it, and a boot has either this
interface or the direct path, never both: as the hypervisor said when it began.

One client at a time. It switches the TPM on and off within the boot, as QEMU does when its machine is reset; when it hangs up
the TPM is off. It cannot take the TPM's state out, nor bring one in.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Final, Protocol

from spvtpm.files.unix_sockets import peer_of
from spvtpm.processor.interfaces.control_connection import ControlConnection
from spvtpm.processor.interfaces.data_channel import DataChannel, is_stream_socket
from spvtpm.processor.unix_sockets import Acceptor, listen
from spvtpm.processor.vtpm_services import Boot
from spvtpm.processor.worker.messages import InterfaceSnapshot, StreamPort
from spvtpm.wire import swtpm_control as wire
from spvtpm.wire.errors import ResourceError, SpvtpmError
from spvtpm.wire.swtpm_control import Capability, ConfigFlag, ControlCommand, ControlRequest, ControlResult

log = logging.getLogger(__name__)

SUFFIX: Final = ".emulator.sock"
"""The socket is named after the VM's id."""

_BACKLOG = 8
_CAPABILITIES = (
    Capability.INIT
    | Capability.SHUTDOWN
    | Capability.GET_TPMESTABLISHED
    | Capability.SET_LOCALITY
    | Capability.CANCEL_TPM_CMD
    | Capability.RESET_TPMESTABLISHED
    | Capability.STOP
    | Capability.GET_CONFIG
    | Capability.SET_DATAFD
    | Capability.SET_BUFFERSIZE
)
"""Without those for state blobs QEMU refuses by itself to migrate or save its machine."""

_OF_DRTM = (3, 4)
"""Localities that may reset the established bit. Source: TCG PC Client PTP 1.05, "TPM_ACCESS_x.tpmEstablishment"."""


class Switch(Protocol):
    """The TPM's power."""

    async def switch_on(self) -> None:
        """The TPM begins anew, as after a reset.

        Raises:
            SpvtpmError: it does not.
        """

    async def switch_off(self) -> None:
        """The TPM ends in order, if it was on.

        Raises:
            SpvtpmError: it has failed.
        """


class EmulatorInterface:
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
        self.path = path
        self._allowed_uids = allowed_uids
        self._switch = switch
        self._acceptor: Acceptor | None = None
        self._client: ControlConnection | None = None
        self._conversation: asyncio.Task[None] | None = None
        self._data: DataChannel | None = None
        self._mode: Callable[[DataChannel], None] = DataChannel.refuse
        self._is_on = False
        self._buffer_bytes = wire.MAX_BUFFER_BYTES
        self._next: ControlConnection | None = None
        try:
            self._canceller, self._cancelled = socket.socketpair()
        except OSError as error:
            raise ResourceError(f"no descriptor can be had for an interface: {error.strerror}") from None

    # As every interface

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
        """What a worker is to serve; it needs no key."""
        return StreamPort(self._buffer_bytes)

    def descriptors(self) -> list[int]:
        """Data channel and canceller, if there is a client."""
        return [] if self._data is None else [self._data.fileno(), self._cancelled.fileno()]

    def leave_to_worker(self) -> None:
        """A worker reads the data channel."""
        self._look(DataChannel.leave, is_on=True)

    def watch(self, wake: Callable[[], None]) -> None:
        """`wake` is called at the next command."""
        self._look(lambda data: data.watch(wake), is_on=True)

    def fail(self) -> None:
        """Every command is answered with TPM_RC_FAILURE."""
        self._look(DataChannel.refuse, is_on=False)

    rest = fail

    def _look(self, mode: Callable[[DataChannel], None], *, is_on: bool) -> None:
        self._mode, self._is_on = mode, is_on
        if self._data is not None:
            self._data.leave()
            mode(self._data)

    def close(self) -> None:
        """Takes the interface away."""
        if self._acceptor is not None:
            self._acceptor.close()
            self.path.unlink(missing_ok=True)
        if self._conversation is not None:
            self._conversation.cancel()
        self._hang_up()
        for end in (self._canceller, self._cancelled, self._next):
            if end is not None:
                end.close()

    # The client

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
        await self._switched(on=False)  # the client is gone: so is the machine that had the TPM
        self._hang_up()
        self._begin()

    async def _hear(self, client: ControlConnection) -> None:
        while data := await client.receive():
            request = wire.parse_request(data)
            if request is None:
                await client.send(wire.result_answer(ControlResult.BAD_PARAMETER))
                return
            await client.send(await self._answer(client, request))
            if request.code == ControlCommand.SET_STATEBLOB:
                return  # a state comes behind it, which nobody reads

    def _hang_up(self) -> None:
        for end in (self._data, self._client):
            if end is not None:
                end.close()
        self._data = self._client = None

    # What it asks

    async def _answer(self, client: ControlConnection, request: ControlRequest) -> bytes:
        match request.code:
            case ControlCommand.GET_CAPABILITY:
                return wire.capability_answer(_CAPABILITIES)
            case ControlCommand.SET_BUFFERSIZE:
                return self._set_buffer_size(request.number)
            case ControlCommand.GET_TPMESTABLISHED:
                return wire.established_answer(self._if_on(ControlResult.SUCCESS))
            case ControlCommand.GET_CONFIG:
                return wire.config_answer(ConfigFlag.FILE_KEY)
            case ControlCommand.GET_STATEBLOB:
                return wire.no_state_answer(ControlResult.BAD_ORDINAL)
            case _:
                return wire.result_answer(await self._carry_out(client, request))

    async def _carry_out(self, client: ControlConnection, request: ControlRequest) -> ControlResult:
        match request.code:
            case ControlCommand.SET_DATAFD:
                return self._set_data_channel(client.take_descriptor())
            case ControlCommand.INIT:  # its flag is about a file of volatile state, which there is not
                return await self._switched(on=True)
            case ControlCommand.STOP | ControlCommand.SHUTDOWN:
                return await self._switched(on=False)
            case ControlCommand.SET_LOCALITY:
                return wire.locality_result(request.body)
            case ControlCommand.RESET_TPMESTABLISHED:  # it is never set
                may = request.body[0] in _OF_DRTM
                return self._if_on(ControlResult.SUCCESS if may else ControlResult.BAD_LOCALITY)
            case ControlCommand.CANCEL_TPM_CMD:
                return self._cancel()
            case _:
                return ControlResult.BAD_ORDINAL

    def _if_on(self, result: ControlResult) -> ControlResult:
        return result if self._is_on else ControlResult.BAD_ORDINAL

    def _cancel(self) -> ControlResult:
        if self._is_on:
            with suppress(BlockingIOError):  # it is full of them
                self._canceller.send(b"\0", socket.MSG_DONTWAIT)
        return self._if_on(ControlResult.SUCCESS)

    def _set_data_channel(self, descriptor: int | None) -> ControlResult:
        if descriptor is None or self._data is not None or not is_stream_socket(descriptor):
            if descriptor is not None:
                os.close(descriptor)
            return ControlResult.BAD_PARAMETER if self._data is None else ControlResult.BAD_ORDINAL
        self._data = DataChannel(descriptor)
        self._mode(self._data)
        return ControlResult.SUCCESS

    def _set_buffer_size(self, wanted: int) -> bytes:
        result = ControlResult.SUCCESS
        if wanted and self._is_on:
            result = ControlResult.BAD_ORDINAL
        elif wanted:
            self._buffer_bytes = max(wire.MIN_BUFFER_BYTES, min(wanted, wire.MAX_BUFFER_BYTES))
        return wire.buffer_size_answer(result, self._buffer_bytes)

    async def _switched(self, *, on: bool) -> ControlResult:
        if on and self._data is None:
            return ControlResult.BAD_ORDINAL  # nobody could speak to it
        try:
            await self._switch.switch_off()
            if on:
                await self._switch.switch_on()
        except SpvtpmError as error:
            log.error("interface %s: the TPM cannot be switched: %s", self.path.name, error)
            return ControlResult.FAIL
        return ControlResult.SUCCESS
