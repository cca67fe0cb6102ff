"""How long one TPM command takes, from the client's call to the response in its hands."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
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
def on_one_core(*pids: int) -> Iterator[None]:
    """This process and the named ones on one core: no wake-up crosses cores, which in a VM can cost more than a command."""
    before = {pid: os.sched_getaffinity(pid) for pid in (0, *pids)}
    core = min(before[0])
    for pid in before:
        os.sched_setaffinity(pid, {core})
    try:
        yield
    finally:
        for pid, cores in before.items():
            os.sched_setaffinity(pid, cores)


def interleaved(
    ours: Transmit,
    theirs: Transmit,
    their_pid: int,
    commands: Callable[[int], list[bytes]],
    rounds: int,
    per_round: int,
) -> tuple[list[int], list[int]]:
    """Nanoseconds of ours and theirs, in rounds, each turn beginning with a few untimed commands.

    The kernel puts client and swtpm on one core or on two, as it likes, and the difference is large. So each round has
    two turns of theirs, as the kernel likes and on one core; what counts is the placement with the better median. Ours
    runs as the kernel likes.
    """
    our_times: list[int] = []
    anywhere: list[int] = []
    together: list[int] = []
    turns: list[tuple[Transmit, list[int], Callable[[], AbstractContextManager[None]]]] = [
        (ours, our_times, nullcontext),
        (theirs, anywhere, nullcontext),
        (theirs, together, lambda: on_one_core(their_pid)),
    ]
    with no_garbage_collection():
        for number in range(rounds):
            for transmit, times, placement in turns if number % 2 == 0 else reversed(turns):
                with placement():
                    timed(transmit, commands(1 + per_round // _UNTIMED_SHARE))
                    times.extend(timed(transmit, commands(per_round)))
    return our_times, min(anywhere, together, key=statistics.median)


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
        pid, key = swtpm.process.pid, _prepare(driver.transmit)
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
            times = interleaved(driver.transmit, swtpm.transmit, pid, measure.commands, rounds, measure.per_round)
            section.rows.append(_row(measure.name, times, measure.note))
        not_durable = "ours is on the disk before the answer, swtpm's is not"
        durable = "swtpm's made durable too: its client syncs file and directory after each answer"
        for name, theirs, note in (
            ("NV_Write, 32 bytes, swtpm as configured", swtpm.transmit, not_durable),
            ("NV_Write, 32 bytes, both durable", swtpm.transmit_durably, durable),
        ):
            progress(name)
            times = interleaved(driver.transmit, theirs, pid, _nv_changing, rounds, 60)
            section.rows.append(_row(name, times, note))
    section.notes.append(
        "spvtpm: the CRB driver, AES-256-GCM both ways, doorbells; swtpm: the plain command over a unix socket."
    )
    section.notes.append(
        "swtpm at its best: on the client's core or where the kernel puts it, whichever has the better median."
    )
    section.notes.append("swtpm writes its state to a new file and renames it; it never asks the kernel to sync it.")
    return section


def _row(name: str, times: tuple[list[int], list[int]], note: str) -> Row:
    ours, theirs = (Figure.of_times(half, "µs") for half in times)
    return Row(name, "µs", ours, theirs, target=1.0, note=note)
