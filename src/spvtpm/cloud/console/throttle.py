"""How often an address may fail to log in. The console's routes come in.

A token cannot be guessed; this keeps those who try from costing the database much.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from typing import Final

from spvtpm.wire.errors import TooMany

ATTEMPTS: Final = 10
WITHIN_S: Final = 60.0
_ADDRESSES: Final = 4096


class Throttle:
    """Attempts of each address, of this process; one event loop's. The addresses heard of longest ago are forgotten."""

    def __init__(self) -> None:
        self._attempts: OrderedDict[str, deque[float]] = OrderedDict()

    def attempt(self, address: str) -> None:
        """Before an attempt.

        Raises:
            TooMany: there were too many that did not succeed.
        """
        now_s = time.monotonic()
        attempts = self._attempts.setdefault(address, deque(maxlen=ATTEMPTS))
        self._attempts.move_to_end(address)
        if len(self._attempts) > _ADDRESSES:
            self._attempts.popitem(last=False)
        if len(attempts) == ATTEMPTS and attempts[0] > now_s - WITHIN_S:
            raise TooMany(f"{ATTEMPTS} attempts within {WITHIN_S:.0f} s have failed")
        attempts.append(now_s)

    def succeeded(self, address: str) -> None:
        """The attempt was a right one."""
        self._attempts.pop(address, None)
