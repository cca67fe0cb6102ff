"""A running VM's vTPM is attested: its chip, its EK's certificate, its quote, its firmware's log.

In the words of RFC 9334: the vTPM in the VM is the attester, and what it quotes the evidence. The chip that has made it and the
chip's vendor are the endorsers, the EK's certificate and the chip's chain their endorsements. The terminal is verifier and
relying party at once. The endorsements come through the confidential channel from a chip that was verified; the evidence comes
through the VM's console, from whatever runs in the VM: all that this can do is fail.
"""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from spvtpm.terminal.appraisal import Appraisal, Expected, appraise
from spvtpm.terminal.attestation import Verified
from spvtpm.terminal.evidence import Evidence, Steps, gather
from spvtpm.terminal.following import find, said_chip
from spvtpm.terminal.machines import Site
from spvtpm.terminal.owned import OwnedVm
from spvtpm.terminal.remote_command import run_in_vm
from spvtpm.wire.decoding import printable
from spvtpm.wire.ek_templates import ECC_P256
from spvtpm.wire.endorsement_certificates import EkCertificate, parse_ek_certificate
from spvtpm.wire.errors import ChipNotAllowed, MessageError, WrongState
from spvtpm.wire.event_log import MAX_LOG_BYTES, EventLog, parse_event_log
from spvtpm.wire.platform_errors import EvidenceRefused
from spvtpm.wire.tpm_stream import CommandDecoder
from spvtpm.wire.tpm_structures import PcrSelection

TPM_COMMANDS: Final = ("stdbuf", "-o0", "tpm2_send")
"""What is run in the VM: takes TPM commands one after the other over one connection, and gives each response at once.

Source: tpm2-tools, man 1 tpm2_send; GNU coreutils, stdbuf.
"""

EVENT_LOG: Final = "/sys/kernel/security/tpm0/binary_bios_measurements"
"""Source: Linux, Documentation/security/tpm/tpm_event_log.rst."""

_MAX_COMPLAINT_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class Endorsed:
    """What chips say of a vTPM, verified.

    Attributes:
        vtpm_id: the attester.
        direct_path_only: whether the vTPM takes commands from nobody but the VM. If not, the host can measure what it likes.
        here: the chip where it runs.
        endorser: the chip that has made it, and certified its EK.
        ek: that certificate.
    """

    vtpm_id: uuid.UUID
    direct_path_only: bool
    here: Verified
    endorser: Verified
    ek: EkCertificate


@dataclass(frozen=True, slots=True)
class Attested:
    """What came of it.

    Attributes:
        owned: the VM.
        endorsed: what chips say of its vTPM.
        evidence: what the vTPM has shown.
        log: the firmware's, if it was asked for.
        appraisal: what to think of it.
    """

    owned: OwnedVm
    endorsed: Endorsed
    evidence: Evidence
    log: EventLog | None
    appraisal: Appraisal


def attest(
    site: Site,
    name: str,
    selection: PcrSelection,
    expected: Expected | None = None,
    log_path: str | None = None,
    *,
    tell_waiting: Callable[[], None] = lambda: None,
) -> Attested:
    """Attests a VM that runs.

    Args:
        site: of the owner.
        name: of the VM in the keyring.
        selection: which PCRs are quoted.
        expected: what they should be; None: whatever they are.
        log_path: where the VM has its firmware's event log; None: it is not read.
        tell_waiting: is told, once, that the VM is on its way to another host and is waited for.

    Raises:
        EvidenceRefused: the vTPM does not show what it has to.
        CertificateRefused: a chip, or the EK's certificate, is not what it should be.
        WrongState: the VM does not run.
        SpvtpmError: something is malformed, away, or refuses.
    """
    owned = site.keyring.owned(name)
    endorsed = _endorse(site, owned)
    evidence = _Talk(gather(endorsed.ek, selection)).hold(site, owned, tell_waiting)
    log = None if log_path is None else parse_event_log(_read(site, owned, log_path, tell_waiting))
    return Attested(owned, endorsed, evidence, log, appraise(evidence.pcrs, expected, log))


def _endorse(site: Site, owned: OwnedVm) -> Endorsed:
    """Asks the chip where the VM runs."""
    seen: list[Verified] = []
    tell_verified = site.tell_verified

    def tell(verified: Verified) -> None:
        seen.append(verified)
        tell_verified(verified)

    site = dataclasses.replace(site, tell_verified=tell)
    chip_id, vm = find(site, owned, said_chip(site, owned), owned)
    if chip_id is None or vm is None or vm.state != "running":
        raise WrongState(f"{owned.name} does not run, as far as its secure processor says")
    endorsement, endorser = site.desk(chip_id, owned).endorsement(owned.vm_id)
    here = seen[-1]
    if endorser.fleet_id != here.fleet_id:
        raise ChipNotAllowed(f"the vTPM of {owned.name} is said to be made by a chip of another fleet than it runs in")
    certificates = map(parse_ek_certificate, endorsement.certificates)
    ek = next((certificate for certificate in certificates if certificate.template is ECC_P256), None)
    if ek is None:
        raise EvidenceRefused(f"the chip has certified no {ECC_P256.name} of the vTPM")
    return Endorsed(endorsement.vtpm_id, vm.policy.direct_path_only, here, endorser, ek)


class _Enough(Exception):
    """All was heard."""


class _Talk:
    """A conversation with the TPM in a VM, over one command in the VM.

    Args:
        steps: what is said.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._responses = CommandDecoder()
        self._complaint = b""
        self._evidence: Evidence | None = None
        self._writing = -1

    def hold(self, site: Site, owned: OwnedVm, tell_waiting: Callable[[], None]) -> Evidence:
        """Begins, and waits for the end."""
        reading, self._writing = os.pipe()
        try:
            self._say(next(self._steps).data)
            code = run_in_vm(site, owned, TPM_COMMANDS, self._take, reading, tell_waiting=tell_waiting)
        except _Enough:
            assert self._evidence is not None  # noqa: S101
            return self._evidence
        finally:
            os.close(self._writing)
            os.close(reading)
        raise EvidenceRefused(f"the VM shows nothing: {_failure(TPM_COMMANDS, code, self._complaint)}")

    def _take(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        if stream == "stderr":
            self._complaint = (self._complaint + data)[:_MAX_COMPLAINT_BYTES]
            return
        for response in self._responses.feed(data):
            try:
                command = self._steps.send(response)
            except StopIteration as end:
                self._evidence = end.value
                raise _Enough from None
            self._say(command.data)

    def _say(self, command: bytes) -> None:
        os.write(self._writing, command)  # the pipe is empty, and has room for any command


def _read(site: Site, owned: OwnedVm, path: str, tell_waiting: Callable[[], None]) -> bytes:
    """A file in the VM, whose size it does not tell."""
    written = {"stdout": b"", "stderr": b""}

    def take(stream: Literal["stdout", "stderr"], data: bytes) -> None:
        written[stream] += data
        if len(written[stream]) > MAX_LOG_BYTES:
            raise MessageError(f"an event log of more than {MAX_LOG_BYTES} bytes")

    command = ("cat", "--", path)
    code = run_in_vm(site, owned, command, take, tell_waiting=tell_waiting)
    if code:
        raise EvidenceRefused(f"the VM shows no event log: {_failure(command, code, written['stderr'])}")
    return written["stdout"]


def _failure(command: Sequence[str], code: int, complaint: bytes) -> str:
    words = printable(complaint[:_MAX_COMPLAINT_BYTES].decode("utf-8", "replace").strip().partition("\n")[0])
    return f"`{' '.join(command)}` ended with {code}" + (f": {words}" if words else "")
