"""Certifies the EKs of new vTPMs with the chip EK; keeps the certificates, whatever the guest does with his copies."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from spvtpm.processor.fuses import Fuses
from spvtpm.processor.nv_store import NvStore
from spvtpm.processor.vtpm_records import endorsement_name
from spvtpm.processor.worker.messages import Endorse
from spvtpm.wire.ek_templates import EK_TEMPLATES
from spvtpm.wire.endorsement_certificates import TpmMake, build_ek_certificate
from spvtpm.wire.errors import CertificateError, IntegrityError, MessageError
from spvtpm.wire.vtpm_endorsement import VtpmEndorsement, parse_endorsement


def read_endorsement(store: NvStore, vtpm_id: uuid.UUID) -> VtpmEndorsement:
    """What is kept of a vTPM's EKs.

    Raises:
        IntegrityError: it is missing or altered.
    """
    name = endorsement_name(vtpm_id)
    try:
        return parse_endorsement(store.read(name))
    except MessageError:
        raise IntegrityError(f"record {name} is not what this secure processor writes") from None


@dataclass(frozen=True, slots=True)
class Birth:
    """What a new vTPM is born with.

    Attributes:
        vtpm_id: its id, which its certificates name.
        endorsement: its certificates.
    """

    vtpm_id: uuid.UUID
    endorsement: VtpmEndorsement


@dataclass(frozen=True, slots=True)
class Endorser:
    """The chip's word for vTPMs.

    Attributes:
        fuses: hold the chip EK.
    """

    fuses: Fuses

    def certify(self, request: Endorse) -> Birth:
        """Gives a new vTPM its id, and certifies each of its standard EKs.

        Args:
            request: of a worker that has just manufactured it, and that no guest has spoken to.

        Raises:
            CertificateError: these are not the public keys that were to be derived.
        """
        if len(request.publics) != len(EK_TEMPLATES):
            raise CertificateError(f"a vTPM has {len(EK_TEMPLATES)} standard EKs, not {len(request.publics)}")
        vtpm_id = uuid.uuid4()
        make = TpmMake(request.manufacturer, request.firmware, request.level, request.revision)
        certificates = tuple(
            build_ek_certificate(self.fuses.endorsement, template, public, vtpm_id, make).encode()
            for template, public in zip(EK_TEMPLATES, request.publics, strict=True)
        )
        return Birth(vtpm_id, VtpmEndorsement(certificates=certificates, issuer=self.fuses.certificates))
