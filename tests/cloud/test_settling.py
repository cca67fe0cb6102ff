"""Moves in any order of steps, faults and latecomers: at every moment at most one host runs the VM, and in the end one does."""

from __future__ import annotations

import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import insert, select

from spvtpm.cloud import handoffs, operations, tables
from spvtpm.cloud.agents import Agents
from spvtpm.cloud.handoffs import Handoff
from spvtpm.cloud.moves import MOVES, undo_move
from spvtpm.cloud.settling import Settler
from spvtpm.cloud.undertakings import NotCurrent, Undertaking, WentThrough
from spvtpm.wire.agent_api import HandoffReport, Order, VmReport
from spvtpm.wire.errors import NotRunning, SpvtpmError
from spvtpm.wire.platform_errors import OperationUnderWay
from spvtpm.wire.problems import problem_of
from tests.cloud.agent_double import AgentDouble, DoubleVm
from tests.cloud.moving_double import Arrival, Departure, shown
from tests.cloud.platform_database import PlatformDatabase

VM = uuid.UUID(int=1)
Fault = Literal["lost", "answer lost"]
Disturbance = tuple[str, int, str, Fault]


_WAY = ("begin", "choose-destination", "depart", "arrive", "link", "hear", "go-on", "tell", "end", "look")
"""Of a migration that nothing disturbs."""

_DISTURBANCES = (
    "fault",
    "hear",
    "look",
    "undo",
    "end",
    "give up",
    "begin",
    "depart",
    "arrive",
    "go-on",
    "read",
    "slow",
)


