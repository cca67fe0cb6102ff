"""One address for all replicas of the platform, as a load balancer in front of them would be."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_PIECE_BYTES = 1 << 16


class Balancer:
    """Joins each connection with one to the next replica that takes it; if none does, ends it. Knows nothing of HTTP.

    Args:
        path: of its socket.
        targets: the replicas' sockets.
    """

    def __init__(self, path: Path, targets: Sequence[Path]) -> None:
        self.url = f"unix:{path}"
        self._path, self._targets = path, targets
        self._turns = itertools.count()
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._ending = asyncio.Event()
        self._open: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._serve()], name="balancer")
        self._thread.start()
        self._ready.wait()

    async def _serve(self) -> None:
        async with await asyncio.start_unix_server(self._accept, self._path):
            self._ready.set()
            await self._ending.wait()
            for task in self._open:
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            async with AsyncExitStack() as cleanup:
                cleanup.push_async_callback(_end, writer)
                replica = await self._replica()
                if replica is not None:
                    cleanup.push_async_callback(_end, replica[1])
                    await _join((reader, replica[1]), (replica[0], writer))
        except asyncio.CancelledError:
            pass
        finally:
            self._open.discard(task)

    async def _replica(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        first = next(self._turns)
        for number in range(len(self._targets)):
            with suppress(OSError):
                return await asyncio.open_unix_connection(self._targets[(first + number) % len(self._targets)])
        return None

    def close(self) -> None:
        """Ends all connections."""
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _join(*ways: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
    """Carries bytes both ways until one side ends."""
    pumps = [asyncio.create_task(_pump(reader, writer)) for reader, writer in ways]
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await reader.read(_PIECE_BYTES):
            writer.write(piece)
            await writer.drain()


async def _end(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
