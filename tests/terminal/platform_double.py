"""A cloud platform and its hosts' agents in one, over real secure processors: small, and honest unless a test says otherwise.

It relays truly, and does to the secure processors what a hypervisor may. What a malicious one does is in its attributes, and in
what `malicious_platform.py` puts in place of its methods.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import uvicorn
from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from spvtpm.wire import messages
from spvtpm.wire.errors import NotFound, SpvtpmError, WrongState
from spvtpm.wire.introductions import Papers
from spvtpm.wire.messages import VmInfo
from spvtpm.wire.platform_api import (
    Chip,
    Destination,
    Drain,
    Event,
    EventPage,
    Host,
    Me,
    NewVm,
    Operation,
    OperationKind,
    PublishedPcrs,
    Remaining,
    Vm,
    VmPage,
    VmState,
    Wants,
)
from spvtpm.wire.platform_errors import NoHost, NoSuchToken
from spvtpm.wire.problems import PROBLEM_TYPE, problem_of
from tests.harness import RunningSp
from tests.relay import Cut, Held, Hook, Side, honest
from tests.terminal.moving import Moving

TOKEN = "token-of-the-platform-double-0123456789"


class PlatformDouble:
    """Listens on a loopback port. Life: a context manager.

    Args:
        sps: its hosts' secure processors.
        hook: what becomes of relayed frames.
        socket_path: of the unix socket on which it listens; None: a loopback port.
        tls: file with its key and certificate; None: no TLS.
    """

    def __init__(
        self, sps: list[RunningSp], hook: Hook = honest, socket_path: Path | None = None, tls: Path | None = None
    ) -> None:
        self._tls = tls
        self.sps = {self._chip_id(sp): sp for sp in sps}
        self.hook = hook
        self.vms: dict[uuid.UUID, Vm] = {}
        self.operations: dict[uuid.UUID, Operation] = {}
        self.asked: list[str] = []
        self.frames: list[tuple[Side, bytes]] = []
        self.consoles: dict[uuid.UUID, Callable[[WebSocket], object]] = {}
        self.keys: dict[str, uuid.UUID] = {}
        self.destinations: dict[uuid.UUID, str | None] = {}
        self.draining: set[str] = set()
        self.moving = Moving()
        self._news = threading.Condition()
        self.answers_to_lose = 0
        self.tells_of_operations = True
        self._listener = socket.socket(socket.AF_INET if socket_path is None else socket.AF_UNIX)
        self._listener.bind(("127.0.0.1", 0) if socket_path is None else str(socket_path))
        self._listener.listen(64)
        config = uvicorn.Config(
            self._app(),
            ws="websockets-sansio",
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=1,
            ssl_certfile=tls,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        name = self._listener.getsockname()
        if isinstance(name, str):
            return f"unix:{name}"
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{name[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._listener.close()

    # What a malicious one does otherwise

    def say(self, vm: Vm) -> Vm | None:
        """What is told of a VM; None: that there is none."""
        return vm

    def pick(self, wants: Wants) -> str:
        """The chip for a VM."""
        fitting = [chip for chip in self.sps if wants.chips is None or chip in wants.chips]
        if not fitting:
            raise NoHost("no host has a chip that is wanted")
        return min(fitting, key=lambda chip: sum(vm.chip_id == chip for vm in self.vms.values()))

    def lead(self, chip_id: str) -> RunningSp:
        """Where the relay for a chip leads."""
        if chip_id not in self.sps:
            raise NotFound(f"there is no chip {chip_id}")
        return self.sps[chip_id]

    def carry_out(self, kind: OperationKind, vm: Vm) -> None:
        """Does what an operation is there for."""
        sp = self.sps[vm.chip_id] if vm.chip_id is not None else None
        if kind == "start" or kind == "resume":
            assert sp is not None
            here = self._info(sp, vm.vm_id)
            if here is None:
                raise NotFound("its owner has not provisioned it")
            if here.state != "running":
                boot = messages.StartVm(vm_id=vm.vm_id) if here.boots else messages.LaunchVm(vm_id=vm.vm_id)
                sp.info(boot)
            self.become(vm, "running")
        elif kind == "shutdown":
            assert sp is not None
            sp.info(messages.StopVm(vm_id=vm.vm_id))
            self.become(vm, "stopped")
        elif kind == "hibernate":
            assert sp is not None
            sp.info(messages.HibernateVm(vm_id=vm.vm_id))
            self.become(vm, "hibernated")
        elif kind == "release":
            if sp is not None and self._info(sp, vm.vm_id) is not None:
                raise WrongState("its vTPM is still there")
            self.become(replace(vm, host=None, chip_id=None), "away")
        elif kind == "place":
            chip = self.pick(vm.wants)
            self.become(replace(vm, host=self._host(chip), chip_id=chip), "placed")
        elif kind == "migrate":
            assert sp is not None
            self.move(vm, self.sps[self.destination(vm)])
        elif kind == "destroy":
            if sp is not None and self._info(sp, vm.vm_id) is not None:
                raise WrongState("its owner has not destroyed it")
            del self.vms[vm.vm_id]

    def destination(self, vm: Vm) -> str:
        """The chip to which a VM is moved."""
        wanted = self.destinations.get(vm.vm_id)
        fitting = [chip for chip in self.sps if chip != vm.chip_id and wanted in (None, self._host(chip))]
        if not fitting:
            raise NoHost("no other host will do")
        return fitting[0]

    # The rest is honest

    def move(self, vm: Vm, destination: RunningSp) -> None:
        """Moves a running VM's vTPM from chip to chip, as both agents and the platform do together."""
        self.moving.move(self.sps[str(vm.chip_id)], destination, vm.vm_id, vm.operation)
        chip = self._chip_id(destination)
        self.become(replace(vm, host=self._host(chip), chip_id=chip), "running")

    def become(self, vm: Vm, state: VmState) -> None:
        """The VM is like that now."""
        self.vms[vm.vm_id] = replace(vm, state=state, changed_s=time.time())

    @staticmethod
    def _chip_id(sp: RunningSp) -> str:
        status = sp.call(messages.GetStatus())
        assert isinstance(status, messages.Status)
        return status.chip_id

    def _host(self, chip_id: str) -> str:
        return f"host-{list(self.sps).index(chip_id)}"

    @staticmethod
    def _info(sp: RunningSp, vm_id: uuid.UUID) -> VmInfo | None:
        return next((vm for vm in sp.vms() if vm.vm_id == vm_id), None)

    def _app(self) -> Starlette:
        def route(
            path: str, answer: Callable[[Request, bytes], object], method: str = "GET", status: int = 200
        ) -> Route:
            async def endpoint(request: Request) -> Response:
                self.asked.append(f"{request.method} {request.url.path}")
                body = await request.body()
                try:
                    if request.headers.get("authorization") != f"Bearer {TOKEN}":
                        raise NoSuchToken("no such token")
                    result = await asyncio.to_thread(answer, request, body)
                except SpvtpmError as error:
                    problem = problem_of(error)
                    return Response(msgspec.json.encode(problem), problem.status, media_type=PROBLEM_TYPE)
                if self.answers_to_lose:
                    self.answers_to_lose -= 1
                    return Response("bad gateway", 502)
                if isinstance(result, Response):
                    return result
                return Response(msgspec.json.encode(result), status, media_type="application/json")

            return Route(path, endpoint, methods=[method])

        return Starlette(
            routes=[
                route("/v1/me", lambda _request, _body: Me(name="owner", scopes=["vms"])),
                route("/v1/chips", lambda _request, _body: self._chips()),
                WebSocketRoute("/v1/chips/{chip_id}/channel", self._channel),
                route("/v1/vms", self._list),
                route("/v1/vms", self._create, "POST", 202),
                route("/v1/vms/{vm_id}", lambda request, _body: self._told(self._vm(request))),
                route("/v1/vms/{vm_id}", lambda request, _body: self._begin(request, "destroy"), "DELETE", 202),
                route("/v1/vms/{vm_id}/events", self._events),
                route("/v1/vms/{vm_id}/pcrs", self._publish, "PUT"),
                WebSocketRoute("/v1/vms/{vm_id}/console", self._console),
                route("/v1/vms/{vm_id}/place", self._place, "POST", 202),
                route("/v1/vms/{vm_id}/migrate", self._migrate, "POST", 202),
                route("/v1/vms/{vm_id}/{kind}", self._command, "POST", 202),
                route("/v1/operations/{operation_id}", lambda request, _body: self._operation(request)),
                route("/v1/operations/{operation_id}/events", self._follow),
                route("/v1/operations/{operation_id}/cancel", self._cancel, "POST"),
                route("/v1/hosts", lambda _request, _body: [self._told_host(self._host(chip)) for chip in self.sps]),
                route("/v1/hosts/{name}/drain", self._drain, "POST"),
                route("/v1/hosts/{name}/drain", self._undrain, "DELETE"),
            ]
        )

    def _chips(self) -> list[Chip]:
        return [
            Chip(
                chip_id=chip,
                host=self._host(chip),
                is_online=True,
                firmware=1,
                software="0",
                vms=0,
                max_vms=9,
                papers=Papers((b"1", b"2", b"3", b"4")),
            )
            for chip in self.sps
        ]

    def _list(self, _request: Request, _body: bytes) -> VmPage:
        told = [self.say(vm) for vm in self.vms.values()]
        return VmPage(vms=sorted((vm for vm in told if vm is not None), key=lambda vm: vm.name), more=False)

    def _vm(self, request: Request) -> Vm:
        vm = self.vms.get(uuid.UUID(request.path_params["vm_id"]))
        if vm is None:
            raise NotFound("there is no such VM")
        return vm

    def _told(self, vm: Vm) -> Vm:
        said = self.say(vm)
        if said is None:
            raise NotFound("there is no such VM")
        return said

    def _create(self, request: Request, body: bytes) -> Operation:
        new, now = msgspec.json.decode(body, type=NewVm), time.time()
        chip = self.pick(new.wants)
        self.vms.setdefault(
            new.vm_id,
            Vm(
                vm_id=new.vm_id,
                name=new.name,
                user="owner",
                state="placed",
                host=self._host(chip),
                chip_id=chip,
                vtpm_id=None,
                vtpm="",
                boots=0,
                has_image=False,
                operation=None,
                failure="",
                wants=new.wants,
                pcrs=None,
                created_s=now,
                changed_s=now,
            ),
        )
        return self._run(request, "create", self.vms[new.vm_id])

    def _place(self, request: Request, body: bytes) -> Operation:
        vm = self._vm(request)
        if vm.state != "away":
            raise WrongState("it has a place")
        self.vms[vm.vm_id] = replace(vm, wants=msgspec.json.decode(body, type=Wants))
        return self._begin(request, "place")

    def _command(self, request: Request, _body: bytes) -> Operation:
        return self._begin(request, msgspec.convert(request.path_params["kind"], OperationKind))

    def _migrate(self, request: Request, body: bytes) -> Operation:
        vm = self._vm(request)
        if vm.state != "running":
            raise WrongState("only one that runs can be moved")
        self.destinations[vm.vm_id] = msgspec.json.decode(body, type=Destination).host
        return self._begin(request, "migrate")

    def _told_host(self, name: str) -> Host:
        return Host(
            name=name,
            address="unix:/nowhere",
            is_online=True,
            seen_s=None,
            chip_id=list(self.sps)[int(name.removeprefix("host-"))],
            firmware=1,
            software="0",
            vms=sum(vm.host == name for vm in self.vms.values()),
            max_vms=9,
            missing_protection=[],
            failure="",
            is_draining=name in self.draining,
        )

    def _drain(self, request: Request, _body: bytes) -> Drain:
        name = request.path_params["name"]
        self.draining.add(name)
        there = [vm for vm in self.vms.values() if vm.host == name]
        moving = [self._submit("migrate", vm) for vm in there if vm.state == "running"]
        stay = [vm for vm in there if vm.state != "running"]
        remaining = [Remaining(vm_id=vm.vm_id, name=vm.name, user=vm.user, why=f"it is {vm.state}") for vm in stay]
        return Drain(host=self._told_host(name), moving=moving, remaining=remaining)

    def _undrain(self, request: Request, _body: bytes) -> Host:
        self.draining.discard(request.path_params["name"])
        return self._told_host(request.path_params["name"])

    def _cancel(self, request: Request, _body: bytes) -> Operation:
        operation = self._operation(request)
        self.moving.cancel(operation.operation_id)
        return operation

    def _begin(self, request: Request, kind: OperationKind) -> Operation:
        return self._run(request, kind, self._vm(request))

    def _run(self, request: Request, kind: OperationKind, vm: Vm) -> Operation:
        key = request.headers["idempotency-key"]
        if key in self.keys:
            return self.operations[self.keys[key]]
        operation = self._submit(kind, vm)
        self.keys[key] = operation.operation_id
        return operation

    def _submit(self, kind: OperationKind, vm: Vm) -> Operation:
        operation = Operation(
            operation_id=uuid.uuid4(),
            kind=kind,
            vm_id=vm.vm_id,
            vm_name=vm.name,
            state="running",
            step="first",
            steps_done=0,
            steps=2,
            error=None,
            created_s=time.time(),
            changed_s=time.time(),
        )
        self.operations[operation.operation_id] = operation
        self.vms[vm.vm_id] = replace(vm, operation=operation.operation_id)
        threading.Thread(target=self._finish, args=(operation,), daemon=True).start()
        return operation

    def _finish(self, operation: Operation) -> None:
        try:
            self.carry_out(operation.kind, self.vms[operation.vm_id])
            ended = replace(operation, state="done", step="done", steps_done=2)
        except SpvtpmError as error:
            ended = replace(operation, state="failed", error=problem_of(error))
        if (vm := self.vms.get(operation.vm_id)) is not None:
            self.vms[vm.vm_id] = replace(vm, operation=None)
        with self._news:
            self.operations[operation.operation_id] = ended
            self._news.notify_all()

    def _operation(self, request: Request) -> Operation:
        found = self.operations.get(uuid.UUID(request.path_params["operation_id"]))
        if found is None:
            raise NotFound("there is no such operation")
        return found

    def _follow(self, request: Request, _body: bytes) -> Response:
        operation_id = self._operation(request).operation_id
        if not self.tells_of_operations:
            return Response("not here", 404)

        def ended() -> Operation:
            with self._news:
                self._news.wait_for(lambda: self.operations[operation_id].state in ("done", "failed"), 60)
            return self.operations[operation_id]

        async def stream() -> AsyncIterator[bytes]:
            yield _event(self.operations[operation_id])
            yield b": nothing new\n\n"
            yield _event(await asyncio.to_thread(ended))

        return StreamingResponse(stream(), media_type="text/event-stream")

    def _events(self, request: Request, _body: bytes) -> EventPage:
        vm, after = self._vm(request), int(request.query_params.get("after", 0))
        happened = [Event(number=number, time_s=vm.created_s, what="created", detail="") for number in (1, 2, 3)]
        page = [event for event in happened if event.number > after][:2]
        return EventPage(events=page, more=bool(page) and page[-1].number < 3)

    def _publish(self, request: Request, body: bytes) -> Response:
        vm = self._vm(request)
        self.vms[vm.vm_id] = replace(vm, pcrs=msgspec.json.decode(body, type=PublishedPcrs))
        return Response(status_code=204)

    # The relay

    async def _channel(self, websocket: WebSocket) -> None:
        try:
            sp = self.lead(websocket.path_params["chip_id"])
        except SpvtpmError as error:
            problem = problem_of(error)
            await websocket.send_denial_response(Response(msgspec.json.encode(problem), problem.status))
            return
        await self.relay(websocket, str(sp.state / "run" / "channel.sock"))

    async def relay(self, websocket: WebSocket, path: str) -> None:
        """Joins a WebSocket with a unix socket, through the hook."""
        if websocket.headers.get("authorization") != f"Bearer {TOKEN}":
            await websocket.close()
            return
        await websocket.accept()
        reader, writer = await asyncio.open_unix_connection(path)

        async def from_owner() -> None:
            number = 0
            while True:
                frame = await websocket.receive_bytes()
                for changed in self._through("owner", number, frame):
                    writer.write(struct.pack(">I", len(changed)) + changed)
                await writer.drain()
                number += 1

        async def from_sp() -> None:
            number = 0
            while True:
                (size,) = struct.unpack(">I", await reader.readexactly(4))
                for changed in self._through("sp", number, await reader.readexactly(size)):
                    await websocket.send_bytes(changed)
                number += 1

        ways = [asyncio.create_task(from_owner()), asyncio.create_task(from_sp())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
                with suppress(
                    asyncio.CancelledError,
                    asyncio.IncompleteReadError,
                    WebSocketDisconnect,
                    OSError,
                    Cut,
                    Held,
                    RuntimeError,
                ):
                    await way
            writer.close()
            with suppress(RuntimeError, OSError, WebSocketDisconnect):
                await websocket.close()

    def _through(self, side: Side, number: int, frame: bytes) -> list[bytes]:
        self.frames.append((side, frame))
        return self.hook(side, number, frame)

    async def _console(self, websocket: WebSocket) -> None:
        path = self.console_socket(uuid.UUID(websocket.path_params["vm_id"]))
        await self.relay(websocket, path)

    def console_socket(self, vm_id: uuid.UUID) -> str:
        """The socket of a VM's console."""
        raise NotImplementedError


def _event(operation: Operation) -> bytes:
    return b"event: operation\ndata: " + msgspec.json.encode(operation) + b"\n\n"
