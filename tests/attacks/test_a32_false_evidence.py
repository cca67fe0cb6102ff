"""A32: whatever answers in a VM's place shows another vTPM's evidence, an old one, a key of its own, or other PCR values.

Between the terminal and the vTPM stands a liar with a genuine vTPM of the same chip of its own, and with this one, but its PCRs
are what they are.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from spvtpm.wire.attestation_keys import ak_template, parse_ak
from spvtpm.wire.attesting_commands import ENDORSEMENT
from spvtpm.wire.errors import MessageError
from spvtpm.wire.platform_errors import EvidenceRefused
from spvtpm.wire.quotes import verify_quote
from spvtpm.wire.tpm_structures import sized
from tests import tpm_commands as tpm
from tests.attesting import FEW, Attester, attester
from tests.harness import RunningSp

pytestmark = pytest.mark.attack("A32")

CREATE_PRIMARY, ACTIVATE, QUOTE, PCR_READ = 0x131, 0x147, 0x158, 0x17E
BAD, GOOD = b"\xbb" * 32, b"\xaa" * 32


@pytest.fixture(scope="module")
def vtpms() -> Iterator[tuple[Attester, Attester]]:
    """The VM's own, with something bad in PCR 16; and the liar's, with something good."""
    with (
        tempfile.TemporaryDirectory(prefix="spvtpm-") as path,
        RunningSp(Path(path) / "sp") as sp,
        attester(sp) as own,
        attester(sp) as liars,
    ):
        own.transmit(tpm.pcr_extend(16, BAD))
        liars.transmit(tpm.pcr_extend(16, GOOD))
        yield own, liars


def code_of(command: bytes) -> int:
    return int.from_bytes(command[6:10], "big")


def extended(digest: bytes) -> bytes:
    return hashlib.sha256(bytes(32) + digest).digest()


class SoftwareKey:
    """A key of the liar's own that looks as an attestation key has to."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        numbers = self._key.public_key().public_numbers()
        fixed = ak_template(bytes(32))[:-68]
        self.ak = parse_ak(fixed + sized(numbers.x.to_bytes(32, "big")) + sized(numbers.y.to_bytes(32, "big")))

    def quote(self, nonce: bytes) -> tuple[bytes, bytes]:
        """What it likes, in the form of a TPM's quote."""
        digest = hashlib.sha256(bytes(64) + extended(GOOD)).digest()
        clock = struct.pack(">QIIBQ", 1, 1, 0, 1, 1)
        attested = bytes.fromhex("ff5443478018") + sized(self.ak.qualified_name(ENDORSEMENT)) + sized(nonce)
        attested += clock + FEW.encode() + sized(digest)
        r, s = decode_dss_signature(self._key.sign(attested, ec.ECDSA(SHA256())))
        return attested, struct.pack(">HH", 0x18, 0xB) + sized(r.to_bytes(32, "big")) + sized(s.to_bytes(32, "big"))


def response(body: bytes) -> bytes:
    """Of a command that was authorized by a password."""
    body += bytes.fromhex("0000010000")
    return struct.pack(">HII", 0x8002, 10 + len(body), 0) + body


def test_a_quote_of_another_vtpm_of_the_same_chip_is_refused(vtpms: tuple[Attester, Attester]) -> None:
    own, liars = vtpms
    assert liars.show().pcrs["sha256"][16] == extended(GOOD)  # for itself, it is a genuine one
    with pytest.raises(EvidenceRefused, match="another EK"):
        own.show(liars.transmit)


def test_an_attestation_key_of_another_vtpm_is_refused(vtpms: tuple[Attester, Attester]) -> None:
    """The EK and the credential go to the right vTPM, the AK and the quote to the liar's."""
    own, liars = vtpms
    made = 0

    def split(command: bytes) -> bytes:
        nonlocal made
        made += code_of(command) == CREATE_PRIMARY
        if (code_of(command) == CREATE_PRIMARY and made == 2) or code_of(command) in (QUOTE, PCR_READ):
            return liars.transmit(command)
        return own.transmit(command)

    with pytest.raises(EvidenceRefused, match="not in the vTPM"):
        own.show(split)
    liars.transmit(tpm.flush_context(0x80000000))


