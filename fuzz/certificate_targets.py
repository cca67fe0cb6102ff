"""Targets for what a vendor signs: certificate chains, revocation lists, chip files. Nothing altered is believed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from tests.endorsements import VTPM, new_endorsement
from tests.papers import NOW, Papers, papers

from fuzz.program import Program
from fuzz.target import Target
from spvtpm.wire.certificate_policies import Purpose, genuine
from spvtpm.wire.certificates import parse_chain
from spvtpm.wire.chip_file import encode_chip_file, parse_chip_file
from spvtpm.wire.endorsement_certificates import verify_endorsement
from spvtpm.wire.errors import CertificateError, CertificateRefused, ChipFileError
from spvtpm.wire.revocation import parse_revocation_list
from spvtpm.wire.vtpm_endorsement import VtpmEndorsement


@cache
def _papers() -> Papers:
    return papers()


@cache
def _list() -> bytes:
    return _papers().revocation_list().encode()


def _damaged(program: Program, content: bytes) -> bytes:
    return program.damage(content) if program.below(2) else content


def fuzz_chain(data: bytes) -> None:
    """A chain with damage, or nothing of a chain, is refused by its parser or by what every reader asks."""
    program = Program(data)
    good = _papers().channel
    raw = program.below(4) == 3
    chain = [program.take(200) if raw else _damaged(program, der) for der in good[: 1 + program.below(6)]]
    policy = genuine(Purpose.CHANNEL, [_papers().vendor.root], parse_revocation_list(_list()), NOW)
    try:
        policy.verify(parse_chain(chain))
    except (CertificateError, CertificateRefused):
        return
    assert tuple(chain) == good, "what is believed is what was signed"


@cache
def _endorsement() -> VtpmEndorsement:
    return new_endorsement(_papers())


def fuzz_ek_certificate(data: bytes) -> None:
    """A vTPM's endorsement with damage, or none, is refused by its parsers or by the chip's chain."""
    program = Program(data)
    good = _endorsement()
    chosen = program.choose(good.certificates)
    der = program.take(400) if program.below(4) == 3 else _damaged(program, chosen)
    policy = genuine(Purpose.CHIP, [_papers().vendor.root], parse_revocation_list(_list()), NOW)
    try:
        verify_endorsement(VtpmEndorsement(certificates=(der,), issuer=good.issuer), VTPM, policy)
    except (CertificateError, CertificateRefused):
        return
    assert der == chosen, "what is believed is what was signed"


def fuzz_revocation_list(data: bytes) -> None:
    """A list with damage, or none, is refused by its parser or by its signature."""
    program = Program(data)
    der = program.take(400) if program.below(4) == 3 else _damaged(program, _list())
    chain = parse_chain(_papers().chip_chain)
    try:
        parse_revocation_list(der).verify(chain.chip_certificate, chain.intermediate, NOW, 1)
    except (CertificateError, CertificateRefused):
        return
    assert der == _list(), "what is believed is what was signed"


def fuzz_chip_file(data: bytes) -> None:
    """A chip file is read whole, and means what it is written as; everything else is a typed error."""
    program = Program(data)
    content = program.take(600) if program.below(4) == 3 else _damaged(program, encode_chip_file(_papers().made))
    try:
        chip = parse_chip_file(content)
    except ChipFileError:
        return
    assert parse_chip_file(encode_chip_file(chip)) == chip


def _chip_files() -> Sequence[bytes]:
    return [b"\x03" + encode_chip_file(_papers().made)]


CERTIFICATE_TARGETS = (
    Target("chain", "certificate chains of chips and channels", fuzz_chain, lambda: [bytes(8)], examples=150),
    Target("ek_certificate", "certificates of vTPMs' EKs", fuzz_ek_certificate, lambda: [bytes(8)], examples=150),
    Target("revocation_list", "the vendor's list of revoked chips", fuzz_revocation_list, lambda: [bytes(4)]),
    Target("chip_file", "the file that a vendor puts into a chip", fuzz_chip_file, _chip_files),
)
