"""The cloud platform as a terminal asks it: typed requests, bounded answers, patience. What it answers is hearsay.

Every request may be repeated: one that begins an operation has a key of its own, so that the platform begins it once.
"""

from __future__ import annotations

import ssl
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import TracebackType
from typing import Final, Self, TypeVar
from urllib.parse import urlencode

import httpx
import msgspec

from spvtpm.terminal.owned import Account
from spvtpm.terminal.platform_address import parse_address, tls_of
from spvtpm.wire.decoding import UNDECODABLE, printable
from spvtpm.wire.errors import MessageError, SpvtpmError
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
    Vm,
    VmPage,
    Wants,
)
from spvtpm.wire.platform_errors import PlatformUntrusted, Unavailable
from spvtpm.wire.problems import error_of

MAX_ANSWER_BYTES: Final = 16 << 20
"""The longest answer; a list of some 1,000 chips, with their papers."""

MAX_VMS: Final = 100_000
"""Of one user; who announces more pages is not waited for."""

TIMEOUT_S: Final = 30.0
"""For one request, and its answer."""

PATIENCE_S: Final = 15.0
"""How long a request is repeated while the platform is away."""

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 2.0
_AWAY = (502, 503, 504)
_T = TypeVar("_T")
_E = TypeVar("_E", bound=BaseException)


