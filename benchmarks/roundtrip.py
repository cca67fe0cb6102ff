"""How long one TPM command takes, from the client's call to the response in its hands."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness import RunningSp
from tests.tpm_commands import (
    SIGNING_KEY,
    checked,
    create_primary,
    ecc_p256,
    get_random,
    handle_in,
    nv_define,
    nv_write,
    pcr_extend,
    pcr_read,
    sign,
    startup,
)

from benchmarks.report import Figure, Row, Section
from benchmarks.swtpm import Swtpm

Transmit = Callable[[bytes], bytes]
Progress = Callable[[str], None]

_NV_INDEX = 0x01500001
KERNELS_CHOICE = "kernel's choice"
_ROUNDS = 20
_UNTIMED_SHARE = 10


@dataclass(frozen=True, slots=True)
class Measure:
    """One command to measure.

    Attributes:
        name: of the row.
        commands: makes that many commands.
        per_round: how many in one round; the full run has 20 rounds.
        note: for the row.
    """

    name: str
    commands: Callable[[int], list[bytes]]
    per_round: int
    note: str = ""


def _same(command: bytes) -> Callable[[int], list[bytes]]:
    return lambda count: [command] * count


def _nv_changing(count: int) -> list[bytes]:
    return [nv_write(_NV_INDEX, os.urandom(32)) for _ in range(count)]


def timed(transmit: Transmit, commands: Sequence[bytes]) -> list[int]:
    """Sends the commands one after the other; nanoseconds of each. All must succeed; that is checked afterwards."""
    times, responses = [], []
    clock = time.perf_counter_ns
    for command in commands:
        begin = clock()
        response = transmit(command)
        times.append(clock() - begin)
        responses.append(response)
    for response in responses:
        checked(response)
    return times


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python's collector pauses for whom it likes: not while we measure."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def _on_cores(client: int, server: int, pid: int) -> Iterator[None]:
    before = {process: os.sched_getaffinity(process) for process in (0, pid)}
    os.sched_setaffinity(0, {client})
    os.sched_setaffinity(pid, {server})
    try:
        yield
    finally:
        for process, cores in before.items():
            os.sched_setaffinity(process, cores)


def _placements(pid: int) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """Where client and server can run. The kernel chooses, and a wake-up across cores can cost more than a command."""
    cores = sorted(os.sched_getaffinity(0))
    found: dict[str, Callable[[], AbstractContextManager[None]]] = {
        KERNELS_CHOICE: nullcontext,
        "one core": lambda: _on_cores(cores[0], cores[0], pid),
    }
    if len(cores) > 1:
        found["two cores"] = lambda: _on_cores(cores[0], cores[1], pid)
    return found


@dataclass(slots=True)
class Contender:
    """One of the two TPMs, and its times so far.

    Attributes:
        transmit: sends one command.
        pid: of the process that answers.
        times: nanoseconds of each command, by placement.
    """

    transmit: Transmit
    pid: int
    times: dict[str, list[int]] = field(default_factory=dict)

    def best(self) -> tuple[str, list[int]]:
        """The placement with the best median, and its times."""
        return min(self.times.items(), key=lambda item: statistics.median(item[1]))


def interleaved(
    contenders: Sequence[Contender], commands: Callable[[int], list[bytes]], rounds: int, per_round: int
) -> None:
    """Fills in the contenders' times: in rounds, each with a turn for each of them and each placement."""
    turns = [
        (contender.transmit, contender.times.setdefault(name, []), placement)
        for contender in contenders
        for name, placement in _placements(contender.pid).items()
    ]
    with no_garbage_collection():
        for number in range(rounds):
            for transmit, times, placement in turns if number % 2 == 0 else reversed(turns):
                with placement():
                    timed(transmit, commands(1 + per_round // _UNTIMED_SHARE))
                    times.extend(timed(transmit, commands(per_round)))


def _prepare(transmit: Transmit) -> int:
    """An NV index of 32 bytes and a loaded signing key; the key's handle."""
    checked(transmit(nv_define(_NV_INDEX, 32)))
    checked(transmit(nv_write(_NV_INDEX, bytes(32))))
    return handle_in(transmit(create_primary(ecc_p256(SIGNING_KEY))))


def measure_round_trips(sp: RunningSp, swtpm_path: str, scratch: Path, *, quick: bool, progress: Progress) -> Section:
    """All commands, against one vTPM of each kind."""
    section = Section("Round trip of one command")
    rounds = _ROUNDS // 2 if quick else _ROUNDS
    state = scratch / "swtpm"
    state.mkdir()
    with Swtpm(swtpm_path, state).connect() as swtpm, sp.driver(sp.launch()) as driver:
        checked(driver.transmit(startup()))
        pid, worker, key = swtpm.process.pid, sp.worker_of(driver.interface), _prepare(driver.transmit)
        if _prepare(swtpm.transmit) != key:
            raise AssertionError("the two TPMs gave the same key different handles")
        nothing_written = "nothing changes, so neither writes"
        for measure in (
            Measure("GetRandom, 32 bytes", _same(get_random(32)), 500),
            Measure("PCR_Extend, SHA-256", _same(pcr_extend(16, bytes(range(32)))), 500),
            Measure("PCR_Read, one SHA-256 PCR", _same(pcr_read(16)), 500),
            Measure("Sign, ECC P-256", _same(sign(key, bytes(32))), 200),
            Measure("NV_Write, 32 bytes unchanged", _same(nv_write(_NV_INDEX, bytes(32))), 200, nothing_written),
        ):
            progress(measure.name)
            both = Contender(driver.transmit, worker), Contender(swtpm.transmit, pid)
            interleaved(both, measure.commands, rounds, measure.per_round)
            section.rows.append(_row(measure.name, both, measure.note))
        not_durable = "ours is on the disk before the answer, swtpm's is not"
        durable = "swtpm's made durable too: its client syncs file and directory after each answer"
        for name, theirs, target, note in (
            ("NV_Write, 32 bytes, swtpm as configured", swtpm.transmit, None, not_durable),
            ("NV_Write, 32 bytes, both durable", swtpm.transmit_durably, 1.0, durable),
        ):
            progress(name)
            both = Contender(driver.transmit, worker), Contender(theirs, pid)
            interleaved(both, _nv_changing, rounds, 60)
            section.rows.append(_row(name, both, note, target))
    section.notes.append(
        "spvtpm: the CRB driver, AES-256-GCM both ways, doorbells; swtpm: the plain command over a unix socket."
    )
    section.notes.append(
        "Each at its best of three placements: as the kernel likes, client and server on one core, on two. In the note: which."
    )
    section.notes.append("swtpm writes its state to a new file and renames it; it never asks the kernel to sync it.")
    return section


def _row(name: str, contenders: tuple[Contender, Contender], note: str, target: float | None = 1.0) -> Row:
    places, figures, free = [], [], []
    for contender in contenders:
        place, times = contender.best()
        places.append(place)
        figures.append(Figure.of_times(times, "µs"))
        free.append(statistics.median(contender.times[KERNELS_CHOICE]) / 1000)
    where = f"{places[0]} / {places[1]}; {KERNELS_CHOICE}: {free[0]:.1f} / {free[1]:.1f} µs"
    return Row(name, "µs", figures[0], figures[1], target, note=f"{note}; {where}" if note else where)
