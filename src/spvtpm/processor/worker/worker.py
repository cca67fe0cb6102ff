"""The process that runs one vTPM, from its first message to its last. Confined before this module's code runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from spvtpm.engine.errors import EngineError
from spvtpm.processor.interfaces.direct import TpmFailedError
from spvtpm.processor.worker import messages
from spvtpm.processor.worker.control import Control, SecureProcessorGoneError
from spvtpm.processor.worker.messages import Failed, Off, Park, Parked, PowerOff, Ready, Start, StillBusy, ToWorker
from spvtpm.processor.worker.ports import CrbPort, PacketPort, Port
from spvtpm.processor.worker.stream_port import StreamPort
from spvtpm.processor.worker.tpm import WorkerTpm
from spvtpm.wire.ek_templates import EkTemplate
from spvtpm.wire.errors import MessageError, SpvtpmError, StorageError


def run(connection: socket.socket, missing: list[str], *, blank: Sequence[EkTemplate] | None) -> None:
    """Serves one vTPM until it is parked, powered off, or the SP is gone.

    Args:
        connection: to the SP.
        missing: the sandbox layers that this kernel does not give, for the SP's log.
        blank: manufacture a TPM ahead of the first message, with these EKs.
    """
    control = Control(connection)
    with suppress(SecureProcessorGoneError), ExitStack() as cleanup:
        try:
            tpm = WorkerTpm(control.commit, control.endorse)
            cleanup.callback(tpm.close)
            if blank is not None:
                tpm.make_blank(blank)
            descriptors = control.receive_descriptors()
            for descriptor in descriptors:
                cleanup.callback(os.close, descriptor)
            _Worker(control, tpm, descriptors).run(missing)
        except (SpvtpmError, EngineError, TpmFailedError) as error:
            control.send(Failed(" ".join(str(error).split())[:1024]))


class _Worker:
    def __init__(self, control: Control, tpm: WorkerTpm, descriptors: list[int]) -> None:
        self._control = control
        self._tpm = tpm
        self._seen_executed = 0
        start = control.receive()
        if not isinstance(start, Start):
            raise MessageError("the first message to a worker must be Start")
        tpm.start(start, lambda: self._open_port(start, descriptors))

    def _open_port(self, start: Start, descriptors: list[int]) -> None:
        self._port: Port
        if isinstance(start.port, messages.DirectPort):
            self._port = CrbPort(start.port, descriptors, self._tpm, self._control)
        elif isinstance(start.port, messages.StreamPort):
            self._port = StreamPort(descriptors, self._tpm, self._control, has_shut_down=start.has_shut_down)
        else:
            self._port = PacketPort(descriptors, self._tpm, self._control)

    def run(self, missing: list[str]) -> None:
        """Serves until an order to end has been carried out."""
        self._control.send(Ready(missing))
        while True:
            self._port.serve()
            if self._obey(self._control.receive()):
                return

    def _obey(self, order: ToWorker) -> bool:
        """Carries out an order; returns whether it was the last."""
        if isinstance(order, Park):
            return self._park(order)
        if isinstance(order, PowerOff):
            if not self._port.guest_has_shut_down:  # else it may come back with TPM2_Startup(STATE), from a sleep
                self._tpm.shut_down()
            self._control.send(Off())
            return True
        raise MessageError(f"{type(order).__name__} makes no sense to a running worker")

    def _park(self, order: Park) -> bool:
        executed = self._port.executed
        idle = executed == self._seen_executed
        self._seen_executed = executed
        if order.only_if_idle and not idle:
            self._control.send(StillBusy())
            return False
        try:
            volatile = self._tpm.take_state()
        except StorageError:
            self._control.send(StillBusy())
            return False
        self._control.send(Parked(volatile, self._port.snapshot(), self._port.guest_has_shut_down))
        return True
