"""Certificate profiles and policies: what is built is accepted, by OpenSSL too; whatever differs is refused with a sentence."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID
from cryptography.x509.verification import ExtensionPolicy, PolicyBuilder, Store, VerificationError
from hypothesis import example, given
from hypothesis import strategies as st

from spvtpm.vendor.factory import ALL_FEATURES
from spvtpm.wire.certificate_building import (
    Issuer,
    Validity,
    build_channel_certificate,
    build_intermediate,
    build_root,
)
from spvtpm.wire.certificate_extensions import (
    CHANNEL_IDENTITY,
    CHIP_IDENTITY,
    ChannelIdentity,
    ChipIdentity,
    Features,
    parse_channel_identity,
    parse_chip_identity,
)
from spvtpm.wire.certificate_policies import (
    AllowedChips,
    ChainPolicy,
    HasFeatures,
    MinimumFirmware,
    OfFleet,
    Purpose,
    ShownFor,
    TrustedRoots,
    ValidAt,
    genuine,
)
from spvtpm.wire.certificates import parse_chain
from spvtpm.wire.errors import (
    CertificateError,
    CertificateExpired,
    CertificateRefused,
    ChipNotAllowed,
    FirmwareTooOld,
    SpvtpmError,
    UntrustedIssuer,
)
from spvtpm.wire.vtpm_endorsement import MAX_CERTIFICATE_BYTES
from tests.papers import DAY, NOW, channel_chain, der, forged, new_papers, papers

IDS = st.binary(min_size=16, max_size=16)
FEATURES = st.integers(0, 2**32 - 1).map(Features)
MODELS = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), min_size=1, max_size=32).filter(str.isprintable)


# Our extensions


@given(st.builds(ChipIdentity, IDS, IDS, FEATURES, MODELS))
def test_a_chip_identity_comes_back(identity: ChipIdentity) -> None:
    assert parse_chip_identity(identity.encode()) == identity


@given(st.builds(ChannelIdentity, IDS, st.integers(0, 2**32 - 1), FEATURES))
def test_a_channel_identity_comes_back(identity: ChannelIdentity) -> None:
    assert parse_channel_identity(identity.encode()) == identity


@given(st.binary(max_size=200))
@example(b"0\x80" + bytes(126))
@example(ChannelIdentity(bytes(16), 0, Features(0)).encode() + b"\0")
def test_other_bytes_are_refused_or_are_strict(content: bytes) -> None:
    for parse in (parse_chip_identity, parse_channel_identity):
        try:
            assert parse(content).encode() == content
        except CertificateError:
            continue


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        (b"\x02\x02\x00\x07", "not strict DER"),  # a leading zero too many
        (b"\x02\x05\x01\x00\x00\x00\x00", "32 bits"),
        (b"\x02\x01\xff", "32 bits"),  # negative
        (b"\x02\x00", "not strict DER"),
        (b"\x04\x01\x07", "another type"),
        (b"\x02\x01\x07\x05\x00", "another type"),
    ],
)
def test_a_firmware_version_in_another_form_is_refused(field: bytes, sentence: str) -> None:
    good = ChannelIdentity(bytes(16), 7, ALL_FEATURES).encode()
    content = good[2:20] + field + good[23:]
    with pytest.raises(CertificateError, match=sentence):
        parse_channel_identity(bytes([0x30, len(content)]) + content)


@pytest.mark.parametrize(
    "bits", [b"\x03\x02\x00\xc0", b"\x03\x02\x06\xc1", b"\x03\x01\x06", b"\x03\x00", b"\x03\x02\x09\xc0"]
)
def test_features_in_another_form_are_refused(bits: bytes) -> None:
    good = ChannelIdentity(bytes(16), 7, ALL_FEATURES).encode()
    content = good[2:23] + bits
    with pytest.raises(CertificateError, match="channel certificate's identity"):
        parse_channel_identity(bytes([0x30, len(content)]) + content)


def test_features_of_the_future_are_kept() -> None:
    identity = ChannelIdentity(bytes(16), 7, ALL_FEATURES | 1 << 20)
    assert parse_channel_identity(identity.encode()).features & 1 << 20


@pytest.mark.parametrize(
    ("chip_id", "fleet_id", "model"),
    [
        (b"c" * 15, b"f" * 16, "m"),
        (b"c" * 16, b"f" * 17, "m"),
        (b"c" * 16, b"f" * 16, ""),
        (b"c" * 16, b"f" * 16, "\x1b[2J"),
    ],
)
def test_an_identity_out_of_bounds_cannot_be_made(chip_id: bytes, fleet_id: bytes, model: str) -> None:
    with pytest.raises(ValueError, match=r"16 bytes|printable"):
        ChipIdentity(chip_id, fleet_id, ALL_FEATURES, model)


# Chains as they should be


@pytest.mark.parametrize("purpose", Purpose)
def test_a_chain_as_built_is_read_and_genuine(purpose: Purpose) -> None:
    certificates = papers().channel if purpose is Purpose.CHANNEL else papers().chip_chain
    chain = parse_chain(certificates)
    papers().genuine(purpose).verify(chain)
    assert chain.encode() == certificates
    assert chain.chip.chip_id == papers().made.chip_id
    assert (chain.channel is not None) == (purpose is Purpose.CHANNEL)
    assert max(map(len, certificates)) < 1024


def test_no_two_certificates_share_a_serial_number() -> None:
    serials = {x509.load_der_x509_certificate(channel_chain(papers().made)[0]).serial_number for _ in range(20)}
    assert len(serials) == 20
    assert all(serial.bit_length() <= 159 for serial in serials)


def _write(folder: Path, name: str, *certificates: bytes) -> str:
    path = folder / name
    path.write_bytes(b"".join(x509.load_der_x509_certificate(one).public_bytes(Encoding.PEM) for one in certificates))
    return str(path)


def _openssl_verify(folder: Path, chain: tuple[bytes, ...], *options: str) -> subprocess.CompletedProcess[str]:
    leaf, *between, root = chain
    files = ["-CAfile", _write(folder, "root.pem", root), "-untrusted", _write(folder, "chain.pem", *between)]
    moment = ["-attime", str(int(NOW.timestamp()))]
    command = ["openssl", "verify", "-x509_strict", *moment, *options, *files, _write(folder, "leaf.pem", leaf)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("options", [[], ["-purpose", "sslserver"], ["-purpose", "sslclient"]])
def test_openssl_verifies_a_channel(tmp_path: Path, options: list[str]) -> None:
    done = _openssl_verify(tmp_path, papers().channel, *options)
    assert done.returncode == 0, done.stderr


def test_openssl_verifies_a_chip(tmp_path: Path) -> None:
    done = _openssl_verify(tmp_path, papers().chip_chain)
    assert done.returncode == 0, done.stderr


def test_openssl_reads_every_certificate_as_der(tmp_path: Path) -> None:
    for certificate in papers().channel:
        (tmp_path / "one.der").write_bytes(certificate)
        done = subprocess.run(
            ["openssl", "asn1parse", "-inform", "DER", "-in", tmp_path / "one.der"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "Error" not in done.stdout


def test_openssl_shows_the_extensions(tmp_path: Path) -> None:
    path = _write(tmp_path, "chip.pem", papers().chip_chain[0])
    shown = subprocess.run(["openssl", "x509", "-in", path, "-noout", "-text"], capture_output=True, text=True)
    assert "CA:TRUE, pathlen:0" in shown.stdout
    assert CHIP_IDENTITY.dotted_string in shown.stdout


def test_a_leaf_of_another_kind_verifies_under_the_chip_too(tmp_path: Path) -> None:
    """Room for the certificates of vTPM EKs (TCG EK Credential Profile): an RSA key without a subject of its own."""
    key = rsa.generate_private_key(65537, 2048).public_key()
    usage = x509.KeyUsage(False, False, True, False, False, False, False, False, False)
    name = x509.Name([x509.NameAttribute(x509.ObjectIdentifier("2.23.133.2.1"), "id:00000000")])
    certificate = forged(
        papers().channel[0],
        papers().chip.key,
        key=key,
        extensions=[
            (usage, True),
            (x509.ExtendedKeyUsage([x509.ObjectIdentifier("2.23.133.8.1")]), False),
            (x509.SubjectAlternativeName([x509.DirectoryName(name)]), False),
        ],
        without=[CHANNEL_IDENTITY],
    )
    chain = (certificate, *papers().chip_chain)
    assert _openssl_verify(tmp_path, chain).returncode == 0
    with pytest.raises(CertificateError, match="channel certificate has a key of another type"):
        parse_chain(chain)


def test_tls_takes_a_channel_certificate_on_both_sides(tmp_path: Path) -> None:
    """The standard library's TLS 1.3, as strict as it can be. It asks for the time of day, so the papers are of today."""
    today = new_papers(start=datetime.now(UTC) - DAY)
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = forged(today.channel[0], today.chip.key, key=key.public_key())
    own = _write(tmp_path, "own.pem", leaf, *today.chip_chain[:2])
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    contexts = [ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)]
    for context in contexts:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # chips have no host names
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_verify_locations(_write(tmp_path, "root.pem", today.chip_chain[2]))
        context.load_cert_chain(own, tmp_path / "key.pem")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = contexts[0].wrap_bio(to_client, to_server)
    server = contexts[1].wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server) * 3:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert client.getpeercert(binary_form=True) == server.getpeercert(binary_form=True) == leaf


