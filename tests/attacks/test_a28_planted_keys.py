"""A28: a guest's administrator plants a key of his own where the EK and its certificate are looked for.

He owns his TPM: he may evict, define, write and clear as he likes, at standard handles and indices too. It changes nothing of
what the secure processor says of the vTPM, to its owner and to the host alike, nor of what an export carries.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from spvtpm.guest.crb_driver import CrbDriver
from spvtpm.wire import messages, owner_messages
from spvtpm.wire.ek_templates import CHAIN_INDEX, ECC_P256, EK_TEMPLATES
from spvtpm.wire.endorsement_certificates import parse_ek_certificate, verify_endorsement, verify_public
from spvtpm.wire.errors import UntrustedIssuer
from tests import tpm_commands as tpm
from tests.endorsements import todays_policy
from tests.harness import RunningSp
from tests.papers import forged

pytestmark = [pytest.mark.attack("A28"), pytest.mark.claim("C7")]

EK_HANDLE = 0x8101000A
"""Where the P-256 EK is looked for. Source: TCG, Registry of Reserved TPM 2.0 Handles, section 2.3.2."""

SIGNING = tpm.ecc_p256(tpm.SIGNING_KEY)
Transmit = Callable[[bytes], bytes]


def by_platform(code: int, *handles: int, parameters: bytes = b"") -> bytes:
    return tpm.command(code, tpm.PLATFORM, *handles, auth=b"", parameters=parameters)


def plant_key(transmit: Transmit) -> bytes:
    """A signing key under the owner hierarchy, at the EK's persistent handle; its public area."""
    made = transmit(tpm.create_primary(SIGNING))
    tpm.checked(transmit(tpm.evict_control(tpm.handle_in(made), EK_HANDLE)))
    tpm.checked(transmit(tpm.flush_context(tpm.handle_in(made))))
    return tpm.public_in(made)


def plant_certificate(transmit: Transmit, index: int, certificate: bytes) -> None:
    """Another content at the certificate's index; the guest's firmware has the platform's authorization."""
    tpm.checked(transmit(by_platform(0x122, index)))  # TPM2_NV_UndefineSpace
    tpm.checked(transmit(tpm.nv_define(index, len(certificate))))
    tpm.checked(transmit(tpm.nv_write(index, certificate)))


def endorsement_of(sp: RunningSp, vm_id: uuid.UUID) -> messages.Endorsement:
    """What host and owner are told: the same."""
    told = sp.call(messages.GetEndorsement(vm_id=vm_id))
    assert isinstance(told, messages.Endorsement)
    with sp.channel() as channel:
        assert channel.ask(owner_messages.GetEndorsement(vm_id=vm_id), messages.Endorsement) == told
    return told


def misled(driver: CrbDriver) -> tuple[bytes, bytes]:
    """What a reader who asks the guest's TPM takes for EK certificate and EK."""
    size = tpm.checked(driver.transmit(tpm.command(0x169, ECC_P256.nv_index)))  # TPM2_NV_ReadPublic
    certificate_bytes = int.from_bytes(size[24:26], "big")
    certificate = tpm.nv_content_in(driver.transmit(tpm.nv_read(ECC_P256.nv_index, certificate_bytes)))
    public = tpm.checked(driver.transmit(tpm.read_public(EK_HANDLE)))
    return certificate, public[12 : 12 + int.from_bytes(public[10:12], "big")]


def test_what_a_guest_plants_misleads_who_asks_the_guest_and_nobody_who_asks_the_sp(sp: RunningSp) -> None:
    vm_id = sp.launch()
    before = endorsement_of(sp, vm_id)
    genuine = parse_ek_certificate(before.certificates[EK_TEMPLATES.index(ECC_P256)])
    mine = ec.generate_private_key(ec.SECP256R1())
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        public = plant_key(driver.transmit)
        fake = forged(genuine.encode(), ec.generate_private_key(ec.SECP384R1()), key=mine.public_key())
        plant_certificate(driver.transmit, ECC_P256.nv_index, fake)
        tpm.checked(driver.transmit(by_platform(0x122, CHAIN_INDEX)))
        assert misled(driver) == (fake, public), "the attack works on who looks there"
    after = endorsement_of(sp, vm_id)
    assert after == before
    (ek,) = (ek for ek in verify_endorsement(after, after.vtpm_id, todays_policy()) if ek.template is ECC_P256)
    with pytest.raises(UntrustedIssuer):
        verify_public(ek, public)


def test_a_new_boot_an_export_and_a_cleared_tpm_certify_nothing_anew(sp: RunningSp) -> None:
    vm_id = sp.launch()
    before = endorsement_of(sp, vm_id)
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        plant_key(driver.transmit)
        plant_certificate(driver.transmit, ECC_P256.nv_index, b"mine")
        tpm.checked(driver.transmit(by_platform(0x124)))  # TPM2_ChangeEPS: another endorsement seed
        eks = [tpm.public_in(driver.transmit(tpm.create_primary(ECC_P256.public, tpm.ENDORSEMENT)))]
    sp.info(messages.ResetVm(vm_id=vm_id))
    assert endorsement_of(sp, vm_id) == before
    sp.info(messages.StopVm(vm_id=vm_id))
    with sp.channel() as channel:
        file = channel.export(vm_id)
        channel.bring(vm_id, sp.key(vm_id), file)
    assert endorsement_of(sp, vm_id) == before
    sp.info(messages.LaunchVm(vm_id=vm_id))
    assert endorsement_of(sp, vm_id) == before
    for ek, certificate in zip(eks, before.certificates[1:], strict=False):
        with pytest.raises(UntrustedIssuer):
            verify_public(parse_ek_certificate(certificate), ek)
