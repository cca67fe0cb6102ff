"""A01: a secure processor that is none, and what a terminal has said to it when it notices: a knock, nothing of its owner."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from spvtpm.terminal.attestation import Verified
from spvtpm.terminal.desk import Desk, Wishes
from spvtpm.terminal.exports import export_vtpm
from spvtpm.terminal.imports import import_vtpm
from spvtpm.terminal.keyring import Keyring
from spvtpm.terminal.session import OwnerSession
from spvtpm.terminal.socket_relay import through_socket
from spvtpm.vendor.factory import make_chip
from spvtpm.wire.certificate_extensions import Features
from spvtpm.wire.errors import CertificateError, CertificateRefused, SpvtpmError
from spvtpm.wire.instance_header import InstanceHeader, SealedHeader
from spvtpm.wire.introductions import Introduce, Knock, Papers, encode_clear, parse_clear
from tests.owner import ANYTHING
from tests.papers import DAY, channel_chain, forged, new_papers, todays_papers
from tests.relay import Relay, Side
from tests.terminal.estate import VM_KEY, new_keyring

pytestmark = pytest.mark.attack("A01")
Chain = tuple[bytes, ...]


def today() -> datetime:
    return datetime.now(UTC)


def genuine() -> Chain:
    return channel_chain(todays_papers().made, start=today() - DAY)


def with_a_key_of_ones_own() -> Chain:
    """The genuine papers, and a channel certificate by a key that the forger has."""
    key = ec.generate_private_key(ec.SECP384R1())
    return (forged(genuine()[0], key, key=ec.generate_private_key(ec.SECP256R1()).public_key()), *genuine()[1:])


def without_an_extension() -> Chain:
    chip = todays_papers().chip
    return (forged(genuine()[0], chip.key, without=[x509.ExtendedKeyUsage.oid]), *genuine()[1:])


def chip_without_vtpms() -> Chain:
    chip = make_chip(todays_papers().vendor, "another", Features.SECURE_VIRTUALISATION, today() - DAY)
    return channel_chain(chip, features=Features.SECURE_VIRTUALISATION, start=today() - DAY)


FAKES: dict[str, Callable[[], Chain]] = {
    "another vendor of the same name": lambda: new_papers(start=today() - DAY).channel,
    "a channel key of one's own": with_a_key_of_ones_own,
    "expired": lambda: channel_chain(todays_papers().made, start=today() - 8 * DAY),
    "not valid yet": lambda: channel_chain(todays_papers().made, start=today() + DAY),
    "without an extension": without_an_extension,
    "without vTPMs": chip_without_vtpms,
    "the chip's own chain twice": lambda: (genuine()[1], *genuine()[1:]),
    "no certificates": lambda: (b"\x30\x00",) * 4,
}


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return new_keyring(tmp_path / "keyring")


class Impostor:
    """Shows papers, and waits for secrets.

    Args:
        path: of its socket.
    """

    def __init__(self, path: Path) -> None:
        self.chain: Chain = genuine()
        self.relay = Relay(path, None, self._answer)

    def _answer(self, _side: Side, number: int, _frame: bytes) -> list[bytes]:
        return [encode_clear(Papers(self.chain))] if number == 0 else []

    def heard(self) -> list[object]:
        """What the terminal has said in clear."""
        return [parse_clear(frame) for frame in self.relay.frames("owner")]


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Impostor]:
    impostor = Impostor(tmp_path / "impostor")
    with impostor.relay:
        yield impostor


def test_an_unwary_terminal_would_tell_an_impostor_everything(keyring: Keyring, impostor: Impostor) -> None:
    """The attack on the unprotected value: without verification, the owner introduces himself, and goes on to TLS."""
    content = keyring.content

    def credulous(_papers: Sequence[bytes]) -> Verified:
        return None  # type: ignore[return-value]

    with pytest.raises(SpvtpmError):  # the impostor shows papers whose key it does not have; its own would do as well
        OwnerSession.open(through_socket(impostor.relay.path), content.load_key(), content.certificate, credulous, 1)
    introduced = parse_clear(impostor.relay.frames("owner")[1])
    assert introduced == Introduce(content.certificate)
    assert len(impostor.relay.frames("owner")) == 3


@pytest.mark.parametrize("fake", FAKES)
def test_a_fake_secure_processor_hears_a_knock_and_nothing_else(
    keyring: Keyring, impostor: Impostor, tmp_path: Path, fake: str
) -> None:
    impostor.chain = FAKES[fake]()
    told: list[object] = []
    desk = Desk(keyring, through_socket(impostor.relay.path), tell=told.append, timeout_s=30)
    with pytest.raises((CertificateRefused, CertificateError)):
        desk.provision(uuid.uuid4(), VM_KEY, ANYTHING, "")
    assert impostor.heard() == [Knock()]
    assert not told

    with pytest.raises((CertificateRefused, CertificateError)):
        export_vtpm(desk, uuid.uuid4(), tmp_path / "out")
    assert impostor.heard() == [Knock(), Knock()]
    assert not (tmp_path / "out").exists()


def test_a_genuine_chip_that_the_owner_does_not_want_hears_no_more(keyring: Keyring, impostor: Impostor) -> None:
    for wishes in (Wishes(chips=frozenset([bytes(16)])), Wishes(minimum_firmware=8), Wishes(fleet_id=bytes(16))):
        with pytest.raises(CertificateRefused):
            Desk(keyring, through_socket(impostor.relay.path), wishes, timeout_s=30).list_mine()
    assert impostor.heard() == [Knock()] * 3


def test_a_revoked_chip_hears_no_more(keyring: Keyring, impostor: Impostor) -> None:
    serial = todays_papers().chip.certificate.serial_number
    revoked = todays_papers().revocation_list([serial], number=2, at=today() - timedelta(hours=1))
    keyring.put_revocation_list(revoked.encode())
    with pytest.raises(CertificateRefused, match="has revoked this chip"):
        Desk(keyring, through_socket(impostor.relay.path), timeout_s=30).list_mine()
    assert impostor.heard() == [Knock()]


@pytest.mark.attack("A07")
def test_an_import_shows_a_fake_not_even_the_file(keyring: Keyring, impostor: Impostor, tmp_path: Path) -> None:
    header = InstanceHeader(uuid.uuid4(), uuid.uuid4(), bytes(16), 1, 1, 0, hibernated=False)
    file = tmp_path / "file"
    file.write_bytes(SealedHeader(header, 1, bytes(32), bytes(32)).encode() + bytes(32 + 17))
    impostor.chain = FAKES["another vendor of the same name"]()
    with pytest.raises(CertificateRefused):
        import_vtpm(Desk(keyring, through_socket(impostor.relay.path), timeout_s=30), uuid.uuid4(), VM_KEY, file)
    assert impostor.heard() == [Knock()]
    assert not keyring.content.vtpms
