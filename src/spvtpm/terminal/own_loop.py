"""An event loop in a thread of its own, for functions that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class OwnLoop:
    """Runs coroutines for threads that wait for them. Life: construct → `run` … → `close`.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, act: Coroutine[Any, Any, _Result]) -> _Result:
        """What a coroutine returns, or raises. Threads may be in here side by side."""
        return asyncio.run_coroutine_threadsafe(act, self._loop).result()

    def close(self) -> None:
        """Cancels what still runs, and ends."""
        self.run(self._cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @staticmethod
    async def _cancel_others() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
