"""A26: an older version of TLS, of a message or of a file, offered in the hope that something weaker will do."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from spvtpm.terminal.keyring import Keyring
from spvtpm.vendor.factory import ALL_FEATURES
from spvtpm.wire import channel, introductions, owner_messages
from spvtpm.wire.certificate_building import Validity, build_channel_certificate
from spvtpm.wire.certificate_extensions import ChannelIdentity
from spvtpm.wire.channel import SecureChannel
from spvtpm.wire.errors import ChannelError, InstanceFormatUnknown, MessageError, PeerError
from spvtpm.wire.instance_header import HEADER_BYTES, SealedHeader, parse_instance_header
from spvtpm.wire.introductions import Knock, Papers, encode_clear, parse_clear
from spvtpm.wire.owner_certificates import parse_owner_certificate
from spvtpm.wire.owner_messages import (
    MAX_OWNER_MESSAGE_BYTES,
    Done,
    ListMine,
    encode_owner_message,
    parse_owner_reply,
    parse_owner_request,
)
from tests.owner import Owner, OwnerChannel
from tests.papers import DAY, der, todays_papers
from tests.relay import Relay, Side
from tests.terminal.conftest import estate  # noqa: F401  # the fixture
from tests.terminal.estate import Estate

pytestmark = pytest.mark.attack("A26")


@pytest.fixture
def relay(estate: Estate, tmp_path: Path) -> Iterator[Relay]:  # noqa: F811
    """A relay to the first chip."""
    with Relay(tmp_path / "relay", estate.channel()) as relay:
        yield relay


# TLS


class Sides:
    """Both ends of a channel in memory, each with its key, and with a version of TLS that a test chooses."""

    def __init__(self, keyring: Keyring) -> None:
        content, chip = keyring.content, todays_papers().made
        self.owner_key, self.owner = content.load_key(), parse_owner_certificate(content.certificate)
        self.sp_key = ec.generate_private_key(ec.SECP256R1())
        identity = ChannelIdentity(chip.chip_id, 1, ALL_FEATURES)
        validity = Validity.lasting(datetime.now(UTC) - DAY, 7 * DAY)
        self.sp = build_channel_certificate(chip.issuer(), self.sp_key.public_key(), identity, validity)

    def end(self, is_server: bool) -> SecureChannel:
        """One end as it is; if it is the client, it has begun to speak."""
        mine, peer = (self.sp, self.owner) if is_server else (self.owner, self.sp)
        key = self.sp_key if is_server else self.owner_key
        return SecureChannel(key, mine, der(peer), is_server=is_server, max_message_bytes=MAX_OWNER_MESSAGE_BYTES)

    def weak_end(self, is_server: bool) -> SecureChannel:
        """One end that speaks TLS 1.2 and nothing newer."""
        kept = channel._context

        def weakened(
            key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, peer: bytes, *, is_server: bool
        ) -> ssl.SSLContext:
            context = kept(key, certificate, peer, is_server=is_server)
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
            return context

        channel._context = weakened
        try:
            return self.end(is_server)
        finally:
            channel._context = kept


def converse(client: SecureChannel, server: SecureChannel) -> None:
    """Until both are open."""
    for _ in range(10):
        for sender, receiver in ((client, server), (server, client)):
            for frame in sender.frames():
                receiver.receive(frame)
    assert client.is_open and server.is_open


def test_tls_1_2_works_where_both_ends_take_it(estate: Estate) -> None:  # noqa: F811
    """The attack on the unprotected value."""
    sides = Sides(estate.keyring)
    converse(sides.weak_end(False), sides.weak_end(True))
    converse(sides.end(False), sides.end(True))


@pytest.mark.parametrize("weak_is_server", [False, True])
def test_tls_1_2_is_refused_by_either_end(estate: Estate, weak_is_server: bool) -> None:  # noqa: F811
    sides = Sides(estate.keyring)
    ends = {weak_is_server: sides.weak_end(weak_is_server), not weak_is_server: sides.end(not weak_is_server)}
    with pytest.raises(ChannelError):
        converse(ends[False], ends[True])


def test_the_running_secure_processor_refuses_tls_1_2(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    kept = channel._context

    def weakened(*arguments: object, is_server: bool) -> ssl.SSLContext:
        context = kept(*arguments, is_server=is_server)  # type: ignore[arg-type]
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
        return context

    OwnerChannel(estate.channel(), Owner()).close()
    monkeypatch.setattr(channel, "_context", weakened)
    with pytest.raises((ChannelError, ConnectionError)):
        OwnerChannel(estate.channel(), Owner())


# Messages


def test_who_does_not_look_at_the_version_reads_another_ones_message() -> None:
    """The attack on the unprotected value."""
    for message in (encode_owner_message(ListMine()), encode_clear(Knock())):
        old = b"\0" + message[1:]
        assert msgspec.msgpack.decode(old[1:]) == msgspec.msgpack.decode(message[1:])


@pytest.mark.parametrize("version", [0, 2, 255])
def test_a_message_of_another_version_is_refused(version: int) -> None:
    other = bytes([version])
    with pytest.raises(MessageError, match=f"version {version} where version {owner_messages.VERSION} was expected"):
        parse_owner_request(other + encode_owner_message(ListMine())[1:])
    with pytest.raises(MessageError, match=f"version {version}"):
        parse_owner_reply(other + encode_owner_message(Done())[1:])
    with pytest.raises(MessageError, match=f"version {version}"):
        parse_clear(other + encode_clear(Knock())[1:])


@pytest.mark.parametrize(("side", "number"), [("owner", 0), ("sp", 0), ("owner", 1)])
def test_an_introduction_of_another_version_opens_nothing(
    estate: Estate,  # noqa: F811
    relay: Relay,
    side: Side,
    number: int,
) -> None:
    def hook(sender: Side, count: int, frame: bytes) -> list[bytes]:
        return [b"\0" + frame[1:]] if (sender, count) == (side, number) else [frame]

    relay.hook = hook
    with pytest.raises(PeerError):
        estate.desk(channel=relay.path).list_mine()


def test_papers_are_not_taken_from_a_message_with_more_in_it() -> None:
    papers = Papers((b"a", b"b", b"c", b"d"))
    fields = msgspec.msgpack.decode(encode_clear(papers)[1:]) | {"tls": "1.2"}
    with pytest.raises(MessageError):
        parse_clear(bytes([introductions.VERSION]) + msgspec.msgpack.encode(fields))


# Files


def test_an_instance_file_of_another_format_version_is_refused_before_anything_is_sent(
    estate: Estate,  # noqa: F811
    relay: Relay,
) -> None:
    vm_id = estate.stopped_vm()
    estate.export(vm_id, "version")
    path = estate.directory / "version"
    file = path.read_bytes()
    for version in (0, 2):
        path.write_bytes(file[:8] + version.to_bytes(2, "big") + file[10:])
        as_if_known = path.read_bytes()[:8] + file[8:]
        assert SealedHeader.parse(as_if_known[:HEADER_BYTES]).instance.version == 1  # who does not look reads it
        with pytest.raises(InstanceFormatUnknown, match=f"format version {version}"):
            parse_instance_header(path.read_bytes())
        with pytest.raises(InstanceFormatUnknown):
            estate.bring(vm_id, "version", channel=relay.path)
    assert not relay.seen
    path.write_bytes(file)
    assert estate.bring(vm_id, "version").vm_id == vm_id
