"""Replicas that beat, fall silent and come back; on a clock of the test."""

from __future__ import annotations

from sqlalchemy import select

from spvtpm.cloud.replicas import DEAD_AFTER_S, Replicas
from spvtpm.cloud.tables import replicas
from tests.cloud.platform_database import PlatformDatabase


class Clock:
    """Seconds, as the test has them."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def names(platform: PlatformDatabase) -> set[str]:
    with platform.engine.connect() as connection:
        return set(connection.scalars(select(replicas.c.executor_id)))


def test_a_silent_replica_is_found_by_one_of_the_others(platform: PlatformDatabase) -> None:
    clock = Clock()
    a, b, c = (Replicas(platform.engine, name, clock) for name in "abc")
    for one in (c, a, b):
        assert one.beat() == []
    found: list[list[str]] = []
    for _ in range(int(DEAD_AFTER_S) // 2):
        clock.now_s += 2
        found += [a.beat(), b.beat()]
    assert [dead for dead in found if dead] == [["c"]]
    assert found[-2:] == [["c"], []]
    a.bury("c")
    assert names(platform) == {"a", "b"}


def test_who_took_the_dead_over_and_died_itself_is_followed_by_another(platform: PlatformDatabase) -> None:
    clock = Clock()
    a, b, c = (Replicas(platform.engine, name, clock) for name in "abc")
    for one in (c, a, b):
        one.beat()
    while a.beat() != ["c"]:
        b.beat()
        clock.now_s += 2
    found: set[str] = set()  # `a` is silent from here on
    for _ in range(20):
        clock.now_s += 2
        found |= set(b.beat())
    assert found == {"a", "c"}


def test_one_that_came_back_is_not_buried(platform: PlatformDatabase) -> None:
    clock = Clock()
    a, c = (Replicas(platform.engine, name, clock) for name in "ac")
    c.beat()
    a.beat()
    while a.beat() != ["c"]:
        clock.now_s += 2
    c.beat()
    a.bury("c")
    assert names(platform) == {"a", "c"}
    clock.now_s += 2
    assert a.beat() == []


def test_who_could_not_look_for_a_while_believes_nobody_dead(platform: PlatformDatabase) -> None:
    clock = Clock()
    a, c = (Replicas(platform.engine, name, clock) for name in "ac")
    c.beat()
    a.beat()
    clock.now_s += 60  # the database was away, for both
    assert a.beat() == []
    c.beat()
    clock.now_s += 2
    assert a.beat() == []


def test_clocks_that_differ_do_not_matter(platform: PlatformDatabase) -> None:
    ours, theirs = Clock(), Clock()
    theirs.now_s = 5.0
    a, c = Replicas(platform.engine, "a", ours), Replicas(platform.engine, "c", theirs)
    for _ in range(20):
        ours.now_s += 2
        theirs.now_s += 2
        assert a.beat() == c.beat() == []
