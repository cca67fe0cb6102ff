"""Carries out the steps of a VM's handoffs: at the secure processor, at the machine, and on the way to the other host."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from msgspec.structs import replace

from spvtpm.hypervisor.arrival import Arrival
from spvtpm.hypervisor.departure import Departure
from spvtpm.hypervisor.records import Brought, HandoffRecord, Record
from spvtpm.hypervisor.secure_processor import SecureProcessor
from spvtpm.hypervisor.steps import Step, Way
from spvtpm.hypervisor.virtual_machine import VirtualMachine
from spvtpm.wire.agent_api import HandoffReport
from spvtpm.wire.errors import NotFound, SpvtpmError, WrongState
from spvtpm.wire.messages import (
    Handoff,
    HandoffToken,
    ReceiveCancel,
    ReceiveFinish,
    ReceiveStart,
    SendCancel,
    SendFinish,
    SendForget,
    SendStart,
)

log = logging.getLogger(__name__)

_MAX_FAILURE: Final = 2048
_NO_LINK: Final = "no link to the other host came in time, or the agent was started anew"


class Handoffs:
    """What can be done with the handoffs of one VM. Steps come one after the other.

    Args:
        vm_id: the VM.
        sp: the host's secure processor.
        machine: the VM's machine.
    """

    def __init__(self, vm_id: uuid.UUID, sp: SecureProcessor, machine: VirtualMachine) -> None:
        self._vm_id = vm_id
        self._sp = sp
        self._machine = machine
        self._departure: Departure | None = None
        self._arrival: Arrival | None = None

    def way(self, record: HandoffRecord | None) -> Way:
        """To the other end of a handoff."""
        if record is None:
            return "none"
        found = self._departure if record.side == "source" else self._arrival
        return found.way if found is not None and found.handoff.hex() == record.handoff else "none"

    def report(self, record: HandoffRecord | None) -> HandoffReport | None:
        """What the platform is told of one."""
        told = report_of(record)
        if record is None or told is None:
            return None
        found = self._departure if record.side == "source" else self._arrival
        is_linked = self.way(record) == "linked"
        return replace(told, is_linked=is_linked, copied_bytes=found.copied_bytes if found is not None else 0)

    @contextmanager
    def linked(self, handoff: bytes) -> Iterator[None]:
        """The link of a handoff is being carried.

        Raises:
            NotFound: there is no such handoff here.
            WrongState: it has its link, or had it.
        """
        found = next((one for one in (self._departure, self._arrival) if one and one.handoff == handoff), None)
        if found is None:
            raise NotFound(f"VM {self._vm_id} has no part here in a handoff {handoff.hex()}, or not any more")
        with found.linked():
            yield

    def interrupt(self) -> None:
        """The VM is not to leave any more."""
        if self._departure is not None:
            self._departure.interrupt()

    async def perform(self, step: Step, record: Record) -> Record:
        """Does it; returns the record as it is then.

        Raises:
            NotRunning: the secure processor is away, and has done it or not.
            SpvtpmError: it cannot be done.
        """
        match step:
            case Step.SEND_START:
                return await self._send_start(record)
            case Step.MOVE:
                return await self._move(record)
            case Step.SETTLE:
                return await self.settle(record)
            case Step.RECEIVE_START:
                return await self._receive_start(record, _brought(record))
            case Step.KEEP_MEMORY:
                return await self._keep_memory(record)
            case Step.RECEIVE_FINISH:
                return await self._receive_finish(record, _brought(record))
            case Step.RECEIVE_CANCEL:
                return await self._receive_cancel(record)
            case Step.FORGET_HANDOFF:
                return await self._forget(record, _brought(record))
            case _:
                raise AssertionError(step)

    async def close(self) -> None:
        """Ends what is under way; what is durable stays."""
        departure, self._departure = self._departure, None
        arrival, self._arrival = self._arrival, None
        if departure is not None:
            await departure.close()
        if arrival is not None:
            await arrival.close()

    # The source

    async def _send_start(self, record: Record) -> Record:
        begun = await self._sp.call(SendStart(vm_id=self._vm_id), Handoff)
        await self.close()
        self._departure = Departure(self._sp, self._machine, self._vm_id, begun.handoff)
        return replace(record, handoff=HandoffRecord(handoff=begun.handoff.hex(), side="source"))

    async def _move(self, record: Record) -> Record:
        """A failure is none of the order: the handoff is taken back then, and the VM runs on."""
        departure, handoff = self._departure, record.handoff
        assert departure is not None and handoff is not None  # noqa: S101  # there is a way
        try:
            token = await departure.move()
        except (SpvtpmError, OSError) as error:
            log.warning("VM %s does not leave: %s", self._vm_id, error)
            handoff = replace(handoff, failure=str(error)[:_MAX_FAILURE])
        else:
            handoff = replace(handoff, outcome="gone", token=token.hex())
        finally:
            await self.close()  # whatever it was: there is no way any more
        return replace(record, handoff=handoff)

    async def settle(self, record: Record) -> Record:
        """The vTPM stays, if the secure processor has not given it up.

        Raises:
            NotRunning: the secure processor is away.
            SpvtpmError: it does not say.
        """
        handoff = record.handoff
        assert handoff is not None  # noqa: S101  # it is what is to be settled
        await self.close()
        name = bytes.fromhex(handoff.handoff)
        try:
            kept = await self._sp.call(SendCancel(vm_id=self._vm_id, handoff=name), HandoffToken)
        except WrongState:
            gone = await self._sp.call(SendFinish(vm_id=self._vm_id, handoff=name), HandoffToken)
            return replace(record, handoff=replace(handoff, outcome="gone", token=gone.token.hex(), failure=""))
        failure = handoff.failure or (_NO_LINK if record.want == "departing" else "")
        return replace(record, handoff=replace(handoff, outcome="kept", token=kept.token.hex(), failure=failure))

    async def _forget(self, record: Record, brought: Brought) -> Record:
        """Whichever side this host is on: an agent that died before it wrote that down was perhaps still expecting the VM."""
        name = bytes.fromhex(brought.handoff)
        await self._sp.call(SendForget(vm_id=self._vm_id, handoff=name, receipt=_token(brought)), Handoff)
        if record.handoff is None:
            await self._sp.call(ReceiveCancel(vm_id=self._vm_id, handoff=name, token=None), Handoff)
        return replace(record, handoff=None, brought=None)

    # The destination

    async def _receive_start(self, record: Record, brought: Brought) -> Record:
        uid = await self._machine.prepare()
        await self._machine.forget_image()  # of another life of it here
        name = bytes.fromhex(brought.handoff)
        await self._sp.call(ReceiveStart(vm_id=self._vm_id, handoff=name, vm_uid=uid), Handoff)
        await self.close()
        self._arrival = Arrival(self._sp, self._vm_id, name)
        return replace(record, resuming=False, handoff=HandoffRecord(handoff=brought.handoff, side="destination"))

    async def _keep_memory(self, record: Record) -> Record:
        arrival = self._arrival
        assert arrival is not None  # noqa: S101  # there is a way
        memory = await arrival.memory()
        await self.close()
        if memory is None:
            log.error("VM %s: its memory has not come whole: it will boot", self._vm_id)
            return record
        await self._machine.put_memory(memory)
        return replace(record, resuming=True)

    async def _receive_finish(self, record: Record, brought: Brought) -> Record:
        name = bytes.fromhex(brought.handoff)
        request = ReceiveFinish(vm_id=self._vm_id, handoff=name, token=_token(brought))
        come = await self._sp.call(request, HandoffToken)
        await self.close()
        handoff = HandoffRecord(handoff=brought.handoff, side="destination", outcome="come", token=come.token.hex())
        return replace(record, handoff=handoff)

    async def _receive_cancel(self, record: Record) -> Record:
        brought = record.brought
        known = record.handoff.handoff if record.handoff is not None else None
        name = known or _brought(record).handoff
        token = _token(brought) if brought is not None and brought.token and brought.handoff == name else None
        request = ReceiveCancel(vm_id=self._vm_id, handoff=bytes.fromhex(name), token=token)
        try:
            await self._sp.call(request, Handoff)
        except WrongState:
            if record.want == "arriving" and brought is not None and brought.handoff == name:
                return record  # it has come just now
            raise
        await self.close()
        is_another = record.want == "arriving" and brought is not None and brought.handoff != name
        return replace(record, handoff=None, brought=brought if is_another else None)


def report_of(record: HandoffRecord | None) -> HandoffReport | None:
    """What is known of a handoff in which nothing goes on."""
    if record is None:
        return None
    return HandoffReport(
        handoff=record.handoff,
        outcome=record.outcome,
        is_linked=False,
        copied_bytes=0,
        token=record.token,
        failure=record.failure,
    )


def _brought(record: Record) -> Brought:
    assert record.brought is not None  # noqa: S101  # `next_step` has looked
    return record.brought


def _token(brought: Brought) -> bytes:
    assert brought.token is not None  # noqa: S101  # `next_step` has looked
    return bytes.fromhex(brought.token)
