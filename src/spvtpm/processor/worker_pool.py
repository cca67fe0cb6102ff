"""Workers as the event loop sees them: fork, talk, notice their end."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from spvtpm.processor.endorser import Birth
from spvtpm.processor.worker import messages
from spvtpm.processor.worker.messages import Endorse, Endorsed, Failed, FromWorker, Start, ToWorker
from spvtpm.processor.zygote_link import ZygoteLink
from spvtpm.wire.errors import SpvtpmError, WorkerError
from spvtpm.wire.framing import FrameDecoder, encode_frame

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 12
_REFILL_PAUSE_S = 0.01
_RESTART_PAUSE_S = 0.1
_RESTART_PATIENCE_S = 10.0
_BLANK_PATIENCE_S = 60.0


class Worker:
    """One worker process.

    Attributes:
        ended: done with its exit code once the process is gone (negative: the signal that killed it).
    """

    def __init__(self, link: ZygoteLink, tag: int, connection: socket.socket) -> None:
        self._link = link
        self._tag = tag
        self._connection = connection
        self._decoder = FrameDecoder()
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def start(self, start: Start, descriptors: Sequence[int]) -> None:
        """Hands over the descriptors, then the first message.

        Raises:
            WorkerError: the worker is gone.
        """
        try:
            socket.send_fds(self._connection, [b"\0"], descriptors)
        except OSError:
            raise WorkerError("the worker died before it was started") from None
        await self.send(start)

    async def send(self, message: ToWorker) -> None:
        """Sends one message.

        Raises:
            WorkerError: the worker is gone.
        """
        try:
            await asyncio.get_running_loop().sock_sendall(self._connection, encode_frame(messages.encode(message)))
        except OSError:
            raise WorkerError("the worker process died") from None

    async def receive(self) -> AsyncIterator[FromWorker]:
        """What the worker says, until it ends.

        Raises:
            FrameError, MessageError: it broke the protocol; kill it.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                data = await loop.sock_recv(self._connection, _READ_BYTES)
            except OSError:
                data = b""
            if not data:
                return
            for frame in self._decoder.feed(data):
                yield messages.parse_from_worker(frame)

    def kill(self) -> None:
        """Ends the process at once."""
        self._link.kill(self._tag)

    def close(self) -> None:
        """Gives up the connection; a worker that still runs ends."""
        self._connection.close()


@dataclass(frozen=True, slots=True)
class Blank:
    """A worker with a new TPM in it, that nobody has used.

    Attributes:
        worker: waits for its `Start`.
        birth: id and certificates of the TPM.
    """

    worker: Worker
    birth: Birth


