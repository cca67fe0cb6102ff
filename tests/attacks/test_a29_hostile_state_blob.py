"""A29: a hostile or damaged state blob reaches libtpms, which checks little itself."""

from __future__ import annotations

import pytest

from spvtpm.engine.libtpms import Engine
from tests import tpm_commands as tpm
from tests.hostile_state import Verdict, bare_verdicts, flip_bit, sampled_bits
from tests.throwaway import run_in_child

NV_INDEX = 0x01500029
GOLDEN_MEASUREMENT = bytes(range(0xA0, 0xC0))


def state_of_a_used_tpm() -> bytes:
    def use() -> bytes:
        with Engine(lambda _permanent: None) as engine:
            engine.manufacture()
            tpm.checked(engine.process(tpm.startup()))
            tpm.checked(engine.process(tpm.nv_define(NV_INDEX, len(GOLDEN_MEASUREMENT))))
            tpm.checked(engine.process(tpm.nv_write(NV_INDEX, GOLDEN_MEASUREMENT)))
            return engine.permanent_state()

    return run_in_child(use)


@pytest.mark.attack("A29")
def test_bare_libtpms_accepts_a_good_share_of_flipped_bits() -> None:
    permanent = state_of_a_used_tpm()

    verdicts = bare_verdicts(permanent, sampled_bits(permanent, 200))

    assert verdicts[Verdict.ACCEPTED] > verdicts.total() / 3, verdicts  # measured: a half to two thirds


@pytest.mark.attack("A29")
def test_bare_libtpms_serves_altered_nv_content_as_the_truth() -> None:
    permanent = state_of_a_used_tpm()
    assert permanent.count(GOLDEN_MEASUREMENT) == 1
    altered = flip_bit(permanent, permanent.index(GOLDEN_MEASUREMENT) * 8)

    def read() -> bytes:
        with Engine(lambda _permanent: None) as engine:
            engine.resume(altered)
            tpm.checked(engine.process(tpm.startup()))
            return tpm.nv_content_in(engine.process(tpm.nv_read(NV_INDEX, len(GOLDEN_MEASUREMENT))))

    assert run_in_child(read) == flip_bit(GOLDEN_MEASUREMENT, 0)
