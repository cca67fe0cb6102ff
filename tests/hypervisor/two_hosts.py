"""Two real hosts, each with a secure processor of one fleet and an agent, and whoever orders and carries between them."""

from __future__ import annotations

import threading
import uuid
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from spvtpm.wire.agent_api import HandoffReport, VmReport
from tests.hypervisor.mortal_agent import MortalAgent
from tests.hypervisor.running_agent import PATIENCE_S, RunningAgent
from tests.processor.migration.two_chips import Cut, Hook, Side, TwoChips, honest


class Carrying:
    """Carries the frames of a link between two agents, in threads of its own.

    Args:
        source: where the VM is.
        destination: where it shall go.
        vm_id: the VM.
        handoff: its name.
        hook: what becomes of each frame.
    """

    def __init__(
        self, source: RunningAgent, destination: RunningAgent, vm_id: uuid.UUID, handoff: str, hook: Hook = honest
    ) -> None:
        path = f"/v1/vms/{vm_id}/link?handoff={handoff}"
        self._cleanup = ExitStack()
        self._ends: dict[Side, ClientConnection] = {
            "destination": self._cleanup.enter_context(destination.websocket(path, max_size=None)),
            "source": self._cleanup.enter_context(source.websocket(path, max_size=None)),
        }
        self._hook = hook
        self.seen: list[tuple[Side, bytes]] = []
        self._threads = [
            threading.Thread(target=self._carry, args=("source", "destination"), daemon=True),
            threading.Thread(target=self._carry, args=("destination", "source"), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _carry(self, side: Side, other: Side) -> None:
        number = 0
        with suppress(ConnectionClosed, Cut):
            while True:
                frame = self._ends[side].recv()
                assert isinstance(frame, bytes)
                self.seen.append((side, frame))
                for instead in self._hook(side, number, frame):
                    self._ends[other].send(instead)
                number += 1
        self.cut()

    def cut(self) -> None:
        """Ends the link."""
        for end in self._ends.values():
            end.close()

    def wait(self) -> None:
        """Until it has ended."""
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        self._cleanup.close()


class Pair:
    """Two hosts; `begin`, `carry`, `receive`, `forget` and `take_back` are what a platform does, step by step.

    Args:
        a: where VMs are.
        b: where they go.
    """

    def __init__(self, a: MortalAgent, b: MortalAgent) -> None:
        self.a, self.b = a, b

    def turned(self) -> Pair:
        """The way back."""
        return Pair(self.b, self.a)

    def running_vm(self) -> uuid.UUID:
        """A VM that runs at the first host; its owner's key is known at both."""
        vm_id = self.a.running_vm()
        self.b.sp._keys[vm_id] = self.a.sp.key(vm_id)
        return vm_id

    def begin(self, vm_id: uuid.UUID) -> str:
        """Both hosts are ordered; the handoff's name."""
        begun = handoff_of(self.a.order(vm_id, "departing"))
        assert begun.outcome == "open" and not begun.is_linked
        self.b.order(vm_id, "arriving", handoff=begun.handoff)
        return begun.handoff

    def carry(self, vm_id: uuid.UUID, handoff: str, hook: Hook = honest) -> HandoffReport:
        """The link, until it ends; what became of the handoff at the source then."""
        Carrying(self.a, self.b, vm_id, handoff, hook).wait()
        return self.decided(vm_id)

    def decided(self, vm_id: uuid.UUID) -> HandoffReport:
        """What became of the handoff at the source, once that is decided."""
        return handoff_of(self.a.wait(vm_id, lambda report: handoff_of(report).outcome != "open"))

    def receive(self, vm_id: uuid.UUID, gone: HandoffReport) -> HandoffReport:
        """The destination is told that it has the VM."""
        assert gone.outcome == "gone", gone
        report = self.b.order(vm_id, "running", handoff=gone.handoff, token=gone.token)
        come = handoff_of(report)
        assert come.outcome == "come"
        return come

    def forget(self, vm_id: uuid.UUID, come: HandoffReport) -> VmReport:
        """The source is told that the destination has it."""
        return self.a.order(vm_id, "absent", handoff=come.handoff, token=come.token)

    def take_back(self, vm_id: uuid.UUID, kept: HandoffReport) -> None:
        """Both are told that the VM stays."""
        assert kept.outcome == "kept", kept
        self.b.order(vm_id, "absent", handoff=kept.handoff, token=kept.token)
        self.a.order(vm_id, "running")

    def destroy(self, vm_id: uuid.UUID) -> None:
        """A VM that is done with goes, wherever it is."""
        for agent in (self.a, self.b):
            agent.order(vm_id, "stopped")
            if agent.report(vm_id).security_block is not None:
                agent.sp.destroy(vm_id)
            agent.order(vm_id, "absent")

    def move(self, vm_id: uuid.UUID) -> None:
        """All of it."""
        self.forget(vm_id, self.receive(vm_id, self.carry(vm_id, self.begin(vm_id))))


class TwoHosts(Pair):
    """Two hosts of a test's own."""

    def __init__(self) -> None:
        self._cleanup = ExitStack()
        self.chips = self._cleanup.enter_context(TwoChips())
        self.chips.b.owner = self.chips.a.owner
        listed = self.chips.a.state.with_name("revoked.pem")
        listed.write_bytes(x509.load_der_x509_crl(self.chips.revoked).public_bytes(Encoding.PEM))
        super().__init__(
            *(
                self._cleanup.enter_context(MortalAgent(sp, "--revocation-list", str(listed)))
                for sp in (self.chips.a, self.chips.b)
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()


def handoff_of(report: VmReport) -> HandoffReport:
    """Of a VM that has one."""
    assert report.handoff is not None, report
    return report.handoff
