"""The revocation list: whose it is, until when it holds, what it holds; and what OpenSSL says of it."""

from __future__ import annotations

import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.wire.certificate_policies import NotRevoked
from spvtpm.wire.certificates import parse_chain
from spvtpm.wire.errors import CertificateError, CertificateRevoked, RevocationUnknown, SpvtpmError
from spvtpm.wire.revocation import MAX_REVOCATION_LIST_BYTES, RevocationList, parse_revocation_list
from tests.papers import DAY, NOW, new_papers, papers

SECOND = timedelta(seconds=1)


def _chip_serial() -> int:
    return papers().chip.certificate.serial_number


def _verify(revoked: RevocationList, *, days: float = 0, min_number: int = 1) -> None:
    NotRevoked(revoked, NOW + days * DAY, min_number).verify(parse_chain(papers().channel))


def test_a_chip_that_is_not_on_the_list_is_not_revoked() -> None:
    for serials in ([], [_chip_serial() + 1], range(1, 200)):
        _verify(papers().revocation_list(serials))


@pytest.mark.attack("A01")
def test_a_chip_on_the_list_is_revoked() -> None:
    with pytest.raises(CertificateRevoked, match="revoked this chip"):
        _verify(papers().revocation_list([5, _chip_serial(), 7]))


@pytest.mark.parametrize(("days", "sentence"), [(30 + 1e-4, "ended on 2027-03-31"), (-1e-4, "from the future")])
def test_a_list_that_is_not_current_tells_nothing(days: float, sentence: str) -> None:
    with pytest.raises(RevocationUnknown, match=sentence):
        _verify(papers().revocation_list(), days=days)


def test_an_older_list_than_one_that_was_seen_is_refused() -> None:
    _verify(papers().revocation_list(number=4), min_number=4)
    with pytest.raises(RevocationUnknown, match="number 4, and number 5 was seen"):
        _verify(papers().revocation_list(number=4), min_number=5)


def test_another_vendors_list_tells_nothing() -> None:
    with pytest.raises(RevocationUnknown, match="not of the chip's vendor"):
        _verify(new_papers("Another Silicon").revocation_list())


def test_a_list_signed_by_a_stranger_tells_nothing() -> None:
    with pytest.raises(RevocationUnknown, match="names another key"):
        _verify(new_papers().revocation_list())
    issuer = papers().intermediate
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    forged = _crl([(identifier, False), (x509.CRLNumber(1), False)], signer=new_papers().intermediate.key)
    with pytest.raises(RevocationUnknown, match="not signed by the chip's vendor"):
        _verify(parse_revocation_list(forged))


def _crl(
    extensions: list[tuple[x509.ExtensionType, bool]] | None = None,
    algorithm: SHA256 | SHA384 | None = None,
    signer: ec.EllipticCurvePrivateKey | None = None,
) -> bytes:
    """A list of the vendor's that is not as profiled."""
    issuer = papers().intermediate
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(NOW)
        .next_update(NOW + DAY)
    )
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    for value, critical in extensions or [(identifier, False), (x509.CRLNumber(1), False)]:
        builder = builder.add_extension(value, critical)
    return builder.sign(signer or issuer.key, algorithm or SHA384()).public_bytes(Encoding.DER)


_identifier = x509.AuthorityKeyIdentifier(bytes(20), None, None)


@pytest.mark.parametrize(
    "extensions",
    [
        [(x509.CRLNumber(1), False)],
        [(_identifier, False)],
        [(_identifier, False), (x509.CRLNumber(1), True)],
        [(_identifier, False), (x509.CRLNumber(2), False), (x509.DeltaCRLIndicator(1), True)],
        [
            (_identifier, False),
            (x509.CRLNumber(2), False),
            (x509.IssuingDistributionPoint(None, None, False, True, None, False, False), True),
        ],
    ],
    ids=["no issuer's key", "no number", "critical number", "delta", "partition"],
)
def test_a_list_with_other_extensions_is_refused(extensions: list[tuple[x509.ExtensionType, bool]]) -> None:
    with pytest.raises(CertificateError, match="other extensions"):
        parse_revocation_list(_crl(extensions))


def test_a_list_without_a_number_that_counts_is_refused() -> None:
    with pytest.raises(CertificateError, match="no number"):
        parse_revocation_list(_crl([(_identifier, False), (x509.CRLNumber(0), False)]))


def test_a_list_signed_another_way_is_refused() -> None:
    with pytest.raises(CertificateError, match="SHA-384"):
        parse_revocation_list(_crl(algorithm=SHA256()))


@pytest.mark.parametrize("content", [b"", b"0\0", bytes(100), bytes(MAX_REVOCATION_LIST_BYTES + 1)])
def test_what_is_no_list_is_refused(content: bytes) -> None:
    with pytest.raises(CertificateError, match=r"malformed|longer than"):
        parse_revocation_list(content)


@pytest.mark.attack("A01")
def test_every_flipped_bit_in_a_list_is_refused() -> None:
    good = papers().revocation_list([_chip_serial() + 1]).encode()
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SpvtpmError):
            _verify(parse_revocation_list(bytes(bad)))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_with_a_typed_error(content: bytes) -> None:
    with pytest.raises(CertificateError):
        parse_revocation_list(content)


def test_a_list_comes_back_as_it_was_received() -> None:
    encoded = papers().revocation_list([1, 2]).encode()
    assert parse_revocation_list(encoded).encode() == encoded


def test_openssl_verifies_the_list_and_refuses_the_revoked_chip(tmp_path: Path) -> None:
    revoked, free = tmp_path / "revoked.pem", tmp_path / "free.pem"
    revoked.write_bytes(papers().revocation_list([_chip_serial()]).crl.public_bytes(Encoding.PEM))
    free.write_bytes(papers().revocation_list().crl.public_bytes(Encoding.PEM))
    for name, issuer in (("root", papers().root), ("intermediate", papers().intermediate), ("chip", papers().chip)):
        (tmp_path / f"{name}.pem").write_bytes(issuer.certificate.public_bytes(Encoding.PEM))

    def openssl(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["openssl", *command], capture_output=True, text=True, cwd=tmp_path)

    shown = openssl("crl", "-in", "revoked.pem", "-noout", "-text", "-CAfile", "intermediate.pem")
    assert "verify OK" in shown.stderr
    assert f"{_chip_serial():X}" in shown.stdout
    moment = ["-attime", str(int(NOW.timestamp()))]
    trust = ["-CAfile", "root.pem", "-untrusted", "intermediate.pem", "-crl_check"]
    assert openssl("verify", *moment, *trust, "-CRLfile", "free.pem", "chip.pem").returncode == 0
    refused = openssl("verify", *moment, *trust, "-CRLfile", "revoked.pem", "chip.pem")
    assert refused.returncode != 0
    assert "certificate revoked" in refused.stderr
