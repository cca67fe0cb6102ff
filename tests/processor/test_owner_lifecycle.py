"""Two secure processors of one fleet, an owner and a platform, driven at random against what the owner believes."""

from __future__ import annotations

import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from spvtpm.wire import messages
from spvtpm.wire.errors import AlreadyExists, ExportSuperseded, NotFound, SpvtpmError, StaleInstance, WrongState
from spvtpm.wire.instance_file import parse_instance_header
from spvtpm.wire.owner_messages import DestroyVm, Done, Rotated, RotateUserSecret
from tests.guests_view import find_traces, leave_traces
from tests.harness import RunningSp
from tests.owner import Owner

pytestmark = [
    *(pytest.mark.claim(number) for number in ("C3", "C4", "C6a", "C6b", "C6c", "B3")),
    *(pytest.mark.attack(number) for number in ("A08", "A09", "A16", "A30")),
]


@dataclass(frozen=True)
class Export:
    """A file that the owner has.

    Attributes:
        place: which secure processor gave it out.
        boots: how often the VM had booted there.
        acknowledged: whether the owner said that he has it.
    """

    file: bytes
    version: int
    place: int
    boots: int
    content: bytes
    pcr: bytes
    hibernated: bool
    started: bool
    secret: bytes
    acknowledged: bool = False