class Moves(RuleBasedStateMachine):
    """One VM, two hosts, and replicas that do their parts of its moves whenever they like."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="spvtpm-")
        here = Path(self.directory.name)
        self.platform = PlatformDatabase(f"sqlite:///{here / 'p.sqlite'}")
        self.doubles = {name: AgentDouble(here / f"{name}.sock", name[1] * 32) for name in ("h1", "h2")}
        self.agents = Agents()
        self.faults: dict[str, Fault] = {}
        self.works: list[Undertaking] = []
        self.read: list[Handoff] = []
        self.settler = Settler(self.platform.engine, self.agents)

    @initialize()
    def place(self) -> None:
        """The VM runs at h1."""
        first, second = self.doubles.values()
        first.others, second.others = [second], [first]
        for name, double in self.doubles.items():
            double.before_order, double.after_order = self._fails(name, "lost"), self._fails(name, "answer lost")
            self.platform.add_host(name, double)
            seen = {"seen_s": 2e9 + time.time(), "report": msgspec.to_builtins(double.host_report())}
            self._write(tables.hosts.update().where(tables.hosts.c.name == name).values(seen))
        first.vms[VM] = DoubleVm(sequence=1, want="running", block="running", machine="running", boots=1)
        row = {"vm_id": VM, "user": "ada", "name": "one", "state": "running", "host": "h1", "wants": {}, "sequence": 4}
        rest = {"vtpm": "active", "boots": 1, "failure": "", "created_s": 0.0, "changed_s": 0.0}
        self._write(insert(tables.vms).values(**row, **rest))

    def _fails(self, name: str, fault: Fault) -> Callable[[uuid.UUID, Order], None]:
        def fail(_vm: uuid.UUID, _order: Order) -> None:
            if self.faults.get(name) == fault:
                del self.faults[name]
                raise NotRunning("nobody heard of it")

        return fail

    def _write(self, statement: Any) -> None:
        with self.platform.engine.begin() as connection:
            connection.execute(statement)

    # What happens. One rule for all, for Hypothesis likes to leave rules out.

    @rule(
        far=st.sampled_from([4, 4, 3, 3, 2, 1, 0]),  # what comes first is drawn most
        ahead_of=st.dictionaries(
            st.sampled_from(_WAY),
            st.tuples(
                st.sampled_from(_DISTURBANCES),
                st.sampled_from([0, 0, 0, 1, 2]),
                st.sampled_from(["h1", "h2"]),
                st.sampled_from(["lost", "answer lost"]),
            ),
            min_size=1,
            max_size=4,
        ),
        left_out=st.one_of(
            st.just({"go-on", "tell", "look"}),  # it has gone, and nobody sees to it
            st.sets(st.sampled_from(["go-on", "hear", "tell", "end", "look"]), min_size=1),
            st.sets(st.sampled_from(_WAY), max_size=2),
        ),
        ends=st.sampled_from(["give up", "end"]),
        is_done_twice=st.booleans(),
    )
    def migrate(
        self, far: int, ahead_of: dict[str, Disturbance], left_out: set[str], ends: str, is_done_twice: bool
    ) -> None:
        """A migration, with something else ahead of some of its parts, and without others; `far` is its link."""
        for part in _WAY:
            if part in ahead_of:
                what, late, host, fault = ahead_of[part]
                self.happen(what, late, far, host, fault)
            if part == "go-on" and is_done_twice:
                self.read.extend(self._all_handoffs())
            if part not in left_out:
                self.happen(ends if part == "end" else part, 0, far, "h1", "lost")
            if part == "go-on" and is_done_twice:
                self.settle_slowly()
            self.never_two()

    def happen(self, what: str, late: int, far: int, host: str, fault: Fault) -> None:
        """Whatever it is, to the newest migration, or, late, to an older one."""
        match what:
            case "begin":
                self.begin()
            case "look":
                self.look()
            case "link":
                self.link(far)
            case "fault":
                self.faults[host] = fault
            case "read":
                self.read.extend(self._all_handoffs())
            case "slow":
                self.settle_slowly()
            case _ if not self.works:
                pass
            case "hear":
                self.hear(self._work(late))
            case "end" | "give up":
                self.end(is_undone=what == "end")
            case "undo":
                self._do(self._work(late), undo_move)
            case "tell":
                self._do(self._work(late), lambda work: work.settler.tell(self._decided(work)))
            case _:
                self._do(self._work(late), MOVES[what])

    def _work(self, late: int) -> Undertaking:
        return self.works[max(0, len(self.works) - 1 - late)]

    def begin(self) -> None:
        """A user asks for a migration; refused while another is not decided."""
        is_undecided = any(not one.is_decided for one in self._all_handoffs())
        with suppress(OperationUnderWay):
            asked = self.platform.submit("migrate", VM)
            with self.platform.engine.connect() as connection:
                row = connection.execute(
                    select(tables.operations).where(tables.operations.c.operation_id == asked.operation_id)
                ).one()
            work = Undertaking(
                asked.operation_id, "migrate", VM, row.sequence, self.platform.engine, self.agents, threading.Event()
            )
            self.works.append(work)
            assert not is_undecided

    def _all_handoffs(self) -> list[Handoff]:
        with self.platform.engine.connect() as connection:
            found = connection.scalars(select(tables.handoffs.c.operation)).all()
            return [handoff for one in found if (handoff := handoffs.find(connection, one)) is not None]

    def _decided(self, work: Undertaking) -> Handoff:
        with self.platform.engine.connect() as connection:
            handoff = handoffs.find(connection, work.operation_id)
        if handoff is None or not handoff.is_decided:
            raise NotCurrent
        return handoff

    def settle_slowly(self) -> None:
        """A replica settles what it read a while ago."""
        read, self.read = self.read, []
        for handoff in read:
            with suppress(SpvtpmError):
                self.settler.tell(self.settler.decide(handoff))

    def _do(self, work: Undertaking, part: Callable[[Undertaking], None]) -> None:
        with self.platform.engine.connect() as connection:
            handoff = handoffs.find(connection, work.operation_id)
        # The parts before it are done, or it would not be begun.
        if part is MOVES["arrive"] and (handoff is None or handoff.handoff is None):
            return
        if part is MOVES["go-on"] and (handoff is None or handoff.outcome != "gone"):
            return
        with suppress(SpvtpmError, NotCurrent, WentThrough):
            part(work)

    def link(self, far: int) -> None:
        """A link comes as far as this, then it ends."""
        for here, there in (("h1", "h2"), ("h2", "h1")):
            leaving, arriving = self._move(here), self._move(there)
            if isinstance(leaving, Departure) and isinstance(arriving, Arrival):
                break
        else:
            return
        if leaving.handoff != arriving.handoff or leaving.outcome != "open" or arriving.has_come:
            return
        arriving.shown, leaving.receipt = shown(leaving.commit) + shown(leaving.abort), shown(arriving.receipt)
        if far >= 1:
            leaving.halt()
        if far >= 2:
            arriving.has_state = True
        if far >= 3:
            leaving.outcome = "gone"
        else:
            leaving.take_back("the link was lost")
        arriving.is_whole = far >= 4

    def _move(self, host: str) -> Departure | Arrival | None:
        vm = self.doubles[host].vms.get(VM)
        return None if vm is None else vm.move

    def hear(self, work: Undertaking) -> None:
        """A replica that carries asks the source."""
        with self.platform.engine.connect() as connection:
            handoff = handoffs.find(connection, work.operation_id)
        if handoff is not None:
            work.settler.hear(handoff, self.doubles[handoff.source].report(VM))

    def end(self, is_undone: bool) -> None:
        """The newest migration ends, failed: undone, or given up where it is."""
        work = self.works[-1]
        if is_undone:
            self._do(work, undo_move)
        with self.platform.engine.begin() as connection:
            operations.end(connection, work.operation_id, problem_of(NotRunning("given up")))
            handoffs.forget_told(connection, work.operation_id)

    def look(self) -> None:
        """A replica settles what was left."""
        with self.platform.engine.connect() as connection:
            left = handoffs.left_behind(connection)
        for handoff in left:
            self.settler.settle_left_behind(handoff)

    # What has to hold

    @invariant()
    def never_two(self) -> None:
        """Nor is it gone from both."""
        running = [name for name, double in self.doubles.items() if double.runs(VM)]
        assert len(running) <= 1
        assert not any(double.violations for double in self.doubles.values())
        if self.doubles["h1"].vms:
            assert any(double.has(VM) for double in self.doubles.values())

    def each_move_is_told_once(self) -> None:
        """To its owner: each begins where the one before has ended."""
        events = tables.events
        told = select(events.c.detail).where(events.c.what == "migrated").order_by(events.c.number)
        with self.platform.engine.connect() as connection:
            details = connection.scalars(told).all()
        ways = ["from host h1 to host h2", "from host h2 to host h1"]
        assert details == [ways[number % 2] for number in range(len(details))]

    def teardown(self) -> None:
        """Faults stop; whoever looks tries again."""
        try:
            self.faults.clear()
            if self.works:
                self.end(is_undone=True)
            self.settle_slowly()
            for _ in range(2):
                self.look()
            with self.platform.engine.connect() as connection:
                left = connection.execute(select(tables.handoffs)).all()
            assert not left
            vm = self.platform.vm(VM)
            if vm is not None:  # else it was not even placed
                assert vm.operation is None
                assert [name for name, double in self.doubles.items() if double.runs(VM)] == [vm.host]
                assert [name for name, double in self.doubles.items() if double.has(VM)] == [vm.host]
                assert self.doubles[vm.host].vms[VM].want == "running"  # an ordinary VM again
            self.each_move_is_told_once()
        finally:
            self.agents.close()
            for double in self.doubles.values():
                double.down()
            self.platform.close()
            self.directory.cleanup()


TestMoves = pytest.mark.attack("A16")(pytest.mark.claim("C8")(Moves.TestCase))
TestMoves.settings = settings(
    max_examples=60, stateful_step_count=6, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_the_end_of_an_earlier_handoff_is_not_heard_for_that_of_a_later_one() -> None:
    kept = HandoffReport(handoff="1" * 32, outcome="kept", is_linked=False, copied_bytes=0, token="a" * 64)
    report = VmReport(
        vm_id=VM, sequence=3, want="running", machine="running", security_block=None, image=False, handoff=kept
    )
    agents = Agents()
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as directory:
        platform = PlatformDatabase(f"sqlite:///{directory}/p.sqlite")
        for named in (None, "2" * 32):
            later = Handoff(uuid.UUID(int=2), VM, 5, "h1", "h2", named, "open", None, None, "", False)
            assert Settler(platform.engine, agents).hear(later, report) is later
        platform.close()
    agents.close()
