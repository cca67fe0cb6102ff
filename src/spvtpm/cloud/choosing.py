"""Chooses a host that answers, and writes it down. Steps come in.

A host that was online a moment ago may be gone since, and would be waited for; so each is asked before it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from spvtpm.cloud import handoffs, hosts
from spvtpm.cloud.placement import Candidate, choose
from spvtpm.wire.errors import SpvtpmError
from spvtpm.wire.platform_errors import NoHost, Unavailable

if TYPE_CHECKING:
    from sqlalchemy import Connection, Row

    from spvtpm.cloud.undertakings import Undertaking
    from spvtpm.wire.platform_api import Wants


_UNTOLD: Final = "it has still to hear how an earlier move of the VM ended"


@dataclass(frozen=True, slots=True)
class Choice:
    """What a host is chosen for. Each function works in a transaction that has the VM's row locked.

    Attributes:
        is_made: whether one was chosen before.
        wants: which hosts will do; raises if none can.
        make: writes down which one it is.
    """

    is_made: Callable[[Connection, Row[Any]], bool]
    wants: Callable[[Row[Any]], Wants]
    make: Callable[[Connection, Row[Any], str], None]


def choose_host(work: Undertaking, choice: Choice) -> None:
    """Chooses the best host that answers; none where the VM is, or which has not heard yet how an earlier move of it ended.

    Raises:
        NoHost: none will do.
        Unavailable: none will do, and one would that does not answer, or has still to hear of an earlier move.
        NotCurrent: the operation is over.
    """
    answering: set[str] = set()
    silent: dict[str, str] = {}
    while True:
        with work.database.begin() as connection:
            vm = work.locked_vm(connection)
            if choice.is_made(connection, vm):
                return
            against = dict.fromkeys(handoffs.hosts_to_tell(connection, vm.vm_id), _UNTOLD)
            if vm.host is not None:
                against[vm.host] = "the VM is there"
            host = _best(choice.wants(vm), hosts.candidates(connection), against, silent)
            if host in answering:
                choice.make(connection, vm, host)
                return
            agent = hosts.agent_of(connection, work.agents, host)
        try:
            agent.host_report()
        except SpvtpmError as error:
            silent[host] = str(error)
        else:
            answering.add(host)


def _best(wants: Wants, candidates: list[Candidate], against: Mapping[str, str], silent: Mapping[str, str]) -> str:
    failures = {**silent, **against}
    try:
        return choose(
            wants, [replace(one, failure=failures[one.name]) if one.name in failures else one for one in candidates]
        )
    except NoHost as error:
        if silent or _UNTOLD in against.values():  # it may be back soon
            raise Unavailable(str(error)) from None
        raise
