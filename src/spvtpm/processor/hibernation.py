"""Hibernation of one vTPM: its boot ends with all of its state kept, or goes on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from spvtpm.processor.vtpm import Vtpm
from spvtpm.wire.errors import SpvtpmError


async def hibernate(vtpm: Vtpm, save: Callable[[bytes], Awaitable[None]]) -> None:
    """Ends the boot; what is volatile goes to `save`, and comes back to `Vtpm.power_on`.

    Args:
        vtpm: active or parked.
        save: makes the volatile state durable, or raises; then the boot goes on.

    Raises:
        WrongState: it is off or failed, or has an NV change that is not durable yet.
        WorkerError: the worker died.
        SpvtpmError: what `save` raised.
    """
    volatile = await vtpm.halt()
    try:
        await save(volatile)
    except SpvtpmError:
        await vtpm.go_on()
        raise
    except BaseException:  # it may be durable, or about to be: nothing goes on beside it
        await vtpm.leave()
        raise
    await vtpm.leave()
