"""What a worker that was taken over can say to the SP, and what becomes of it. Its side of the socket is played here."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from spvtpm.processor.worker.messages import (
    Commit,
    Committed,
    Endorse,
    Failed,
    FromWorker,
    Off,
    PacketPort,
    Park,
    Parked,
    PowerOff,
    Ready,
    Refused,
    Start,
    StillBusy,
    encode,
    parse_to_worker,
)
from spvtpm.processor.worker_pool import Worker
from spvtpm.processor.worker_session import WorkerSession
from spvtpm.wire.errors import WorkerError
from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.messages import VmInfo, VmList, VtpmInfo, encode_message, parse_reply

pytestmark = pytest.mark.attack("A22")


ENDORSE = Endorse([b"public"], 1, 2, 0, 164)


class Link:
    """Stands for the zygote: notes who was to be killed."""

    def __init__(self, theirs: socket.socket) -> None:
        self.killed = False
        self._theirs = theirs

    def kill(self, _tag: int) -> None:
        self.killed = True
        self._theirs.close()


class Scene:
    """A session, and the worker's end of its socket."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        ours.setblocking(False)
        self.theirs.setblocking(False)
        self.link = Link(self.theirs)
        self.commits: list[bytes] = []
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._decoder = FrameDecoder()
        self.worker = Worker(self.link, 1, ours)  # type: ignore[arg-type]
        self.worker.ended.set_result(-9)
        self.session = WorkerSession(self.worker, "vTPM x", self._commit, self._on_end)

    async def _commit(self, permanent: bytes) -> None:
        self.commits.append(permanent)

    async def _on_end(self, reason: str) -> None:
        self.ended.set_result(reason)

    async def say(self, *messages: FromWorker) -> None:
        for message in messages:
            await asyncio.get_running_loop().sock_sendall(self.theirs, encode_frame(encode(message)))

    async def hear(self) -> Any:
        while True:
            data = await asyncio.get_running_loop().sock_recv(self.theirs, 1 << 16)
            for frame in self._decoder.feed(data):
                return parse_to_worker(frame)

    async def begin(self) -> asyncio.Future[Ready]:
        """The worker has its `Start`, and has not answered it."""
        starting = asyncio.ensure_future(self.session.start(Start(PacketPort()), [], lambda: None))
        await asyncio.get_running_loop().sock_recv(self.theirs, 1)  # comes ahead of the first message
        await self.hear()
        return starting

    async def start(self) -> None:
        starting = await self.begin()
        await self.say(Ready())
        await starting


def play(act: Callable[[Scene], Awaitable[None]]) -> None:
    async def run() -> None:
        scene = Scene()
        await scene.start()
        async with asyncio.timeout(30):
            await act(scene)
        await scene.session.end()
        scene.theirs.close()

    asyncio.run(run())


@pytest.mark.parametrize("message", [Parked(b"state", None), Off(), StillBusy(), Ready()])
def test_a_reply_that_nobody_asked_for_ends_the_worker(message: FromWorker) -> None:
    async def act(scene: Scene) -> None:
        await scene.say(message)
        assert "out of turn" in await scene.ended
        assert scene.link.killed
        with pytest.raises(WorkerError, match="out of turn"):
            await scene.session.order(PowerOff())

    play(act)


def test_last_words_that_nobody_asked_for_are_told_as_they_are() -> None:
    async def act(scene: Scene) -> None:
        await scene.say(Failed("libtpms cannot go on"))
        scene.theirs.close()
        assert await scene.ended == "libtpms cannot go on"

    play(act)


def test_the_reason_for_which_a_worker_ends_fits_what_the_hypervisor_reads() -> None:
    async def act(scene: Scene) -> None:
        nonsense = msgspec.msgpack.encode({"type": "Off", "\x1b[2J" + "long" * 10_000: 1})
        await asyncio.get_running_loop().sock_sendall(scene.theirs, encode_frame(nonsense))
        vtpm = VtpmInfo(uuid.uuid4(), "failed", "", False, await scene.ended)
        listed = VmList([VmInfo(uuid.uuid4(), "failed", 1, vtpm)])
        assert parse_reply(encode_message(listed)) == listed

    play(act)


def test_a_second_reply_to_one_order_ends_the_worker() -> None:
    async def act(scene: Scene) -> None:
        parking = asyncio.ensure_future(scene.session.order(Park()))
        assert await scene.hear() == Park()
        await scene.say(Parked(b"state", None), Parked(b"state", None))
        assert await parking == Parked(b"state", None)
        assert "out of turn" in await scene.ended

    play(act)


@pytest.mark.parametrize("counts", [(1, 1), (1, 2, 3), (4, 4), (8, 7)])
def test_refusals_that_are_told_more_often_than_they_double_end_the_worker(counts: tuple[int, ...]) -> None:
    async def act(scene: Scene) -> None:
        await scene.say(*(Refused(3, count) for count in counts))
        assert "counts refused frames wrongly" in await scene.ended

    play(act)


def test_a_worker_that_commits_on_and_on_lets_others_have_their_turn() -> None:
    async def act(scene: Scene) -> None:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while len(scene.commits) < 200:
                turns += 1
                await asyncio.sleep(0)

        others = asyncio.ensure_future(other())
        for number in range(200):
            await scene.say(Commit(number.to_bytes(2, "big")))
            assert await scene.hear() == Committed()
        await others
        assert turns >= 200

    play(act)


def test_a_worker_that_dies_fails_the_order_that_waits_for_it() -> None:
    async def act(scene: Scene) -> None:
        parking = asyncio.ensure_future(scene.session.order(Park()))
        await scene.hear()
        scene.theirs.close()
        with pytest.raises(WorkerError, match="killed by signal 9"):
            await parking
        assert "died" in await scene.ended

    play(act)


@pytest.mark.attack("A28")
def test_a_worker_that_has_served_a_guest_gets_nothing_certified() -> None:
    async def act(scene: Scene) -> None:
        await scene.say(ENDORSE)
        assert "said Endorse out of turn" in await scene.ended
        assert scene.link.killed

    play(act)
