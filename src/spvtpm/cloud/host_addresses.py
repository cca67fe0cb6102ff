"""Hosts: which there are, and how their agents are reached. Routes, relay and the command line come in."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from spvtpm.cloud import handoffs, queries
from spvtpm.cloud.tables import hosts, vms
from spvtpm.wire.errors import NotFound, WrongState
from spvtpm.wire.platform_api import Host, HostAddress

if TYPE_CHECKING:
    import uuid


@dataclass(frozen=True, slots=True)
class AgentAddress:
    """How a host's agent is reached.

    Attributes:
        host: the host's name.
        address: `unix:/path`, `http://…` or `https://…`.
        token: that the agent wants to hear; a secret.
    """

    host: str
    address: str
    token: str

    def __repr__(self) -> str:
        return f"AgentAddress({self.host!r}, {self.address!r})"


def set_host(connection: Connection, name: str, address: HostAddress) -> Host:
    """Makes a host known, or changes how its agent is reached."""
    where = {"address": address.address, "token": address.token}
    if connection.execute(update(hosts).where(hosts.c.name == name).values(where)).rowcount == 0:
        try:
            with connection.begin_nested():
                connection.execute(insert(hosts).values(name=name, failure="", created_s=time.time(), **where))
        except IntegrityError:  # somebody else has, just now
            connection.execute(update(hosts).where(hosts.c.name == name).values(where))
    return queries.find_host(connection, name)


def remove_host(connection: Connection, name: str) -> None:
    """Forgets a host.

    Raises:
        NotFound: there is none of this name.
        WrongState: VMs are placed there, or moving there.
    """
    moving = handoffs.count_undecided(connection, name)
    if moving:
        raise WrongState(f"VMs are moving to or from host {name}: {moving}; it has to be settled first where they are")
    try:
        with connection.begin_nested():
            handoffs.forget_host(connection, name)
            if connection.execute(delete(hosts).where(hosts.c.name == name)).rowcount == 0:
                raise NotFound(f"there is no host {name}")
    except IntegrityError:
        count = connection.scalar(select(func.count()).where(vms.c.host == name))
        raise WrongState(f"VMs are placed at host {name}: {count}; they have to be released first") from None


def agent_of_chip(connection: Connection, chip_id: str) -> AgentAddress:
    """The agent of the host that a chip is in.

    Raises:
        NotFound: no host has it.
    """
    row = connection.execute(
        select(hosts.c.name, hosts.c.address, hosts.c.token).where(hosts.c.chip_id == chip_id)
    ).one_or_none()
    if row is None:
        raise NotFound(f"there is no chip {chip_id}")
    return AgentAddress(*row)


def agent_of_host(connection: Connection, name: str) -> AgentAddress:
    """The agent of a host.

    Raises:
        NotFound: there is none of this name.
    """
    row = connection.execute(
        select(hosts.c.name, hosts.c.address, hosts.c.token).where(hosts.c.name == name)
    ).one_or_none()
    if row is None:
        raise NotFound(f"there is no host {name}")
    return AgentAddress(*row)


def agent_of_vm(connection: Connection, user: str, vm_id: uuid.UUID) -> AgentAddress:
    """The agent of the host where a VM is placed.

    Raises:
        NotFound: the user has no such VM.
        WrongState: it has no host.
    """
    vm = queries.find_vm(connection, user, vm_id)
    if vm.host is None:
        raise WrongState(f"VM {vm.name} is {vm.state}: it has no host")
    return agent_of_host(connection, vm.host)
