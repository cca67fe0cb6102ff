"""A TPM emulator, whoever its client is and however he came: what he asks for, and who looks at his data channel.

The client switches the TPM on and off. He cannot take the TPM's state out, nor bring one in.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from spvtpm.processor.interfaces.control_connection import ControlConnection
from spvtpm.processor.interfaces.data_channel import DataChannel, is_stream_socket
from spvtpm.processor.worker.messages import StreamPort
from spvtpm.wire import swtpm_control as wire
from spvtpm.wire.errors import ResourceError, SpvtpmError
from spvtpm.wire.swtpm_control import Capability, ConfigFlag, ControlCommand, ControlRequest, ControlResult

log = logging.getLogger(__name__)

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


class Emulation:
    """One TPM's. Its data channel is a worker's, or watched, or refused: `leave_to_worker()`, `watch()`, `fail()`, `rest()`.

    Args:
        switch: of the TPM.
        name: for the log.

    Raises:
        ResourceError: no descriptors can be had.
    """

    def __init__(self, switch: Switch, name: str) -> None:
        self._switch = switch
        self._name = name
        self._data: DataChannel | None = None
        self._mode: Callable[[DataChannel], None] = DataChannel.refuse
        self._is_on = False
        self._buffer_bytes = wire.MAX_BUFFER_BYTES
        try:
            self._canceller, self._cancelled = socket.socketpair()
        except OSError as error:
            raise ResourceError(f"no descriptor can be had for an interface: {error.strerror}") from None

    def stream_port(self) -> StreamPort:
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

    def close_ends(self) -> None:
        """Gives everything back."""
        self.close_data_channel()
        self._canceller.close()
        self._cancelled.close()

    def close_data_channel(self) -> None:
        """Hangs up, if there is a data channel."""
        if self._data is not None:
            self._data.close()
            self._data = None

    async def answer(self, client: ControlConnection, request: ControlRequest) -> bytes:
        """Does what a request asks for; its answer.

        Args:
            client: with the descriptor that came along.
            request: what he wants.
        """
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
                return await self.switched(on=True)
            case ControlCommand.STOP | ControlCommand.SHUTDOWN:
                return await self.switched(on=False)
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
        self.open_data_channel(descriptor)
        return ControlResult.SUCCESS

    def open_data_channel(self, descriptor: int) -> None:
        """There is a data channel: this unix stream socket, which is the object's from now on."""
        self._data = DataChannel(descriptor)
        self._mode(self._data)

    def _set_buffer_size(self, wanted: int) -> bytes:
        result = ControlResult.SUCCESS
        if wanted and self._is_on:
            result = ControlResult.BAD_ORDINAL
        elif wanted:
            self._buffer_bytes = max(wire.MIN_BUFFER_BYTES, min(wanted, wire.MAX_BUFFER_BYTES))
        return wire.buffer_size_answer(result, self._buffer_bytes)

    async def switched(self, *, on: bool) -> ControlResult:
        """Switches the TPM off, and then, if it is to be on, on again."""
        if on and self._data is None:
            return ControlResult.BAD_ORDINAL  # nobody could speak to it
        try:
            await self._switch.switch_off()
            if on:
                await self._switch.switch_on()
        except SpvtpmError as error:
            log.error("interface %s: the TPM cannot be switched: %s", self._name, error)
            return ControlResult.FAIL
        return ControlResult.SUCCESS
