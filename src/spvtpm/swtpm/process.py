"""The process: it begins, says that it has, serves, and ends."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

from spvtpm.processor.unix_sockets import Acceptor
from spvtpm.swtpm.options import Options, Startup
from spvtpm.swtpm.power import Power, powering
from spvtpm.swtpm.sockets import ControlServer, DataServer, listen
from spvtpm.wire.errors import WorkerError
from spvtpm.wire.swtpm_control import ControlResult
from spvtpm.wire.tpm_stream import HEADER

_STARTUP: dict[Startup, bytes] = {
    "clear": bytes.fromhex("80010000000c000001440000"),
    "state": bytes.fromhex("80010000000c000001440001"),
}
"""TPM2_Startup. Source: TCG TPM 2.0 Library Part 3, section "TPM2_Startup"."""


async def serve(options: Options, on_ready: Callable[[], None]) -> None:
    """Serves until SIGTERM or SIGINT, or until a client has ended it.

    Args:
        options: what was asked for.
        on_ready: called once it listens.

    Raises:
        SpvtpmError: it cannot begin.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    async with AsyncExitStack() as cleanup:
        power = await cleanup.enter_async_context(powering(options.state))
        await _open(options, power, stopping, cleanup)
        on_ready()
        await stopping.wait()


async def _open(options: Options, power: Power, stopping: asyncio.Event, cleanup: AsyncExitStack) -> None:
    def gone() -> None:
        if options.terminates:
            stopping.set()

    emulation = power.emulation
    data = None
    if options.server is not None:
        data = DataServer(emulation, gone)
        cleanup.callback(data.close)
    if options.is_on and data is not None:
        if await emulation.switched(on=True) is not ControlResult.SUCCESS:
            raise WorkerError("the TPM does not begin; the log says why")
        if options.startup != "none":
            await _start(data, options.startup)
    if options.server is not None and data is not None:
        _accept(listen(options.server), data.serve, cleanup)
    if options.control is not None:
        _accept(listen(options.control), ControlServer(emulation, stopping.set, gone).serve, cleanup)
    for place in (options.server, options.control):
        if place is not None and place.path is not None:
            cleanup.callback(partial(place.path.unlink, missing_ok=True))


async def _start(data: DataServer, startup: Startup) -> None:
    _tag, _size, code = HEADER.unpack_from(await data.transmit(_STARTUP[startup]))
    if code:
        raise WorkerError(f"the TPM does not start: TPM2_Startup answers {code:#05x}")


def _accept(
    listener: socket.socket, serve: Callable[[socket.socket], Awaitable[None]], cleanup: AsyncExitStack
) -> None:
    tasks = set[asyncio.Future[None]]()

    def handle(connection: socket.socket) -> None:
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = asyncio.ensure_future(serve(connection))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def end() -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    listener.setblocking(False)
    cleanup.push_async_callback(end)
    cleanup.callback(Acceptor(listener, "the TPM", handle).close)
