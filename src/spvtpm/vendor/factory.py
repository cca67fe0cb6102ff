"""Makes chips: the vendor's floor. What leaves it is one private file for each chip; what stays is the chip's certificate."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from spvtpm.files import PUBLIC, create_file, locked
from spvtpm.vendor.authority import Vendor, load_vendor, to_pem
from spvtpm.wire.certificate_building import Validity, build_chip_certificate
from spvtpm.wire.certificate_extensions import CHIP_ID_BYTES, ChipIdentity, Features
from spvtpm.wire.certificates import Chain
from spvtpm.wire.chip_file import Chip, encode_chip_file
from spvtpm.wire.errors import AlreadyExists, UsageError

CHIP_VALIDITY = timedelta(days=20 * 365)
SOFTWARE_CHIP = "spvtpm software chip"
"""The model of a chip that is a file: its certificate does not pretend to be hardware."""

ALL_FEATURES = Features.SECURE_VIRTUALISATION | Features.VTPM


def manufacture_chip(
    directory: Path,
    output: Path,
    *,
    model: str = SOFTWARE_CHIP,
    features: Features = ALL_FEATURES,
    now: datetime | None = None,
) -> Chain:
    """Makes a chip of the fleet's present generation, and gives its certificate chain.

    The certificate is put on file first, so that a chip that exists can be revoked. If the chip file then cannot be written,
    a certificate stays whose key nobody has.

    Args:
        directory: the vendor's.
        output: the chip file; must not exist.
        model: the hardware, 1 to 64 bytes of printable UTF-8.
        features: what it can do.
        now: the time, with a time zone.

    Raises:
        AlreadyExists: the chip file is there.
        UsageError: the model or the features cannot be in a certificate.
        StorageError: a file of the vendor's cannot be read, or the chip file cannot be written.
    """
    if output.exists() or output.is_symlink():
        raise AlreadyExists(f"{output} exists already")
    with locked(directory):
        vendor = load_vendor(directory)
        chip = make_chip(vendor, model, features, now or datetime.now(UTC))
        chain = chip.chain()
        paper = directory / "chips" / f"{chip.chip_id.hex()}.pem"
        create_file(paper, to_pem(chain.chip_certificate), PUBLIC)
        create_file(output, encode_chip_file(chip))
    return chain


def make_chip(vendor: Vendor, model: str, features: Features, now: datetime) -> Chip:
    """A new chip's secrets and certificates, not written anywhere yet.

    Raises:
        UsageError: the model or the features cannot be in a certificate.
    """
    chip_id, key = os.urandom(CHIP_ID_BYTES), ec.generate_private_key(ec.SECP384R1())
    end = min(now + CHIP_VALIDITY, vendor.intermediate.certificate.not_valid_after_utc)
    try:
        identity = ChipIdentity(chip_id, vendor.fleet.fleet_id, features, model)
        certificate = build_chip_certificate(
            vendor.intermediate, key.public_key(), identity, Validity.lasting(now, end - now)
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    chain = (certificate, vendor.intermediate.certificate, vendor.root)
    return Chip(
        chip_id=chip_id,
        fleet_id=vendor.fleet.fleet_id,
        storage_root_key=os.urandom(32),
        generation=vendor.fleet.generation,
        sp_secret=vendor.fleet.sp_secret(),
        endorsement_key=key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        certificates=(
            chain[0].public_bytes(Encoding.DER),
            chain[1].public_bytes(Encoding.DER),
            chain[2].public_bytes(Encoding.DER),
        ),
    )