# Chains as they should not be


def _library_verifies(chain: tuple[bytes, ...]) -> bool:
    """What the library's own path validation says, which tries the same with code of its own."""
    leaf, *between, root = map(x509.load_der_x509_certificate, chain)
    ca, any_leaf = ExtensionPolicy.webpki_defaults_ca(), ExtensionPolicy.permit_all()
    builder = PolicyBuilder().store(Store([root])).time(NOW).extension_policies(ca_policy=ca, ee_policy=any_leaf)
    try:
        builder.build_client_verifier().verify(leaf, between)
    except VerificationError:
        return False
    return True


def _broken_links() -> dict[str, tuple[bytes, ...]]:
    """Chains whose certificates are as profiled, with one link between them broken."""
    good, other = papers(), new_papers()
    chip, intermediate = good.chip_chain[0], good.chip_chain[1]
    stranger = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stranger")])
    identifier = x509.AuthorityKeyIdentifier(bytes(20), None, None)
    return {
        "channel, signature": (forged(good.channel[0], other.chip.key), *good.chip_chain),
        "channel, name": (forged(good.channel[0], good.chip.key, issuer=stranger), *good.chip_chain),
        "channel, key": (forged(good.channel[0], good.chip.key, extensions=[(identifier, False)]), *good.chip_chain),
        "chip": (good.channel[0], forged(chip, other.intermediate.key), *good.chip_chain[1:]),
        "intermediate": (*good.channel[:2], forged(intermediate, other.root.key), good.channel[3]),
        "root": (*good.channel[:3], other.channel[3]),
    }


