"""A20: a platform shows a forged EK certificate, or a genuine one beside another vTPM's EK. Judged by OpenSSL and tpm2-tools too.

Whoever attests a VM makes a credential for the certified key: only the TPM that has that key can open it.
"""

from __future__ import annotations

import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from spvtpm.wire import messages
from spvtpm.wire.ek_templates import ECC_P256
from spvtpm.wire.endorsement_certificates import (
    EkCertificate,
    parse_ek_certificate,
    verify_endorsement,
    verify_public,
)
from spvtpm.wire.errors import UntrustedIssuer
from spvtpm.wire.vtpm_endorsement import VtpmEndorsement
from tests.clients.served import served
from tests.clients.tools import Tools
from tests.endorsements import todays_policy
from tests.harness import RunningSp
from tests.papers import forged, new_papers, todays_papers

pytestmark = pytest.mark.attack("A20")

CREDENTIAL = b"only the right TPM reads this.."


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path:
        yield Path(path)


@contextmanager
def vm(sp: RunningSp, directory: Path) -> Iterator[tuple[Tools, messages.Endorsement]]:
    """A VM's tools, and what the SP says of its vTPM."""
    directory.mkdir()
    with served(sp, directory) as (tcti, vtpm):
        yield Tools(tcti, directory), endorsement_of(sp, vtpm.vm_id)


def endorsement_of(sp: RunningSp, vm_id: uuid.UUID) -> messages.Endorsement:
    reply = sp.call(messages.GetEndorsement(vm_id=vm_id))
    assert isinstance(reply, messages.Endorsement)
    return reply


def p256_certificate(endorsement: VtpmEndorsement) -> EkCertificate:
    certificates = map(parse_ek_certificate, endorsement.certificates)
    return next(ek for ek in certificates if ek.template is ECC_P256)


def openssl_accepts(certificate: bytes, issuer: tuple[bytes, bytes, bytes], directory: Path) -> bool:
    """With the vendor's root that the reader trusts, and the chain that he is shown."""

    def pem(name: str, *ders: bytes) -> Path:
        texts = [
            subprocess.run(["openssl", "x509", "-inform", "der"], input=der, capture_output=True, check=True).stdout
            for der in ders
        ]
        (directory / name).write_bytes(b"".join(texts))
        return directory / name

    root = pem("root", todays_papers().root.certificate.public_bytes(Encoding.DER))
    command: list[str | Path] = [
        "openssl",
        "verify",
        "-CAfile",
        root,
        "-untrusted",
        pem("chain", *issuer[:2]),
        pem("leaf", certificate),
    ]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def credential_opens(tools: Tools, certificate: EkCertificate) -> bool:
    """A credential for the key in the certificate, and an attestation key of this TPM; whether this TPM opens it."""
    key = certificate.certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    tools.run("tpm2_createek", "-Q", "-c", "ek.ctx", "-G", "ecc", "-u", "ek.pub")
    name = tools.attestation_key_under("ek.ctx")
    tools.run(
        *("tpm2_makecredential", "-Q", "-T", "none", "-G", "ecc", "-u", tools.write("certified.pem", key)),
        *("-s", tools.write("secret", CREDENTIAL), "-n", name, "-o", "credential"),
    )
    tools.run("tpm2_startauthsession", "--policy-session", "-S", "session.ctx")
    tools.run("tpm2_policysecret", "-Q", "-S", "session.ctx", "-c", "e")
    opened = tools.attempt(
        *("tpm2_activatecredential", "-Q", "-c", "ak.ctx", "-C", "ek.ctx", "-i", "credential", "-o", "opened"),
        *("-P", "session:session.ctx"),
    )
    tools.flush("-t", "-l", "-s")
    return opened.returncode == 0 and tools.read("opened") == CREDENTIAL


@pytest.mark.claim("C7")
def test_a_vtpms_own_certificate_opens_its_credential_and_no_other_vtpms(sp: RunningSp, directory: Path) -> None:
    with vm(sp, directory / "a") as (tools_a, ours), vm(sp, directory / "b") as (tools_b, theirs):
        for endorsement in (ours, theirs):
            assert openssl_accepts(p256_certificate(endorsement).encode(), endorsement.issuer, directory)
        assert credential_opens(tools_a, p256_certificate(ours))
        assert credential_opens(tools_b, p256_certificate(theirs))
        # The platform shows the certificate of B, genuine as it is, for A:
        assert not credential_opens(tools_a, p256_certificate(theirs))
        with pytest.raises(UntrustedIssuer, match=str(theirs.vtpm_id)):
            verify_endorsement(theirs, ours.vtpm_id, todays_policy())
        public = p256_certificate(ours).public
        verify_public(p256_certificate(ours), public)
        with pytest.raises(UntrustedIssuer):
            verify_public(p256_certificate(theirs), public)


def test_a_certificate_for_the_attackers_own_key_is_refused_unless_the_chip_signed_it(
    sp: RunningSp, directory: Path
) -> None:
    with vm(sp, directory / "a") as (_tools, endorsement):
        genuine = p256_certificate(endorsement).encode()
    mine = ec.generate_private_key(ec.SECP256R1()).public_key()
    foreign = new_papers("Other Silicon")
    chips_own_name = forged(genuine, ec.generate_private_key(ec.SECP384R1()), key=mine)
    other_vendor = forged(genuine, foreign.chip.key, key=mine, issuer=foreign.chip.certificate.subject)
    for certificate, issuer in (
        (chips_own_name, endorsement.issuer),
        (other_vendor, endorsement.issuer),
        (other_vendor, foreign.made.certificates),
    ):
        assert not openssl_accepts(certificate, issuer, directory)
        with pytest.raises(UntrustedIssuer):
            verify_endorsement(
                VtpmEndorsement(certificates=(certificate,), issuer=issuer), endorsement.vtpm_id, todays_policy()
            )
