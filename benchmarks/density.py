"""How many vTPMs fit on a machine: memory per active and per parked one, and whether any of them answers."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.harness import RunningSp
from tests.tpm_commands import checked, get_random, startup

from benchmarks.report import Figure, Row, Section
from benchmarks.roundtrip import Progress
from benchmarks.swtpm import Swtpm
from spvtpm.wire import messages

_SAMPLE = 50
_KIB = 1024
_PARKED_TARGET_KIB = 64.0
_INTERFACE_NAME = "/memfd:spvtpm-crb"
_THEIR_TIME_S = 60.0
"""No more swtpm are spawned after that."""


def pss_kib(pid: int) -> int:
    """Proportional set size: private memory plus the process's share of what it shares. Source: proc(5), smaps_rollup."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise AssertionError(f"no Pss in smaps_rollup of process {pid}")


def _interface_kib(daemon: int) -> float:
    """Memory in the interfaces' memory files, which are nobody's while nobody maps them."""
    total = 0
    for link in Path(f"/proc/{daemon}/fd").iterdir():
        if str(link.readlink()).startswith(_INTERFACE_NAME):
            total += link.stat().st_blocks * 512
    return total / _KIB


_TheirLevel = tuple[Figure, list[int]]
"""PSS per process and nanoseconds to each answer."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What a secure processor takes, in KiB.

    Attributes:
        daemon: its PSS.
        zygote: PSS of the zygote's processes and of the spare workers.
        active: PSS of the workers that run a vTPM.
        interfaces: shared memory of interfaces, apart from what a worker that maps it is charged for.
        processes: how many processes run a vTPM.
    """

    daemon: int
    zygote: int
    active: int
    interfaces: float
    processes: int

    @property
    def total(self) -> float:
        """Everything."""
        return self.daemon + self.zygote + self.active + (0 if self.processes else self.interfaces)


def sp_memory(sp: RunningSp) -> Memory:
    """Weighs a secure processor."""
    zygote, active, processes = 0, 0, 0
    for pid in sp.workers():
        if _INTERFACE_NAME in Path(f"/proc/{pid}/maps").read_text():
            active += pss_kib(pid)
            processes += 1
        else:
            zygote += pss_kib(pid)
    return Memory(pss_kib(sp.process.pid), zygote, active, _interface_kib(sp.process.pid), processes)


def _answers(sp: RunningSp, vm_ids: Iterable[uuid.UUID]) -> list[int]:
    times = []
    for vm_id in vm_ids:
        with sp.driver(vm_id) as driver:
            begin = time.perf_counter_ns()
            response = driver.transmit(get_random(32))
            times.append(time.perf_counter_ns() - begin)
            checked(response)
    return times


def _settled(sp: RunningSp) -> Memory:
    time.sleep(0.3)  # spare workers are made, dead ones are gone
    return sp_memory(sp)


class _Ours:
    """One SP with more and more VMs."""

    def __init__(self, sp: RunningSp) -> None:
        self._sp = sp
        self._vms: list[uuid.UUID] = []
        self._rehearse()
        self.empty = _settled(sp)

    def _rehearse(self) -> None:
        """One VM through its whole life: what the daemon loads and allocates once is not the price of a vTPM."""
        self.grow(1)
        self.park_all()
        self.answers()
        self._sp.destroy(self._vms.pop())

    def grow(self, count: int) -> None:
        """Launches VMs until there are `count`; each vTPM has answered twice."""
        with self._sp.channel() as channel:
            while len(self._vms) < count:
                vm_id = self._sp.launch(channel)
                with self._sp.driver(vm_id) as driver:
                    checked(driver.transmit(startup()))
                    checked(driver.transmit(get_random(32)))
                self._vms.append(vm_id)

    def answers(self) -> list[int]:
        """Nanoseconds of one GetRandom each, of a random sample."""
        return _answers(self._sp, random.sample(self._vms, min(_SAMPLE, len(self._vms))))

    def park_all(self) -> None:
        """Leaves no vTPM with a process."""
        for vm_id in self._vms:
            self._sp.call(messages.ParkVtpm(vm_id=vm_id))

    def wake_all(self) -> None:
        """Leaves no vTPM without one."""
        for vm in self._sp.vms():
            if vm.vtpm is not None and vm.vtpm.residency == "parked":
                self._sp.call(messages.WakeVtpm(vm_id=vm.vm_id))


