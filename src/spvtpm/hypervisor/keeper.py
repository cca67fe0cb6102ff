"""One VM on this host: keeps its newest order and sees to it that the VM is as ordered, and stays so."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from msgspec.structs import replace

from spvtpm.hypervisor.performer import Performer
from spvtpm.hypervisor.records import Brought, Record, Records
from spvtpm.hypervisor.steps import Step
from spvtpm.wire.agent_api import Order, VmReport
from spvtpm.wire.errors import MessageError, NotRunning, ResourceError, SpvtpmError, WrongState
from spvtpm.wire.messages import VmInfo
from spvtpm.wire.platform_errors import MachineFailed, Superseded, Unavailable

log = logging.getLogger(__name__)

ORDER_PATIENCE_S: Final = 20.0
"""How long an order's sender waits for its end; shorter than a platform waits for an answer. The agent goes on with the order."""

MAX_FALLS: Final = 5
"""How often in a row a VM is booted again that does not stay up, or cannot be booted for now."""

_UP_S: Final = 60.0
"""A VM that was up for this long has not fallen in a row."""

_FIRST_PAUSE_S: Final = 1.0
_CLOSE_PATIENCE_S: Final = 45.0


class VmKeeper:
    """Keeps one VM. Life: construct → `start()` → `order()` … → `close()`. One task acts, and always on the newest order.

    Args:
        record: what was ordered before.
        records: where it is kept.
        performer: carries out steps on this VM.
    """

    def __init__(self, record: Record, records: Records, performer: Performer) -> None:
        self._record = record
        self._records = records
        self._performer = performer
        self._writing = asyncio.Lock()
        self._acting = asyncio.Lock()
        self._is_changing = False  # from the first step until the VM is as ordered; not while it is only looked at
        self._woken = asyncio.Event()
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._visitors = 0
        self._closing = False
        self._is_fresh = False  # nobody has heard yet what became of the order
        self._is_settled = False
        self._up_since: float | None = None
        self._falls = 0
        self._not_before = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def vm_id(self) -> uuid.UUID:
        """The VM."""
        return self._record.vm_id

    @property
    def record(self) -> Record:
        """The newest order, and what became of it."""
        return self._record

    @property
    def performer(self) -> Performer:
        """What carries out steps on this VM."""
        return self._performer

    @property
    def is_absent(self) -> bool:
        """Whether nothing of the VM is here, nor shall be, and nobody is about to change that."""
        record = self._record
        is_gone = record.want in (None, "absent") and not record.failure and not self._performer.machine.is_kept
        return is_gone and not self._visitors and not self._acting.locked()

    def start(self) -> None:
        """Begins to act."""
        self._task = asyncio.get_running_loop().create_task(self._work())
        self.wake()

    def wake(self) -> None:
        """Has it look whether the VM is as ordered."""
        self._woken.set()

    def look(self, block: VmInfo | None) -> None:
        """Tells what the secure processor has of the VM now; cheap, for a regular look at all VMs."""
        if self._acting.locked() or self._has_given_up or time.monotonic() < self._not_before:
            return
        try:
            is_as_ordered = self._performer.next_step(self._record, block) is Step.NOTHING
        except SpvtpmError:
            is_as_ordered = False
        if not (is_as_ordered and self._is_settled):
            self.wake()

    async def order(self, order: Order) -> None:
        """Takes an order, durably, and waits until the VM is as ordered.

        Raises:
            Superseded: it is older than another, or a newer one has come meanwhile.
            NotRunning: the secure processor is away; the order is kept.
            Unavailable: it takes long; the agent goes on with it.
            SpvtpmError: it cannot be carried out, and the agent has given up.
        """
        with self._visiting():
            await self._take_order(order)

    async def _take_order(self, order: Order) -> None:
        await self._update(lambda record: self._ordered(record, order))
        if order.want != "departing":
            self._performer.handoffs.interrupt()
        for sequence, waiter in self._waiting:
            if sequence < order.sequence and not waiter.done():
                waiter.set_exception(Superseded(f"order {sequence} for VM {self.vm_id}: a newer one has come"))
        waiter = asyncio.get_running_loop().create_future()
        entry = (order.sequence, waiter)
        self._waiting.append(entry)
        self._is_fresh, self._is_settled, self._falls, self._not_before = True, False, 0, 0.0
        self.wake()
        try:
            async with asyncio.timeout(ORDER_PATIENCE_S):
                await waiter
        except TimeoutError:
            raise Unavailable(f"VM {self.vm_id} is not {order.want} yet; its host goes on with it") from None
        finally:
            self._waiting.remove(entry)

    def _ordered(self, record: Record, order: Order) -> Record:
        if self._closing:
            raise Unavailable("the agent is being stopped")
        if order.sequence < record.sequence:
            raise Superseded(f"order {order.sequence} for VM {self.vm_id} is older than order {record.sequence}")
        if order.sequence == record.sequence and record.want not in (None, order.want):
            raise Superseded(f"order {order.sequence} for VM {self.vm_id} was to be {record.want}, not {order.want}")
        if order.want == "arriving" and order.handoff is None:
            raise MessageError("an order for a VM to arrive says in which handoff")
        handoff = record.handoff
        if order.want == "departing" and order.sequence > record.sequence and handoff is not None:
            handoff = handoff if handoff.outcome in ("open", "gone") else None
        return replace(
            record,
            sequence=order.sequence,
            want=order.want,
            failure="",
            brought=_brought(order),
            handoff=handoff,
        )

    async def put_image(self, sequence: int, image: bytes) -> None:
        """Stores a memory image that was brought from elsewhere, durably.

        Raises:
            Superseded: an order is newer.
            WrongState: the VM runs, or is ordered to.
            SpvtpmError: the secure processor cannot be asked, or the image not be written.
        """
        with self._visiting():
            async with self._acting:
                await self._take_image(sequence, image)

    async def _take_image(self, sequence: int, image: bytes) -> None:
        if sequence < self._record.sequence:
            raise Superseded(f"image {sequence} for VM {self.vm_id} is older than order {self._record.sequence}")
        if self._record.want == "running" and not self._record.failure:
            raise WrongState(f"VM {self.vm_id} is ordered to run: it takes no other memory now")
        await self._performer.put_image(image)
        if self._record.want in (None, "absent"):
            await self._update(lambda record: Record(vm_id=record.vm_id, sequence=sequence))

    @contextmanager
    def _visiting(self) -> Iterator[None]:
        self._visitors += 1
        try:
            yield
        finally:
            self._visitors -= 1

    def report(self, block: VmInfo | None) -> VmReport:
        """How the VM is.

        Args:
            block: what the secure processor has of it.
        """
        record = self._record
        state = self._performer.machine_for_report(block)
        if self._is_changing or (state == "none" and record.want == "running" and not record.failure):
            state = "changing"
        return VmReport(
            vm_id=self.vm_id,
            sequence=record.sequence,
            want=record.want,
            machine=state,
            security_block=block,
            image=self._performer.has_image(),
            failure=record.failure,
            handoff=self._performer.handoffs.report(record.handoff),
        )

    def take_no_more(self) -> None:
        """Takes no more orders, and tells those who wait for one's end."""
        self._closing = True
        self._performer.handoffs.interrupt()
        for _sequence, waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(
                    Unavailable("the agent is being stopped; it goes on with the order at its next start")
                )
        self.wake()

    async def close(self) -> None:
        """Stops acting, then powers the VM off. What was ordered stays ordered."""
        self.take_no_more()
        if self._task is not None:
            _done, late = await asyncio.wait([self._task], timeout=_CLOSE_PATIENCE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._performer.power_down(self._record)

    @property
    def _has_given_up(self) -> bool:
        return self._record.want is None or bool(self._record.failure)

    @property
    def _is_unsettled(self) -> bool:
        """Whether a handoff from here is open: nobody but this agent lets its machine go on then, so it never gives up."""
        handoff = self._record.handoff
        return handoff is not None and handoff.is_unsettled

    async def _work(self) -> None:
        while not self._closing:
            await self._woken.wait()
            self._woken.clear()
            async with self._acting:
                await self._performer.machine.tidy()
                if not (self._has_given_up or self._closing or time.monotonic() < self._not_before):
                    await self._act()
                self._is_changing = False

    async def _act(self) -> None:
        """Steps until the VM is as ordered, or the agent gives up, or it has to wait for something."""
        record = self._record
        try:
            if await self._carry_out():
                self._is_changing = False
                self._settle()
        except NotRunning as error:
            self._is_settled = False
            self._answer(
                self._record.sequence, NotRunning(f"{error}; the order is kept, and carried out when it is back")
            )
        except SpvtpmError as error:
            await self._failed(record, error)
        except Exception as error:
            log.exception("VM %s: a defect", self.vm_id)
            await self._failed(
                record, SpvtpmError(f"VM {self.vm_id}: {type(error).__name__} in the agent; its log says more")
            )

    async def _carry_out(self) -> bool:
        """Returns whether it came to an end.

        Raises:
            SpvtpmError: of a step.
        """
        while True:
            record = self._record
            step = await self._performer.look(record)
            if step is Step.NOTHING:
                return record == self._record
            if (
                self._closing and record.want != "hibernated"
            ):  # what is suspended already is better hibernated than lost
                return False
            if self._up_since is not None and record.want == "running" and not self._may_rise(record):
                return False
            self._is_settled = False
            log.info("VM %s, wanted %s: %s", self.vm_id, record.want, step.name.lower().replace("_", " "))
            self._is_changing = True
            changed = await self._performer.perform(step, record)
            if changed != record:
                await self._update(partial(_changed, before=record, by_step=changed))

    def _may_rise(self, record: Record) -> bool:
        """It was up, and is not any more: whether to boot it again now.

        Raises:
            ResourceError: it falls again and again.
        """
        assert self._up_since is not None  # noqa: S101  # the caller has looked
        now = time.monotonic()
        self._falls = 1 if now - self._up_since >= _UP_S else self._falls + 1
        self._up_since = None
        log.warning("VM %s is down, and wanted %s: fall %d", self.vm_id, record.want, self._falls)
        if self._falls > MAX_FALLS:
            raise MachineFailed(f"VM {self.vm_id} went down {self._falls} times in a row, soon after each boot")
        if self._falls > 1:
            self._pause()
            return False
        return True

    def _pause(self) -> None:
        self._is_settled = False
        self._not_before = time.monotonic() + _FIRST_PAUSE_S * 2 ** (self._falls - 1)

    def _settle(self) -> None:
        if not self._is_settled:
            log.info("VM %s is %s, as ordered", self.vm_id, self._record.want)
        self._is_fresh, self._is_settled = False, True
        if self._record.want == "running":
            self._up_since = self._up_since or time.monotonic()
        else:
            self._up_since, self._falls = None, 0
        self._answer(self._record.sequence, None)

    async def _failed(self, record: Record, error: SpvtpmError) -> None:
        if record.sequence != self._record.sequence:
            self.wake()  # the newest order is another
            return
        if isinstance(error, ResourceError) and not self._is_fresh and self._falls < MAX_FALLS:
            self._falls += 1
            log.warning("VM %s, wanted %s: failure %d: %s", self.vm_id, record.want, self._falls, error)
            self._pause()
            return
        if self._is_unsettled:
            self._falls = min(self._falls + 1, MAX_FALLS)
            log.error("VM %s: what becomes of its handoff is not settled yet: %s", self.vm_id, error)
            self._pause()
            self._answer(record.sequence, error)
            return
        log.error("VM %s cannot be %s: %s", self.vm_id, record.want, error)
        self._is_fresh, self._is_settled, self._up_since = False, False, None
        sentence = str(error)[:2048] or type(error).__name__

        def given_up(newest: Record) -> Record:
            return replace(newest, failure=sentence) if newest.sequence == record.sequence else newest

        try:
            await self._update(given_up)
        except SpvtpmError as unwritten:  # it stays in memory
            log.error("VM %s: %s", self.vm_id, unwritten)
            self._record = given_up(self._record)
        self._answer(record.sequence, error)

    def _answer(self, sequence: int, error: SpvtpmError | None) -> None:
        for of, waiter in self._waiting:
            if of == sequence and not waiter.done():
                if error is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(error)

    async def _update(self, change: Callable[[Record], Record]) -> None:
        """Makes a change of the record durable, then known."""
        async with self._writing:
            record = change(self._record)
            if record != self._record:
                await asyncio.to_thread(self._records.put, record)
                self._record = record


def _brought(order: Order) -> Brought | None:
    if order.handoff is None:
        return None
    return Brought(handoff=order.handoff, token=order.token)


def _changed(newest: Record, before: Record, by_step: Record) -> Record:
    """The newest record with what a step has changed; what has come with a newer order is not used up yet."""
    brought = by_step.brought if newest.sequence == before.sequence else newest.brought
    return replace(newest, resuming=by_step.resuming, handoff=by_step.handoff, brought=brought)
