"""A platform that lies about where a VM was moved: chips are asked, and the keyring learns nothing from the platform."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing

import pytest
from msgspec.structs import replace

from spvtpm.terminal.comeback import begin
from spvtpm.terminal.creation import create
from spvtpm.terminal.departure import end, recover
from spvtpm.terminal.destruction import destroy
from spvtpm.terminal.exports import Exported
from spvtpm.terminal.machines import Site, vtpm_of
from spvtpm.terminal.migration import migrate
from spvtpm.terminal.overview import compare
from spvtpm.terminal.owned import Account, OwnedVm
from spvtpm.terminal.platform import Platform
from spvtpm.terminal.whereabouts import AtChip
from spvtpm.wire.errors import ChannelError, ChipNotAllowed, NotFound, StaleInstance, WrongState
from spvtpm.wire.platform_errors import PlatformContradicts
from tests.harness import RunningSp
from tests.owner import ANYTHING
from tests.papers import todays_papers
from tests.processor.migration.two_chips import Handoff, honest, list_of
from tests.terminal.conftest import estate  # noqa: F401  # the fixture
from tests.terminal.estate import VM_KEY, Estate
from tests.terminal.malicious_platform import MaliciousPlatform
from tests.terminal.platform_double import TOKEN

pytestmark = [pytest.mark.claim("C8"), pytest.mark.attack("A10")]


@pytest.fixture
def evil(estate: Estate) -> Iterator[MaliciousPlatform]:  # noqa: F811
    with MaliciousPlatform(estate.sps) as evil:
        yield evil


@pytest.fixture
def site(estate: Estate, evil: MaliciousPlatform) -> Iterator[Site]:  # noqa: F811
    with Platform(Account(url=evil.url, token=TOKEN), patience_s=1) as platform:
        yield Site(estate.keyring, platform, timeout_s=10)


class Web:
    """A VM that runs, and where it is in truth.

    Args:
        site: of its owner.
        evil: the platform.
    """

    def __init__(self, site: Site, evil: MaliciousPlatform) -> None:
        self._site, self._evil = site, evil
        self.name = f"vm-{uuid.uuid4().hex[:12]}"
        create(site, OwnedVm(name=self.name, vm_id=uuid.uuid4(), vm_key=VM_KEY, policy=ANYTHING))
        self.owned = site.keyring.owned(self.name)
        self.here = self.known()
        self.there = next(chip for chip in evil.sps if chip != self.here)

    def known(self) -> str:
        """The chip where the keyring knows it."""
        known = vtpm_of(self._site.keyring, self.owned.vm_id)
        assert known is not None and isinstance(known.place, AtChip)
        return known.place.chip_id.hex()

    def move(self) -> None:
        """In truth."""
        self._evil.move(self._evil.vms[self.owned.vm_id], self._evil.sps[self.there])


@pytest.fixture
def web(site: Site, evil: MaliciousPlatform) -> Iterator[Web]:
    web = Web(site, evil)
    chips = dict(evil.sps)
    yield web
    evil.sps = chips
    evil.says_chip, evil.leads_elsewhere, evil.claims_done = {}, {}, set()
    destroy(site, web.name)


def test_a_move_that_is_claimed_and_not_done_is_noticed(site: Site, evil: MaliciousPlatform, web: Web) -> None:
    evil.claims_done = {"migrate"}
    with pytest.raises(PlatformContradicts, match=f"the chip {web.here}, has it still"):
        migrate(site, web.name)
    evil.says_chip[web.owned.vm_id] = web.there
    with pytest.raises(PlatformContradicts, match=f"its vTPM lives at the chip {web.here}"):
        begin(site, web.name, "start")
    evil.says_chip.clear()
    assert web.known() == web.here


def test_a_move_to_a_chip_that_does_not_have_it_is_not_believed_though_the_old_one_is_kept_silent(
    site: Site, evil: MaliciousPlatform, web: Web
) -> None:
    """Unprotected, the owner would look for his vTPM where it never was, and could have it imported there a second time."""
    silenced = evil.sps.pop(web.here)
    evil.says_chip[web.owned.vm_id] = web.there
    for attempt in (
        lambda: begin(site, web.name, "start"),
        lambda: end(site, web.name, "shutdown"),
        lambda: recover(site, web.name),
        lambda: migrate(site, web.name),
        lambda: destroy(site, web.name),
    ):
        with pytest.raises(PlatformContradicts, match="which does not have it"):
            attempt()
    assert isinstance(compare(site, web.name).silence, PlatformContradicts)
    assert web.known() == web.here
    evil.sps[web.here] = silenced
    assert site.keyring.owned(web.name) == web.owned


def test_a_move_that_is_hidden_is_told_by_the_chip_that_gave_the_vtpm_away(
    site: Site, evil: MaliciousPlatform, web: Web
) -> None:
    web.move()
    evil.says_chip[web.owned.vm_id] = web.here
    with pytest.raises(PlatformContradicts, match=f"its vTPM lives at the chip {web.there}"):
        begin(site, web.name, "start")
    assert web.known() == web.there
    evil.carry_out("shutdown", evil.vms[web.owned.vm_id])
    assert isinstance(recover(site, web.name), Exported)  # whatever the platform says
    evil.says_chip.clear()
    begin(site, web.name, "start")


def test_a_chip_that_the_policy_forbids_is_not_even_asked(site: Site, evil: MaliciousPlatform, web: Web) -> None:
    chips = frozenset([bytes.fromhex(web.here)])
    site.keyring.keep_vm(replace(web.owned, policy=replace(ANYTHING, chips=chips)))
    evil.says_chip[web.owned.vm_id] = web.there
    silenced = evil.sps.pop(web.here)
    evil.frames.clear()
    with pytest.raises(ChipNotAllowed, match="which its policy does not allow"):
        begin(site, web.name, "start")
    assert not evil.frames
    evil.sps[web.here] = silenced
    assert web.known() == web.here


def test_a_move_that_is_hidden_together_with_the_new_chip_makes_no_owner_forget_his_vm(
    site: Site, evil: MaliciousPlatform, web: Web
) -> None:
    """Unprotected, who hears that a chip does not have it any more would take it for destroyed, and drop its key."""
    web.move()
    evil.says_chip[web.owned.vm_id] = web.here
    silenced = evil.sps.pop(web.there)
    for attempt in (lambda: destroy(site, web.name), lambda: end(site, web.name, "shutdown")):
        with pytest.raises(ChannelError):
            attempt()
    evil.sps[web.there] = silenced
    assert site.keyring.owned(web.name) == web.owned
    assert web.known() == web.here


def test_a_question_that_is_broken_off_and_a_claim_of_destruction_make_no_owner_forget_his_vm(
    site: Site, evil: MaliciousPlatform, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.move()
    evil.says_chip[web.owned.vm_id] = web.here
    evil.claims_done = {"destroy"}
    opened, lead = 0, evil.lead

    def lead_but_once(chip_id: str) -> RunningSp:
        nonlocal opened
        opened += 1
        if opened == 2:  # the question to which chip it was given
            raise NotFound("there is no such chip")
        return lead(chip_id)

    monkeypatch.setattr(evil, "lead", lead_but_once)
    with pytest.raises(WrongState, match="moved meanwhile, and lives"):
        destroy(site, web.name)
    assert opened == 3
    assert site.keyring.owned(web.name) == web.owned
    monkeypatch.undo()


@pytest.mark.attack("A08")
def test_a_chip_with_an_older_version_than_was_seen_is_not_followed(
    site: Site, evil: MaliciousPlatform, web: Web
) -> None:
    known = vtpm_of(site.keyring, web.owned.vm_id)
    assert known is not None
    site.keyring.remember(replace(known, newest=9))  # stands for a chip that was put back
    web.move()
    with pytest.raises(StaleInstance, match="put back to an older state"):
        begin(site, web.name, "start")
    assert web.known() == web.here
    site.keyring.remember(known)


@pytest.mark.attack("A01")
def test_another_chip_behind_the_new_ones_name_confirms_nothing(site: Site, evil: MaliciousPlatform, web: Web) -> None:
    web.move()
    evil.leads_elsewhere = {web.there: web.here}
    with pytest.raises(ChipNotAllowed):
        migrate(site, web.name)
    evil.leads_elsewhere = {}
    assert migrate(site, web.name).chip_id == bytes.fromhex(web.there)


@pytest.mark.attack("A18")
def test_a_chip_to_which_it_is_only_on_its_way_is_not_believed_to_have_it(
    site: Site, evil: MaliciousPlatform, web: Web
) -> None:
    """The source may keep it still: an owner who believed otherwise would not find it again where it stays."""
    source, destination = evil.sps[web.here], evil.sps[web.there]
    source.keep_key(web.owned.vm_id, VM_KEY)
    with closing(Handoff(source, destination, web.owned.vm_id, honest, list_of(todays_papers()).encode())) as handoff:
        handoff.send_memory(b"some")
        handoff.send_final(handoff.stop())
        while not any(vm.vm_id == web.owned.vm_id for vm in destination.vms()):
            pass
        silenced = evil.sps.pop(web.here)
        evil.says_chip[web.owned.vm_id] = web.there
        with pytest.raises(WrongState, match="still arriving"):
            begin(site, web.name, "start")
        assert web.known() == web.here
        evil.sps[web.here] = silenced
        handoff.discard(handoff.cancel())
    evil.says_chip.clear()
    assert begin(site, web.name, "start").state == "running"
    assert web.known() == web.here