@pytest.mark.parametrize("link", _broken_links())
def test_one_broken_link_is_refused_by_us_and_by_the_library(link: str) -> None:
    chain = _broken_links()[link]
    root = x509.load_der_x509_certificate(chain[-1])
    with pytest.raises(UntrustedIssuer):
        TrustedRoots([root]).verify(parse_chain(chain))
    if link != "channel, key":  # RFC 5280 makes the key identifier a help for finding a path, and no condition
        assert not _library_verifies(chain)


def test_the_library_verifies_what_we_do() -> None:
    assert _library_verifies(papers().channel)


def _key(curve: ec.EllipticCurve) -> ec.EllipticCurvePublicKey:
    return ec.generate_private_key(curve).public_key()


_usage = x509.KeyUsage(True, False, False, False, False, True, False, False, False)
_unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\0")
_DIFFERENT: dict[str, tuple[int, dict[str, object], str]] = {
    # place in the chain, what the forger changes, a word of the refusal
    "another curve": (1, {"key": _key(ec.SECP256R1())}, "chip certificate has a key on the curve secp256r1"),
    "another curve of the channel": (0, {"key": _key(ec.SECP384R1())}, "on the curve secp384r1, not on secp256r1"),
    "RSA": (1, {"key": rsa.generate_private_key(65537, 2048).public_key()}, "key of another type"),
    "SHA-256": (0, {"algorithm": SHA256()}, "not signed with ECDSA and SHA-384"),
    "unknown critical": (1, {"extensions": [(_unknown, True)]}, "has a critical extension that does not belong"),
    "unknown": (
        2,
        {"extensions": [(_unknown, False)]},
        "intermediate certificate has an extension that does not belong",
    ),
    "no constraints": (1, {"without": [ExtensionOID.BASIC_CONSTRAINTS]}, "lacks an extension: basic constraints"),
    "no usage": (1, {"without": [ExtensionOID.KEY_USAGE]}, "lacks an extension: key usage"),
    "no subject key": (1, {"without": [ExtensionOID.SUBJECT_KEY_IDENTIFIER]}, "lacks an extension: subject key"),
    "no issuer's key": (0, {"without": [ExtensionOID.AUTHORITY_KEY_IDENTIFIER]}, "lacks an extension: authority key"),
    "no identity": (1, {"without": [CHIP_IDENTITY]}, "lacks an extension: chip identity"),
    "no channel identity": (0, {"without": [CHANNEL_IDENTITY]}, "lacks an extension: channel identity"),
    "no purpose": (0, {"without": [ExtensionOID.EXTENDED_KEY_USAGE]}, "lacks an extension: extended key usage"),
    "TLS server alone": (
        0,
        {"extensions": [(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)]},
        "other purposes",
    ),
    "constraints not critical": (
        1,
        {"extensions": [(x509.BasicConstraints(True, 0), False)]},
        "is not marked critical: basic constraints",
    ),
    "identity critical": (
        1,
        {"extensions": [(x509.UnrecognizedExtension(CHIP_IDENTITY, b"0\0"), True)]},
        "is marked critical, and should not be: chip identity",
    ),
    "chip is no CA": (1, {"extensions": [(x509.BasicConstraints(False, None), True)]}, "is not one of a CA"),
    "channel is a CA": (0, {"extensions": [(x509.BasicConstraints(True, 0), True)]}, "is one of a CA"),
    "longer path": (1, {"extensions": [(x509.BasicConstraints(True, 1), True)]}, "path length 1, not 0"),
    "endless path": (2, {"extensions": [(x509.BasicConstraints(True, None), True)]}, "path length None, not 1"),
    "longer path of the root": (3, {"extensions": [(x509.BasicConstraints(True, 3), True)]}, "path length 3, not 2"),
    "more usage": (1, {"extensions": [(_usage, True)]}, "key for another usage"),
    "another subject key": (
        1,
        {"extensions": [(x509.SubjectKeyIdentifier(bytes(20)), False)]},
        "subject key identifier that is not its key's",
    ),
    "issuer by serial number": (
        0,
        {
            "extensions": [
                (x509.AuthorityKeyIdentifier(bytes(20), [x509.DirectoryName(x509.Name([]))], 1), False),
            ]
        },
        "by something else than a key identifier",
    ),
    "another chip in the subject": (
        1,
        {"subject": x509.Name([x509.NameAttribute(NameOID.SERIAL_NUMBER, "00" * 16)])},
        "subject that names another chip",
    ),
    "no subject": (0, {"subject": x509.Name([])}, "does not name its issuer or its subject"),
    "valid too long": (0, {"validity": Validity.lasting(NOW, timedelta(days=7, seconds=1))}, "longer than 7 days"),
}


