"""The chip file, format 2: all that the vendor puts into a chip. Pure: bytes in, a chip out, and back.

For the vendor, who writes it once, and for the secure processor, which reads it at each start. Format: docs/formats/chip-file.md.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_private_key
from msgspec import Meta

from spvtpm.wire.certificate_building import Issuer
from spvtpm.wire.certificate_extensions import CHIP_ID_BYTES, FLEET_ID_BYTES
from spvtpm.wire.certificate_policies import TrustedRoots
from spvtpm.wire.certificates import Chain, parse_chain
from spvtpm.wire.checksummed import ChecksummedFile, WrongChecksum
from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import ChipFileError, SpvtpmError
from spvtpm.wire.generations import MAX_GENERATION, SECRET_BYTES
from spvtpm.wire.vtpm_endorsement import DerCertificate

FORMAT = 2
MAX_CHIP_FILE_BYTES = 16384

_MAX_KEY_BYTES = 512
_Secret32 = Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]


class Chip(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A manufactured chip, secrets and all.

    Attributes:
        chip_id: 16 bytes, public.
        fleet_id: 16 bytes, public.
        storage_root_key: 32 bytes; every NV record is sealed under a key derived from it.
        generation: of `sp_secret`, 1 to 1,024; public.
        sp_secret: 32 bytes, the fleet's secret in this generation (`generations.py`).
        endorsement_key: the chip EK's private key on P-384, PKCS#8 in DER.
        certificates: DER: the chip EK's, the vendor's intermediate, the vendor's root; public.
    """

    chip_id: Annotated[bytes, Meta(min_length=CHIP_ID_BYTES, max_length=CHIP_ID_BYTES)]
    fleet_id: Annotated[bytes, Meta(min_length=FLEET_ID_BYTES, max_length=FLEET_ID_BYTES)]
    storage_root_key: _Secret32
    generation: Annotated[int, Meta(ge=1, le=MAX_GENERATION)]
    sp_secret: _Secret32
    endorsement_key: Annotated[bytes, Meta(min_length=1, max_length=_MAX_KEY_BYTES)]
    certificates: tuple[DerCertificate, DerCertificate, DerCertificate]

    def __repr__(self) -> str:
        return f"Chip(chip_id={self.chip_id.hex()}, fleet_id={self.fleet_id.hex()}, generation={self.generation})"

    def chain(self) -> Chain:
        """The chip's certificates, parsed.

        Raises:
            CertificateError: they are not those of a chip.
        """
        return parse_chain(self.certificates)

    def issuer(self) -> Issuer:
        """The chip EK, ready to certify.

        Raises:
            ChipFileError: it is no key on P-384, or not the certificate's.
            CertificateError: the certificates are not those of a chip.
        """
        try:
            key = load_der_private_key(self.endorsement_key, password=None)
            if isinstance(key, ec.EllipticCurvePrivateKey):
                return Issuer(self.chain().chip_certificate, key)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            pass  # told below without the library's own words: they could quote the key
        raise ChipFileError("the chip file is damaged: its endorsement key is not that of its certificate")


_FILE = ChecksummedFile("chip", FORMAT, Chip)


def encode_chip_file(chip: Chip) -> bytes:
    """The file's content. What is written can be read: it is parsed first.

    Raises:
        ChipFileError: the chip's parts do not belong together.
    """
    content = _FILE.encode(chip)
    parse_chip_file(content)
    return content


def parse_chip_file(content: bytes) -> Chip:
    """Reads a chip file, and checks that its parts belong together: ids, key, and the chain up to its own root.

    Args:
        content: at most 16,384 bytes.

    Raises:
        ChipFileError: it is damaged, or no chip file of format 2.
    """
    if len(content) > MAX_CHIP_FILE_BYTES:
        raise ChipFileError(f"the chip file is longer than {MAX_CHIP_FILE_BYTES} bytes")
    try:
        chip = _FILE.decode(content)
    except WrongChecksum:
        raise ChipFileError("the chip file is damaged: its checksum is wrong") from None
    except UNDECODABLE:
        # The decoder's own message is left out: it could quote what it could not read.
        raise ChipFileError("the chip file is damaged, or no chip file of format 2") from None
    _check_parts(chip)
    return chip


def _check_parts(chip: Chip) -> None:
    try:
        chain = chip.chain()
        TrustedRoots([chain.root]).verify(chain)
        chip.issuer()
    except ChipFileError:
        raise
    except SpvtpmError as error:
        raise ChipFileError(f"the chip file is damaged: {error}") from None
    if (chain.chip.chip_id, chain.chip.fleet_id) != (chip.chip_id, chip.fleet_id):
        raise ChipFileError("the chip file is damaged: its certificate is of another chip or fleet")
