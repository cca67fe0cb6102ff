"""What a real secure processor makes of a new vTPM: EKs, their certificates, PCR banks, and nothing else that a guest notices."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spvtpm.processor.fuses.keepers import load_fuses
from spvtpm.processor.nv_store import NvStore
from spvtpm.processor.vtpm_records import endorsement_name
from spvtpm.wire import messages, owner_messages
from spvtpm.wire.ek_templates import CHAIN_INDEX, EK_TEMPLATES
from spvtpm.wire.endorsement_certificates import parse_ek_certificate, verify_endorsement, verify_public
from spvtpm.wire.errors import NotFound, PcrBankUnknown, WrongState
from spvtpm.wire.instance_content import Policy
from tests import tpm_commands as tpm
from tests.endorsements import todays_policy
from tests.harness import RunningSp
from tests.owner import Owner

pytestmark = pytest.mark.claim("C7")

LOCKOUT_COUNTER = 0x20E
"""TPM_PT_LOCKOUT_COUNTER. Source: TCG TPM 2.0 Library Part 2, table TPM_PT."""

PERSISTENT, TRANSIENT, NV = 0x81000000, 0x80000000, 0x01000000
RC_INITIALIZE = 0x100
BANKS = {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningSp]:
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path, RunningSp(Path(path) / "sp") as running:
        yield running


def endorsement_of(sp: RunningSp, vm_id: uuid.UUID) -> messages.Endorsement:
    reply = sp.call(messages.GetEndorsement(vm_id=vm_id))
    assert isinstance(reply, messages.Endorsement)
    return reply


def eks_of(sp: RunningSp, vm_id: uuid.UUID, *, start: bool = True) -> list[bytes]:
    """The public areas that the vTPM derives now."""
    with sp.driver(vm_id) as driver:
        if start:
            tpm.checked(driver.transmit(tpm.startup()))
        publics = []
        for template in EK_TEMPLATES:
            made = driver.transmit(tpm.create_primary(template.public, tpm.ENDORSEMENT))
            publics.append(tpm.public_in(made))
            tpm.checked(driver.transmit(tpm.flush_context(tpm.handle_in(made))))
        return publics


def handles(transmit: Callable[[bytes], bytes], first: int) -> list[int]:
    response = tpm.checked(transmit(tpm.get_capability(1, first, 100)))  # TPM_CAP_HANDLES
    return [int.from_bytes(response[at : at + 4], "big") for at in range(19, len(response), 4)]


def banks(transmit: Callable[[bytes], bytes]) -> set[str]:
    """The names of the banks with PCRs."""
    response = tpm.checked(transmit(tpm.get_capability(5, 0, 1)))  # TPM_CAP_PCRS
    found, offset = set(), 19
    while offset < len(response):
        if any(response[offset + 3 : offset + 6]):
            found.add(BANKS[int.from_bytes(response[offset : offset + 2], "big")])
        offset += 6
    return found


def test_each_standard_ek_is_certified_by_the_chip_for_this_vtpm(shared: RunningSp) -> None:
    vm_id = shared.launch()
    endorsement = endorsement_of(shared, vm_id)
    certificates = verify_endorsement(endorsement, endorsement.vtpm_id, todays_policy())
    assert [ek.template for ek in certificates] == list(EK_TEMPLATES)
    for ek, public in zip(certificates, eks_of(shared, vm_id), strict=True):
        verify_public(ek, public)


def test_two_vtpms_have_keys_and_certificates_of_their_own(shared: RunningSp) -> None:
    one, two = (endorsement_of(shared, shared.launch()) for _ in range(2))
    assert one.issuer == two.issuer
    keys = [{parse_ek_certificate(der).public for der in each.certificates} for each in (one, two)]
    assert not keys[0] & keys[1]


def test_the_guest_finds_a_tpm_as_new(shared: RunningSp) -> None:
    vm_id = shared.launch()
    certificates = endorsement_of(shared, vm_id).certificates
    with shared.driver(vm_id) as driver:
        transmit = driver.transmit
        assert tpm.response_code(transmit(tpm.get_random(8))) == RC_INITIALIZE, "it waits for TPM2_Startup"
        tpm.checked(transmit(tpm.startup()))
        assert tpm.property_in(transmit(tpm.get_capability(6, LOCKOUT_COUNTER))) == 0
        clock = tpm.clock_in(transmit(tpm.read_clock()))
        assert clock.is_safe, "the boot of its making ended in order"
        assert clock.restart_count == 0
        assert handles(transmit, TRANSIENT) == handles(transmit, PERSISTENT) == []
        chain = [index for index in handles(transmit, NV) if index >= CHAIN_INDEX]
        assert handles(transmit, NV) == [*(template.nv_index for template in EK_TEMPLATES), *chain]
        for template, certificate in zip(EK_TEMPLATES, certificates, strict=True):
            assert tpm.nv_content_in(transmit(tpm.nv_read(template.nv_index, len(certificate)))) == certificate
        assert tpm.pcr_in(transmit(tpm.pcr_read(0))) == bytes(32)


def test_eks_and_certificates_outlive_parking_boots_and_a_power_cut(sp: RunningSp) -> None:
    vm_id = sp.launch()
    eks, certified = eks_of(sp, vm_id), endorsement_of(sp, vm_id)
    sp.info(messages.ParkVtpm(vm_id=vm_id))
    assert eks_of(sp, vm_id, start=False) == eks
    sp.info(messages.ResetVm(vm_id=vm_id))
    assert eks_of(sp, vm_id) == eks
    sp.info(messages.HibernateVm(vm_id=vm_id))
    assert endorsement_of(sp, vm_id) == certified
    sp.info(messages.StartVm(vm_id=vm_id))
    assert eks_of(sp, vm_id, start=False) == eks
    sp.kill()
    sp.start()
    sp.info(messages.StartVm(vm_id=vm_id))
    assert eks_of(sp, vm_id) == eks
    assert endorsement_of(sp, vm_id) == certified


@pytest.mark.claim("C6a")
@pytest.mark.parametrize("hibernated", [False, True], ids=["shut down", "hibernated"])
def test_eks_and_certificates_outlive_export_and_import(sp: RunningSp, hibernated: bool) -> None:
    vm_id = sp.launch()
    eks, certified = eks_of(sp, vm_id), endorsement_of(sp, vm_id)
    sp.info(messages.HibernateVm(vm_id=vm_id) if hibernated else messages.StopVm(vm_id=vm_id))
    moved = uuid.uuid4()
    with sp.channel() as channel:
        file = channel.export(vm_id)
        with pytest.raises(NotFound):
            sp.call(messages.GetEndorsement(vm_id=vm_id))
        channel.bring(moved, sp.key(moved), file)
    assert endorsement_of(sp, moved) == certified
    sp.info(messages.LaunchVm(vm_id=moved))
    assert eks_of(sp, moved, start=not hibernated) == eks


def test_a_destroyed_vtpm_leaves_no_certificates(sp: RunningSp) -> None:
    vm_id = sp.launch()
    name = endorsement_name(endorsement_of(sp, vm_id).vtpm_id)
    kept = sp.launch()
    sp.destroy(vm_id)
    with pytest.raises(NotFound):
        sp.call(messages.GetEndorsement(vm_id=vm_id))
    other = endorsement_name(endorsement_of(sp, kept).vtpm_id)
    sp.stop()
    store = NvStore(sp.state / "nv.db", _root_key(sp))
    assert name not in store
    assert other in store
    store.close()


def _root_key(sp: RunningSp) -> bytes:
    return load_fuses(sp.state / "fuses").storage_root_key


def test_owner_and_host_are_told_the_same_and_strangers_nothing(shared: RunningSp) -> None:
    vm_id = shared.launch()
    request = owner_messages.GetEndorsement(vm_id=vm_id)
    with shared.channel() as channel:
        assert channel.ask(request, messages.Endorsement) == endorsement_of(shared, vm_id)
    with shared.channel(Owner()) as channel, pytest.raises(NotFound):
        channel.ask(request, messages.Endorsement)


def test_a_vm_without_a_vtpm_has_no_certificates(shared: RunningSp) -> None:
    vm_id = shared.new_vm()
    with pytest.raises(WrongState, match="no vTPM"):
        shared.call(messages.GetEndorsement(vm_id=vm_id))
    with shared.channel() as channel, pytest.raises(NotFound):
        channel.ask(owner_messages.GetEndorsement(vm_id=vm_id), messages.Endorsement)
    with pytest.raises(NotFound):
        shared.call(messages.GetEndorsement(vm_id=uuid.uuid4()))


def test_the_command_line_writes_certificates_that_openssl_verifies(shared: RunningSp, tmp_path: Path) -> None:
    vm_id = shared.launch()
    command = [sys.executable, "-m", "spvtpm.cli", "hypervisor", "endorsement", str(vm_id), "--sp", str(shared.state)]
    where = tmp_path / "certificates"
    said = subprocess.run([*command, "--output", where], capture_output=True, text=True, check=True).stdout
    names = ["rsa-2048-ek.pem", "p-256-ek.pem", "p-384-ek.pem"]
    assert sorted(path.name for path in where.iterdir()) == sorted(["chain.pem", *names])
    assert str(endorsement_of(shared, vm_id).vtpm_id) in said
    for name in names:
        verify: list[str | Path] = ["openssl", "verify", "-CAfile", where / "chain.pem", where / name]
        assert subprocess.run(verify, capture_output=True, check=False).returncode == 0, name
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.count("BEGIN CERTIFICATE") == 6
    told = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    assert (told["type"], len(told["certificates"]), len(told["issuer"])) == ("Endorsement", 3, 3)
    again = subprocess.run([*command, "--output", where], capture_output=True, text=True, check=False)
    assert again.returncode != 0
    assert "exists" in again.stderr


def _policy(*names: str) -> Policy:
    return Policy(
        migration_allowed=True, chips=None, minimum_firmware=0, direct_path_only=False, pcr_banks=frozenset(names)
    )


@pytest.mark.claim("B5")
@pytest.mark.parametrize("names", [("sha256",), ("sha256", "sha384"), ("sha1", "sha512"), ()], ids=str)
def test_a_vtpm_has_the_pcr_banks_that_its_owner_asks_for(shared: RunningSp, names: tuple[str, ...]) -> None:
    vm_id = shared.new_vm(_policy(*names))
    shared.info(messages.LaunchVm(vm_id=vm_id))
    expected = set(names or BANKS.values())
    with shared.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        assert banks(driver.transmit) == expected
    shared.info(messages.ResetVm(vm_id=vm_id))
    with shared.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        assert banks(driver.transmit) == expected


@pytest.mark.claim("B5")
def test_a_bank_that_there_is_none_of_is_refused_and_nothing_made(shared: RunningSp) -> None:
    vm_id, before = uuid.uuid4(), shared.vms()
    with shared.channel() as channel, pytest.raises(PcrBankUnknown, match="'md5'"):
        channel.provision(vm_id, bytes(32), _policy("sha256", "md5"))
    assert shared.vms() == before
