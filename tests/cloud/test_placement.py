"""Which host takes a VM."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.cloud.placement import Candidate, choose
from spvtpm.wire.agent_api import HostReport
from spvtpm.wire.platform_api import Wants
from spvtpm.wire.platform_errors import NoHost
from tests.cloud.agent_double import PAPERS

CHIPS = ["0a" * 16, "0b" * 16, "0c" * 16]


def host(
    name: str, *, chip: str = CHIPS[0], firmware: int = 1, placed: int = 0, max_vms: int = 64, failure: str = ""
) -> Candidate:
    """A host."""
    report = HostReport(
        chip_id=chip,
        firmware=firmware,
        software="1",
        max_vms=max_vms,
        vms=0,
        active=0,
        parked=0,
        missing_protection=[],
        papers=PAPERS,
    )
    return Candidate(name, failure, report, placed)


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    names = draw(st.lists(st.from_regex(r"[a-z]{1,3}", fullmatch=True), unique=True, max_size=8))
    return [
        host(
            name,
            chip=draw(st.sampled_from(CHIPS)),
            firmware=draw(st.integers(0, 3)),
            placed=draw(st.integers(0, 4)),
            max_vms=draw(st.integers(0, 4)),
            failure=draw(st.sampled_from(["", "", "not online"])),
        )
        for name in names
    ]


wants = st.builds(
    Wants,
    chips=st.none() | st.lists(st.sampled_from(CHIPS), min_size=1, max_size=3),
    minimum_firmware=st.integers(0, 3),
    host=st.none() | st.from_regex(r"[a-z]", fullmatch=True),
)


def will_do(wanted: Wants, one: Candidate) -> bool:
    """The rule, said once more."""
    report = one.report
    return (
        report is not None
        and not one.failure
        and wanted.host in {None, one.name}
        and (wanted.chips is None or report.chip_id in wanted.chips)
        and report.firmware >= wanted.minimum_firmware
        and one.placed < report.max_vms
    )


@given(wants, candidates())
def test_the_least_loaded_of_those_that_will_do_is_chosen_and_else_each_has_its_clause(
    wanted: Wants, hosts: list[Candidate]
) -> None:
    fit = {one.name: one for one in hosts if will_do(wanted, one)}
    if fit:
        chosen = fit[choose(wanted, hosts)]
        loads = {one.name: one.placed / one.report.max_vms for one in fit.values() if one.report is not None}
        assert (loads[chosen.name], chosen.name) == min((load, name) for name, load in loads.items())
        assert choose(wanted, hosts[::-1]) == chosen.name
    else:
        with pytest.raises(NoHost) as refused:
            choose(wanted, hosts)
        asked = [one.name for one in hosts] if wanted.host is None or not hosts else [wanted.host]
        assert all(f"{name}: " in str(refused.value) for name in asked)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_placed_one_by_one_loads_stay_even_and_no_host_is_overfilled(sizes: list[int]) -> None:
    placed = [0] * len(sizes)
    for _ in range(sum(sizes)):
        hosts = [host(f"h{number}", placed=placed[number], max_vms=size) for number, size in enumerate(sizes)]
        placed[int(choose(Wants(), hosts)[1:])] += 1
        fractions = [Fraction(count, size) for count, size in zip(placed, sizes, strict=True)]
        assert max(fractions) - min(fractions) <= Fraction(1, min(sizes))
    assert placed == sizes


def test_the_sentence_names_each_host_and_why() -> None:
    hosts = [
        host("h1", chip=CHIPS[1]),
        host("h2", placed=64),
        host("h3", failure="not online"),
        host("h4", firmware=0),
        Candidate("h5", "", None, 0),
    ]
    with pytest.raises(NoHost) as refused:
        choose(Wants(chips=[CHIPS[0]], minimum_firmware=1), hosts)
    assert str(refused.value) == (
        "no host takes the VM: h1: chip not in the list; h2: full (64 of 64); h3: not online; "
        "h4: firmware 0 is older than 1; h5: not online"
    )


def test_without_hosts_and_with_very_many_the_sentence_stays_short() -> None:
    with pytest.raises(NoHost, match="the platform has none"):
        choose(Wants(), [])
    with pytest.raises(NoHost, match="and 80 more") as refused:
        choose(Wants(minimum_firmware=9), [host(f"host-{number:03}") for number in range(100)])
    assert len(str(refused.value)) < 2048
    with pytest.raises(NoHost, match=r": elsewhere: there is no such host$"):
        choose(Wants(host="elsewhere"), [host("host-1")])
