"""Keeps the parts of the stack running: starts them in order, starts again what dies, ends them in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, Final, Protocol

from spvtpm.stack.process import Part, in_words
from spvtpm.wire.platform_errors import PartFailed

MOST_FAILURES: Final = 5
"""So many ends in a row, none long after its start, and nobody believes any more that another start will help."""

STEADY_AFTER_S: Final = 60.0
"""Who ran for so long did start: what ended it then is counted anew."""

FIRST_PAUSE_S: Final = 0.25
"""Before a part is started again; doubled with each failure in a row."""

ENDING_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Screen(Protocol):
    """Where a person reads what happens."""

    def tell(self, sentence: str) -> None:
        """Something has happened."""


class Supervisor:
    """All parts. Life: construct in a running event loop → `start()` for each level, lowest first → `watch()` → `stop()`.

    Once a signal to end has come, `start` and `watch` return at once; `is_ending` tells.

    Args:
        screen: told what happens.
    """

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._levels: list[list[Part]] = []
        self._ending = asyncio.Event()
        for number in ENDING_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._ending.set)

    @property
    def is_ending(self) -> bool:
        """Whether it was told to end."""
        return self._ending.is_set()

    @property
    def parts(self) -> list[Part]:
        """All of them, lowest level first."""
        return [part for level in self._levels for part in level]

    async def start(self, *level: Part) -> None:
        """Starts parts that do not need each other, and waits until they listen.

        Raises:
            PartFailed: one of them does not start; nothing is tried again.
        """
        self._levels.append(list(level))
        await self.until_ending(*(part.start() for part in level))

    async def watch(self) -> None:
        """Starts again what dies, until a signal to end comes.

        Raises:
            PartFailed: a part ends again and again.
        """
        await self.until_ending(*(self._keep(part) for part in self.parts))

    async def until_ending(self, *work: Coroutine[Any, Any, None]) -> None:
        """Does all of this at the same time; gives up, in peace, when a signal to end comes."""
        tasks = [asyncio.create_task(one) for one in work]
        ending = asyncio.create_task(self._ending.wait())
        try:
            waiting = {ending, *tasks}
            while not ending.done() and waiting != {ending}:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {ending}:
                    await task  # an error of one ends all
        finally:
            for task in (ending, *tasks):
                task.cancel()
            await asyncio.gather(ending, *tasks, return_exceptions=True)

    async def _keep(self, part: Part) -> None:
        loop = asyncio.get_running_loop()
        failures, started = 0, loop.time()
        why = in_words(await part.ended())
        while True:
            failures = 1 if loop.time() - started > STEADY_AFTER_S else failures + 1
            if failures > MOST_FAILURES:
                raise PartFailed(f"{part.name} ends again and again ({why}); what it said is in {part.log}")
            pause_s = FIRST_PAUSE_S * 2 ** (failures - 1)
            self._screen.tell(f"{part.name} has ended ({why}); it is started again in {pause_s:g} s")
            await asyncio.sleep(pause_s)
            started = loop.time()
            try:
                await part.start()
            except PartFailed as failed:
                why = str(failed)
                continue
            self._screen.tell(f"{part.name} runs again")
            why = in_words(await part.ended())

    async def stop(self) -> None:
        """Ends all parts, the highest level first. A part that does not end in time is killed."""
        for level in reversed(self._levels):
            went_well = await asyncio.gather(*(part.stop() for part in level))
            for part, is_well in zip(level, went_well, strict=True):
                if not is_well:
                    self._screen.tell(f"{part.name} did not end in time, and was killed; its log is {part.log}")
