"""A real vTPM's evidence, as its owner's terminal asks for it, and as tpm2-tools see it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from spvtpm.terminal.evidence import converse, gather
from spvtpm.wire.errors import InterfaceError, MessageError
from spvtpm.wire.platform_errors import EvidenceRefused
from spvtpm.wire.quotes import parse_quote
from spvtpm.wire.tpm_structures import sized
from tests import tpm_commands as tpm
from tests.attesting import MANY, Attester, attester
from tests.clients.tools import Tools
from tests.harness import RunningSp

pytestmark = pytest.mark.claim("C7")

MOST_HANDLES = 3
"""Slots for keys of the engine."""

PCR_READ = 0x17E
NO_VALUES = bytes.fromhex("80010000001600000000000000000000000000000000")
"""As a TPM answers that has no such bank."""

FAILURE = bytes.fromhex("80010000000a00000101")


def code_of(command: bytes) -> int:
    return int.from_bytes(command[6:10], "big")


@pytest.fixture(scope="module")
def vtpm() -> Iterator[Attester]:
    with (
        tempfile.TemporaryDirectory(prefix="spvtpm-") as path,
        RunningSp(Path(path) / "sp") as sp,
        attester(sp) as vtpm,
    ):
        vtpm.transmit(tpm.pcr_extend(16, b"\xab" * 32))
        yield vtpm


def test_a_vtpm_shows_its_pcrs_by_a_key_beside_its_ek(vtpm: Attester) -> None:
    evidence = converse(gather(vtpm.ek, MANY), vtpm.transmit)
    extended = hashlib.sha256(bytes(32) + b"\xab" * 32).digest()
    assert evidence.pcrs["sha1"] == {0: bytes(20), 16: bytes(20)}
    assert set(evidence.pcrs["sha256"]) == {*range(11), 23}
    assert vtpm.show().pcrs == {"sha256": {0: bytes(32), 7: bytes(32), 16: extended}}


def test_each_question_has_another_key_and_nonce_and_leaves_nothing_in_the_tpm(vtpm: Attester) -> None:
    shown = [vtpm.show() for _ in range(MOST_HANDLES + 1)]
    assert len({evidence.nonce for evidence in shown}) == len({evidence.ak.public for evidence in shown}) == len(shown)
    clocks = [evidence.quote.clock_ms for evidence in shown]
    assert clocks == sorted(clocks)
    assert len({(evidence.quote.reset_count, evidence.quote.restart_count) for evidence in shown}) == 1


def test_a_tpm_without_the_bank_shows_nothing_and_keeps_no_key(vtpm: Attester) -> None:
    def without(command: bytes) -> bytes:
        return NO_VALUES if code_of(command) == PCR_READ else vtpm.transmit(command)

    for _ in range(MOST_HANDLES + 1):
        with pytest.raises(EvidenceRefused, match="sha256"):
            vtpm.show(without)


def test_tpm2_checkquote_agrees(vtpm: Attester, tmp_path: Path) -> None:
    evidence, tools = vtpm.show(), Tools("none", tmp_path)
    tools.write("ak.pub", sized(evidence.ak.public))
    tools.write("quote", evidence.attested)
    tools.write("signature", evidence.signature)
    words = ("-u", "ak.pub", "-m", "quote", "-s", "signature", "-g", "sha256")
    tools.run("tpm2_checkquote", *words, "-q", evidence.nonce.hex())
    tools.refused("tpm2_checkquote", *words, "-q", bytes(32).hex())
    printed = tools.run("tpm2_print", "-t", "TPMS_ATTEST", "quote").decode()
    assert evidence.quote.digest.hex() in printed
    assert f"resetCount: {evidence.quote.reset_count}" in printed
    assert evidence.quote.signer.hex() in printed


@pytest.mark.attack("A25")
def test_any_flipped_bit_of_a_quote_is_refused_and_a_cut_one_is_malformed(vtpm: Attester) -> None:
    evidence = vtpm.show()
    for size in range(len(evidence.attested)):
        with pytest.raises((MessageError, EvidenceRefused)):
            parse_quote(evidence.attested[:size])
    for bit in range(8 * len(evidence.attested)):
        flipped = bytearray(evidence.attested)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(EvidenceRefused):
            evidence.ak.verify(evidence.signature, bytes(flipped))
    with pytest.raises(MessageError):
        evidence.ak.verify(evidence.signature + b"\0", evidence.attested)


def test_a_tpm_that_refuses_is_named_with_the_command(vtpm: Attester) -> None:
    with pytest.raises(InterfaceError, match="TPM2_CreatePrimary: 0x101"):
        vtpm.show(lambda _command: FAILURE)
    with pytest.raises(MessageError):
        vtpm.show(lambda _command: b"no TPM")
