"""Which of an owner's channels are older than an answer that has to stay true.

A relay can hold back what an owner has sent, and hand it on when he has long given that channel up. If he has asked meanwhile,
in another channel, what became of a vTPM, then he acts on the answer: he starts it elsewhere because it is not here, or throws a
file away because it is. An import or an acknowledgement that comes in late would make the answer a lie, and a vTPM live twice,
or not at all. So the question outdates all other channels of that owner that are there when it is answered.

The same holds for one VM: who has exported, imported or destroyed it in one channel has given up what he said of it in others.
A destruction that was held back does not meet the VM that came back meanwhile, nor a rotation the secret that came after it.

A channel counts from the introduction on, before its handshake: what is held back can only belong to one that had got so far.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from spvtpm.wire.errors import StaleInstance

_MAX_GIVEN_UP = 256
"""A channel that was left behind so often is out of date altogether."""


class Turn:
    """One channel among those of its owner."""

    def __init__(self, turns: set[Turn]) -> None:
        self._turns = turns
        self._is_outdated = False
        self._given_up = set[uuid.UUID | None]()

    def outdate_others(self) -> None:
        """An answer is being given in this channel that has to stay true."""
        for turn in self._turns:
            turn._is_outdated |= turn is not self

    def change(self, subject: uuid.UUID | None) -> None:
        """A VM is about to come, to go, or, if there is none named, all of them to get another secret, by a word of this channel.

        Raises:
            StaleInstance: its owner has asked in another one what became of a vTPM, or changed the same there.
        """
        if self._is_outdated or subject in self._given_up:
            raise StaleInstance("its owner has gone on in a newer channel; this one is out of date")
        for turn in self._turns - {self}:
            turn._given_up.add(subject)
            turn._is_outdated |= len(turn._given_up) > _MAX_GIVEN_UP


class ChannelOrder:
    """All channels that are there, by the key that their owner has introduced himself with, proven or not yet."""

    def __init__(self) -> None:
        self._of_owner: dict[bytes, set[Turn]] = {}

    @contextmanager
    def turn_of(self, owner: bytes) -> Iterator[Turn]:
        """The turn of a channel, for as long as its connection lives.

        Args:
            owner: fingerprint of the owner's key, 32 bytes.
        """
        turns = self._of_owner.setdefault(owner, set())
        turn = Turn(turns)
        turns.add(turn)
        try:
            yield turn
        finally:
            turns.remove(turn)
            if not turns:
                del self._of_owner[owner]
