"""The port to whatever runs operations durably: what the platform needs of it, and nothing else."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Protocol


class DurableEngine(Protocol):
    """Runs each operation that it is handed until its end, also if this process dies meanwhile: then in another one.

    Life: construct with the function that runs an operation → `start()` → `hand_over()` … → `close()`.
    """

    def start(self) -> None:
        """Takes up what was left."""

    def hand_over(self, operation_id: uuid.UUID, queue_key: str) -> None:
        """Takes an operation. Handed over twice, it is run once.

        Args:
            operation_id: the operation.
            queue_key: operations of one key share a bounded number of places: the host, mostly.
        """

    def close(self) -> None:
        """Ends; what is under way is taken up again by the next start, or by another replica."""


Step = Callable[[], None]
"""Part of an operation; may be repeated, and then finds what it has done already."""
