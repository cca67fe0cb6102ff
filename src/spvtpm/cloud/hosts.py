"""Hosts as the database has them: which are online, how full they are."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import Connection, Row, func, select

from spvtpm.cloud import handoffs, tables
from spvtpm.cloud.placement import Candidate
from spvtpm.wire.agent_api import HostReport

if TYPE_CHECKING:
    from spvtpm.cloud.agents import Agent, Agents

ONLINE_WITHIN_S: Final = 15.0
"""A host whose agent has not answered for so long is not online."""


def is_online(host: Row[Any], now_s: float) -> bool:
    """Whether the host's agent answered lately, with nothing wrong.

    Args:
        host: a row of the table `hosts`.
        now_s: seconds since 1970.
    """
    return not host.failure and host.seen_s is not None and now_s - host.seen_s < ONLINE_WITHIN_S


def report_of(host: Row[Any]) -> HostReport | None:
    """What the host's agent said last, from a row of the table `hosts`."""
    return None if host.report is None else msgspec.convert(host.report, HostReport)


def placed_vms(connection: Connection) -> dict[str, int]:
    """How many VMs are placed at each host that has any."""
    rows = connection.execute(
        select(tables.vms.c.host, func.count()).where(tables.vms.c.host.is_not(None)).group_by(tables.vms.c.host)
    )
    return {str(host): count for host, count in rows}


def candidates(connection: Connection) -> list[Candidate]:
    """All hosts for a placement. They stay as they are until the transaction ends, and so does what is placed at them."""
    rows = connection.execute(select(tables.hosts).order_by(tables.hosts.c.name).with_for_update()).all()
    placed, now_s = Counter(placed_vms(connection)) + handoffs.coming(connection), time.time()
    return [Candidate(row.name, _against(row, now_s), report_of(row), placed[row.name]) for row in rows]


def _against(host: Row[Any], now_s: float) -> str:
    if is_online(host, now_s):
        return "draining" if host.is_draining else ""
    is_fresh = host.seen_s is not None and now_s - host.seen_s < ONLINE_WITHIN_S
    return host.failure if is_fresh and host.failure else "not online"


def agent_if_known(connection: Connection, agents: Agents, host: str) -> Agent | None:
    """The agent of a host that may have been forgotten meanwhile; None: it was."""
    row = connection.execute(select(tables.hosts).where(tables.hosts.c.name == host)).one_or_none()
    return None if row is None else agents.agent(row.name, row.address, row.token)


def agent_of(connection: Connection, agents: Agents, host: str) -> Agent:
    """The agent of a host that has VMs."""
    row = connection.execute(select(tables.hosts).where(tables.hosts.c.name == host)).one()
    return agents.agent(row.name, row.address, row.token)
