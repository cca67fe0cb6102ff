"""One vTPM's worker while it lives: orders out, replies in, commits in between, its end noticed. Knows no residencies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager

from spvtpm.processor.worker.messages import (
    Commit,
    Committed,
    Failed,
    FromWorker,
    Park,
    PowerOff,
    Ready,
    Refused,
    Start,
)
from spvtpm.processor.worker_pool import Worker
from spvtpm.wire.crb import AttachError
from spvtpm.wire.errors import MessageError, PeerError, StorageError, WorkerError

log = logging.getLogger(__name__)

_REPLY_TIMEOUT_S = 60.0
"""A worker that has not answered by then is killed; the longest command, RSA key generation, takes a few seconds."""


def misbehaviour(name: str, reply: FromWorker) -> WorkerError:
    """The error for a reply of the worker of `name` that is none to what was asked."""
    said = reply.reason if isinstance(reply, Failed) else f"it said {type(reply).__name__} out of turn"
    return WorkerError(f"the worker of {name} failed: {said}")


class WorkerSession:
    """One worker. Life: construct → `start()` → `order()` … → `end()`.

    Args:
        worker: waits for its `Start`.
        name: of the vTPM, for errors and the log: "vTPM 6f1c…".
        commit: makes a permanent state durable, or raises `StorageError`.
        on_end: told why, once, if the worker ends or misbehaves after it was started and before `end()`.
    """

    def __init__(
        self,
        worker: Worker,
        name: str,
        commit: Callable[[bytes], Awaitable[None]],
        on_end: Callable[[str], Coroutine[None, None, None]],
    ) -> None:
        self._worker = worker
        self._name = name
        self._commit = commit
        self._on_end = on_end
        self._awaited: asyncio.Future[FromWorker] | None = None
        self._refused = 0
        self._over: WorkerError | None = None
        self._conversation = asyncio.create_task(self._converse())

    async def start(self, start: Start, descriptors: Sequence[int], meanwhile: Callable[[], None] | None) -> Ready:
        """Has the worker begin.

        Args:
            start: which TPM to be.
            descriptors: of its port.
            meanwhile: done while the worker works; None: nothing.

        Raises:
            WorkerError: it died, or cannot; `end()` it.
            Exception: from `meanwhile`; `end()` the worker too.
        """
        with self._expecting() as replied:
            await self._worker.start(start, descriptors)
            if meanwhile is not None:
                meanwhile()
            reply = await self._reply(replied)
        if not isinstance(reply, Ready):
            raise misbehaviour(self._name, reply)
        return reply

    async def order(self, order: Park | PowerOff) -> FromWorker:
        """Gives an order and waits for the reply.

        Raises:
            WorkerError: it died, or does not answer; `end()` it.
        """
        with self._expecting() as replied:
            await self._worker.send(order)
            return await self._reply(replied)

    @contextmanager
    def _expecting(self) -> Iterator[asyncio.Future[FromWorker]]:
        """The reply to what the body says; raises if there is nobody to say it to."""
        if self._over is not None:
            raise self._over
        self._awaited = asyncio.get_running_loop().create_future()
        try:
            yield self._awaited
        finally:
            if not self._awaited.cancel():
                self._awaited.exception()  # seen, whether somebody waited for it or not
            self._awaited = None

    async def _reply(self, replied: asyncio.Future[FromWorker]) -> FromWorker:
        try:
            return await asyncio.wait_for(replied, _REPLY_TIMEOUT_S)
        except TimeoutError:
            raise WorkerError(f"the worker of {self._name} did not answer") from None

    def kill(self) -> None:
        """Kills the worker; whoever waits for it learns that it died."""
        self._worker.kill()

    async def end(self) -> None:
        """Ends the worker at once; its state is elsewhere, or not wanted."""
        self._worker.kill()
        self._conversation.cancel()
        await asyncio.gather(self._conversation, return_exceptions=True)
        self._worker.close()

    async def _converse(self) -> None:
        """Hears what the worker says, commits what it asks, and notices when it ends."""
        reason = ""
        try:
            async for message in self._worker.receive():
                reason = message.reason if isinstance(message, Failed) else reason
                await self._hear(message)
        except (PeerError, ValueError) as error:
            reason = f"the worker broke the protocol: {error}"
            self._worker.kill()
        except WorkerError:
            pass
        reason = reason or f"the worker died{await self._epitaph()}"
        self._over = WorkerError(f"{self._name}: {reason}")
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_exception(self._over)
        self._obituary = asyncio.create_task(self._on_end(reason))

    async def _hear(self, message: FromWorker) -> None:
        """One message. A worker that speaks out of turn is not to be believed; one that speaks on and on waits for the others.

        Raises:
            MessageError: it has no business to say this now.
        """
        if isinstance(message, Commit):
            await self._worker.send(await self._committed(message))
        elif isinstance(message, Refused):
            if message.count < 2 * self._refused:
                raise MessageError("it counts refused frames wrongly")
            self._refused = message.count
            error = AttachError(message.error).name
            log.warning("%s: refused %d frames so far, the last one: %s", self._name, message.count, error)
        elif self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(message)
        elif not isinstance(message, Failed):  # last words come when they must
            raise MessageError(f"it said {type(message).__name__} out of turn")
        await asyncio.sleep(0)

    async def _committed(self, message: Commit) -> Committed:
        try:
            await self._commit(message.permanent)
        except StorageError as error:
            log.error("%s: an NV change is not durable: %s", self._name, error)
            return Committed(str(error))
        return Committed()

    async def _epitaph(self) -> str:
        try:
            code = await asyncio.wait_for(asyncio.shield(self._worker.ended), 1.0)
        except TimeoutError:
            return ""
        return f" (killed by signal {-code})" if code < 0 else f" (exit code {code})"
