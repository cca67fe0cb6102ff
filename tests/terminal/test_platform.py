"""The way to a platform: what an address may be, whom TLS lets in, what is repeated, and what a hostile answer does."""

from __future__ import annotations

import ipaddress
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from spvtpm.terminal import operations, platform
from spvtpm.terminal.operations import wait_for
from spvtpm.terminal.owned import Account
from spvtpm.terminal.platform import Platform
from spvtpm.terminal.platform_address import parse_address
from spvtpm.terminal.platform_relay import to_chip
from spvtpm.wire.errors import ChannelError, FrameError, MessageError, NotFound, SpvtpmError, UsageError
from spvtpm.wire.introductions import Knock, Papers, encode_clear, parse_clear
from spvtpm.wire.platform_api import NewVm, Operation
from spvtpm.wire.platform_errors import NoSuchToken, PlatformUntrusted, Unavailable
from tests.papers import DAY
from tests.terminal.estate import Estate
from tests.terminal.platform_double import TOKEN, PlatformDouble


def connected(url: str, token: str = TOKEN, ca_file: str = "", patience_s: float = 0) -> Platform:
    return Platform(Account(url=url, token=token, ca_file=ca_file), patience_s)


@pytest.fixture
def cloud(estate: Estate) -> Iterator[PlatformDouble]:
    with PlatformDouble(estate.sps) as cloud:
        yield cloud


# Addresses


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://cloud.example", "https://cloud.example"),
        ("https://cloud.example:8443/", "https://cloud.example:8443"),
        ("https://[2001:db8::1]:8443", "https://[2001:db8::1]:8443"),
        ("http://localhost:8080", "http://localhost:8080"),
        ("http://127.0.0.2:80", "http://127.0.0.2:80"),
        ("http://[::1]", "http://[::1]"),
        ("unix:/run/spvtpm/cloud.sock", "http://platform"),
    ],
)
def test_an_address_of_a_platform(url: str, base: str) -> None:
    assert parse_address(url).base == base


@pytest.mark.parametrize(
    "url",
    [
        "",
        "cloud.example",
        "ftp://cloud.example",
        "https://",
        "https://cloud.example/v1",
        "https://cloud.example?x",
        "https://cloud.example#x",
        "https://user:password@cloud.example",
        "https://cloud.example:port",
        "https://cloud example",
        "https://cloud.example\n",
        "https://clöud.example",
        "unix:relative",
        "https://" + "a" * 300,
    ],
)
def test_what_is_no_address_of_a_platform(url: str) -> None:
    with pytest.raises(UsageError):
        parse_address(url)


@pytest.mark.attack("A24")
@pytest.mark.parametrize(
    "url", ["http://cloud.example", "http://192.0.2.1", "http://localhost.example", "http://[::2]"]
)
def test_a_token_crosses_no_network_in_clear_unless_its_owner_says_so(url: str) -> None:
    with pytest.raises(UsageError, match="in clear"):
        parse_address(url)
    assert parse_address(url, plain_http=True).base == url


# TLS, unix sockets


