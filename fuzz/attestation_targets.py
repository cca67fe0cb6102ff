"""Targets for what a VM shows as evidence: a TPM's answers, and firmware's event logs. Nothing altered is believed."""

from __future__ import annotations

from collections.abc import Sequence

from tests.attesting import log_event, log_head
from tests.wire.test_quotes import READERS, SELECTION, said

from fuzz.program import Program
from fuzz.target import Target
from spvtpm.wire import attesting_commands as tpm
from spvtpm.wire.attestation_keys import parse_ak
from spvtpm.wire.attesting_commands import ENDORSEMENT
from spvtpm.wire.errors import InterfaceError, MessageError
from spvtpm.wire.event_log import MAX_EVENTS, parse_event_log
from spvtpm.wire.platform_errors import EvidenceRefused
from spvtpm.wire.quotes import verify_quote


def _logs() -> Sequence[bytes]:
    banks = ("sha1", "sha256", "sm3_256")
    events = [log_event(0, 3, b"StartupLocality\0\3", banks), log_event(7, 4, bytes(4), banks)]
    return [log_head(banks) + b"".join(events), log_head() + log_event(9, 0xD, b"vmlinuz\0")]


def fuzz_event_log(data: bytes) -> None:
    """A log with damage, or none, is refused, or replays to PCRs of its events alone, and acts on nobody's screen."""
    program = Program(data)
    raw = program.below(4) == 3
    try:
        log = parse_event_log(program.rest() if raw else program.damage(program.choose(_logs())))
    except MessageError:
        return
    assert len(log.events) <= MAX_EVENTS, "bounded"
    extended = {event.pcr for event in log.events if event.is_extended}
    assert all(set(values) == extended for values in log.replay().values()), "what no event went into has no value"
    assert all(event.words.isprintable() for event in log.events), "fit for a screen"


def fuzz_quote(data: bytes) -> None:
    """A quote, its signature or its key with damage is refused; answers of a TPM are read, or are typed errors."""
    program = Program(data)
    good = (said("ak-public"), said("attested"), said("signature"))
    public, attested, signature = (program.damage(part) for part in good)
    try:
        verify_quote(attested, signature, parse_ak(public), ENDORSEMENT, said("nonce"), SELECTION)
    except (MessageError, EvidenceRefused):
        pass
    else:
        assert (public, attested) == good[:2], "what is believed is what was signed"
    body = program.rest()
    response = program.damage(bytes.fromhex("8001") + (10 + len(body)).to_bytes(4, "big") + bytes(4) + body)
    for read in READERS:
        try:
            read(tpm.pcr_read(SELECTION).answer(response))
        except (MessageError, InterfaceError):
            continue


ATTESTATION_TARGETS = (
    Target("event_log", "what firmware says that it has measured", fuzz_event_log, _logs),
    Target("quote", "a TPM's quote, its key, and other answers of a TPM", fuzz_quote),
)