@pytest.mark.parametrize("different", _DIFFERENT)
def test_whatever_is_not_as_profiled_has_a_sentence_of_its_own(different: str) -> None:
    place, changes, sentence = _DIFFERENT[different]
    signer = (papers().chip, papers().intermediate, papers().root, papers().root)[place].key
    chain = list(papers().channel)
    chain[place] = forged(chain[place], signer, **changes)  # type: ignore[arg-type]
    with pytest.raises(CertificateError, match=sentence):
        parse_chain(chain)


def test_a_channel_cannot_claim_a_feature_that_its_chip_lacks() -> None:
    chain = channel_chain(papers().made, features=ALL_FEATURES | 1 << 5)
    with pytest.raises(CertificateError, match="claims a feature"):
        parse_chain(chain)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_a_chain_of_another_length_is_refused(count: int) -> None:
    with pytest.raises(CertificateError, match=f"this one has {count}"):
        parse_chain((papers().channel * 2)[:count])


@pytest.mark.parametrize("content", [b"", b"\0", b"0\x82\xff\xff", bytes(MAX_CERTIFICATE_BYTES + 1)])
def test_what_is_no_certificate_is_refused(content: bytes) -> None:
    with pytest.raises(CertificateError, match=r"malformed|longer than 2048"):
        parse_chain((content, *papers().chip_chain))


def test_bytes_after_a_certificate_are_refused() -> None:
    with pytest.raises(CertificateError, match="malformed"):
        parse_chain((papers().channel[0] + b"\0", *papers().chip_chain))


def _refuses(chain: tuple[bytes, ...]) -> bool:
    try:
        papers().genuine().verify(parse_chain(chain))
    except SpvtpmError:
        return True
    return False


