"""Fuses in a PKCS#11 token: the chip EK signs inside it, the other secrets are sealed under a key that never leaves it.

Files: `sealed`, see docs/formats/fuses.md; and `counter`, since PKCS#11 has none that a token would count with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import Meta

from spvtpm.files import create_file
from spvtpm.processor.fuses import Fuses
from spvtpm.processor.fuses.file import FileCounter, begin_counter
from spvtpm.processor.fuses.pkcs11_token import Token, TokenKey
from spvtpm.processor.fuses.sealing import MAX_SEALED_BYTES, read_sealed_file
from spvtpm.processor.sp_secret import SpSecret
from spvtpm.wire.certificate_building import Issuer
from spvtpm.wire.certificates import parse_chain
from spvtpm.wire.checksummed import ChecksummedFile
from spvtpm.wire.chip_file import Chip
from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import FusesError, SpvtpmError
from spvtpm.wire.vtpm_endorsement import DerCertificate

_LABEL = b"spvtpm fuses sealed to a token v1"
_Bytes16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
_Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file: by the chip's id the token's keys are found."""

    chip_id: _Bytes16
    content: Annotated[bytes, Meta(max_length=MAX_SEALED_BYTES)]


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is encrypted: the chip without its endorsement key."""

    fleet_id: _Bytes16
    storage_root_key: _Bytes32
    generation: int
    sp_secret: _Bytes32
    certificates: tuple[DerCertificate, DerCertificate, DerCertificate]


_FILE = ChecksummedFile("sealed", 1, _Sealed)


def seal_to_token(directory: Path, chip: Chip, token: Token) -> None:
    """Moves a chip into a token, and begins its counter.

    Raises:
        AlreadyExists: there is a chip in this directory.
        FusesError: the token has this chip already, or does not do its part.
        StorageError: a file cannot be written.
    """
    begin_counter(directory)
    secrets = _Content(chip.fleet_id, chip.storage_root_key, chip.generation, chip.sp_secret, chip.certificates)
    with token.new_keys(chip.chip_id, chip.issuer().key):
        content = token.seal(chip.chip_id, _LABEL + chip.chip_id, msgspec.json.encode(secrets))
        create_file(directory / "sealed", _FILE.encode(_Sealed(chip.chip_id, content)))


def load_from_token(directory: Path, token: Token) -> Fuses:
    """The fuses; the token certifies for them from then on.

    Raises:
        FusesError: the file is missing or damaged, or the token has not the chip's keys.
    """
    file = read_sealed_file(directory / "sealed", _FILE)
    decrypted = token.unseal(file.chip_id, _LABEL + file.chip_id, file.content)
    try:
        content = msgspec.json.decode(decrypted, type=_Content)
        secret = SpSecret(content.fleet_id, content.generation, content.sp_secret)
        certificate = parse_chain(content.certificates).chip_certificate
    except (*UNDECODABLE, ValueError, SpvtpmError):
        raise FusesError("what was sealed to the token is no chip") from None
    public_key = certificate.public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)  # noqa: S101  # as the certificate's profile says
    issuer = Issuer(certificate, TokenKey(token, file.chip_id, public_key))
    counter = FileCounter(directory / "counter")
    return Fuses(file.chip_id, content.storage_root_key, secret, issuer, content.certificates, counter)
