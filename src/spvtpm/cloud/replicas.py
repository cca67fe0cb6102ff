"""Which of the platform's processes live, and who takes up what a dead one had begun.

Each beats in the database. None compares clocks with another: one is dead whose row has not changed for a while by the
looker's own clock. To be wrong about that costs work, and harms nothing (docs/decisions/0014-durable-workflows-on-dbos.md).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, Engine, delete, insert, select, update

from spvtpm.cloud.tables import replicas

if TYPE_CHECKING:
    from collections.abc import Callable

BEAT_EVERY_S: Final = 2.0
DEAD_AFTER_S: Final = 10.0
_BLIND_AFTER_S: Final = 5.0
"""Who could not beat for so long did not see the others do it either."""


class Replicas:
    """One process among its like. One thread."""

    def __init__(self, database: Engine, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            database: the platform's.
            name: of this process; the same after a restart.
            clock: seconds, of this process alone.
        """
        self._database = database
        self._name = name
        self._clock = clock
        self._last_beat_s = clock()
        self._seen: dict[str, tuple[float, float]] = {}  # name -> what its row says, since when by our clock

    def beat(self) -> list[str]:
        """Tells that this process lives, and finds those that do not.

        Returns:
            Names of the dead, each of them claimed: no other process does the same within `DEAD_AFTER_S`.
        """
        with self._database.begin() as connection:
            self._tell(connection)
            rows = connection.execute(select(replicas).where(replicas.c.executor_id != self._name)).all()
        now_s = self._clock()
        if now_s - self._last_beat_s > _BLIND_AFTER_S:
            self._seen.clear()
        self._last_beat_s = now_s
        found = {row.executor_id: row.seen_s for row in rows}
        self._seen = {
            name: (seen_s, self._seen[name][1] if self._seen.get(name, (None,))[0] == seen_s else now_s)
            for name, seen_s in found.items()
        }
        dead = [name for name, (_, since_s) in self._seen.items() if now_s - since_s >= DEAD_AFTER_S]
        return [name for name in dead if self._claim(name)]

    def bury(self, name: str) -> None:
        """Forgets a dead process whose work was taken up, unless it has come back."""
        with self._database.begin() as connection:
            connection.execute(
                delete(replicas).where(replicas.c.executor_id == name, replicas.c.seen_s == self._seen[name][0])
            )

    def _tell(self, connection: Connection) -> None:
        now_s = time.time()
        changed = connection.execute(update(replicas).where(replicas.c.executor_id == self._name).values(seen_s=now_s))
        if changed.rowcount == 0:
            connection.execute(insert(replicas).values(executor_id=self._name, seen_s=now_s))

    def _claim(self, name: str) -> bool:
        seen_s, _ = self._seen[name]
        # Any other number will do: whoever looks at the same time finds that the row is not what it was.
        mine_s = max(time.time(), seen_s + 0.001)
        with self._database.begin() as connection:
            changed = connection.execute(
                update(replicas)
                .where(replicas.c.executor_id == name, replicas.c.seen_s == seen_s)
                .values(seen_s=mine_s)
            )
        self._seen[name] = (mine_s, self._clock())
        return changed.rowcount == 1