@pytest.mark.attack("A01")
def test_every_flipped_bit_in_the_leaf_is_refused() -> None:
    leaf = papers().channel[0]
    for bit in range(len(leaf) * 8):
        bad = bytearray(leaf)
        bad[bit // 8] ^= 1 << bit % 8
        assert _refuses((bytes(bad), *papers().chip_chain)), f"bit {bit}"


@pytest.mark.attack("A01")
@given(st.integers(0, 3), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_any_flipped_bit_in_a_chain_is_refused(place: int, where: float, bit: int) -> None:
    chain = list(papers().channel)
    bad = bytearray(chain[place])
    bad[int(where * len(bad))] ^= 1 << bit
    chain[place] = bytes(bad)
    assert _refuses(tuple(chain))


@given(st.lists(st.binary(max_size=100), max_size=5))
def test_any_bytes_are_refused_with_a_typed_error(chain: list[bytes]) -> None:
    with pytest.raises(CertificateError):
        parse_chain(chain)


# Policies


def _told(policy: ChainPolicy, kind: type[CertificateRefused], sentence: str, chain: tuple[bytes, ...] = ()) -> None:
    with pytest.raises(kind, match=sentence):
        policy.verify(parse_chain(chain or papers().channel))


def test_no_trusted_root_is_no_trust() -> None:
    _told(TrustedRoots([]), UntrustedIssuer, "not trusted")


def test_one_of_several_roots_will_do() -> None:
    roots = [new_papers().root.certificate, papers().root.certificate]
    TrustedRoots(roots).verify(parse_chain(papers().channel))


def test_validity_includes_both_ends() -> None:
    chain = parse_chain(papers().channel)
    leaf = chain.certificates[0]
    for moment in (leaf.not_valid_before_utc, leaf.not_valid_after_utc):
        ValidAt(moment).verify(chain)
    second = timedelta(seconds=1)
    _told(ValidAt(leaf.not_valid_after_utc + second), CertificateExpired, "channel certificate is not valid after")
    _told(ValidAt(leaf.not_valid_before_utc - second), CertificateExpired, "not valid before")


def test_a_kind_is_not_another() -> None:
    _told(ShownFor(Purpose.CHIP), CertificateRefused, "not in a chip certificate")
    _told(ShownFor(Purpose.CHANNEL), CertificateRefused, "not in a channel certificate", papers().chip_chain)


def test_chip_fleet_features_and_firmware() -> None:
    chain, chip = parse_chain(papers().channel), papers().made
    for policy in (
        AllowedChips([b"x" * 16, chip.chip_id]),
        OfFleet(chip.fleet_id),
        HasFeatures(ALL_FEATURES),
        HasFeatures(Features(0)),
        MinimumFirmware(7),
    ):
        policy.verify(chain)
    _told(AllowedChips([b"x" * 16]), ChipNotAllowed, "not among those")
    _told(AllowedChips([]), ChipNotAllowed, "not among those")
    _told(OfFleet(b"x" * 16), ChipNotAllowed, "of the fleet")
    _told(HasFeatures(Features(1 << 9)), ChipNotAllowed, "lacks")
    _told(MinimumFirmware(8), FirmwareTooOld, "version 7; needed: 8")
    _told(MinimumFirmware(0), CertificateRefused, "does not tell which firmware", papers().chip_chain)


def test_firmware_that_does_not_use_a_feature_does_not_have_it() -> None:
    chain = channel_chain(papers().made, features=Features.VTPM)
    _told(HasFeatures(Features.SECURE_VIRTUALISATION), ChipNotAllowed, "secure_virtualisation", chain)


def test_the_policies_that_nobody_may_leave_out_are_in_genuine() -> None:
    kinds = {type(policy).__name__ for policy in papers().genuine().policies}
    assert kinds == {"ShownFor", "TrustedRoots", "ValidAt", "NotRevoked"}
    unsigned = new_papers().revocation_list()
    policy = genuine(Purpose.CHANNEL, [papers().root.certificate], unsigned, NOW)
    _told(policy, CertificateRefused, "revocation list names another key")


# Builders


def _build_with_wrong_key() -> object:
    return Issuer(papers().root.certificate, papers().intermediate.key)


def _build_name(name: str) -> Callable[[], object]:
    return lambda: build_root(papers().root.key, name, Validity.lasting(NOW, DAY))


@pytest.mark.parametrize(
    "build",
    [_build_with_wrong_key, *map(_build_name, ["", " x", "x" * 41, "a\nb"])],
    ids=["key", "empty", "blank", "long", "line"],
)
def test_a_value_that_cannot_be_in_a_certificate_is_refused(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"not that of the certificate|vendor's name"):
        build()


def test_a_builder_makes_nothing_that_a_reader_refuses() -> None:
    identity = ChannelIdentity(papers().made.chip_id, 1, ALL_FEATURES)
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(CertificateError, match="longer than 7 days"):
        build_channel_certificate(papers().chip, key, identity, Validity.lasting(NOW, 8 * DAY))
    with pytest.raises(CertificateError, match="not on secp384r1"):
        build_intermediate(papers().root, key, "Example", Validity.lasting(NOW, DAY))


@pytest.mark.attack("A24")
def test_an_issuers_representation_names_it_and_no_key() -> None:
    assert repr(papers().root) == "Issuer(CN=Example Silicon root,O=Example Silicon)"
    assert der(papers().root.certificate) == papers().channel[3]
