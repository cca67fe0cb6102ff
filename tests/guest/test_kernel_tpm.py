"""The kernel asks for localities: it gets 0 alone, and nothing of that reaches the vTPM."""

from __future__ import annotations

import pytest

from spvtpm.guest.kernel_tpm import answer_locality
from tests import tpm_commands as tpm

SET_LOCALITY = "80010000000b20001000"


@pytest.mark.attack("A14")
@pytest.mark.parametrize(
    ("asked", "code"), [("00", tpm.RC_SUCCESS), ("01", tpm.RC_LOCALITY), ("04", tpm.RC_LOCALITY), ("", tpm.RC_LOCALITY)]
)
def test_the_kernel_gets_locality_0_alone(asked: str, code: int) -> None:
    answer = answer_locality(bytes.fromhex(SET_LOCALITY + asked))
    assert answer is not None
    assert tpm.response_code(answer) == code


@pytest.mark.parametrize("command", [b"", tpm.get_random(8), bytes.fromhex(SET_LOCALITY)[:9]])
def test_everything_else_is_the_vtpms(command: bytes) -> None:
    assert answer_locality(command) is None
