"""A hundred commands of owners to a whole cloud, while its parts are killed: nothing is in limbo, no vTPM is lost or doubled."""

from __future__ import annotations

import random
import re
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, Row, select

from spvtpm.cli.vm_parts import run_quietly
from spvtpm.cloud import tables
from spvtpm.cloud.agents import Agent
from spvtpm.cloud.database import Database
from spvtpm.cloud.service import replica_id
from spvtpm.terminal.machines import Site
from spvtpm.terminal.whereabouts import Destroyed, InFile
from spvtpm.wire.agent_api import VmReport
from spvtpm.wire.instance_file import MAX_FILE_BYTES, parse_instance_header
from tests.balancer import Balancer
from tests.cloud_stack import CloudHost, CloudStack, Daemon
from tests.crashes.lives import Lives
from tests.postgres import Database as PostgresDatabase

SEED = 4  # another one finds other moments
OWNERS, VMS_EACH, COMMANDS = 2, 4, 100


class Crowd:
    """A cloud, and owners who use it by one address.

    Args:
        cloud: the cloud.
        database: the platform's.
        sites: of the owners.
    """

    def __init__(self, cloud: CloudStack, database: Engine, sites: list[Site]) -> None:
        self.cloud, self.database, self.sites = cloud, database, sites

    def rows(self, table: Any) -> list[Row[Any]]:
        """All that is in a table of the platform."""
        with self.database.connect() as connection:
            return list(connection.execute(select(table)).all())


@contextmanager
def crowd(replicas: int, database_url: str | None = None) -> Iterator[Crowd]:
    """A cloud of two hosts."""
    with ExitStack() as cleanup:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="spvtpm-"))) / "c"
        cloud = cleanup.enter_context(CloudStack(directory, 2, replicas, database_url))
        balancer = cleanup.enter_context(
            Balancer(directory / "all.sock", [Path(url.removeprefix("unix:")) for url in cloud.urls])
        )
        database = Database(database_url or f"sqlite:///{directory / 'cloud-0' / 'platform.sqlite'}")
        cleanup.callback(database.close)
        sites = [cleanup.enter_context(cloud.user(f"owner{number}").site(balancer.url)) for number in range(OWNERS)]
        yield Crowd(cloud, database.engine, sites)


def eventually(holds: Callable[[], object], within_s: float = 60.0) -> None:
    """Waits for something that the platform does by itself; `holds` gives what is still missing."""
    deadline = time.monotonic() + within_s
    while missing := holds():
        assert time.monotonic() < deadline, missing
        time.sleep(0.1)


def reports(host: CloudHost) -> dict[uuid.UUID, VmReport]:
    """Of a host's agent, but for VMs that it only remembers to have had."""
    agent = Agent(host.name, host.address, host.token_file.read_text().strip())
    try:
        found = {report.vm_id: report for report in agent.vm_reports()}
    finally:
        agent.close()
    return {vm_id: it for vm_id, it in found.items() if it.want not in (None, "absent") or it.security_block}


def disagreements(crowd: Crowd) -> list[str]:
    """Where the platform, the agents and the secure processors do not say the same."""
    found, vms = [], {vm.vm_id: vm for vm in crowd.rows(tables.vms)}
    for host in crowd.cloud.hosts:
        blocks, told = {vm.vm_id: vm for vm in host.sp.vms()}, reports(host)
        placed = {vm_id for vm_id, vm in vms.items() if vm.host == host.name}
        if not placed == told.keys() == blocks.keys():
            found.append(f"{host.name}: platform {placed}, agent {told.keys()}, secure processor {blocks.keys()}")
            continue
        for vm_id in placed:
            machine = "running" if blocks[vm_id].state == "running" else "none"
            block = told[vm_id].security_block
            says = (vms[vm_id].state, told[vm_id].machine, block.state if block else "")
            if says != (blocks[vm_id].state, machine, blocks[vm_id].state):
                found.append(f"{vm_id}: {says}, secure processor {blocks[vm_id].state}")
    found += [f"{vm.vm_id} is {vm.state} and has no host" for vm in vms.values() if not vm.host and vm.state != "away"]
    return found


def verify_vtpms(crowd: Crowd) -> None:
    """Each vTPM that was made and not destroyed exists once, in a secure processor or in its owner's file."""
    there = Counter(str(vm.vtpm.vtpm_id) for host in crowd.cloud.hosts for vm in host.sp.vms() if vm.vtpm)
    expected = set()
    for site in crowd.sites:
        known = [known for known in site.keyring.content.vtpms if not isinstance(known.place, Destroyed)]
        expected |= {str(one.vtpm_id) for one in known}
        files = {Path(one.place.path): one for one in known if isinstance(one.place, InFile)}
        assert set(site.keyring.instances().iterdir()) == set(files)
        for path, one in files.items():
            assert path.stat().st_size <= MAX_FILE_BYTES
            assert parse_instance_header(path.read_bytes()).vtpm_id == one.vtpm_id
            there[str(one.vtpm_id)] += 1
    assert set(there) == expected
    assert set(there.values()) <= {1}