class _Theirs:
    """More and more swtpm."""

    def __init__(self, path: str, scratch: Path, running: ExitStack) -> None:
        self._path = path
        self._scratch = scratch
        self._running = running
        self._all: list[Swtpm] = []

    def grow(self, count: int, deadline: float) -> bool:
        """Whether there are `count` of them now."""
        while len(self._all) < count:
            if time.monotonic() > deadline:
                return False
            state = self._scratch / f"swtpm-{len(self._all)}"
            state.mkdir()
            swtpm = Swtpm(self._path, state)
            self._running.callback(swtpm.stop)
            checked(swtpm.connect().transmit(get_random(32)))
            self._all.append(swtpm)
        return True

    def pss(self) -> Figure:
        """Of one process."""
        return Figure(sum(pss_kib(swtpm.process.pid) for swtpm in self._all) / len(self._all))

    def answers(self) -> list[int]:
        """As ours."""
        times = []
        for swtpm in random.sample(self._all, min(_SAMPLE, len(self._all))):
            begin = time.perf_counter_ns()
            response = swtpm.transmit(get_random(32))
            times.append(time.perf_counter_ns() - begin)
            checked(response)
        return times


@dataclass(frozen=True, slots=True)
class _Level:
    """What was measured with `count` vTPMs of ours."""

    count: int
    active: Memory
    active_answers: list[int]
    parked: Memory
    parked_answers: list[int]


def _climb(sp: RunningSp, counts: Sequence[int], progress: Progress) -> tuple[Memory, list[_Level]]:
    ours = _Ours(sp)
    levels = []
    for count in counts:
        progress(f"{count} vTPMs of ours, active")
        ours.wake_all()
        ours.grow(count)
        active, active_answers = _settled(sp), ours.answers()
        progress(f"{count} vTPMs of ours, parked")
        ours.park_all()
        levels.append(_Level(count, active, active_answers, _settled(sp), ours.answers()))
    return ours.empty, levels


def _climb_theirs(path: str, counts: Sequence[int], scratch: Path, progress: Progress) -> dict[int, _TheirLevel]:
    deadline = time.monotonic() + _THEIR_TIME_S
    levels = {}
    with ExitStack() as running:
        theirs = _Theirs(path, scratch, running)
        for count in counts:
            progress(f"{count} swtpm")
            if not theirs.grow(count, deadline):
                break
            levels[count] = theirs.pss(), theirs.answers()
    return levels


def measure_density(
    sp: RunningSp, swtpm_path: str, scratch: Path, *, counts: Sequence[int], progress: Progress
) -> Section:
    """Memory and answers at each of `counts` vTPMs: ours first, then swtpm, so that neither shares the other's pages.

    Args:
        sp: without any VM; left with its VMs parked.
        swtpm_path: of the program.
        scratch: an empty directory.
        counts: ascending.
        progress: told what is going on.
    """
    section = Section("Many vTPMs")
    empty, levels = _climb(sp, counts, progress)
    sp.stop()
    their_levels = _climb_theirs(swtpm_path, counts, scratch, progress)
    for level in levels:
        section.rows += _rows(level, empty, their_levels.get(level.count))
    section.notes.append(
        f"Fixed cost of our SP, without any vTPM: daemon {empty.daemon:,} KiB, "
        f"zygote and spare workers {empty.zygote:,} KiB (PSS)."
    )
    last = levels[-1]
    section.notes.append(
        f"With {last.count:,} active: daemon {last.active.daemon:,} KiB, zygote and spares {last.active.zygote:,} KiB, "
        f"all together {last.active.total / _KIB:,.0f} MiB; all parked: {last.parked.total / _KIB:,.0f} MiB "
        f"and {last.parked.processes} processes with a vTPM."
    )
    section.notes.append(
        "Active: mean PSS of the worker processes (swtpm: of its processes). Parked: growth of the daemon's PSS since "
        "it was empty, and of the interfaces' memory files, divided by the number. Kernel memory is in neither."
    )
    section.notes.append(
        f"Answers: one GetRandom each from a random sample of {_SAMPLE}, or all if fewer; all answered."
    )
    return section


def _rows(level: _Level, empty: Memory, theirs: _TheirLevel | None) -> list[Row]:
    pss, answers = theirs if theirs is not None else (None, None)
    per_active = level.active.active / level.active.processes
    grown = level.parked.daemon + level.parked.interfaces - empty.daemon - empty.interfaces
    per_parked = grown / level.count
    vtpms = f"{level.count:,} vTPM" + ("s" if level.count > 1 else "")
    return [
        Row(
            f"{vtpms}: memory, active",
            "KiB",
            Figure(per_active),
            pss,
            None,
            "mean PSS per process: the more there are, the less each bears of what they share",
        ),
        Row(f"{vtpms}: memory, parked", "KiB", Figure(per_parked), None, _PARKED_TARGET_KIB, "no process"),
        Row(
            f"{vtpms}: answer, active",
            "µs",
            Figure.of_times(level.active_answers, "µs"),
            None if answers is None else Figure.of_times(answers, "µs"),
            None,
            "the first command after a pause: caches are cold; ours opens a session with it",
        ),
        Row(
            f"{vtpms}: answer, parked",
            "ms",
            Figure.of_times(level.parked_answers, "ms"),
            None,
            None,
            "each wakes first",
        ),
    ]