def test_a_key_that_is_in_no_tpm_is_refused(vtpms: tuple[Attester, Attester]) -> None:
    own, _liars = vtpms
    forger = SoftwareKey()
    nonce = bytes(32)
    attested, signature = forger.quote(nonce)
    verify_quote(attested, signature, forger.ak, ENDORSEMENT, nonce, FEW)  # looked at alone, it is as good as any

    def forge(command: bytes) -> bytes:
        if code_of(command) == CREATE_PRIMARY and ak_template(bytes(32))[:-68] in command:
            handle = own.transmit(command)[10:14]
            return response(handle + bytes(4) + sized(forger.ak.public))
        return own.transmit(command)

    with pytest.raises(EvidenceRefused, match="not in the vTPM"):
        own.show(forge)


def test_a_key_of_another_kind_is_refused(vtpms: tuple[Attester, Attester]) -> None:
    """One that would sign what the liar likes: not restricted."""
    own, _liars = vtpms
    restricted, free = bytes.fromhex("00050472"), bytes.fromhex("00040472")

    def unrestrict(command: bytes) -> bytes:
        return own.transmit(command.replace(restricted, free))

    with pytest.raises(EvidenceRefused, match="another kind"):
        own.show(unrestrict)


def test_a_guessed_secret_binds_no_key(vtpms: tuple[Attester, Attester]) -> None:
    own, _liars = vtpms

    def guess(command: bytes) -> bytes:
        answer = own.transmit(command)
        return answer[:16] + bytes(32) + answer[48:] if code_of(command) == ACTIVATE else answer

    with pytest.raises(EvidenceRefused, match="secret"):
        own.show(guess)


def test_an_old_quote_is_refused(vtpms: tuple[Attester, Attester]) -> None:
    """Of the same key even, which a verifier without a nonce would take."""
    own, _liars = vtpms
    kept: list[bytes] = []

    def replay(command: bytes) -> bytes:
        if code_of(command) != QUOTE:
            return own.transmit(command)
        kept.append(own.transmit(command.replace(nonce_of(command), bytes(32))))
        return kept[0]

    with pytest.raises(EvidenceRefused, match="nonce"):
        own.show(replay)
    first = own.show()
    with pytest.raises(EvidenceRefused, match="nonce"):
        verify_quote(first.attested, first.signature, first.ak, ENDORSEMENT, bytes(32), FEW)


def nonce_of(quote_command: bytes) -> bytes:
    """Behind header, handle, and authorization with its size: a TPM2B."""
    return quote_command[29:61]


def test_a_quote_of_other_pcrs_is_refused(vtpms: tuple[Attester, Attester]) -> None:
    own, _liars = vtpms

    def others(command: bytes) -> bytes:
        return own.transmit(command[:-3] + b"\x81\0\0" if code_of(command) == QUOTE else command)  # without PCR 16

    with pytest.raises(EvidenceRefused, match="other PCRs"):
        own.show(others)


def test_other_values_than_were_quoted_are_refused(vtpms: tuple[Attester, Attester]) -> None:
    own, _liars = vtpms

    def better(command: bytes) -> bytes:
        return own.transmit(command).replace(extended(BAD), extended(GOOD))

    with pytest.raises(EvidenceRefused, match="other PCR values"):
        own.show(better)


@pytest.mark.parametrize("at", [10, 40, -40, -10])
def test_an_altered_quote_is_refused(vtpms: tuple[Attester, Attester], at: int) -> None:
    own, _liars = vtpms

    def alter(command: bytes) -> bytes:
        answer = bytearray(own.transmit(command))
        if code_of(command) == QUOTE:
            answer[at] ^= 1
        return bytes(answer)

    with pytest.raises((EvidenceRefused, MessageError)):
        own.show(alter)


def test_the_right_vtpm_is_believed_after_all_that(vtpms: tuple[Attester, Attester]) -> None:
    own, _liars = vtpms
    assert own.show().pcrs["sha256"][16] == extended(BAD)