class WorkerPool:
    """Forks workers through a zygote that is started again should it ever die.

    Keeps workers forked and confined ahead of need: bare ones, so that waking a vTPM does not wait for a fork, and such with
    a new, certified TPM, so that creating one waits neither for its keys nor for their certificates.

    Args:
        spare: how many of each kind to keep ahead.
        certify: what a new TPM says of itself; gives its birth. Called in another thread.

    Attributes:
        missing: sentences naming each sandbox layer that this kernel does not give.
    """

    def __init__(self, spare: int, certify: Callable[[Endorse], Birth]) -> None:
        self.missing: list[str] = []
        self._spare_count = spare
        self._certify = certify
        self._spare: list[Worker] = []
        self._blanks: list[asyncio.Task[Blank]] = []
        self._workers: dict[int, Worker] = {}
        self._link: ZygoteLink | None = None
        self._refilling: asyncio.TimerHandle | None = None
        self._opened = asyncio.Event()
        self._restarting: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Starts the zygote.

        Raises:
            WorkerError: it does not start.
        """
        try:
            link = ZygoteLink()
            await asyncio.to_thread(link.wait_ready)
        except OSError as error:
            raise WorkerError(f"the worker zygote does not start: {error.strerror}") from None
        self.note_missing(link.missing)
        link.set_blocking(False)
        self._link = link
        self._opened.set()
        asyncio.get_running_loop().add_reader(link.fileno(), self._on_exit)
        self._refill()

    def note_missing(self, sentences: list[str]) -> None:
        """Logs each layer of protection that is missing, once."""
        for sentence in sentences:
            if sentence not in self.missing:
                self.missing.append(sentence)
                log.warning("sandbox: %s", sentence)

    def _refill_later(self) -> None:
        """Not at once: whoever took a worker should have the machine for what it took it for."""
        if self._refilling is None:
            self._refilling = asyncio.get_running_loop().call_later(_REFILL_PAUSE_S, self._refill)

    def _refill(self) -> None:
        self._refilling = None
        with suppress(WorkerError):
            while self._link is not None and len(self._spare) < self._spare_count:
                self._spare.append(self._fork(blank=False))
            while self._link is not None and len(self._blanks) < self._spare_count:
                self._blanks.append(self._begin_blank())

    def _begin_blank(self) -> asyncio.Task[Blank]:
        task = asyncio.get_running_loop().create_task(self._make_blank(self._fork(blank=True)))
        task.add_done_callback(_note_failure)
        return task

    async def _make_blank(self, worker: Worker) -> Blank:
        """Hears what the worker's new TPM says of itself, and certifies it: its first words, and the only ones before `Start`.

        Raises:
            WorkerError: there is no such TPM.
        """
        try:
            async with asyncio.timeout(_BLANK_PATIENCE_S):
                birth = await self._hear_of_birth(worker)
        except (SpvtpmError, ValueError, TimeoutError) as error:
            worker.kill()
            worker.close()
            raise WorkerError(f"no new TPM could be made: {error or 'it takes too long'}") from None
        return Blank(worker, birth)

    async def _hear_of_birth(self, worker: Worker) -> Birth:
        async for message in worker.receive():
            if not isinstance(message, Endorse):
                raise WorkerError(message.reason if isinstance(message, Failed) else "the worker speaks out of turn")
            birth = await asyncio.to_thread(self._certify, message)
            endorsement = birth.endorsement
            await worker.send(Endorsed(list(endorsement.certificates), endorsement.issuer))
            return birth
        raise WorkerError("the worker died")

    def _fork(self, *, blank: bool) -> Worker:
        if self._link is None:
            raise WorkerError("the worker zygote is being started again")
        tag, connection = self._link.fork(blank=blank)
        connection.setblocking(False)
        worker = Worker(self._link, tag, connection)
        self._workers[tag] = worker
        return worker

    async def take(self) -> Worker:
        """A confined worker that waits for its `Start`; waits a while for a zygote that is being started again.

        Raises:
            WorkerError: none can be had now.
        """
        await self._await_zygote()
        while self._spare:
            worker = self._spare.pop(0)
            self._refill_later()
            if not worker.ended.done():
                return worker
        return self._fork(blank=False)

    async def take_blank(self) -> Blank:
        """As `take`, with a new TPM.

        Raises:
            WorkerError: none can be had now.
        """
        await self._await_zygote()
        while self._blanks:
            making = self._blanks.pop(0)
            self._refill_later()
            with suppress(WorkerError):
                blank = await making
                if not blank.worker.ended.done():
                    return blank
        return await self._begin_blank()

    async def _await_zygote(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._opened.wait(), _RESTART_PATIENCE_S)

    def _on_exit(self) -> None:
        assert self._link is not None  # noqa: S101  # the reader is removed with the link
        with suppress(BlockingIOError):
            while True:
                try:
                    ended = self._link.receive_exit()
                except ConnectionError:
                    ended = None
                if ended is None:
                    self._zygote_died()
                    return
                worker = self._workers.pop(ended.tag, None)
                if worker is not None and not worker.ended.done():
                    worker.ended.set_result(ended.exit_code)

    def _zygote_died(self) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        self._opened.clear()
        asyncio.get_running_loop().remove_reader(link.fileno())
        link.close()
        log.error("the worker zygote died; it is started again")
        for worker in self._workers.values():
            if not worker.ended.done():
                worker.ended.set_result(-9)
        self._workers.clear()
        self._spare.clear()
        self._blanks.clear()
        self._restarting = asyncio.create_task(self._restart())

    async def _restart(self) -> None:
        pause_s = _RESTART_PAUSE_S
        while True:
            try:
                await self.open()
                return
            except WorkerError as error:
                log.error("the worker zygote could not be started again: %s; next try in %.1f s", error, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _RESTART_PATIENCE_S)

    def close(self) -> None:
        """Ends the zygote and every worker."""
        if self._restarting is not None:
            self._restarting.cancel()
        if self._link is not None:
            asyncio.get_running_loop().remove_reader(self._link.fileno())
            self._link.close()
            self._link = None
        for making in self._blanks:
            making.cancel()
        for worker in self._workers.values():
            worker.close()


def _note_failure(making: asyncio.Task[Blank]) -> None:
    """Whoever wants a blank makes another one: this one is only logged."""
    if not making.cancelled() and (error := making.exception()) is not None:
        log.error("%s", error)
