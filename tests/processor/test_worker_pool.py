"""Blanks: what is certified, when, and how often. The worker's end is played here; a hostile one says anything."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import Sequence

import pytest

from spvtpm.processor.endorser import Birth
from spvtpm.processor.worker.messages import (
    Commit,
    Endorse,
    Endorsed,
    Failed,
    FromWorker,
    Ready,
    encode,
    parse_to_worker,
)
from spvtpm.processor.worker_pool import Blank, Worker, WorkerPool
from spvtpm.wire.errors import CertificateError, WorkerError
from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.vtpm_endorsement import VtpmEndorsement
from tests.processor.test_worker_session import Link

pytestmark = pytest.mark.attack("A28")

ENDORSE = Endorse([b"public"], 1, 2, 0, 164)
ENDORSEMENT = VtpmEndorsement(certificates=(b"certificate",), issuer=(b"chip", b"intermediate", b"root"))
BIRTH = Birth(uuid.UUID(int=7), ENDORSEMENT)


class Desk:
    """Certifies, and notes what."""

    def __init__(self, error: Exception | None = None) -> None:
        self.certified: list[Endorse] = []
        self._error = error

    def certify(self, request: Endorse) -> Birth:
        if self._error is not None:
            raise self._error
        self.certified.append(request)
        return BIRTH


async def made_of(desk: Desk, said: Sequence[FromWorker]) -> tuple[Blank | WorkerError, bool, list[bytes]]:
    """What the pool makes of a worker that says this and closes; whether it was killed; and the frames that it got."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    link = Link(theirs)
    worker = Worker(link, 1, ours)  # type: ignore[arg-type]
    theirs.sendall(b"".join(encode_frame(encode(message)) for message in said))
    theirs.shutdown(socket.SHUT_WR)
    pool = WorkerPool(0, desk.certify)
    result: Blank | WorkerError
    try:
        result = await pool._make_blank(worker)
        frames = FrameDecoder().feed(theirs.recv(1 << 16))
    except WorkerError as error:
        result, frames = error, []
    worker.close()
    theirs.close()
    return result, link.killed, frames


@pytest.mark.claim("C7")
def test_a_blanks_first_words_are_certified_and_its_id_is_the_one_in_the_certificates() -> None:
    desk = Desk()
    blank, killed, frames = asyncio.run(made_of(desk, [ENDORSE]))
    assert isinstance(blank, Blank)
    assert (blank.birth, killed, desk.certified) == (BIRTH, False, [ENDORSE])
    assert [parse_to_worker(frame) for frame in frames] == [Endorsed([b"certificate"], ENDORSEMENT.issuer)]


@pytest.mark.parametrize("first", [Commit(b"state"), Ready(), Failed("libtpms cannot")])
def test_whoever_says_something_else_first_gets_nothing_certified(first: FromWorker) -> None:
    desk = Desk()
    refused, killed, _frames = asyncio.run(made_of(desk, [first, ENDORSE]))
    assert isinstance(refused, WorkerError)
    assert (killed, desk.certified) == (True, [])


def test_a_second_set_of_keys_is_not_certified() -> None:
    desk = Desk()
    asyncio.run(made_of(desk, [ENDORSE, ENDORSE, ENDORSE]))
    assert desk.certified == [ENDORSE]


def test_a_worker_that_dies_or_keys_that_are_none_make_no_blank() -> None:
    for desk, said in ((Desk(), []), (Desk(CertificateError("no key")), [ENDORSE])):
        refused, killed, _frames = asyncio.run(made_of(desk, said))
        assert isinstance(refused, WorkerError)
        assert killed
