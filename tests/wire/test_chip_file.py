"""The chip file, format 2: what goes in comes out, and nothing whose parts do not belong together."""

from __future__ import annotations

import hashlib
import json
import traceback

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.vendor.factory import ALL_FEATURES, make_chip
from spvtpm.wire.chip_file import MAX_CHIP_FILE_BYTES, Chip, encode_chip_file, parse_chip_file
from spvtpm.wire.errors import ChipFileError
from tests.papers import DAY, NOW, new_papers, papers


def with_checksum(chip: bytes, number: int = 2) -> bytes:
    """A file whose checksum is right, whatever it holds."""
    return b'{"format":%d,"chip":%b,"sha256":"%b"}' % (number, chip, hashlib.sha256(chip).hexdigest().encode())


def changed(**fields: object) -> bytes:
    """The chip's file with these fields, and a right checksum."""
    return with_checksum(msgspec.json.encode(msgspec.structs.replace(papers().made, **fields)))


def test_a_chip_comes_back() -> None:
    content = encode_chip_file(papers().made)
    assert parse_chip_file(content) == papers().made
    assert b" " not in content
    assert len(content) < MAX_CHIP_FILE_BYTES / 4


def test_a_chip_can_certify() -> None:
    chip = parse_chip_file(encode_chip_file(papers().made))
    assert chip.issuer().certificate == chip.chain().chip_certificate


@pytest.mark.attack("A15")
def test_every_flipped_bit_gives_the_same_chip_or_none() -> None:
    good = encode_chip_file(papers().made)
    for bit in range(0, len(good) * 8, 7):  # every byte, and each bit of it in turn
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        try:
            assert parse_chip_file(bytes(bad)) == papers().made, f"bit {bit}"
        except ChipFileError:
            continue


def _key(kind: str) -> bytes:
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
    if kind == "RSA":
        key = rsa.generate_private_key(65537, 2048)
    elif kind == "Ed25519":
        key = ed25519.Ed25519PrivateKey.generate()
    else:
        key = ec.generate_private_key(ec.SECP384R1() if kind == "another" else ec.SECP256R1())
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def _another() -> Chip:
    return make_chip(papers().vendor, "test chip", ALL_FEATURES, NOW - DAY)


@pytest.mark.attack("A15")
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (changed(chip_id=b"x" * 16), "of another chip or fleet"),
        (changed(fleet_id=b"x" * 16), "of another chip or fleet"),
        (changed(endorsement_key=_key("another")), "not that of its certificate"),
        (changed(endorsement_key=_key("curve")), "not that of its certificate"),
        (changed(endorsement_key=_key("Ed25519")), "not that of its certificate"),
        (changed(endorsement_key=b"x"), "not that of its certificate"),
        (changed(certificates=_another().certificates), "not that of its certificate"),
        (changed(certificates=(*papers().chip_chain[:2], new_papers().chip_chain[2])), "names another issuer's key"),
        (changed(certificates=papers().chip_chain[::-1]), "certificate"),
        (changed(certificates=(b"x",) * 3), "malformed"),
        (changed(generation=0), "no chip file of format 2"),
        (changed(generation=1025), "no chip file of format 2"),
        (changed(sp_secret=b"x" * 31), "no chip file of format 2"),
        (changed(certificates=papers().chip_chain[:2]), "no chip file of format 2"),
    ],
)
def test_a_right_checksum_over_parts_that_do_not_belong_together_is_not_enough(content: bytes, sentence: str) -> None:
    with pytest.raises(ChipFileError, match=sentence):
        parse_chip_file(content)


def test_a_key_of_another_kind_is_refused() -> None:
    with pytest.raises(ChipFileError, match="no chip file of format 2"):
        parse_chip_file(changed(endorsement_key=_key("RSA")))  # longer than any key on P-384


def test_unknown_fields_and_other_formats_are_refused() -> None:
    good = json.loads(msgspec.json.encode(papers().made))
    for content in (
        with_checksum(json.dumps(good | {"more": 1}).encode()),
        with_checksum(json.dumps(good).encode(), number=1),
        with_checksum(json.dumps(good).encode(), number=3),
    ):
        with pytest.raises(ChipFileError, match="no chip file of format 2"):
            parse_chip_file(content)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"[" * 16000, b'{"format":2}', b"\xff\xfe{}", b"x" * 16385])
def test_something_else_than_a_chip_file_is_refused(content: bytes) -> None:
    with pytest.raises(ChipFileError):
        parse_chip_file(content)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_a_typed_error(content: bytes) -> None:
    with pytest.raises(ChipFileError):
        parse_chip_file(content)


def test_a_chip_whose_parts_do_not_belong_together_is_not_written() -> None:
    with pytest.raises(ChipFileError, match="another chip"):
        encode_chip_file(msgspec.structs.replace(papers().made, chip_id=b"x" * 16))


@pytest.mark.attack("A24")
def test_neither_the_representation_nor_an_error_shows_a_secret() -> None:
    chip = papers().made
    assert repr(chip) == f"Chip(chip_id={chip.chip_id.hex()}, fleet_id={chip.fleet_id.hex()}, generation=1)"
    for content in (with_checksum(b'{"chip_id":"TOP-SECRET"}'), changed(endorsement_key=b"TOP-SECRET")):
        try:
            parse_chip_file(content)
        except ChipFileError:
            assert "TOP-SECRET" not in traceback.format_exc()
        else:
            pytest.fail("a damaged chip was read")
