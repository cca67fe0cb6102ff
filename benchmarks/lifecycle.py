"""How long a vTPM takes to come to be, to be powered on again, to wake."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.harness import RunningSp
from tests.tpm_commands import checked, get_random, startup

from benchmarks.report import Figure, Row, Section
from benchmarks.roundtrip import Progress, no_garbage_collection
from benchmarks.swtpm import Swtpm, SwtpmSetup
from spvtpm.guest.crb_driver import CrbDriver
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.wire import messages

_SAMPLES = 40
_BURST = 10
_PAUSE_S = 0.03
"""Between two samples "at rest": long enough for the SP to have a spare worker ready again."""

_BLANK_PAUSE_S = 0.3
"""The same for a blank TPM, which makes an RSA key first."""

_clock = time.perf_counter_ns


def _rest(pause_s: float) -> None:
    """What either has left unwritten is written now: else whoever syncs next would pay for it."""
    os.sync()
    time.sleep(pause_s)


def _first_answer(sp: RunningSp, vm_id: uuid.UUID, vm_key: bytes) -> None:
    with InterfaceMemory.connect(sp.interface(vm_id)) as memory:
        driver = CrbDriver(memory, vm_key)
        checked(driver.transmit(startup()))
        checked(driver.transmit(get_random(32)))


def _boot(sp: RunningSp, vm_id: uuid.UUID, request: messages.Request) -> tuple[int, int]:
    """Nanoseconds to the hypervisor's reply, and to the guest's first answer."""
    vm_key = sp.key(vm_id)
    begin = _clock()
    sp.info(request)
    replied = _clock()
    _first_answer(sp, vm_id, vm_key)
    return replied - begin, _clock() - begin


def _boot_swtpm(path: str, state: Path, running: ExitStack) -> int:
    """Nanoseconds to the first answer."""
    begin = _clock()
    swtpm = Swtpm(path, state)
    running.callback(swtpm.stop)
    swtpm.connect()
    checked(swtpm.transmit(get_random(32)))
    return _clock() - begin


class _Lifecycle:
    def __init__(self, sp: RunningSp, swtpm_path: str, scratch: Path) -> None:
        self._sp = sp
        self._swtpm_path = swtpm_path
        self._scratch = scratch

    def _new_state(self) -> Path:
        state = self._scratch / uuid.uuid4().hex[:8]
        state.mkdir()
        return state

    def create(self, count: int, burst: int, pause_s: float) -> tuple[list[int], list[int], list[int]]:
        """New vTPMs, `burst` of ours back to back, then as many swtpm, `count` in all; their ends are not timed."""
        replies: list[int] = []
        ours: list[int] = []
        theirs: list[int] = []
        for _ in range(count // burst):
            vms = [self._sp.new_vm() for _ in range(burst)]
            _rest(pause_s)
            for vm_id in vms:
                replied, answered = _boot(self._sp, vm_id, messages.LaunchVm(vm_id=vm_id))
                replies.append(replied)
                ours.append(answered)
            for vm_id in vms:
                self._sp.destroy(vm_id)
            states = [self._new_state() for _ in range(burst)]
            _rest(pause_s)
            with ExitStack() as running:
                theirs += [_boot_swtpm(self._swtpm_path, state, running) for state in states]
        return replies, ours, theirs

    def create_certified(self, count: int, setup: SwtpmSetup) -> tuple[list[int], list[int]]:
        """New vTPMs with EK certificates by their chip; new swtpm states with such by a local CA, and swtpm on them."""
        ours: list[int] = []
        theirs: list[int] = []
        for _ in range(count):
            vm_id = self._sp.new_vm()
            _rest(_BLANK_PAUSE_S)
            ours.append(_boot(self._sp, vm_id, messages.LaunchVm(vm_id=vm_id))[1])
            self._sp.destroy(vm_id)
            state = self._new_state()
            _rest(_BLANK_PAUSE_S)
            with ExitStack() as running:
                begin = _clock()
                setup.make(state)
                _boot_swtpm(self._swtpm_path, state, running)
                theirs.append(_clock() - begin)
        return ours, theirs

    def power_on(self, count: int) -> tuple[list[int], list[int]]:
        """One vTPM of each kind, stopped and powered on again and again from its stored state."""
        vm_id = self._sp.launch()
        state = self._new_state()
        with ExitStack() as running:
            _boot_swtpm(self._swtpm_path, state, running)
        ours, theirs = [], []
        for _ in range(count):
            self._sp.call(messages.StopVm(vm_id=vm_id))
            _rest(_PAUSE_S)
            ours.append(_boot(self._sp, vm_id, messages.StartVm(vm_id=vm_id))[1])
            _rest(_PAUSE_S)
            with ExitStack() as running:
                theirs.append(_boot_swtpm(self._swtpm_path, state, running))
        self._sp.destroy(vm_id)
        return ours, theirs

    def wake(self, count: int, pause_s: float) -> list[int]:
        """From the doorbell of a parked vTPM to the answer."""
        vm_id = self._sp.launch()
        times = []
        with self._sp.driver(vm_id) as driver:
            checked(driver.transmit(startup()))
            for _ in range(count):
                self._sp.call(messages.ParkVtpm(vm_id=vm_id))
                time.sleep(pause_s)
                begin = _clock()
                response = driver.transmit(get_random(32))
                times.append(_clock() - begin)
                checked(response)
        self._sp.destroy(vm_id)
        return times


def measure_lifecycle(sp: RunningSp, swtpm_path: str, scratch: Path, *, quick: bool, progress: Progress) -> Section:
    """Creation, power-on and waking."""
    section = Section("From nothing to an answer")
    samples = _SAMPLES // 2 if quick else _SAMPLES * 2
    lifecycle = _Lifecycle(sp, swtpm_path, scratch)
    with no_garbage_collection():
        progress("create, at rest")
        replies, ours, theirs = lifecycle.create(samples, 1, _BLANK_PAUSE_S)
        rest = "LaunchVm … connect, Startup, GetRandom answered; swtpm: spawn … GetRandom answered"
        section.rows.append(_row("create → first answer, at rest", ours, theirs, None, rest))
        section.rows.append(_row("  of it: LaunchVm → reply", replies, None, None, "made, durable, serving"))
        _measure_certified(lifecycle, section, scratch, samples=max(5, samples // 8), progress=progress)
        progress("create, in a burst")
        _replies, ours, theirs = lifecycle.create(samples, _BURST, _PAUSE_S)
        burst = f"{_BURST} back to back: ours has spare workers for the first few only"
        section.rows.append(_row("create → first answer, in a burst", ours, theirs, None, burst))
        progress("power on")
        ours, theirs = lifecycle.power_on(samples // 2)
        stored = "StartVm or spawn with a state that exists"
        section.rows.append(_row("power on → first answer", ours, theirs, 1.0, stored))
        progress("wake")
        for name, pause_s, note in (
            ("wake a parked vTPM, at rest", _PAUSE_S, "doorbell → GetRandom answered; a spare worker is ready"),
            ("wake a parked vTPM, at once", 0.0, "the doorbell rings as soon as it is parked"),
        ):
            section.rows.append(_row(name, lifecycle.wake(samples, pause_s), None, None, note))
    section.notes.append(
        "Both make a TPM of their own with libtpms; ours has EK certificates and is durable when LaunchVm answers, swtpm's is "
        "neither, but for the row that says so."
    )
    section.notes.append(
        "Before each turn all that was left unwritten is synced, so that ours does not pay for swtpm's."
    )
    section.notes.append("Not timed: what our VM's owner says, making swtpm's state directory, and ending either.")
    return section


def _measure_certified(
    lifecycle: _Lifecycle, section: Section, scratch: Path, *, samples: int, progress: Progress
) -> None:
    name = "create with EK certificates → first answer"
    try:
        setup = SwtpmSetup(scratch / "local-ca")
    except FileNotFoundError as error:
        section.notes.append(f'Left out: "{name}": {error}')
        return
    progress("create with EK certificates")
    ours, theirs = lifecycle.create_certified(samples, setup)
    note = "three EKs, from the pool; swtpm: swtpm_setup --create-ek-cert --create-platform-cert, spawn … answered"
    section.rows.append(_row(name, ours, theirs, 0.02, note))


def _row(name: str, ours: list[int], theirs: list[int] | None, target: float | None, note: str) -> Row:
    figure: Callable[[list[int]], Figure] = lambda times: Figure.of_times(times, "ms")  # noqa: E731
    return Row(name, "ms", figure(ours), None if theirs is None else figure(theirs), target, note)