class OwnersBelief(RuleBasedStateMachine):
    """One vTPM. The owner remembers every file, and never says which version he has seen: the ledgers alone refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="spvtpm-")
        self.places = [RunningSp(Path(self.directory.name) / name) for name in ("a", "b")]
        self.owner = Owner()
        self.vm_id, self.key = uuid.uuid4(), bytes(range(32))
        self.place: int | None = None  # where the vTPM's VM is
        self.state = ""
        self.boots = 0
        self.made = False  # whether there is a vTPM
        self.started = False  # whether the guest has started it since it was cold
        self.content, self.pcr = b"", bytes(32)
        self.version = 0
        self.secret = self.owner.user_secret
        self.files: list[Export] = []
        self.least = [0, 0]  # by place: the oldest version that it takes

    def teardown(self) -> None:
        for sp in self.places:
            sp.kill()
        self.directory.cleanup()

    @property
    def sp(self) -> RunningSp:
        assert self.place is not None
        sp = self.places[self.place]
        sp._keys[self.vm_id] = self.key
        return sp

    def refused(self, request: messages.Request, error: type[SpvtpmError]) -> None:
        for number, sp in enumerate(self.places):
            if self.place in (None, number):
                with pytest.raises(error):
                    sp.call(request)

    def is_here(self) -> bool:
        return self.place is not None

    # The owner

    @initialize(place=st.integers(0, 1))
    def provision(self, place: int) -> None:
        with self.places[place].channel(self.owner) as channel:
            channel.provision(self.vm_id, self.key)
        self.place, self.state, self.boots, self.made, self.version = place, "stopped", 0, False, 0
        self.content, self.pcr = b"", bytes(32)
        self.boot(True)
        self.use(b"begin...")
        self.end_boot(False)

    @precondition(lambda self: self.place is not None)
    @rule(acknowledges=st.sampled_from([True, True, True, False]))
    def export(self, acknowledges: bool) -> None:
        with self.sp.channel(self.owner) as channel:
            if not self.made or self.state == "running":
                with pytest.raises(WrongState):
                    channel.take_export(self.vm_id)
                return
            begins, file = channel.take_export(self.vm_id)
            self._note(file)
            if not acknowledges:
                return
            assert channel.acknowledge(self.vm_id, begins, file).state == "exported"
        assert self.place is not None
        self.least[self.place] = self.version
        self.place = None

    def _note(self, file: bytes) -> None:
        self.version += 1
        header = parse_instance_header(file)
        assert (header.version, header.hibernated) == (self.version, self.state == "hibernated")
        assert self.place is not None
        pcr = self.pcr if header.hibernated else bytes(32)
        self.files.append(
            Export(
                file,
                self.version,
                self.place,
                self.boots,
                self.content,
                pcr,
                header.hibernated,
                self.started,
                self.secret,
            )
        )

    @precondition(lambda self: self.place is not None and bool(self.files))
    @rule()
    def acknowledge_late(self) -> None:
        """In another channel than that which gave the file out."""
        export = self.files[-1]
        with self.sp.channel(self.owner) as channel, pytest.raises((ExportSuperseded, NotFound)):
            begins, _file = channel.take_export(self.vm_id) if self.made and self.state != "running" else (None, b"")
            if begins is None:
                raise NotFound("nothing to acknowledge")
            self._note(_file)
            channel.acknowledge(self.vm_id, begins, export.file)

    @precondition(lambda self: self.place is None and bool(self.files))
    @rule(place=st.integers(0, 1))
    def bring_the_newest(self, place: int) -> None:
        self.bring(0, place)

    @precondition(lambda self: len(self.files) > 1)
    @rule(which=st.integers(1, 3), place=st.integers(0, 1))
    def bring_an_older_one(self, which: int, place: int) -> None:
        self.bring(which, place)

    def bring(self, which: int, place: int) -> None:
        export = self.files[-1 - which % len(self.files)]
        sp = self.places[place]
        target = uuid.uuid4() if self.place == place else self.vm_id
        owner = Owner(self.owner.key, export.secret)
        with sp.channel(owner) as channel:
            if self.place == place or export.version < self.least[place]:
                with pytest.raises(StaleInstance):
                    channel.bring(target, self.key, export.file)
                event("refused: it lives here" if self.place == place else "refused: it is older")
                return
            if self.place is not None or export is not self.files[-1]:
                return  # the other place would take it: only the owner's memory hinders a clone (tests/terminal)
            vm = channel.bring(self.vm_id, self.key, export.file)
        self.place, self.state, self.boots, self.made = place, vm.state, 0, True
        self.secret = export.secret
        self.version, self.content, self.pcr = export.version, export.content, export.pcr
        self.started = export.started

    @precondition(lambda self: self.place is not None)
    @rule()
    def rotate(self) -> None:
        self.secret = self.vm_id.bytes + bytes([len(self.files) % 256] * 16)
        with self.sp.channel(self.owner) as channel:
            assert channel.ask(RotateUserSecret(user_secret=self.secret), Rotated).vms == 1

    @precondition(lambda self: self.place is not None and len(self.files) > 2)
    @rule()
    def destroy(self) -> None:
        with self.sp.channel(self.owner) as channel:
            channel.ask(DestroyVm(vm_id=self.vm_id), Done)
        assert self.place is not None
        if self.made:
            self.least[self.place] = self.version + 1
        self.place = None

    # The platform

    @rule(rightly=st.sampled_from([True, True, True, False]))
    def boot(self, rightly: bool) -> None:
        launches = (self.boots == 0) == rightly
        request = (messages.LaunchVm if launches else messages.StartVm)(vm_id=self.vm_id)
        if self.place is None:
            self.refused(request, NotFound)
        elif launches and self.boots:
            self.refused(request, AlreadyExists)
        elif not launches and (not self.boots or self.state == "running"):
            self.refused(request, WrongState)
        else:
            self.sp.info(request)
            self._booted()

    def _booted(self) -> None:
        if self.state != "hibernated":
            self.started, self.pcr = False, bytes(32)
        self.state, self.made = "running", True
        self.boots += 1

    @rule(hibernate=st.booleans())
    def end_boot(self, hibernate: bool) -> None:
        request = (messages.HibernateVm if hibernate else messages.StopVm)(vm_id=self.vm_id)
        if self.state != "running" or self.place is None:
            self.refused(request, NotFound if self.place is None else WrongState)
            return
        self.sp.info(request)
        self.state = "hibernated" if hibernate else "stopped"

    @rule(place=st.integers(0, 1))
    def power_cut(self, place: int) -> None:
        self.places[place].kill()
        self.places[place].start()
        if self.place == place and self.state == "running":
            self.state = "stopped"

    # The guest

    @precondition(lambda self: self.place is not None and self.state == "running")
    @rule(content=st.binary(min_size=8, max_size=8))
    def use(self, content: bytes) -> None:
        if self.content:
            traces = find_traces(self.sp, self.vm_id, start=not self.started)
            assert (traces.nv, traces.pcr) == (self.content, self.pcr)
            self.started = True
        self.pcr = leave_traces(self.sp, self.vm_id, content, start=not self.started).pcr
        self.content, self.started = content, True


TestOwnersBelief = OwnersBelief.TestCase
TestOwnersBelief.settings = settings(
    max_examples=12,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
