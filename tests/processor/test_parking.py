"""Where parked states are kept: sealed, each good for one waking of one vTPM."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from spvtpm.processor.parking import ParkingLot
from spvtpm.processor.worker.messages import Parked
from spvtpm.wire.errors import IntegrityError

SECRET = b"a session key that stays secret!"
VTPMS = [uuid.UUID(int=number) for number in range(3)]

states = st.builds(
    Parked,
    volatile=st.binary(min_size=1, max_size=100),
    snapshot=st.none(),
)


class Lot(RuleBasedStateMachine):
    """A parking lot against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.lot = ParkingLot()
        self.model: dict[uuid.UUID, Parked] = {}

    @rule(vtpm_id=st.sampled_from(VTPMS), state=states)
    def put(self, vtpm_id: uuid.UUID, state: Parked) -> None:
        self.lot.put(vtpm_id, state)
        self.model[vtpm_id] = state

    @rule(vtpm_id=st.sampled_from(VTPMS))
    def take(self, vtpm_id: uuid.UUID) -> None:
        if vtpm_id in self.model:
            assert self.lot.take(vtpm_id) == self.model.pop(vtpm_id)
        else:
            with pytest.raises(KeyError):
                self.lot.take(vtpm_id)

    @rule(vtpm_id=st.sampled_from(VTPMS))
    def drop(self, vtpm_id: uuid.UUID) -> None:
        self.lot.drop(vtpm_id)
        self.model.pop(vtpm_id, None)

    @invariant()
    def knows_what_it_keeps(self) -> None:
        assert [vtpm_id in self.lot for vtpm_id in VTPMS] == [vtpm_id in self.model for vtpm_id in VTPMS]


TestLot = Lot.TestCase


@pytest.mark.attack("A30")
def test_a_state_wakes_once() -> None:
    lot = ParkingLot()
    lot.put(VTPMS[0], Parked(b"volatile", None))
    lot.take(VTPMS[0])
    with pytest.raises(KeyError):
        lot.take(VTPMS[0])


@pytest.mark.attack("A24")
@given(states)
def test_a_kept_state_does_not_lie_in_memory_in_the_clear(state: Parked) -> None:
    lot = ParkingLot()
    lot.put(VTPMS[0], Parked(SECRET + state.volatile, None))
    ((key, sealed),) = lot._kept.values()
    assert SECRET not in key + sealed


@pytest.mark.attack("A10")
def test_a_state_altered_in_memory_or_another_vtpms_is_refused() -> None:
    lot = ParkingLot()
    lot.put(VTPMS[0], Parked(b"volatile", None))
    key, sealed = lot._kept[VTPMS[0]]
    lot._kept[VTPMS[1]] = key, sealed
    with pytest.raises(IntegrityError, match=str(VTPMS[1])):
        lot.take(VTPMS[1])
    for position in range(len(sealed)):
        altered = bytearray(sealed)
        altered[position] ^= 1
        lot._kept[VTPMS[0]] = key, bytes(altered)
        with pytest.raises(IntegrityError, match=str(VTPMS[0])):
            lot.take(VTPMS[0])
