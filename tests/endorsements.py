"""EK public areas and certificates in memory, and what a reader asks of them."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spvtpm.wire.certificate_policies import AllOf, Purpose, genuine
from spvtpm.wire.ek_templates import ECC_P256, ECC_P384, EK_TEMPLATES, EkTemplate
from spvtpm.wire.endorsement_certificates import EkCertificate, TpmMake, build_ek_certificate
from spvtpm.wire.vtpm_endorsement import VtpmEndorsement
from tests.papers import Papers, todays_papers

MAKE = TpmMake(manufacturer=0x49424D00, firmware=0x20191023, level=0, revision=164)
VTPM = uuid.UUID("6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11")
OTHER_VTPM = uuid.UUID("0c2f8f3a-91b7-4d6b-8a45-0f2b7b1c9d10")
_CURVES: dict[EkTemplate, ec.EllipticCurve] = {ECC_P256: ec.SECP256R1(), ECC_P384: ec.SECP384R1()}


def new_public(template: EkTemplate) -> bytes:
    """The public area of a new key of this template."""
    curve = _CURVES.get(template)
    if curve is None:
        return template.encode_public(
            rsa.generate_private_key(65537, 2048).public_key().public_numbers().n.to_bytes(256, "big")
        )
    numbers = ec.generate_private_key(curve).public_key().public_numbers()
    return template.encode_public(*(number.to_bytes(template.parts[0], "big") for number in (numbers.x, numbers.y)))


def new_certificate(papers: Papers, template: EkTemplate = ECC_P256, vtpm_id: uuid.UUID = VTPM) -> EkCertificate:
    """For a new key, by the chip of these papers."""
    return build_ek_certificate(papers.chip, template, new_public(template), vtpm_id, MAKE)


def new_endorsement(papers: Papers, vtpm_id: uuid.UUID = VTPM) -> VtpmEndorsement:
    """Of new keys, as a secure processor keeps it."""
    certificates = tuple(new_certificate(papers, template, vtpm_id).encode() for template in EK_TEMPLATES)
    return VtpmEndorsement(certificates=certificates, issuer=papers.made.certificates)


def todays_policy() -> AllOf:
    """What somebody who trusts the test's vendor asks of a chip now."""
    papers, now = todays_papers(), datetime.now(UTC)
    return genuine(Purpose.CHIP, [papers.root.certificate], papers.revocation_list(at=now.replace(microsecond=0)), now)
