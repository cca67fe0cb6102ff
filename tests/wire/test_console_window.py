"""The windows of a console: whoever sends waits for room, whoever is sent more refuses it, and neither waits for ever."""

from __future__ import annotations

import threading

import pytest

from spvtpm.wire.console import WINDOW_PIECES
from spvtpm.wire.console_window import Intake, Room
from spvtpm.wire.errors import MessageError


def full_room() -> Room:
    room = Room()
    for _ in range(WINDOW_PIECES):
        assert room.await_piece()
    return room


class Waiting:
    """A thread that waits for room."""

    def __init__(self, room: Room) -> None:
        self._room, self._may_go = room, list[bool]()
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        self._may_go.append(self._room.await_piece())

    def may_go(self) -> bool:
        """What it was told."""
        self._thread.join(60)
        return self._may_go[0]


def test_whoever_waits_for_room_goes_on_when_something_is_taken() -> None:
    room = full_room()
    waiting = [Waiting(room), Waiting(room)]
    room.give_back(2)
    assert [who.may_go() for who in waiting] == [True, True]
    with pytest.raises(MessageError):
        room.give_back(WINDOW_PIECES + 1)
    room.give_back(WINDOW_PIECES)


def test_whoever_waits_for_room_is_told_that_there_will_be_none() -> None:
    room = full_room()
    waiting = Waiting(room)
    room.close()
    assert not waiting.may_go()
    room.give_back(1)
    assert not room.await_piece()


@pytest.mark.attack("A25")
def test_more_taken_than_was_sent_is_refused() -> None:
    room = Room()
    assert room.await_piece()
    with pytest.raises(MessageError):
        room.give_back(2)


@pytest.mark.attack("A23")
@pytest.mark.parametrize("taken", [0, 1, WINDOW_PIECES // 4 - 1])
def test_a_piece_more_than_a_window_is_refused_as_long_as_nothing_is_told_as_taken(taken: int) -> None:
    intake = Intake()
    for _ in range(WINDOW_PIECES):
        intake.come()
    assert sum(intake.taken() for _ in range(taken)) == 0
    with pytest.raises(MessageError):
        intake.come()


def test_whoever_has_filled_a_window_is_told_before_all_of_it_is_taken() -> None:
    """Else both would wait, now or some windows later."""
    room, intake = full_room(), Intake()
    for _ in range(WINDOW_PIECES):
        intake.come()
    for _ in range(10):
        told = 0
        for _ in range(WINDOW_PIECES // 2):
            told += (now := intake.taken())
            if now:
                room.give_back(now)
        assert told > 0
        for _ in range(told):
            assert room.await_piece()
            intake.come()
