"""The port to whatever runs operations durably: what the platform needs of it, and nothing else."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Protocol


class Leaving(BaseException):
    """This process is being stopped: the operation is left as it is, for whoever takes it up. Not an error, so none is caught."""


class Durably(Protocol):
    """Does a part of an operation once."""

    def __call__(self, name: str, part: Callable[[], str]) -> str:
        """Does the part and keeps its answer; if that is kept already, gives it without doing anything.

        A process that dies in between has the part done again: so it finds what it has done already.

        Args:
            name: of the part.
            part: does it, and answers; never raises but `Leaving`.

        Returns:
            Its answer.
        """


RunOperation = Callable[[uuid.UUID, Durably], None]
"""Runs an operation to its end, or `Leaving`; always the same parts as long as their answers are the same."""


class DurableEngine(Protocol):
    """Runs each operation that it is handed until its end, also if this process dies meanwhile: then in another one.

    Life: construct with the function that runs an operation → `start()` → `hand_over()` … → `close()`.
    """

    def start(self) -> None:
        """Takes up what this replica left when it ended last."""

    def hand_over(self, operation_id: uuid.UUID, queue_key: str) -> None:
        """Takes an operation. Handed over twice, it is run once.

        Args:
            operation_id: the operation.
            queue_key: operations of one key share a bounded number of places: the host, mostly.
        """

    def take_over(self, replica: str) -> int:
        """Takes up what a dead replica had begun. If that is only slow, its next write finds that it is not its any more.

        Returns:
            How many operations those were.
        """

    def abandoned(self, operation_ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
        """Those of these operations, all of them handed over once, that nobody will run any more."""

    def close(self) -> None:
        """Ends; what is under way is taken up again by the next start, or by another replica."""
