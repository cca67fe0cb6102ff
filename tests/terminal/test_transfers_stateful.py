"""Any history of boots, exports and imports over relays that cut: in the end, and at every moment, one life."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from spvtpm.terminal.whereabouts import InFile
from spvtpm.wire import messages
from spvtpm.wire.errors import SpvtpmError
from tests.relay import Cut, Hook, Relay, Side, honest
from tests.terminal.estate import Estate

cuts = st.none() | st.none() | st.tuples(st.sampled_from(["owner", "sp"]), st.integers(0, 7))
chips = st.integers(0, 1)


def hook_for(cut: tuple[Side, int] | None) -> Hook:
    """Ends the connection at this frame, if there is one to cut at."""

    def hook(side: Side, number: int, frame: bytes) -> list[bytes]:
        if (side, number) == cut:
            raise Cut
        return [frame]

    return honest if cut is None else hook


class Life(RuleBasedStateMachine):
    """One VM, two chips, files, and an owner who tries again."""

    estate: Estate
    relays: list[Relay]

    def __init__(self) -> None:
        super().__init__()
        self.vm_id = self.estate.stopped_vm()
        self.vtpm_id = self.estate.vtpm_of(self.vm_id)
        self.files: list[str] = []
        self.estate.desk().list_mine()

    def relay(self, chip: int, cut: tuple[Side, int] | None) -> Path:
        self.relays[chip].hook = hook_for(cut)
        return self.relays[chip].path

    def here(self) -> list[int]:
        """The chips where it lives, in truth."""
        found = []
        for chip in (0, 1):
            with self.estate.desk(chip).connect() as session:  # the keyring learns nothing of this
                if self.vm_id in {vm.vm_id for vm in session.list_mine()}:
                    found.append(chip)
        return found

    @rule(
        what=st.sampled_from(["export", "bring", "bring", "boot", "ask"]), chip=chips, cut=cuts, back=st.integers(0, 2)
    )
    def step(self, what: str, chip: int, cut: tuple[Side, int] | None, back: int) -> None:
        """One rule for all: Hypothesis would leave some of several out of most examples."""
        with suppress(SpvtpmError):
            if what == "export":
                self.export(back, cut)
            elif what == "bring":
                self.bring(back, chip, cut)
            elif what == "boot":
                self.boot()
            else:
                self.estate.desk(chip).fate(self.vtpm_id)

    def export(self, back: int, cut: tuple[Side, int] | None) -> None:
        """Mostly to another file than the last time, and at the chip where it lives, if it lives in one."""
        self.files.append(self.files[-1] if back == 1 and self.files else f"{uuid.uuid4()}")
        chip = (self.here() or [0])[0]
        self.estate.export(self.vm_id, self.files[-1], chip, self.relay(chip, cut))

    def bring(self, back: int, chip: int, cut: tuple[Side, int] | None) -> None:
        """One of the last files that there are."""
        files = [name for name in self.files if (self.estate.directory / name).exists()]
        if files:
            self.estate.bring(self.vm_id, files[-1 - back % len(files)], chip, self.relay(chip, cut))

    def boot(self) -> None:
        """Wherever it lives."""
        for chip in self.here():
            state = self.estate.sps[chip].vm(self.vm_id)
            begin = messages.LaunchVm if state.boots == 0 else messages.StartVm
            self.estate.run_and_stop(self.vm_id, chip, begin(vm_id=self.vm_id))

    @invariant()
    def it_lives_once(self) -> None:
        place = self.estate.place(self.vtpm_id)
        here = self.here()
        assert len(here) <= 1
        if isinstance(place, InFile):
            assert not here
            assert self.estate.sha256(Path(place.path).name) == place.sha256

    def teardown(self) -> None:
        """Whatever happened, the owner has it in a chip again after asking both, and trying again."""
        for chip in (0, 1):
            self.estate.desk(chip).fate(self.vtpm_id)
        place = self.estate.place(self.vtpm_id)
        if isinstance(place, InFile):
            self.estate.bring(self.vm_id, Path(place.path).name)
        (chip,) = self.here()
        self.estate.desk(chip).destroy(self.vm_id)


@pytest.fixture
def two_chips(estate: Estate) -> Iterator[type[Life]]:
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as directory:
        relays = [Relay(Path(directory) / f"relay{chip}", estate.channel(chip)) for chip in (0, 1)]
        with relays[0], relays[1]:
            yield type("LifeHere", (Life,), {"estate": estate, "relays": relays})


@pytest.mark.claim("B3")
@pytest.mark.attack("A02")
@pytest.mark.attack("A09")
def test_a_vtpm_lives_once_whatever_is_cut(two_chips: type[Life]) -> None:
    limits = settings(
        max_examples=30,
        stateful_step_count=20,
        deadline=None,
        phases=[Phase.reuse, Phase.generate],  # each step takes real processes: shrinking would take hours
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    run_state_machine_as_test(two_chips, settings=limits)
