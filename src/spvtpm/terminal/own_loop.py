"""An event loop in a thread of its own, for functions that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class OwnLoop:
    """Runs coroutines for threads that wait for them. Life: construct → `run` … → `close`.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()  # what is run comes before the end, or not at all
        self._is_closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, act: Coroutine[Any, Any, _Result]) -> _Result:
        """What a coroutine returns, or raises. Threads may be in here side by side.

        Raises:
            CancelledError: the loop is closed, or was meanwhile; that of `concurrent.futures`.
        """
        with self._lock:
            if self._is_closed:
                act.close()
                raise CancelledError
            future = asyncio.run_coroutine_threadsafe(act, self._loop)
        return future.result()

    def close(self) -> None:
        """Cancels what still runs, and ends; once more does nothing."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            future = asyncio.run_coroutine_threadsafe(self._cancel_others(), self._loop)
        future.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @staticmethod
    async def _cancel_others() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
