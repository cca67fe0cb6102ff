"""Whom a vTPM is never sent to, and from whom none is taken: before any state leaves."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from spvtpm.wire import messages
from spvtpm.wire.errors import (
    CertificateRevoked,
    ChipNotAllowed,
    FirmwareTooOld,
    MigrationForbidden,
    NotFound,
    RevocationUnknown,
    SpvtpmError,
    TooMany,
    UntrustedIssuer,
    WrongState,
)
from spvtpm.wire.instance_content import Policy
from spvtpm.wire.owner_messages import AskFate, Fate
from tests.harness import RunningSp
from tests.owner import ANYTHING
from tests.papers import new_papers
from tests.processor.migration.pasts import furnish, furnished, is_nowhere, runs
from tests.processor.migration.two_chips import TwoChips, ask, list_of

pytestmark = [pytest.mark.claim("C8"), pytest.mark.attack("A17")]


def refused(chips: TwoChips, vm_id: uuid.UUID, kind: type[SpvtpmError], revoked: bytes | None = None) -> None:
    """The handoff comes to nothing for this reason; nothing of the vTPM has left, and it runs on."""
    handoff = chips.begin(vm_id, revoked=revoked)
    with pytest.raises(kind):
        handoff.stop()
    assert chips.a.vm(vm_id).state == "running"
    assert sum(len(frame) for side, frame in handoff.carrier.seen if side == "source") < 20_000
    assert not [frame for _side, frame in handoff.carrier.seen if b"in truth" in frame]
    handoff.cancel()
    handoff.close()
    assert is_nowhere(chips.b, vm_id)


def with_policy(sp: RunningSp, **changes: object) -> uuid.UUID:
    """A VM that runs under another policy."""
    policy = Policy(**{**{name: getattr(ANYTHING, name) for name in ANYTHING.__struct_fields__}, **changes})
    vm_id = sp.new_vm(policy)
    sp.info(messages.LaunchVm(vm_id=vm_id))
    with sp.driver(vm_id) as driver:
        furnish(driver)
    return vm_id


def chip_id(sp: RunningSp) -> bytes:
    return bytes.fromhex(ask(sp, messages.GetStatus(), messages.Status).chip_id)


def test_another_vendors_chip_gets_nothing() -> None:
    with TwoChips(other_vendor=new_papers("Example Silicon", datetime.now(UTC) - timedelta(days=1))) as chips:
        vm_id, _seen = furnished(chips.a)
        refused(chips, vm_id, UntrustedIssuer)


def test_a_chip_that_is_not_on_the_owners_list_gets_nothing(chips: TwoChips) -> None:
    refused(chips, with_policy(chips.a, chips=frozenset({chip_id(chips.a)})), ChipNotAllowed)


def test_older_firmware_than_the_owner_wants_gets_nothing() -> None:
    with TwoChips() as chips:
        chips.a.stop()
        chips.a.start(firmware=2)
        refused(chips, with_policy(chips.a, minimum_firmware=2), FirmwareTooOld)


def test_a_vtpm_whose_owner_does_not_want_it_does_not_leave(chips: TwoChips) -> None:
    vm_id = with_policy(chips.a, migration_allowed=False)
    with pytest.raises(MigrationForbidden):
        ask(chips.a, messages.SendStart(vm_id=vm_id), messages.Handoff)


def test_without_a_list_of_revoked_chips_nothing_moves_and_a_revoked_chip_gets_nothing() -> None:
    with TwoChips() as chips:
        vm_id, seen = furnished(chips.a)
        refused(chips, vm_id, RevocationUnknown, revoked=b"")
        stale = chips.vendor.revocation_list((), 1, datetime.now(UTC) - timedelta(days=90)).encode()
        refused(chips, vm_id, RevocationUnknown, revoked=stale)
        handoff = chips.begin(vm_id)
        handoff.move()
        handoff.close()
        runs(chips.b, vm_id, seen)
        serial = x509.load_der_x509_certificate(_chain_of(chips.a)[1]).serial_number
        newer = list_of(chips.vendor, (serial,), 2).encode()
        back = chips.begin(vm_id, source=chips.b, revoked=newer)
        with pytest.raises(CertificateRevoked):
            back.stop()
        back.close()
        again = chips.begin(vm_id, source=chips.b)  # with the older list: the newer one is not forgotten
        with pytest.raises(CertificateRevoked):
            again.stop()
        again.close()
        runs(chips.b, vm_id, seen)


def _chain_of(sp: RunningSp) -> tuple[bytes, ...]:
    with sp.channel() as channel:
        return channel.papers.chain


def test_what_is_not_there_cannot_be_moved_and_what_is_there_cannot_come(chips: TwoChips) -> None:
    with pytest.raises(NotFound):
        ask(chips.a, messages.SendStart(vm_id=uuid.uuid4()), messages.Handoff)
    stopped = chips.a.new_vm()
    with pytest.raises(WrongState):
        ask(chips.a, messages.SendStart(vm_id=stopped), messages.Handoff)
    with pytest.raises(WrongState):
        ask(chips.a, messages.ReceiveStart(vm_id=stopped, handoff=bytes(16)), messages.Handoff)


@pytest.mark.attack("A23")
def test_so_many_vms_are_expected_at_a_time(chips: TwoChips) -> None:
    begun = []
    with pytest.raises(TooMany):
        for number in range(200):
            request = messages.ReceiveStart(vm_id=uuid.uuid4(), handoff=number.to_bytes(16, "big"))
            ask(chips.b, request, messages.Handoff)
            begun.append(request)
    for request in begun:
        ask(chips.b, messages.ReceiveCancel(vm_id=request.vm_id, handoff=request.handoff), messages.Handoff)


def test_the_owner_learns_where_it_went(chips: TwoChips) -> None:
    vm_id, _seen = furnished(chips.a)
    vtpm = chips.a.vm(vm_id).vtpm
    assert vtpm is not None
    handoff = chips.begin(vm_id)
    handoff.move()
    handoff.close()
    with chips.a.channel() as channel:
        fate = channel.ask(AskFate(vtpm_id=vtpm.vtpm_id), Fate)
    assert (fate.state, fate.chip) == ("migrated", chip_id(chips.b))
    with chips.b.channel(chips.a.owner) as channel:
        assert channel.ask(AskFate(vtpm_id=vtpm.vtpm_id), Fate).state == "here"
