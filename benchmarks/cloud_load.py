"""A cloud under load: VMs made, used and shut down through the platform, by several terminals at once; how long, how large."""

from __future__ import annotations

import os
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests.cloud_stack import CloudStack
from tests.owner import ANYTHING

from benchmarks.density import pss_kib, sp_memory
from benchmarks.report import Figure, Row, Section
from benchmarks.roundtrip import Progress
from spvtpm.cli.vm_parts import run_quietly
from spvtpm.hypervisor.machine_process import find_machines
from spvtpm.terminal.creation import create
from spvtpm.terminal.departure import end
from spvtpm.terminal.machines import Site
from spvtpm.terminal.owned import OwnedVm
from spvtpm.terminal.platform import Platform

_TERMINALS = 8
"""Of one user, each with a keyring of its own."""

_HOSTS = 2
_USE = ("tpm2_getrandom", "--hex", "16")
_NS_PER_S = 1e9
_KIB_PER_MIB = 1024

_PLATFORM_TARGET_KIB = 192.0 * _KIB_PER_MIB
_AGENT_TARGET_KIB = 64.0 * _KIB_PER_MIB
_SP_TARGET_KIB = 96.0 * _KIB_PER_MIB
"""What a part should not exceed once all VMs have left it, however many there were."""

_Command = Callable[[Site, str], object]


def _create(site: Site, name: str) -> None:
    create(site, OwnedVm(name=name, vm_id=uuid.uuid4(), vm_key=os.urandom(32), policy=ANYTHING))


def _use(site: Site, name: str) -> None:
    code, _output, errors = run_quietly(site, name, _USE)
    assert code == 0, errors


def _shut_down(site: Site, name: str) -> None:
    end(site, name, "shutdown")


_PHASES: tuple[tuple[str, _Command], ...] = (
    ("create and boot", _create),
    ("use: tpm2_getrandom in the VM", _use),
    ("shut down, vTPM home in a file", _shut_down),
)


def _one_after_the_other(site: Site, names: Sequence[str], command: _Command) -> list[int]:
    """Nanoseconds of each."""
    times = []
    for name in names:
        begin = time.perf_counter_ns()
        command(site, name)
        times.append(time.perf_counter_ns() - begin)
    return times


def _phase(sites: Sequence[Site], vms: int, words: str, command: _Command) -> list[Row]:
    """All terminals at once, each with its share of the VMs."""
    shares = [[f"vm{number}" for number in range(first, vms, len(sites))] for first in range(len(sites))]
    begin = time.perf_counter_ns()
    with ThreadPoolExecutor(len(sites)) as pool:
        parts = list(pool.map(_one_after_the_other, sites, shares, [command] * len(sites)))
    took_s = (time.perf_counter_ns() - begin) / _NS_PER_S
    times = [time_ns for part in parts for time_ns in part]
    figure = Figure.of_times(times, "ms")
    slowest = sorted(times)[min(len(times) - 1, len(times) * 99 // 100)] / 1e6  # as the 95th percentile is taken
    return [
        Row(words, "ms", figure, note=f"{len(sites)} terminals at once, each with one command at a time"),
        Row(f"{words}: 99th percentile", "ms", Figure(slowest, samples=len(times))),
        Row(f"{words}: throughput", "VMs/s", Figure(vms / took_s)),
    ]


def _machines(cloud: CloudStack) -> list[int]:
    """Process ids of the machines on all hosts."""
    directories = [host.agent_state.resolve() for host in cloud.hosts]
    return [
        pid
        for path, pid in find_machines("machine").items()
        if any(path.resolve().is_relative_to(directory) for directory in directories)
    ]


def _while_all_run(cloud: CloudStack, vms: int) -> list[Row]:
    machines = [pss_kib(pid) for pid in _machines(cloud)]
    assert len(machines) == vms, f"{len(machines)} machines of {vms} VMs"
    return [
        Row("machine of a VM, while all run", "KiB", Figure(statistics.mean(machines), samples=vms), note=_MEAN),
        *_parts(cloud, "while all run", has_targets=False),
    ]


_MEAN = "mean PSS per process, of the emulated VM itself: Python and what it has loaded"


def _parts(cloud: CloudStack, when: str, *, has_targets: bool) -> list[Row]:
    """PSS of what there is one of, or one of each host."""
    (platform,) = cloud.replicas
    agents = [host.agent.process for host in cloud.hosts]
    weights = (
        ("platform", [pss_kib(platform.process.pid)] if platform.process else [], _PLATFORM_TARGET_KIB),
        ("largest agent", [pss_kib(agent.pid) for agent in agents if agent], _AGENT_TARGET_KIB),
        (
            "largest secure processor, all its processes",
            [sp_memory(host.sp).total for host in cloud.hosts],
            _SP_TARGET_KIB,
        ),
    )
    return [
        Row(f"{name}, {when}", "KiB", Figure(max(kib)), target=target if has_targets else None)
        for name, kib, target in weights
    ]


def measure_cloud(scratch: Path, *, vms: int, progress: Progress) -> Section:
    """A cloud of its own, on SQLite.

    Args:
        scratch: where it can be made.
        vms: how many.
        progress: is told what is going on.
    """
    progress("a cloud of two hosts")
    with ExitStack() as cleanup:
        cloud = cleanup.enter_context(CloudStack(scratch / "c", _HOSTS))
        account = cloud.user("user").account()
        sites = [
            Site(cloud.keyring(f"terminal-{number}"), cleanup.enter_context(Platform(account)))
            for number in range(min(_TERMINALS, vms))
        ]
        rows, memory = list[Row](), _parts(cloud, "before", has_targets=False)
        for number, (words, command) in enumerate(_PHASES):
            progress(f"cloud: {vms} VMs: {words}")
            rows += _phase(sites, vms, words, command)
            if number == 0:
                memory += _while_all_run(cloud, vms)
        memory += _parts(cloud, "after all have left", has_targets=True)
    return Section(
        f"Cloud: {vms} VMs on {_HOSTS} hosts, through the platform on SQLite",
        rows + memory,
        ["Everything, the terminals too, shares this machine. Memory: PSS. swtpm has no such thing."],
    )