def self_signed(path: Path, name: x509.GeneralName) -> Path:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "platform")])
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(), now - DAY, now + DAY)
        .add_extension(x509.SubjectAlternativeName([name]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(pem + certificate.public_bytes(Encoding.PEM))
    return path


def knock(where: Platform, cloud: PlatformDouble) -> Papers:
    relay = to_chip(where, bytes.fromhex(next(iter(cloud.sps))))(10)
    try:
        relay.send([encode_clear(Knock())])
        papers = parse_clear(relay.receive(relay.deadline()))
        assert isinstance(papers, Papers)
        return papers
    finally:
        relay.close()


def test_only_who_is_vouched_for_is_the_platform(estate: Estate, tmp_path: Path) -> None:
    here = self_signed(tmp_path / "here.pem", x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    elsewhere = self_signed(tmp_path / "elsewhere.pem", x509.DNSName("elsewhere.example"))
    with PlatformDouble(estate.sps, tls=here) as cloud:
        with connected(cloud.url, ca_file=str(here)) as where:
            assert where.me().name == "owner"
            assert knock(where, cloud)
        for stranger in ("", str(elsewhere)):
            with connected(cloud.url, ca_file=stranger) as where:
                with pytest.raises(PlatformUntrusted):
                    where.me()
                with pytest.raises(PlatformUntrusted):
                    knock(where, cloud)
        assert all(word == "GET /v1/me" for word in cloud.asked)
    with PlatformDouble(estate.sps, tls=elsewhere) as cloud, connected(cloud.url, ca_file=str(elsewhere)) as where:
        with pytest.raises(PlatformUntrusted, match="not trusted"):
            where.me()
        with pytest.raises(PlatformUntrusted, match="not trusted"):
            knock(where, cloud)
    with pytest.raises(PlatformUntrusted, match="cannot be read"):
        connected("https://127.0.0.1", ca_file=str(tmp_path / "none"))


def test_a_platform_behind_a_unix_socket(estate: Estate) -> None:
    path = estate.directory / "cloud.sock"
    with PlatformDouble(estate.sps, socket_path=path) as cloud, connected(cloud.url) as where:
        assert where.me().name == "owner"
        assert knock(where, cloud)


# Requests


def test_a_token_that_is_not_known(cloud: PlatformDouble) -> None:
    with connected(cloud.url, token="wrong") as where:
        with pytest.raises(NoSuchToken):
            where.me()
        with pytest.raises((NoSuchToken, ChannelError)):
            knock(where, cloud)


@pytest.mark.attack("A24")
def test_no_repr_and_no_log_shows_the_token(cloud: PlatformDouble, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    account = Account(url=cloud.url, token=TOKEN)
    with Platform(account) as where:
        where.me()
        knock(where, cloud)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("spvtpm", "websockets.client"))]
    assert TOKEN not in repr(account) + str(account.__rich_repr__()) + "".join(ours)


def test_a_request_whose_answer_was_lost_begins_no_second_operation(cloud: PlatformDouble) -> None:
    vm_id = uuid.uuid4()
    with connected(cloud.url, patience_s=5) as where:
        cloud.answers_to_lose = 2
        operation = where.create(NewVm(vm_id=vm_id, name="lost"))
        wait_for(where, operation)
        assert list(cloud.operations) == [operation.operation_id]
        assert cloud.asked.count("POST /v1/vms") == 3


def test_a_platform_that_is_away_is_told_so(cloud: PlatformDouble) -> None:
    cloud.answers_to_lose = 1
    with connected(cloud.url) as where, pytest.raises(Unavailable, match="status 502"):
        where.me()
    with connected("http://127.0.0.1:1") as where:
        with pytest.raises(Unavailable, match="does not answer"):
            where.me()
        with pytest.raises(Unavailable, match="does not answer"):
            to_chip(where, bytes(16))(1)


def test_an_operation_is_followed_also_where_no_events_come(
    cloud: PlatformDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "_POLL_S", 0.01)
    with connected(cloud.url) as where:
        for tells in (True, False):
            cloud.tells_of_operations = tells
            told: list[Operation] = []
            wait_for(where, where.create(NewVm(vm_id=uuid.uuid4(), name="followed")), told.append)
            assert (told[0].state, told[-1].state) == ("running", "done")


def test_an_operation_that_fails_says_why_as_its_own_error(cloud: PlatformDouble) -> None:
    vm_id = uuid.uuid4()
    with connected(cloud.url) as where:
        wait_for(where, where.create(NewVm(vm_id=vm_id, name="fails")))
        with pytest.raises(NotFound, match="start of fails has failed: its owner has not provisioned it"):
            wait_for(where, where.command(vm_id, "start"))


def test_events_of_a_vm_come_page_by_page(cloud: PlatformDouble) -> None:
    vm_id = uuid.uuid4()
    with connected(cloud.url) as where:
        where.create(NewVm(vm_id=vm_id, name="eventful"))
        assert [event.number for event in where.events(vm_id)] == [1, 2, 3]


# Hostile answers


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """Whoever connects and asks gets these bytes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.recv(1 << 16)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(1 << 16)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        listener.close()


def http(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


@pytest.mark.attack("A25")
@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (http(b"[]"), MessageError),
        (http(b"{"), MessageError),
        (http(b'{"name": "a", "scopes": [], "more": 1}'), MessageError),
        (http(b"\xff" * 100), MessageError),
        (http(b" " * 20_000), MessageError),
        (http(b"no", "500 Oh"), MessageError),
        (http(b'{"code": "x"}', "400 No"), MessageError),
        (http(b"", "302 Found", "Location: http://192.0.2.1/\r\n"), MessageError),
        (http(b"", "503 Away"), Unavailable),
        (b"", Unavailable),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n[", Unavailable),
        (b"SSH-2.0-OpenSSH\r\n", Unavailable),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000, Unavailable),
    ],
)
def test_a_hostile_answer_is_a_typed_error(
    answer: bytes, kind: type[SpvtpmError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "MAX_ANSWER_BYTES", 10_000)
    with answering(answer) as url, connected(url) as where, pytest.raises(kind):
        where.me()


@pytest.mark.attack("A25")
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        http(b"no", "403 No"),
        http(b"", "302 Found", "Location: ws://192.0.2.1/\r\n"),
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
    ],
)
def test_a_platform_that_opens_no_channel_is_a_typed_error(answer: bytes) -> None:
    with answering(answer) as url, connected(url) as where, pytest.raises(ChannelError):
        to_chip(where, bytes(16))(5)


@pytest.mark.attack("A02")
@pytest.mark.attack("A25")
@pytest.mark.parametrize(
    ("send", "kind"),
    [
        (lambda frame: [frame + bytes(1 << 16)], ChannelError),
        (lambda _frame: [b""], FrameError),
        (lambda _frame: [b"no message"], MessageError),
    ],
)
def test_frames_that_are_none(
    estate: Estate, cloud: PlatformDouble, send: Callable[[bytes], list[bytes]], kind: type[SpvtpmError]
) -> None:
    cloud.hook = lambda side, _number, frame: send(frame) if side == "sp" else [frame]
    with connected(cloud.url) as where, pytest.raises(kind):
        knock(where, cloud)
