"""Carries a handoff's frames between two hosts' agents, and can read none of them. `carrying.py` comes in.

A thread and an event loop of its own, for whoever runs an operation has none. Each direction waits for its receiver before it
takes more from its sender, so what is in between stays small.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from websockets.exceptions import ConnectionClosed

from spvtpm.cloud.agent_sockets import connect_agent
from spvtpm.wire.errors import MessageError, SpvtpmError

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

    from spvtpm.cloud.host_addresses import AgentAddress

_CLOSE_S: Final = 10.0  # for the last of a VM's memory, too
_JOIN_S: Final = 40.0  # longer than two WebSockets take to be opened, or closed

logger = logging.getLogger(__name__)


class LinkRelay:
    """One link. Life: construct, which begins it → `has_ended` … → `close()`."""

    def __init__(self, source: AgentAddress, destination: AgentAddress, path: str) -> None:
        """
        Args:
            source: the host that the VM leaves.
            destination: the host that it goes to.
            path: of the link, the same at both.
        """
        self._source = source
        self._destination = destination
        self._path = path
        self._failure: SpvtpmError | None = None
        self._over = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._carry())
        self._octets = [0, 0]
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether nothing is carried any more."""
        return self._over.is_set()

    @property
    def failure(self) -> SpvtpmError | None:
        """Why it was not opened; None: it was."""
        return self._failure

    def wait(self, timeout_s: float) -> bool:
        """Waits until it has ended, or for so long; whether it has."""
        return self._over.wait(timeout_s)

    def close(self) -> None:
        """Ends it."""
        if not self._over.is_set():
            with suppress(RuntimeError):  # it ends just now
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._until_over())
        finally:
            self._over.set()

    async def _until_over(self) -> None:
        try:
            await self._task
        except SpvtpmError as error:
            self._failure = error
        except asyncio.CancelledError:
            pass
        except Exception:
            logger.exception("the link %s broke", self._path)
        logger.info(
            "link %s from host %s to host %s: %d bytes, and %d back",
            *(self._path, self._source.host, self._destination.host, *self._octets),
        )

    async def _carry(self) -> None:
        # The source begins as soon as it has its end: so the other one comes first.
        destination = await connect_agent(self._destination, self._path, _CLOSE_S)
        try:
            source = await connect_agent(self._source, self._path, _CLOSE_S)
            try:
                ways = [self._pump(source, destination, 0), self._pump(destination, source, 1)]
                tasks = [asyncio.ensure_future(way) for way in ways]
                try:
                    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
                for task in done:
                    task.result()
            finally:
                await source.close()
        finally:
            await destination.close()  # after what came before has gone there

    async def _pump(self, sender: ClientConnection, receiver: ClientConnection, way: int) -> None:
        try:
            async for frame in sender:
                if isinstance(frame, str):
                    raise MessageError("a host sent text on a link, and frames are binary")
                await receiver.send(frame)
                self._octets[way] += len(frame)
        except ConnectionClosed:
            return
