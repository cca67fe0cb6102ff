"""The process that runs one vTPM, from its first message to its last. Confined before this module's code runs."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

from spvtpm.engine.libtpms import EngineError
from spvtpm.processor.worker import messages
from spvtpm.processor.worker.control import Control, SecureProcessorGoneError
from spvtpm.processor.worker.messages import (
    Failed,
    Off,
    Park,
    Parked,
    PowerOff,
    Ready,
    Refused,
    Start,
    StillBusy,
    ToWorker,
)
from spvtpm.processor.worker.ports import CrbPort, PacketPort, Port
from spvtpm.processor.worker.tpm import WorkerTpm
from spvtpm.wire.crb import AttachError
from spvtpm.wire.errors import MessageError, SpvtpmError


def run(connection: socket.socket, missing: list[str]) -> None:
    """Serves one vTPM until it is parked, powered off, or the SP is gone.

    Args:
        connection: to the SP.
        missing: the sandbox layers that this kernel does not give, for the SP's log.
    """
    control = Control(connection)
    with suppress(SecureProcessorGoneError):
        try:
            _Worker(control).run(missing)
        except (SpvtpmError, EngineError) as error:
            control.send(Failed(str(error)[:1024]))


class _Worker:
    def __init__(self, control: Control) -> None:
        self._control = control
        self._refused = 0
        self._seen_executed = 0
        descriptors = control.receive_descriptors()
        start = control.receive()
        if not isinstance(start, Start):
            raise MessageError("the first message to a worker must be Start")
        self._tpm = WorkerTpm(control.commit, self._watch)
        self._tpm.start(start)
        self._port: Port
        if isinstance(start.port, messages.DirectPort):
            self._port = CrbPort(start.port, descriptors, self._tpm.execute, self._count_refused)
        else:
            self._port = PacketPort(descriptors, self._tpm.execute)

    def _watch(self, cancel: Callable[[], None]) -> AbstractContextManager[None]:
        return self._port.watch(cancel)

    def _count_refused(self, error: AttachError) -> None:
        self._refused += 1
        if self._refused & (self._refused - 1) == 0:
            self._control.send(Refused(error, self._refused))

    def run(self, missing: list[str]) -> None:
        """Serves until an order to end has been carried out."""
        port, control = self._port, self._control
        control.send(Ready(missing))
        poll = select.poll()
        poll.register(port, select.POLLIN)
        poll.register(control, select.POLLIN)
        from_port, from_control = port.fileno(), control.fileno()
        while True:
            for descriptor, _event in poll.poll():
                if descriptor == from_port:
                    port.service()
                elif descriptor == from_control and self._obey(control.receive()):
                    return
            while control.pending():
                if self._obey(control.receive()):
                    return

    def _obey(self, order: ToWorker) -> bool:
        """Carries out an order; returns whether it was the last."""
        if isinstance(order, Park):
            return self._park(order)
        if isinstance(order, PowerOff):
            self._tpm.shut_down()
            self._control.send(Off())
            return True
        raise MessageError(f"{type(order).__name__} makes no sense to a running worker")

    def _park(self, order: Park) -> bool:
        idle = self._tpm.executed == self._seen_executed
        self._seen_executed = self._tpm.executed
        if self._tpm.waits_for_storage or (order.only_if_idle and not idle):
            self._control.send(StillBusy())
            return False
        volatile, permanent = self._tpm.take_state()
        self._control.send(Parked(volatile, permanent, self._port.snapshot()))
        return True
