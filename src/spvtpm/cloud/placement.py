"""Which host takes a VM: pure. The owner and the secure processor check for themselves whether it was one that will do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spvtpm.wire.platform_errors import NoHost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spvtpm.wire.agent_api import HostReport
    from spvtpm.wire.platform_api import Wants

_MOST_CLAUSES: Final = 20


@dataclass(frozen=True, slots=True)
class Candidate:
    """A host.

    Attributes:
        name: its name.
        failure: why it takes none now, such as `not online`; empty: it does.
        report: what its agent said last; None: nothing yet.
        placed: how many VMs are placed there.
    """

    name: str
    failure: str
    report: HostReport | None
    placed: int


def choose(wants: Wants, hosts: Sequence[Candidate]) -> str:
    """The name of the host that takes the VM: of those that will do the one with the least load for its size.

    Raises:
        NoHost: none will do; with a clause for each.
    """
    reasons = {host.name: _reason_against(wants, host) for host in hosts}
    fit = [host for host in hosts if not reasons[host.name]]
    if fit:
        return min(fit, key=_load).name
    if not hosts:
        raise NoHost("no host takes the VM: the platform has none")
    if wants.host is not None:  # what the others say against it is nobody's question
        reasons = {wants.host: reasons.get(wants.host, "there is no such host")}
    clauses = [f"{name}: {reason}" for name, reason in sorted(reasons.items())]
    more = f"; and {len(clauses) - _MOST_CLAUSES} more" if len(clauses) > _MOST_CLAUSES else ""
    raise NoHost(f"no host takes the VM: {'; '.join(clauses[:_MOST_CLAUSES])}{more}")


def _load(host: Candidate) -> tuple[float, str]:
    size = host.report.max_vms if host.report is not None else 0
    return host.placed / max(size, 1), host.name


def _reason_against(wants: Wants, host: Candidate) -> str:
    if wants.host is not None and host.name != wants.host:
        return "not the host asked for"
    report = host.report
    if host.failure or report is None:
        return host.failure or "not online"
    if wants.chips is not None and report.chip_id not in wants.chips:
        return "chip not in the list"
    if report.firmware < wants.minimum_firmware:
        return f"firmware {report.firmware} is older than {wants.minimum_firmware}"
    if host.placed >= report.max_vms:
        return f"full ({host.placed} of {report.max_vms})"
    return ""
