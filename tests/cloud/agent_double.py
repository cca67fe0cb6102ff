"""A hypervisor agent without a host: keeps orders as the real one does, and fails, hangs and vanishes when a test says so."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec
from websockets.sync.server import ServerConnection

from spvtpm.wire.agent_api import PAGE_REPORTS, HostReport, Order, VmReport, VmReports, WantedState
from spvtpm.wire.errors import AlreadyExists, NotFound, TooMany, WrongState
from spvtpm.wire.introductions import Papers
from spvtpm.wire.messages import VmInfo, VtpmInfo
from spvtpm.wire.platform_errors import Superseded
from tests.cloud.double_server import TOKEN, UnixServer
from tests.cloud.moving_double import Arrival, Departure, Stage, shown

__all__ = ["PAPERS", "TOKEN", "AgentDouble", "DoubleVm"]
PAPERS = Papers((b"channel", b"chip", b"intermediate", b"root"))


@dataclass
class DoubleVm:
    """A VM at the double; `block` is what its secure processor would have."""

    sequence: int = 0
    want: WantedState | None = None
    block: Literal["running", "stopped", "failed", "hibernated", "leaving", "arriving"] | None = None
    boots: int = 0
    machine: Literal["none", "changing", "running"] = "none"
    image: bytes | None = None
    failure: str = ""
    vtpm_id: uuid.UUID = field(default_factory=uuid.uuid4)
    move: Departure | Arrival | None = None


class AgentDouble:
    """An agent on a unix socket, in threads of the test's process; so it survives whatever a test does to the platform.

    Attributes:
        vms: what is here.
        carried_out: every order that was not refused, in turn.
        refused: every order that was too old.
        before_order: called with each order before it counts; may wait, or raise what the agent then answers.
        after_order: called with each order after it was carried out, before the answer; may do the same.
        before_request: called with the method and path of each request about one VM.
        at_stage: called with each stage of a departure; may wait, or raise why the VM stays.
        frames: how many of them the memory of a VM is that moves.
        others: doubles that may have the same VMs.
        violations: VMs that ran here while they ran at another one.
    """

    def __init__(self, socket_path: Path, chip_id: str = "00" * 16, *, firmware: int = 1, max_vms: int = 64) -> None:
        self.path = socket_path
        self.chip_id = chip_id
        self.firmware = firmware
        self.max_vms = max_vms
        self.vms: dict[uuid.UUID, DoubleVm] = {}
        self.carried_out: list[tuple[uuid.UUID, Order]] = []
        self.refused: list[tuple[uuid.UUID, Order]] = []
        self.before_order: Callable[[uuid.UUID, Order], None] = lambda _vm, _order: None
        self.after_order: Callable[[uuid.UUID, Order], None] = lambda _vm, _order: None
        self.before_request: Callable[[str, str], None] = lambda _method, _path: None
        self.at_stage: Callable[[uuid.UUID, Stage], None] = lambda _vm, _stage: None
        self.frames = 4
        self.others: list[AgentDouble] = []
        self.violations: list[uuid.UUID] = []
        self._lock = threading.RLock()
        self._server: UnixServer | None = None
        self.up()

    @property
    def address(self) -> str:
        """For the platform's table of hosts."""
        return f"unix:{self.path}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def up(self) -> None:
        """Answers."""
        if self._server is None:
            self.path.unlink(missing_ok=True)
            self._server = UnixServer(self)

    def down(self) -> None:
        """Does not answer any more, and ends every connection."""
        server, self._server = self._server, None
        if server is not None:
            server.end()
            self.path.unlink(missing_ok=True)
            server.links.end()

    def provision(self, vm_id: uuid.UUID) -> None:
        """What an owner does through the channel."""
        with self._lock:
            assert self.vms[vm_id].want == "defined"
            self.vms[vm_id].block = "stopped"

    def take(self, vm_id: uuid.UUID) -> None:
        """What an owner does through the channel who exports a vTPM or destroys it."""
        with self._lock:
            self.vms[vm_id].block = None

    def report(self, vm_id: uuid.UUID) -> VmReport:
        """What the double says of a VM."""
        with self._lock:
            vm = self.vms.get(vm_id, DoubleVm())
            vtpm = VtpmInfo(vtpm_id=vm.vtpm_id, residency="active" if vm.block == "running" else "off")
            return VmReport(
                vm_id=vm_id,
                sequence=vm.sequence,
                want=vm.want,
                machine=vm.machine,
                security_block=vm.block and VmInfo(vm_id=vm_id, state=vm.block, boots=vm.boots, vtpm=vtpm),
                image=vm.image is not None,
                failure=vm.failure,
                handoff=None if vm.move is None else vm.move.report(),
            )

    def runs(self, vm_id: uuid.UUID) -> bool:
        """Whether the VM runs here."""
        return vm_id in self.vms and self.vms[vm_id].machine == "running"

    def has(self, vm_id: uuid.UUID) -> bool:
        """Whether the secure processor has anything of the VM."""
        return vm_id in self.vms and self.vms[vm_id].block is not None

    def may_link(self, vm_id: uuid.UUID, handoff: str) -> None:
        """Raises if there is no such handoff open."""
        with self._lock:
            move = self.vms[vm_id].move if vm_id in self.vms else None
            if move is None or move.handoff != handoff or move.is_linked or move.report().outcome != "open":
                raise NotFound("no such handoff is open here")

    def serve_link(self, vm_id: uuid.UUID, link: ServerConnection) -> None:
        """Serves the link of a handoff that is open."""
        move = self.vms[vm_id].move
        if isinstance(move, Departure):
            move.serve(link, self.frames, lambda stage: self.at_stage(vm_id, stage))
        elif move is not None:
            move.serve(link)

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> bytes:
        """Answers a request, or raises what it answers instead."""
        if (method, path) == ("GET", "/v1/host"):
            return msgspec.json.encode(self.host_report())
        if (method, path) == ("GET", "/v1/vms"):
            return self._page(query.get("after", ""))
        found = re.fullmatch(r"/v1/vms/([0-9a-f-]{36})(/image)?", path)
        assert found, path
        vm_id = uuid.UUID(found[1])
        self.before_request(method, found[2] or "")
        if found[2]:
            return self._image(method, vm_id, query, body)
        if method == "PUT":
            order = msgspec.json.decode(body, type=Order)
            self.before_order(vm_id, order)
            self._obey(vm_id, order)
            self.after_order(vm_id, order)
        return msgspec.json.encode(self.report(vm_id))

    def host_report(self) -> HostReport:
        """What the double says of itself."""
        return HostReport(
            chip_id=self.chip_id,
            firmware=self.firmware,
            software="1",
            max_vms=self.max_vms,
            vms=len(self.vms),
            active=0,
            parked=0,
            missing_protection=[],
            papers=PAPERS,
        )

    def _page(self, after: str) -> bytes:
        with self._lock:
            here = [vm_id for vm_id, vm in self.vms.items() if vm.want != "absent"]
        ids = sorted(vm_id for vm_id in here if not after or vm_id > uuid.UUID(after))
        page = VmReports(vms=[self.report(one) for one in ids[:PAGE_REPORTS]], more=len(ids) > PAGE_REPORTS)
        return msgspec.json.encode(page)

    def _image(self, method: str, vm_id: uuid.UUID, query: dict[str, str], body: bytes) -> bytes:
        with self._lock:
            if method == "PUT":
                vm = self.vms.setdefault(vm_id, DoubleVm())
                sequence = int(query["sequence"])
                self._verify_age(vm_id, vm, Order(sequence=sequence, want="defined"))
                vm.image = body
                if vm.want in (None, "absent"):
                    vm.sequence, vm.want = sequence, None
                return b""
            image = self.vms[vm_id].image if vm_id in self.vms else None
            if image is None:
                raise NotFound("there is no image")
            return image

    def _verify_age(self, vm_id: uuid.UUID, vm: DoubleVm, order: Order) -> None:
        if order.sequence < vm.sequence:
            self.refused.append((vm_id, order))
            raise Superseded(f"order {order.sequence} is older than {vm.sequence}")

    def _count(self, vm_id: uuid.UUID, vm: DoubleVm, order: Order) -> None:
        self._verify_age(vm_id, vm, order)
        if order.sequence == vm.sequence and vm.want not in (None, order.want):
            self.refused.append((vm_id, order))
            raise Superseded(f"order {order.sequence} was to be {vm.want}, not {order.want}")
        vm.sequence = order.sequence

    def _obey(self, vm_id: uuid.UUID, order: Order) -> None:
        with self._lock:
            vm = self.vms.setdefault(vm_id, DoubleVm())
            self._count(vm_id, vm, order)
            vm.want = order.want
            self.carried_out.append((vm_id, order))
            match order.want:
                case "defined":
                    pass
                case "absent":
                    self._end_move(vm, order)
                    if vm.block is not None:
                        raise WrongState("the secure processor has it")
                    vm.machine, vm.image, vm.move = "none", None, None
                case "arriving":
                    self._expect(vm, order)
                case _ if vm.block is None:
                    raise NotFound("its owner has not provisioned it")
                case "departing":
                    self._depart(vm_id, vm, order)
                case "running" if isinstance(vm.move, Arrival) and not vm.move.has_come:
                    self._come(vm_id, vm, vm.move, order)
                case "running":
                    if isinstance(vm.move, Departure):
                        vm.move.take_back()
                    if vm.machine != "running":
                        vm.boots += vm.block != "hibernated"
                        vm.block, vm.image = "running", None
                        self._begin_to_run(vm_id, vm)
                case "stopped":
                    vm.machine, vm.block = "none", "stopped"
                case "hibernated":
                    if vm.block == "running":
                        vm.machine, vm.block, vm.image = "none", "hibernated", b"memory of " + vm_id.bytes

    def _begin_to_run(self, vm_id: uuid.UUID, vm: DoubleVm) -> None:
        vm.machine = "running"
        if any(other.runs(vm_id) for other in self.others):
            self.violations.append(vm_id)

    def _depart(self, vm_id: uuid.UUID, vm: DoubleVm, order: Order) -> None:
        move = vm.move
        if isinstance(move, Departure) and (move.sequence == order.sequence or move.outcome == "open"):
            return
        if vm.machine != "running":
            raise WrongState("it does not run")

        def keep() -> None:
            vm.block = "running"
            self._begin_to_run(vm_id, vm)

        def halt() -> None:
            vm.machine, vm.block = "none", "leaving"

        vm.move = Departure(self._lock, order.sequence, keep, halt)

    def _expect(self, vm: DoubleVm, order: Order) -> None:
        assert order.handoff is not None
        if isinstance(vm.move, Arrival) and vm.move.handoff == order.handoff:
            return
        if vm.block is not None:
            raise AlreadyExists("the secure processor has it")
        if sum(one.block is not None for one in self.vms.values()) >= self.max_vms:
            raise TooMany("no room")
        vm.block, vm.move = "arriving", Arrival(order.handoff)

    def _come(self, vm_id: uuid.UUID, vm: DoubleVm, move: Arrival, order: Order) -> None:
        move.verify_commit(order.token)
        move.has_come, vm.block = True, "running"
        vm.boots += 0 if move.is_whole else 1  # its memory was lost on the way
        self._begin_to_run(vm_id, vm)

    def _end_move(self, vm: DoubleVm, order: Order) -> None:
        if order.handoff is None or vm.move is None:
            return
        if isinstance(vm.move, Arrival):
            vm.move.verify_abort(order.token)
        elif vm.move.outcome != "gone" or order.token is None or shown(order.token) != vm.move.receipt:
            raise WrongState("no receipt of this handoff")
        vm.block = None
