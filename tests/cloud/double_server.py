"""How an agent double is reached: HTTP and WebSockets on a unix socket, in threads of the test's process."""

from __future__ import annotations

import json
import re
import socket
import threading
import urllib.parse
import uuid
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, unix_serve

from spvtpm.wire.errors import SpvtpmError
from spvtpm.wire.platform_errors import NoSuchToken
from spvtpm.wire.problems import PROBLEM_TYPE, problem_of

if TYPE_CHECKING:
    from tests.cloud.agent_double import AgentDouble

TOKEN = "t" * 40


class _Handler(BaseHTTPRequestHandler):
    server: UnixServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if "Upgrade" in self.headers:
            self._splice()
        else:
            self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        where = urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, kind = 200, "application/json"
        try:
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                raise NoSuchToken("wrong token")
            answer = self.server.double.answer(
                self.command, where.path, dict(urllib.parse.parse_qsl(where.query)), body
            )
        except SpvtpmError as error:
            problem = problem_of(error)
            status, kind, answer = problem.status, PROBLEM_TYPE, json.dumps(msgspec.to_builtins(problem)).encode()
        with suppress(OSError):  # the platform may be dead by now
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    def _splice(self) -> None:
        """Hands a WebSocket on to where they are served."""
        self.close_connection = True
        with socket.socket(socket.AF_UNIX) as upstream:
            upstream.connect(self.server.links.path)
            lines = [self.requestline, *(f"{name}: {value}" for name, value in self.headers.items()), "", ""]
            upstream.sendall("\r\n".join(lines).encode())
            back = threading.Thread(target=_copy, args=(upstream, self.connection), daemon=True)
            back.start()
            _copy(self.connection, upstream)
            back.join()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def address_string(self) -> str:
        return "unix"


def _copy(sender: socket.socket, receiver: socket.socket) -> None:
    with suppress(OSError):
        while data := sender.recv(1 << 16):
            receiver.sendall(data)
    for one in (sender, receiver):
        with suppress(OSError):
            one.shutdown(socket.SHUT_WR if one is receiver else socket.SHUT_RD)


class _Links:
    """Where a double's WebSockets are served."""

    def __init__(self, double: AgentDouble) -> None:
        self.path = f"{double.path}.links"
        self._double = double
        Path(self.path).unlink(missing_ok=True)
        self._server: Server = unix_serve(self._serve, self.path, process_request=self._admit, compression=None)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        try:
            if request.headers["Authorization"] != f"Bearer {TOKEN}":
                raise NoSuchToken("wrong token")
            self._double.may_link(*self._asked(request))
        except SpvtpmError as error:
            problem = problem_of(error)
            return connection.respond(HTTPStatus(problem.status), msgspec.json.encode(problem).decode())
        return None

    def _serve(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        self._double.serve_link(self._asked(connection.request)[0], connection)

    def _asked(self, request: Request) -> tuple[uuid.UUID, str]:
        found = re.fullmatch(r"/v1/vms/([0-9a-f-]{36})/link\?handoff=([0-9a-f]{32})", request.path)
        assert found, request.path
        return uuid.UUID(found[1]), found[2]

    def end(self) -> None:
        """Ends."""
        self._server.shutdown()
        self._thread.join()


class UnixServer(ThreadingHTTPServer):
    """Serves one double."""

    address_family = socket.AF_UNIX
    daemon_threads = True
    block_on_close = False

    def __init__(self, double: AgentDouble) -> None:
        self.double = double
        self.links = _Links(double)
        self._connections: set[socket.socket] = set()
        super().__init__(str(double.path), _Handler)  # type: ignore[arg-type]  # a path instead of host and port
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        self.socket.bind(str(self.double.path))

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = self.socket.accept()
        self._connections.add(connection)
        return connection, address or ("unix", 0)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A platform that is killed resets its connections."""

    def end(self) -> None:
        """Ends."""
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
