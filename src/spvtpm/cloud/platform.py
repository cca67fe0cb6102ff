"""What the parts of one replica share: configuration, database, threads for it, streams, limits. Routes and console come in.

Life: construct → serve `api.build_app(platform)` → `leave()` when it is to end → `close()`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar

from spvtpm.cloud.database import CONNECTIONS, Database
from spvtpm.cloud.places import Places
from spvtpm.cloud.streams import Streams

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from spvtpm.cloud.config import CloudConfig

_THREADS: Final = CONNECTIONS // 2  # the rest is the workers'

_Found = TypeVar("_Found")


class Platform:
    """One replica's parts.

    Attributes:
        config: of the platform.
        database: of the platform.
        streams: of events.
        relays_of_user, relays_of_host, relays: how many channels and consoles may be relayed.
    """

    def __init__(self, config: CloudConfig, database: Database, *, wake: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            config: of the platform.
            database: of the platform, migrated.
            wake: tells whoever works on operations that one was begun.
        """
        limits = config.limits
        self.config = config
        self.database = database
        self.wake = wake
        self.relays_of_user = Places(limits.relays_per_user, "relayed channels and consoles of this user")
        self.relays_of_host = Places(limits.relays_per_host, "relayed channels and consoles of this host")
        self.relays = Places(limits.relays, "relayed channels and consoles")
        self.streams = Streams(self.read, limits.streams_per_user)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="database")

    async def read(self, look: Callable[[Connection], _Found]) -> _Found:
        """Looks into the database, in a thread.

        Raises:
            Unavailable: it is away.
        """

        def work() -> _Found:
            with self.database.read() as connection:
                return look(connection)

        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def write(self, change: Callable[[Connection], _Found]) -> _Found:
        """Changes the database, in one transaction, in a thread.

        Raises:
            Unavailable: it is away.
        """

        def work() -> _Found:
            with self.database.write() as connection:
                return change(connection)

        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def leave(self) -> None:
        """Ends what would go on by itself, so that the server can end. From the event loop."""
        self.streams.close()

    def close(self) -> None:
        """Ends the rest."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.database.close()
