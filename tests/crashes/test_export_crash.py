"""A16 for exports, imports, destructions: kill -9 at each step and at random. The newest state is in SP or file, not in both."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from spvtpm.wire import messages
from spvtpm.wire.errors import SpvtpmError
from spvtpm.wire.owner_messages import AskFate, DestroyVm, Done, ExportBegins, ExportVtpm, Fate
from tests.guests_view import find_traces, leave_traces
from tests.harness import RunningSp

pytestmark = [pytest.mark.attack("A16"), pytest.mark.claim("C6b")]

KILLS = 300
"""At random moments of exports and imports."""

ROUNDS = 20
"""Of creations, and of destructions."""

GONE = (SpvtpmError, OSError)
"""What an owner sees of an SP that is killed."""


@dataclass
class Story:
    """What the owner knows: the newest file that he has whole, and what the guest wrote last.

    Attributes:
        vm_id: the VM.
        number: what the guest wrote.
        hibernates: whether the VM is hibernated, not stopped, before an export.
    """

    sp: RunningSp
    vm_id: uuid.UUID
    number: int = 0
    vtpm_id: uuid.UUID | None = None
    file: bytes = b""
    hibernates: bool = False

    @property
    def content(self) -> bytes:
        return self.number.to_bytes(8, "big")

    def use(self, *, launch: bool) -> None:
        """Boots, checks that the newest state is there, changes it, and ends the boot."""
        request = messages.LaunchVm if launch else messages.StartVm
        was_hibernated = self.sp.vm(self.vm_id).state == "hibernated"
        self.sp.info(request(vm_id=self.vm_id))
        if self.number:
            assert find_traces(self.sp, self.vm_id, start=not was_hibernated).nv == self.content
        self.number += 1
        leave_traces(self.sp, self.vm_id, self.content, start=self.number == 1)
        end = messages.HibernateVm if self.hibernates else messages.StopVm
        self.sp.info(end(vm_id=self.vm_id))

    def export(self, at_step: Callable[[str], None]) -> None:
        with self.sp.channel() as channel:
            at_step("channel open")
            begins, file = channel.take_export(self.vm_id)
            self.vtpm_id, self.file = begins.vtpm_id, file  # durable at the owner's from here on
            at_step("file taken")
            channel.acknowledge(self.vm_id, begins, file)
            at_step("destroyed")

    def bring(self, at_step: Callable[[str], None]) -> None:
        with self.sp.channel() as channel:
            at_step("channel open")
            channel.bring(self.vm_id, self.sp.key(self.vm_id), self.file)
            at_step("imported")

    def is_here(self) -> bool:
        """What the SP says became of the vTPM; exactly one of SP and file has it."""
        with self.sp.channel() as channel:
            if self.vtpm_id is None:
                return True
            fate = channel.ask(AskFate(vtpm_id=self.vtpm_id), Fate)
        assert fate.state in ("here", "exported")
        assert (fate.state == "here") == (self.vm_id in [vm.vm_id for vm in self.sp.vms()])
        return fate.state == "here"


class _Killed(Exception):
    """The test killed the SP at the step that it wanted."""


def killing_at(sp: RunningSp, wanted: str) -> Callable[[str], None]:
    def at_step(step: str) -> None:
        if step == wanted:
            sp.kill()
            raise _Killed

    return at_step


def nothing(_step: str) -> None:
    """No step is special."""


@pytest.fixture(params=[False, True], ids=["stopped", "hibernated"])
def story(request: pytest.FixtureRequest, sp: RunningSp) -> Story:
    """A VM that was used."""
    story = Story(sp, sp.new_vm(), hibernates=request.param)
    story.use(launch=True)
    return story


def test_an_export_killed_at_any_named_step_is_had_by_exactly_one(story: Story) -> None:
    for step, still_here in (("channel open", True), ("file taken", True), ("destroyed", False)):
        with pytest.raises(_Killed):
            story.export(killing_at(story.sp, step))
        story.sp.start()
        assert story.is_here() == still_here
    story.bring(nothing)
    story.use(launch=True)


def test_an_import_killed_at_any_named_step_is_had_by_exactly_one(story: Story) -> None:
    story.export(nothing)
    for step, here in (("channel open", False), ("imported", True)):
        with pytest.raises(_Killed):
            story.bring(killing_at(story.sp, step))
        story.sp.start()
        assert story.is_here() == here
    story.use(launch=True)


def test_a_destruction_killed_after_its_answer_stays_one(story: Story) -> None:
    with story.sp.channel() as channel:
        story.vtpm_id = channel.ask(ExportVtpm(vm_id=story.vm_id), ExportBegins).vtpm_id
    with story.sp.channel() as channel:
        channel.ask(DestroyVm(vm_id=story.vm_id), Done)
    story.sp.kill()
    story.sp.start()
    with story.sp.channel() as channel:
        assert story.vtpm_id is not None
        assert channel.fate(story.vtpm_id).state == "destroyed"
    assert story.sp.vms() == []


def kill_within(sp: RunningSp, action: Callable[[], object], longest_s: float, generator: random.Random) -> bool:
    """Begins the action and kills the SP at a random moment within it; returns whether the action was answered to its end."""
    delay_s = generator.uniform(0, longest_s)
    done = False

    def act() -> None:
        nonlocal done
        try:
            action()
            done = True
        except GONE:
            pass

    thread = threading.Thread(target=act)
    thread.start()
    time.sleep(delay_s)  # the moment is the test's input, not something to wait for
    os.kill(sp.process.pid, signal.SIGKILL)
    thread.join()
    sp.kill()
    return done


def killed_in(
    story: Story, action: Callable[[Callable[[str], None]], None], longest_s: float, generator: random.Random
) -> bool:
    """Kills the SP within an export or an import, and starts it; whether the vTPM is here then: as was answered, if it was."""
    was_here = story.is_here()
    answered = kill_within(story.sp, lambda: action(nothing), longest_s, generator)
    story.sp.start()
    here = story.is_here()
    assert here != was_here or not answered
    return here


def typical_s(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def test_at_random_moments_exactly_one_of_sp_and_file_brings_back_the_newest_state(state_directory: Path) -> None:
    generator = random.Random(20_263)  # noqa: S311  # moments, not secrets
    with RunningSp(state_directory) as sp:
        story = Story(sp, sp.new_vm())
        story.use(launch=True)
        longest_s = 1.5 * typical_s(lambda: story.export(nothing))
        story.bring(nothing)
        launched = False
        outcomes = {
            "export": [0, 0],
            "import": [0, 0],
        }  # how often the vTPM was in the file afterwards, and how often here
        while sum(map(sum, outcomes.values())) < KILLS:
            story.use(launch=not launched)
            launched = True
            here = killed_in(story, story.export, longest_s, generator)
            outcomes["export"][here] += 1
            if here:
                continue
            here = killed_in(story, story.bring, longest_s, generator)
            outcomes["import"][here] += 1
            if not here:
                story.bring(nothing)
            launched = False
            story.hibernates = generator.random() < 0.5
        assert min(map(min, outcomes.values())) > KILLS // 60, outcomes


def test_a_creation_at_random_moments_is_there_whole_or_not_at_all(state_directory: Path) -> None:
    generator = random.Random(20_264)  # noqa: S311  # moments, not secrets
    with RunningSp(state_directory) as sp:
        longest_s = 1.5 * typical_s(sp.launch)
        made = 0
        for _round in range(ROUNDS):
            vm_id = sp.new_vm()
            request = messages.LaunchVm(vm_id=vm_id)
            answered = kill_within(sp, partial(sp.info, request), longest_s, generator)
            sp.start()
            vm = sp.vm(vm_id)
            assert (vm.vtpm is not None, vm.boots) in ((True, 1), (False, 0))
            assert vm.vtpm is not None or not answered
            made += vm.vtpm is not None
            sp.info(messages.StartVm(vm_id=vm_id) if vm.vtpm else request)
            leave_traces(sp, vm_id, b"it works")
        assert 0 < made < ROUNDS


def test_a_destruction_at_random_moments_is_done_whole_or_not_at_all(state_directory: Path) -> None:
    generator = random.Random(20_265)  # noqa: S311  # moments, not secrets
    with RunningSp(state_directory) as sp:
        first = sp.launch()
        longest_s = 1.5 * typical_s(lambda: sp.destroy(first))
        gone = 0
        for _round in range(ROUNDS):
            story = Story(sp, sp.new_vm())
            story.use(launch=True)
            vtpm = sp.vm(story.vm_id).vtpm
            assert vtpm is not None
            answered = kill_within(sp, partial(sp.destroy, story.vm_id), longest_s, generator)
            sp.start()
            with sp.channel() as channel:
                state = channel.fate(vtpm.vtpm_id).state
            assert state in ("here", "destroyed")
            assert state == "destroyed" or not answered
            gone += state == "destroyed"
            if state == "here":
                story.use(launch=False)
        assert 0 < gone < ROUNDS
