"""The platform's end of the agents' API (`wire/agent_api.py`). What an agent answers is hostile: bounds first."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

import httpx
import msgspec

from spvtpm.wire.agent_api import MAX_IMAGE_BYTES, HostReport, Order, VmReport, VmReports
from spvtpm.wire.decoding import UNDECODABLE, in_words
from spvtpm.wire.errors import MessageError, NotRunning
from spvtpm.wire.platform_errors import TooLarge, Unavailable
from spvtpm.wire.problems import MAX_PROBLEM_BYTES, error_of

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator

AWAY: Final = (Unavailable, NotRunning)
"""A host that is away, or one whose secure processor is: both come back, mostly."""

ANSWER_TIMEOUT_S: Final = 30.0
"""How long an agent may take for an order. It may be asked again: an order is repeatable, and the agent goes on with it."""

_CONNECT_TIMEOUT_S: Final = 5.0
_REPORT_TIMEOUT_S: Final = 10.0  # a host that is as slow as this takes no VM, and is not online
_WHOLE_ANSWER_S: Final = 120.0
_MAX_REPORT_BYTES: Final = 4 << 20  # a page of reports, each with two sentences
_BROKEN: Final = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
_Answer = TypeVar("_Answer")


class Agent:
    """One host's agent. Each method is one request, and raises the error that the agent answers with.

    Raises:
        Unavailable: it does not answer.
        MessageError: its answer makes no sense.
        SpvtpmError: its answer is an error.
    """

    def __init__(self, host: str, address: str, token: str) -> None:
        """
        Args:
            host: the host's name, for sentences.
            address: `unix:/path`, `http://…` or `https://…`.
            token: that the agent wants to hear.
        """
        self.host = host
        path = address.removeprefix("unix:") if address.startswith("unix:") else None
        self._client = httpx.Client(
            base_url="http://agent" if path is not None else address,
            transport=httpx.HTTPTransport(uds=path),
            headers={"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"},  # bounds are of what is sent
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            trust_env=False,  # no proxy stands between platform and agent
        )

    def host_report(self) -> HostReport:
        """What the host is, and how full."""
        return _decoded(self._exchange("GET", "/v1/host", _MAX_REPORT_BYTES, timeout=_REPORT_TIMEOUT_S), HostReport)

    def vm_reports(self) -> Iterator[VmReport]:
        """Every VM that the host knows, ordered by id."""
        after: uuid.UUID | None = None
        while True:
            parameters = {} if after is None else {"after": str(after)}
            page = _decoded(self._exchange("GET", "/v1/vms", _MAX_REPORT_BYTES, params=parameters), VmReports)
            for report in page.vms:
                if after is not None and report.vm_id <= after:
                    raise MessageError(f"the agent of host {self.host} lists its VMs in no order")
                after = report.vm_id
                yield report
            if not page.more or not page.vms:
                return

    def vm_report(self, vm_id: uuid.UUID) -> VmReport:
        """One VM, also one that is nowhere."""
        return self._report_of(vm_id, self._exchange("GET", f"/v1/vms/{vm_id}", _MAX_REPORT_BYTES))

    def order(self, vm_id: uuid.UUID, order: Order) -> VmReport:
        """Has the VM be as ordered; returns once it is."""
        body = msgspec.json.encode(order)
        headers = {"Content-Type": "application/json"}
        answer = self._exchange("PUT", f"/v1/vms/{vm_id}", _MAX_REPORT_BYTES, content=body, headers=headers)
        return self._report_of(vm_id, answer)

    def image(self, vm_id: uuid.UUID) -> bytes:
        """The memory image of a hibernated VM: ciphertext."""
        return self._exchange("GET", f"/v1/vms/{vm_id}/image", MAX_IMAGE_BYTES)

    def give_image(self, vm_id: uuid.UUID, sequence: int, image: bytes) -> None:
        """Brings the memory image, before the VM is ordered to run."""
        headers = {"Content-Type": "application/octet-stream"}
        parameters = {"sequence": str(sequence)}
        self._exchange(
            "PUT", f"/v1/vms/{vm_id}/image", MAX_PROBLEM_BYTES, params=parameters, content=image, headers=headers
        )

    def close(self) -> None:
        """Ends; the agent is not told."""
        self._client.close()

    def _report_of(self, vm_id: uuid.UUID, answer: bytes) -> VmReport:
        report = _decoded(answer, VmReport)
        if report.vm_id != vm_id:
            raise MessageError(f"the agent of host {self.host} answered about another VM")
        return report

    def _exchange(self, method: str, path: str, max_bytes: int, **request: Any) -> bytes:
        try:
            try:
                return self._ask(method, path, max_bytes, **request)
            except (
                _BROKEN
            ):  # a kept connection that the agent has closed meanwhile, most likely; each request may be repeated
                return self._ask(method, path, max_bytes, **request)
        except httpx.TimeoutException:
            raise Unavailable(f"host {self.host} does not answer in time") from None
        except httpx.HTTPError as error:
            raise Unavailable(f"host {self.host} does not answer: {in_words(error)}") from None

    def _ask(self, method: str, path: str, max_bytes: int, **request: Any) -> bytes:
        with self._client.stream(method, path, **request) as response:
            if not response.is_success:
                raise error_of(_bounded(response, MAX_PROBLEM_BYTES, cut=True), response.status_code)
            return _bounded(response, max_bytes, cut=False)


def _bounded(response: httpx.Response, max_bytes: int, *, cut: bool) -> bytes:
    body = bytearray()
    deadline = time.monotonic() + _WHOLE_ANSWER_S
    for chunk in response.iter_raw():  # as it comes: one that drips would never fill a larger one
        if time.monotonic() > deadline:
            raise Unavailable(f"the agent's answer is not whole after {_WHOLE_ANSWER_S:g} s")
        body += chunk
        if len(body) > max_bytes:
            if cut:
                break
            raise TooLarge(f"the agent's answer is longer than {max_bytes} bytes")
    return bytes(body[:max_bytes])


def _decoded(body: bytes, kind: type[_Answer]) -> _Answer:
    try:
        return msgspec.json.decode(body, type=kind)
    except UNDECODABLE as error:
        raise MessageError(f"the agent's answer makes no sense: {in_words(error)}") from None


class Agents:
    """All agents, with their connections kept. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str, str], Agent] = {}

    def agent(self, host: str, address: str, token: str) -> Agent:
        """The agent of a host; arguments as of `Agent`."""
        key = (host, address, token)
        with self._lock:
            found = self._known.get(key)
            if found is None:
                found = self._known[key] = Agent(*key)
            return found

    def close(self) -> None:
        """Ends all connections."""
        with self._lock:
            known, self._known = list(self._known.values()), {}
        for agent in known:
            agent.close()