def verify(crowd: Crowd, lives: Lives) -> None:
    """Whatever was killed: every operation has ended, all say the same, no vTPM is lost or doubled, and what runs answers."""
    eventually(lambda: [row for row in crowd.rows(tables.operations) if row.state not in ("done", "failed")])
    failed = [row.error for row in crowd.rows(tables.operations) if row.state == "failed"]
    assert all(error["code"] and error["detail"] for error in failed)
    assert not [vm for vm in crowd.rows(tables.vms) if vm.operation is not None]
    eventually(lambda: disagreements(crowd))
    verify_vtpms(crowd)
    names = {vm.vm_id: vm.state for vm in crowd.rows(tables.vms)}
    running = 0
    for site, name in lives.names:
        owned = site.keyring.vm(name)
        if owned is not None and names[owned.vm_id] == "running":
            code, output, errors = run_quietly(site, name, ("tpm2_getrandom", "8"))
            assert (code, len(output)) == (0, 8), errors
            running += 1
    assert running >= len(lives.names) // 2


@dataclass
class Toll:
    """What was killed, and what it met.

    Attributes:
        kills: how many.
        met: operations that were under way then, all kills together.
    """

    kills: int = 0
    met: int = 0

    def count(self, crowd: Crowd) -> None:
        """Somebody was killed just now."""
        self.kills += 1
        self.met += sum(row.state == "running" for row in crowd.rows(tables.operations))


def live(crowd: Crowd, disturb: Callable[[Lives, random.Random, Toll], None]) -> None:
    """A hundred commands, with kills in the midst of operations, and a look at what is left."""
    lives, toll = Lives(crowd.sites, VMS_EACH, COMMANDS, SEED), Toll()
    try:
        lives.run(lambda chance: disturb(lives, chance, toll))
        verify(crowd, lives)
    finally:
        print(f"seed {SEED}: {toll}; {lives.done.total()} commands done: {dict(lives.done)}; said in vain:")
        print("\n".join(f"  {word}: {failure}" for word, failure in lives.failures))
        print(Counter((row.kind, row.state) for row in crowd.rows(tables.operations)))
    assert toll.kills  # how many is a matter of time: a dead replica's work is waited for
    assert toll.met


def live_while_one_dies(
    crowd: Crowd, kill: Callable[[random.Random], Callable[[], None]], pause: tuple[int, int]
) -> None:
    """The same, with somebody killed at random moments, and started again some moment later.

    Args:
        crowd: who lives.
        kill: kills; gives what starts whoever it was.
        pause: how many commands are begun in between, at least and at most.
    """

    def disturb(lives: Lives, chance: random.Random, toll: Toll) -> None:
        while not lives.wait(chance.randint(*pause)):
            lives.wait(COMMANDS, chance.random())
            start_again = kill(chance)
            toll.count(crowd)
            lives.wait(COMMANDS, chance.random())
            start_again()

    live(crowd, disturb)


class Pair:
    """Two replicas on one PostgreSQL.

    Args:
        crowd: whose they are.
        database: in which DBOS has its tables, too.
    """

    def __init__(self, crowd: Crowd, database: PostgresDatabase) -> None:
        self.replicas = crowd.cloud.replicas
        self._names = [replica_id(crowd.cloud.directory / f"cloud-{number}") for number in range(2)]
        self._database = database

    def busy_one(self) -> Daemon | None:
        """The replica that works on most operations now; None: none works."""
        asked = "select executor_id from dbos.workflow_status where status = 'PENDING'"
        found = Counter(self._database.query(asked).split()).most_common(1)
        return self.replicas[self._names.index(found[0][0])] if found else None

    def taken_over(self) -> list[int]:
        """How many operations each of the dead had begun that the other one went on with, as their logs say."""
        logs = "".join(replica.log() for replica in self.replicas)
        return [int(count) for count in re.findall(r"is dead; it had begun (\d+) operations", logs)]


def test_a_replica_is_killed_and_the_other_one_goes_on(postgres: PostgresDatabase) -> None:
    with crowd(2, postgres.url) as it:
        pair = Pair(it, postgres)

        def kill_one(lives: Lives, chance: random.Random, toll: Toll) -> None:
            while not lives.wait(chance.randint(5, 12)):
                victim = pair.busy_one()
                if victim is None:
                    continue
                victim.kill()
                toll.count(it)
                if not toll.met:  # what it was busy with has just ended
                    victim.start()
                    continue
                if sum(pair.taken_over()) and chance.random() < 0.4:
                    lives.wait(COMMANDS, chance.random())
                else:  # until the other one has its work, or for good
                    before = len(pair.taken_over())
                    while len(pair.taken_over()) == before:
                        if lives.wait(COMMANDS, 0.5):
                            return
                victim.start()

        live(it, kill_one)
        assert sum(pair.taken_over())


def test_the_only_replica_is_killed_and_started_again() -> None:
    with crowd(1) as it:
        (replica,) = it.cloud.replicas

        def kill(_chance: random.Random) -> Callable[[], None]:
            replica.kill()
            return replica.start

        live_while_one_dies(it, kill, (6, 12))


def test_agents_are_killed(postgres: PostgresDatabase) -> None:
    with crowd(2, postgres.url) as it:

        def kill(chance: random.Random) -> Callable[[], None]:
            agent = chance.choice(it.cloud.hosts).agent
            agent.kill()
            return agent.start

        live_while_one_dies(it, kill, (5, 10))


def test_secure_processors_are_killed(postgres: PostgresDatabase) -> None:
    with crowd(2, postgres.url) as it:

        def kill(chance: random.Random) -> Callable[[], None]:
            sp = chance.choice(it.cloud.hosts).sp
            sp.kill()
            return sp.start

        live_while_one_dies(it, kill, (6, 12))
