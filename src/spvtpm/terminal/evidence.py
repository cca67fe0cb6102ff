"""What a VM's vTPM has to show its owner: one conversation with a TPM, whoever carries it. Every answer is hostile. No I/O.

    terminal                                   the VM's vTPM, or whoever pretends to be it
    EK by its template               ->        must be exactly the one that the chip has certified
    a new AK                         ->        must be one that never leaves its TPM, and signs only what the TPM attests
    a credential for EK and AK       ->        the secret in it: both are in the same TPM
    the PCRs, a quote with a nonce   ->        values, and the AK's word for them

Source: TCG TPM 2.0 Library Part 1, section 24 "Credential Protection"; TCG EK Credential Profile 2.5, section 2.1.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from spvtpm.wire import attesting_commands as tpm
from spvtpm.wire.attestation_keys import AttestationKey, ak_template, parse_ak
from spvtpm.wire.attesting_commands import Command
from spvtpm.wire.credentials import SECRET_BYTES, make_credential
from spvtpm.wire.endorsement_certificates import EkCertificate, verify_public
from spvtpm.wire.errors import InterfaceError, SpvtpmError, UntrustedIssuer
from spvtpm.wire.platform_errors import EvidenceRefused
from spvtpm.wire.quotes import Quote, verify_quote
from spvtpm.wire.tpm_structures import PcrSelection, PcrValues, Reader

NONCE_BYTES: Final = 32

_ATTEMPTS: Final = 4
"""PCRs that were read may change before they are quoted."""

Random = Callable[[int], bytes]
Steps = Generator[Command, bytes, "Evidence"]
"""Gives commands, takes their responses."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a vTPM has shown, verified: its own AK has signed these PCRs for this nonce.

    Attributes:
        ak: the key, bound to the EK.
        nonce: of this question alone.
        attested: TPMS_ATTEST, as signed.
        signature: TPMT_SIGNATURE.
        quote: what was signed.
        pcrs: the values that were quoted.
    """

    ak: AttestationKey
    nonce: bytes
    attested: bytes
    signature: bytes
    quote: Quote
    pcrs: PcrValues


def gather(ek: EkCertificate, selection: PcrSelection, random: Random = os.urandom) -> Steps:
    """The conversation; what it leaves in the TPM is removed.

    Args:
        ek: the certificate of the vTPM's P-256 EK, verified.
        selection: which PCRs.
        random: gives that many random bytes.

    Raises:
        EvidenceRefused: it is not shown what has to be shown; the sentence says what.
        SpvtpmError: something is malformed, or the TPM refuses a command.
    """
    handles: list[int] = []
    try:
        evidence = yield from _gather(ek, selection, random, handles)
    except SpvtpmError:
        yield from _flush(handles)
        raise
    yield from _flush(handles)
    return evidence


def converse(steps: Steps, transmit: Callable[[bytes], bytes]) -> Evidence:
    """Has the conversation with a TPM that is at hand."""
    response: bytes | None = None
    while True:
        try:
            command = next(steps) if response is None else steps.send(response)
        except StopIteration as end:
            evidence: Evidence = end.value
            return evidence
        response = transmit(command.data)


def _gather(
    certified: EkCertificate, selection: PcrSelection, random: Random, handles: list[int]
) -> Generator[Command, bytes, Evidence]:
    ek, shown = tpm.created((yield from _ask(tpm.create_primary(certified.template.public))))
    handles.append(ek)
    try:
        verify_public(certified, shown)
    except UntrustedIssuer:
        raise EvidenceRefused("the VM's TPM is not the vTPM that the chip certified: it has another EK") from None
    handle, public = tpm.created((yield from _ask(tpm.create_primary(ak_template(random(32))))))
    handles.append(handle)
    ak = parse_ak(public)
    yield from _bind(certified, ak, ek, handle, random, handles)
    for _ in range(_ATTEMPTS):
        pcrs = yield from _read_pcrs(selection)
        nonce = random(NONCE_BYTES)
        answer = yield from _ask(tpm.quote(handle, nonce, selection))
        attested, signature = tpm.quoted(answer)
        quote = verify_quote(attested, signature, ak, tpm.ENDORSEMENT, nonce, selection)
        if quote.verify_values(pcrs):
            return Evidence(ak, nonce, attested, signature, quote, pcrs)
    raise EvidenceRefused("the VM shows other PCR values than its vTPM has quoted")


def _bind(
    certified: EkCertificate, ak: AttestationKey, ek_handle: int, ak_handle: int, random: Random, handles: list[int]
) -> Generator[Command, bytes, None]:
    """Has a credential opened that takes both keys."""
    key = certified.certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101  # the P-256 EK's
    secret = random(SECRET_BYTES)
    session = tpm.started((yield from _ask(tpm.start_policy_session(random(32)))))
    handles.append(session)
    yield from _ask(tpm.policy_secret(session))
    credential = make_credential(key, ak.name, secret)
    try:
        answer = yield from _ask(tpm.activate_credential(ak_handle, ek_handle, session, credential))
    except InterfaceError as error:
        raise EvidenceRefused(f"the attestation key is not in the vTPM that the chip certified ({error})") from None
    handles.remove(session)
    if not hmac.compare_digest(tpm.activated(answer), secret):
        raise EvidenceRefused(
            "the attestation key is not in the vTPM that the chip certified: its secret was not found"
        )


def _read_pcrs(selection: PcrSelection) -> Generator[Command, bytes, PcrValues]:
    values: PcrValues = {bank: {} for bank, _ in selection.banks}
    while True:
        left = [
            (bank, tuple(index for index in indices if index not in values[bank])) for bank, indices in selection.banks
        ]
        left = [(bank, indices) for bank, indices in left if indices]
        if not left:
            return values
        read = tpm.values_read((yield from _ask(tpm.pcr_read(PcrSelection(tuple(left))))))
        wanted = {(bank, index) for bank, indices in left for index in indices}
        found = {(bank, index) for bank, of_bank in read.items() for index in of_bank}
        if not found or not found <= wanted:
            raise EvidenceRefused(f"the VM's TPM does not give its PCRs of {', '.join(bank for bank, _ in left)}")
        for bank, of_bank in read.items():
            values[bank].update(of_bank)


def _ask(command: Command) -> Generator[Command, bytes, Reader]:
    response = yield command
    return command.answer(response)


def _flush(handles: list[int]) -> Generator[Command, bytes, None]:
    for handle in reversed(handles):
        yield tpm.flush_context(handle)  # whatever it answers: there is nothing more to do
