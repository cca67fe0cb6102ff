"""A real agent in a process of its own, over a real secure processor, with real machines; and a platform that gives it orders."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec
from websockets.sync.client import ClientConnection, unix_connect

from spvtpm.hypervisor.machine_process import find_machines
from spvtpm.terminal.console import run_command
from spvtpm.terminal.socket_relay import through_socket
from spvtpm.wire.agent_api import HostReport, Order, VmReport, VmReports, WantedState
from spvtpm.wire.instance_content import Policy
from spvtpm.wire.owner_messages import MyVm, NewVtpm
from spvtpm.wire.problems import error_of
from tests.cloud_stack import Daemon, spvtpm
from tests.harness import RunningSp, has_ended
from tests.owner import ANYTHING

PATIENCE_S = 60.0


class RunningAgent(Daemon):
    """An agent of a host. Starts it, stops it in order or by SIGKILL, starts it again; asks it as a platform does.

    Args:
        sp: of the host.
        options: of `spvtpm agent init`.
        config: what else is in its configuration.
    """

    def __init__(self, sp: RunningSp, *options: str, config: str = "") -> None:
        self.sp = sp
        self.directory = sp.state.with_name(f"{sp.state.name}-ag")
        super().__init__(("agent", "run", self.directory), sp.state.with_name(f"{sp.state.name}-agent.log"))
        spvtpm("agent", "init", self.directory, "--sp", sp.state, *options)
        with (self.directory / "agent.toml").open("a") as file:
            file.write(config)
        self.token = (self.directory / "token").read_text()
        self._sequence = 0
        self.http = self.client(self.token)
        self.start()

    def start(self) -> None:
        """Starts it; asks it over a new connection."""
        super().start()
        self.http.close()
        self.http = self.client(self.token)

    def client(self, token: str) -> httpx.Client:
        """Whoever shows this token."""
        return httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.directory / "agent.sock")),
            base_url="http://agent",
            headers={"Authorization": f"Bearer {token}"},
            timeout=PATIENCE_S,
        )

    def ask(self, method: str, path: str, **request: Any) -> bytes:
        """One request; a refusal is raised."""
        response = self.http.request(method, path, **request)
        if response.is_error:
            raise error_of(response.content, response.status_code)
        return response.content

    def next_sequence(self) -> int:
        """Of an order that is newer than all before."""
        self._sequence += 1
        return self._sequence

    def order(
        self,
        vm_id: uuid.UUID,
        want: WantedState,
        sequence: int | None = None,
        handoff: str | None = None,
        token: str | None = None,
    ) -> VmReport:
        """An order, and how the VM is then."""
        order = Order(sequence=sequence or self.next_sequence(), want=want, handoff=handoff, token=token)
        return msgspec.json.decode(
            self.ask("PUT", f"/v1/vms/{vm_id}", content=msgspec.json.encode(order)), type=VmReport
        )

    def report(self, vm_id: uuid.UUID) -> VmReport:
        """How a VM is."""
        return msgspec.json.decode(self.ask("GET", f"/v1/vms/{vm_id}"), type=VmReport)

    def reports(self) -> dict[uuid.UUID, VmReport]:
        """How all VMs are."""
        page = msgspec.json.decode(self.ask("GET", "/v1/vms"), type=VmReports)
        assert not page.more
        return {report.vm_id: report for report in page.vms}

    def host(self) -> HostReport:
        """How the host is."""
        return msgspec.json.decode(self.ask("GET", "/v1/host"), type=HostReport)

    def wait(self, vm_id: uuid.UUID, condition: Callable[[VmReport], bool]) -> VmReport:
        """Asks until the VM is as it should become; the agent tells nobody by itself."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            response = self.http.get(f"/v1/vms/{vm_id}")
            if response.is_success:
                report = msgspec.json.decode(response.content, type=VmReport)
                if condition(report):
                    return report
            assert time.monotonic() < deadline, f"{response.text}\n{self.log()}"
            time.sleep(0.05)

    def wait_running(self, vm_id: uuid.UUID, boots: int = 1) -> VmReport:
        """Waits until the VM runs, in this boot or a later one."""

        def runs(report: VmReport) -> bool:
            block = report.security_block
            return report.machine == "running" and block is not None and block.boots >= boots

        return self.wait(vm_id, runs)

    def provision(self, vm_id: uuid.UUID, policy: Policy = ANYTHING) -> None:
        """The owner provisions a VM, which gets its key from the secure processor."""
        with self.sp.channel() as channel:
            request = channel.owner.provision(vm_id, self.sp.key(vm_id), NewVtpm(policy=policy), inject_key=True)
            channel.ask(request, MyVm)

    def new_vm(self) -> uuid.UUID:
        """A VM that is announced and provisioned."""
        vm_id = uuid.uuid4()
        self.order(vm_id, "defined")
        self.provision(vm_id)
        return vm_id

    def running_vm(self) -> uuid.UUID:
        """A VM that runs."""
        vm_id = self.new_vm()
        self.order(vm_id, "running")
        return vm_id

    def machine_directory(self, vm_id: uuid.UUID) -> Path:
        """What the VM's machine has."""
        return self.directory / "vms" / str(vm_id) / "machine"

    def machine_pid(self, vm_id: uuid.UUID) -> int | None:
        """Process of the VM's machine."""
        return find_machines("machine").get(self.machine_directory(vm_id))

    def run_in_vm(self, vm_id: uuid.UUID, *arguments: str) -> str:
        """A command in the VM that must succeed; what it printed."""
        written: list[bytes] = []
        way = through_socket(self.machine_directory(vm_id) / "console.sock")
        code = run_command(way, self.sp.key(vm_id), vm_id, arguments, lambda _stream, data: written.append(data))
        text = b"".join(written).decode()
        assert code == 0, text
        return text

    def websocket(self, path: str, token: str | None = None, **options: Any) -> ClientConnection:
        """A WebSocket to the agent, to be entered."""
        headers = {"Authorization": f"Bearer {token or self.token}"}
        connection: ClientConnection = unix_connect(
            str(self.directory / "agent.sock"),
            f"ws://agent{path}",
            additional_headers=headers,
            compression=None,
            **options,
        )
        return connection

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        if self.is_running:
            self.stop()
        assert not self.machines(), "machines outlive an agent that stopped in order"

    def machines(self) -> Sequence[int]:
        """Processes of all machines of this agent."""
        return [pid for place, pid in find_machines("machine").items() if place.is_relative_to(self.directory)]


def wait_for_end(pid: int) -> None:
    """Until a process has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert has_ended(descriptor)
