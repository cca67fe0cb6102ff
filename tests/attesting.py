"""What attests in tests: a vTPM of a real secure processor at hand, without a VM; event logs as a firmware writes them."""

from __future__ import annotations

import hashlib
import struct
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from spvtpm.terminal.appraisal import parse_selection
from spvtpm.terminal.evidence import Evidence, converse, gather
from spvtpm.wire import messages
from spvtpm.wire.ek_templates import ECC_P256, EK_TEMPLATES
from spvtpm.wire.endorsement_certificates import EkCertificate, parse_ek_certificate
from spvtpm.wire.tpm_stream import Transmit, ensure_started
from tests.harness import RunningSp

ALGORITHMS = {"sha1": 0x0004, "sha256": 0x000B, "sha384": 0x000C, "sm3_256": 0x0012}
_UNKNOWN_BYTES = 32

FEW = parse_selection("sha256:0,7,16")
MANY = parse_selection("sha256:0,1,2,3,4,5,6,7,8,9,10,23+sha1:0,16")


@dataclass(frozen=True, slots=True)
class Attester:
    """A vTPM.

    Attributes:
        vm_id: of its VM.
        transmit: one command to it.
        ek: the certificate of its P-256 EK.
    """

    vm_id: uuid.UUID
    transmit: Transmit
    ek: EkCertificate

    def show(self, through: Transmit | None = None) -> Evidence:
        """Attests, perhaps through somebody in between."""
        return converse(gather(self.ek, FEW), through or self.transmit)


@contextmanager
def attester(sp: RunningSp) -> Iterator[Attester]:
    """A new VM's vTPM, started."""
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        ensure_started(driver.transmit)
        yield Attester(vm_id, driver.transmit, ek_of(sp, vm_id))
    sp.destroy(vm_id)


def ek_of(sp: RunningSp, vm_id: uuid.UUID) -> EkCertificate:
    """The certificate of the P-256 EK of a VM's vTPM."""
    endorsement = sp.call(messages.GetEndorsement(vm_id=vm_id))
    assert isinstance(endorsement, messages.Endorsement)
    return parse_ek_certificate(endorsement.certificates[EK_TEMPLATES.index(ECC_P256)])


def log_head(banks: Sequence[str] = ("sha256",)) -> bytes:
    """The first event of a crypto-agile log."""
    sizes = b"".join(struct.pack("<HH", ALGORITHMS[bank], _bytes(bank)) for bank in banks)
    content = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(banks)) + sizes + b"\0"
    return struct.pack("<II20xI", 0, 3, len(content)) + content


def log_event(
    pcr: int, kind: int, data: bytes, banks: Sequence[str] = ("sha256",), measured: bytes | None = None
) -> bytes:
    """Another event.

    Args:
        pcr: into which PCR.
        kind: number of its type.
        data: what the log says.
        banks: as in the head.
        measured: what was hashed; None: the data.
    """
    hashed = data if measured is None else measured
    digests = b"".join(struct.pack("<H", ALGORITHMS[bank]) + _digest(bank, hashed) for bank in banks)
    return struct.pack("<III", pcr, kind, len(banks)) + digests + struct.pack("<I", len(data)) + data


def _bytes(bank: str) -> int:
    return hashlib.new(bank).digest_size if bank in hashlib.algorithms_guaranteed else _UNKNOWN_BYTES


def _digest(bank: str, data: bytes) -> bytes:
    return hashlib.new(bank, data).digest() if bank in hashlib.algorithms_guaranteed else bytes(_UNKNOWN_BYTES)