class Platform:
    """A user's connection to a platform. Life: construct → requests → `close`.

    Args:
        account: where it is, and who asks.
        patience_s: how long a request is repeated while the platform is away.

    Raises:
        UsageError: the address is none.
        PlatformUntrusted: the file of the authorities cannot be read.
    """

    def __init__(self, account: Account, patience_s: float = PATIENCE_S) -> None:
        self.account = account
        self.address = parse_address(account.url, plain_http=account.plain_http)
        self._patience_s = patience_s
        self._tls = tls_of(account) if self.address.is_tls else None
        transport = httpx.HTTPTransport(verify=self._tls or True, uds=self.address.path or None, trust_env=False)
        self._client = httpx.Client(
            transport=transport,
            base_url=self.address.base,
            headers={**self.authorization(), "Accept-Encoding": "identity"},
            timeout=TIMEOUT_S,
            trust_env=False,
        )

    def authorization(self) -> dict[str, str]:
        """What shows who asks. Secret."""
        return {"Authorization": f"Bearer {self.account.token}"}

    @property
    def tls(self) -> ssl.SSLContext | None:
        """How the platform's certificate is verified, if TLS is spoken."""
        return self._tls

    def me(self) -> Me:
        """Who asks.

        Raises:
            NoSuchToken: the platform does not know the token.
            SpvtpmError: the platform's refusal; or it is away, or answers nonsense. So all requests.
        """
        return self._ask("GET", "/v1/me", Me)

    def chips(self) -> list[Chip]:
        """The chips that it says it has."""
        return self._ask("GET", "/v1/chips", list[Chip])

    def vm(self, vm_id: uuid.UUID) -> Vm:
        """What it says of a VM."""
        return _about(found := self._ask("GET", f"/v1/vms/{vm_id}", Vm), found.vm_id == vm_id)

    def vms(self, *, of_all: bool = False) -> list[Vm]:
        """All VMs of this user, by name; or, for administrators, of all users, by these."""
        found: list[Vm] = []
        while True:
            query = {"all": "true"} if of_all else {}
            if found:
                query["after"] = f"{found[-1].user}/{found[-1].name}" if of_all else found[-1].name
            page = self._ask("GET", f"/v1/vms?{urlencode(query)}" if query else "/v1/vms", VmPage)
            names = [(vm.user if of_all else "", vm.name) for vm in [*found[-1:], *page.vms]]
            _about(page, all(first < second for first, second in pairwise(names)))
            found += page.vms
            if not page.more or not page.vms or len(found) > MAX_VMS:
                return found

    def hosts(self) -> list[Host]:
        """All hosts; for administrators, as the next two."""
        return self._ask("GET", "/v1/hosts", list[Host])

    def drain(self, name: str) -> Drain:
        """Has a host emptied: it takes no VMs any more, and those that run there move away."""
        found = self._ask("POST", f"/v1/hosts/{name}/drain", Drain)
        return _about(found, found.host.name == name)

    def undrain(self, name: str) -> Host:
        """Has a host take VMs again."""
        return _about(found := self._ask("DELETE", f"/v1/hosts/{name}/drain", Host), found.name == name)

    def events(self, vm_id: uuid.UUID, after: int = 0) -> Iterator[Event]:
        """What happened to a VM as the platform saw it, oldest first."""
        while True:
            page = self._ask("GET", f"/v1/vms/{vm_id}/events?after={after}", EventPage)
            numbers = [after, *(event.number for event in page.events)]
            _about(page, all(first < second for first, second in pairwise(numbers)))
            yield from page.events
            if not page.more or not page.events:
                return
            after = numbers[-1]

    def operation(self, operation_id: uuid.UUID) -> Operation:
        """How far an operation is."""
        found = self._ask("GET", f"/v1/operations/{operation_id}", Operation)
        return _about(found, found.operation_id == operation_id)

    def create(self, new: NewVm) -> Operation:
        """Has a VM placed."""
        return self._begin("POST", "/v1/vms", "create", new.vm_id, new)

    def place(self, vm_id: uuid.UUID, wants: Wants) -> Operation:
        """Has a VM placed again that is away."""
        return self._begin("POST", f"/v1/vms/{vm_id}/place", "place", vm_id, wants)

    def command(self, vm_id: uuid.UUID, kind: OperationKind) -> Operation:
        """Has a VM started, shut down, hibernated, resumed, or released."""
        return self._begin("POST", f"/v1/vms/{vm_id}/{kind}", kind, vm_id)

    def migrate(self, vm_id: uuid.UUID, destination: Destination) -> Operation:
        """Has a VM moved to another host while it runs."""
        return self._begin("POST", f"/v1/vms/{vm_id}/migrate", "migrate", vm_id, destination)

    def cancel(self, operation_id: uuid.UUID) -> Operation:
        """Asks for the end of a migration, as long as its VM has not gone; how far it is."""
        found = self._ask("POST", f"/v1/operations/{operation_id}/cancel", Operation)
        return _about(found, found.operation_id == operation_id)

    def destroy(self, vm_id: uuid.UUID) -> Operation:
        """Has a VM forgotten whose owner has destroyed it."""
        return self._begin("DELETE", f"/v1/vms/{vm_id}", "destroy", vm_id)

    def publish(self, vm_id: uuid.UUID, pcrs: PublishedPcrs) -> None:
        """Shows PCR values to everybody who may see the VM."""
        self._repeat("PUT", f"/v1/vms/{vm_id}/pcrs", pcrs, {})

    @contextmanager
    def stream(self, path: str) -> Iterator[Iterator[bytes]]:
        """The bytes of an answer that goes on for a while, as they come.

        Raises:
            SpvtpmError: the platform's refusal; or it is away.
        """
        with self._told(), self._client.stream("GET", path, headers={"Accept": "text/event-stream"}) as response:
            if response.status_code != httpx.codes.OK:
                raise error_of(_read(response), response.status_code)
            yield response.iter_raw()

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(
        self, method: str, path: str, kind: OperationKind, vm_id: uuid.UUID, body: msgspec.Struct | None = None
    ) -> Operation:
        operation = self._ask(method, path, Operation, body, {"Idempotency-Key": str(uuid.uuid4())})
        return _about(operation, (operation.vm_id, operation.kind) == (vm_id, kind))

    def _ask(
        self,
        method: str,
        path: str,
        kind: type[_T],
        body: msgspec.Struct | None = None,
        headers: dict[str, str] | None = None,
    ) -> _T:
        answer = self._repeat(method, path, body, headers or {})
        try:
            return msgspec.json.decode(answer, type=kind)
        except UNDECODABLE:
            raise MessageError(f"the platform's answer to {method} {path} is none that could be understood") from None

    def _repeat(self, method: str, path: str, body: msgspec.Struct | None, headers: dict[str, str]) -> bytes:
        content = None if body is None else msgspec.json.encode(body)
        if content is not None:
            headers = {**headers, "Content-Type": "application/json"}
        ends, delay = time.monotonic() + self._patience_s, _FIRST_DELAY_S
        while True:
            try:
                with self._told():
                    return self._once(method, path, content, headers)
            except Unavailable:
                if time.monotonic() + delay > ends:
                    raise
            time.sleep(delay)
            delay = min(2 * delay, _LONGEST_DELAY_S)

    def _once(self, method: str, path: str, content: bytes | None, headers: dict[str, str]) -> bytes:
        with self._client.stream(method, path, content=content, headers=headers) as response:
            answer = _read(response)
        if response.is_success:
            return answer
        error = error_of(answer, response.status_code)
        if response.status_code in _AWAY and isinstance(error, MessageError):  # somebody before the platform says so
            raise Unavailable(f"the platform at {self.address} is away: status {response.status_code}")
        raise error

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What httpx says, in the words of the error tree."""
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise self._error(error) from None

    def _error(self, error: Exception) -> SpvtpmError:
        reason = _cause(error, ssl.SSLCertVerificationError)
        if reason is not None:
            return PlatformUntrusted(f"the certificate of {self.address} is not trusted: {reason.verify_message}")
        system = _cause(error, OSError)
        words = (system.strerror if system else None) or str(error) or "the connection broke"
        if isinstance(error, httpx.TimeoutException):
            words = "it took too long"
        elif isinstance(system, ssl.SSLError):
            words = f"TLS failed, as where only http is spoken ({printable(words)})"
        return Unavailable(f"the platform at {self.address} does not answer: {words}")


def _read(response: httpx.Response) -> bytes:
    """The body, within bounds of size and time."""
    body, ends = bytearray(), time.monotonic() + TIMEOUT_S
    for piece in response.iter_raw():
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            raise MessageError("the platform's answer is too long")
        if time.monotonic() > ends:
            raise Unavailable("the platform's answer took too long")
    return bytes(body)


def _cause(error: BaseException, kind: type[_E]) -> _E | None:
    """The error of this kind that led to this one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kind):
        cause = cause.__cause__ or cause.__context__
    return cause


def _about(answer: _T, is_answer: bool) -> _T:
    if not is_answer:
        raise MessageError(f"the platform's {type(answer).__name__} is not about what was asked")
    return answer
