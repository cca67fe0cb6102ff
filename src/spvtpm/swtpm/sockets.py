"""The sockets of `spvtpm-swtpm`: where control requests come in, and where TPM commands do."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress

from spvtpm.guest.tcti import listen_at
from spvtpm.processor.interfaces.control_connection import ControlConnection
from spvtpm.processor.interfaces.emulation import Emulation
from spvtpm.swtpm.options import Place
from spvtpm.wire import swtpm_control as wire
from spvtpm.wire.errors import FrameError, ResourceError
from spvtpm.wire.swtpm_control import ControlCommand, ControlResult
from spvtpm.wire.tpm_stream import MAX_COMMAND_BYTES, TPM_RC_FAILURE, CommandDecoder, error_response


def listen(place: Place) -> socket.socket:
    """A socket that listens there.

    Raises:
        AlreadyExists: something else lies at its path.
        ResourceError: it cannot be had.
    """
    try:
        if place.descriptor >= 0:
            return socket.socket(fileno=place.descriptor)
        if place.path is None:
            return socket.create_server((place.address, place.port))
        listener = listen_at(place.path)
        if place.mode is not None:
            place.path.chmod(place.mode)
        if place.owner != (-1, -1):
            os.chown(place.path, *place.owner)
        return listener
    except OSError as error:
        raise ResourceError(f"cannot listen at {place.path or place.port}: {error.strerror}") from None


class ControlServer:
    """Control requests of any number of clients, one after the other.

    Args:
        emulation: answers them.
        on_shutdown: called when a client has the TPM shut down for good.
        on_gone: called when a client has gone that had brought a data channel.
    """

    def __init__(self, emulation: Emulation, on_shutdown: Callable[[], None], on_gone: Callable[[], None]) -> None:
        self._emulation = emulation
        self._on_shutdown = on_shutdown
        self._on_gone = on_gone
        self._lock = asyncio.Lock()

    async def serve(self, connection: socket.socket) -> None:
        """One client, to his end."""
        client = ControlConnection(connection)
        brought_data = False
        try:
            while data := await client.receive():
                request = wire.parse_request(data)
                if request is None:
                    await client.send(wire.result_answer(ControlResult.BAD_PARAMETER))
                    break
                async with self._lock:
                    answer = await self._emulation.answer(client, request)
                await client.send(answer)
                succeeded = not any(answer[:4])
                brought_data |= succeeded and request.code == ControlCommand.SET_DATAFD
                if succeeded and request.code == ControlCommand.SHUTDOWN:
                    self._on_shutdown()
                if request.code == ControlCommand.SET_STATEBLOB:
                    break  # a state comes behind it, which nobody reads
        except OSError:
            pass
        finally:
            client.close()
        if brought_data:
            async with self._lock:
                await self._emulation.switched(on=False)
                self._emulation.close_data_channel()
            self._on_gone()


class DataServer:
    """TPM commands of any number of clients, one after the other, on the one data channel.

    Args:
        emulation: has that channel from now on.
        on_gone: called when a client has gone.
    """

    def __init__(self, emulation: Emulation, on_gone: Callable[[], None]) -> None:
        self._channel, theirs = socket.socketpair()
        self._channel.setblocking(False)
        emulation.open_data_channel(theirs.detach())
        self._on_gone = on_gone
        self._lock = asyncio.Lock()

    async def transmit(self, command: bytes) -> bytes:
        """One command, its response."""
        loop = asyncio.get_running_loop()
        async with self._lock:
            await loop.sock_sendall(self._channel, command)
            return await loop.sock_recv(self._channel, MAX_COMMAND_BYTES)

    async def serve(self, connection: socket.socket) -> None:
        """One client, to his end."""
        loop, decoder = asyncio.get_running_loop(), CommandDecoder()
        with connection, suppress(OSError):
            while data := await loop.sock_recv(connection, MAX_COMMAND_BYTES):
                try:
                    commands = decoder.feed(data)
                except FrameError:
                    await loop.sock_sendall(connection, error_response(TPM_RC_FAILURE))
                    break
                for command in commands:
                    await loop.sock_sendall(connection, await self.transmit(command))
        self._on_gone()

    def close(self) -> None:
        """Ends the channel."""
        self._channel.close()
