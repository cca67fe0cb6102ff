"""How often somebody may fail to log in. The console's routes come in.

A token cannot be guessed; this keeps those who try from costing the database much.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from typing import Final

from spvtpm.wire.errors import TooMany

ATTEMPTS: Final = 10
ATTEMPTS_OF_PEER: Final = 300
"""Of all behind one peer, which may be a proxy with many people behind it, or one who makes up what a proxy would say."""

WITHIN_S: Final = 60.0
_KNOWN: Final = 4096


class Throttle:
    """Failed attempts within the last minute, of this process; one event loop's. Those heard of longest ago are forgotten."""

    def __init__(self) -> None:
        self._of_client = _Attempts(ATTEMPTS)
        self._of_peer = _Attempts(ATTEMPTS_OF_PEER)

    def attempt(self, peer: str, forwarded: str) -> None:
        """Before an attempt: it counts as failed until it has succeeded.

        Args:
            peer: address of whoever has the connection.
            forwarded: address that the peer says it asks for; it may be made up.

        Raises:
            TooMany: there were too many that did not succeed.
        """
        self._of_peer.verify_free(peer)
        self._of_client.verify_free(f"{peer} {forwarded}")
        self._of_peer.add(peer)
        self._of_client.add(f"{peer} {forwarded}")

    def succeeded(self, peer: str, forwarded: str) -> None:
        """The attempt was a right one."""
        self._of_peer.take_back(peer)
        self._of_client.forget(f"{peer} {forwarded}")


class _Attempts:
    def __init__(self, most: int) -> None:
        self._most = most
        self._times_s: OrderedDict[str, deque[float]] = OrderedDict()

    def verify_free(self, who: str) -> None:
        times_s = self._times_s.get(who)
        if times_s is not None and len(times_s) == self._most and times_s[0] > time.monotonic() - WITHIN_S:
            raise TooMany(f"{self._most} attempts within {WITHIN_S:.0f} s have failed")

    def add(self, who: str) -> None:
        self._times_s.setdefault(who, deque(maxlen=self._most)).append(time.monotonic())
        self._times_s.move_to_end(who)
        if len(self._times_s) > _KNOWN:
            self._times_s.popitem(last=False)

    def take_back(self, who: str) -> None:
        if self._times_s.get(who):
            self._times_s[who].pop()

    def forget(self, who: str) -> None:
        self._times_s.pop(who, None)
