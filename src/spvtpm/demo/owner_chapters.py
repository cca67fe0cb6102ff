"""The demo's chapters in which the owner acts: a vTPM's certificates, its way to another host, and back from a lost one."""

from __future__ import annotations

from pathlib import Path

from spvtpm.demo.cast import Cast
from spvtpm.demo.stage import ActFailed, EmulatedVm, SecureProcessorHost, wait_until
from spvtpm.demo.story import Claim
from spvtpm.demo.tpm_use import NV_INDEX, PCR, ZERO, endorsement_key, password_of
from spvtpm.wire import messages

VERIFIES = Claim(
    "C4", "The owner verifies the chip before he sends it anything", "spvtpm terminal verify; an impostor is refused"
)
ENDORSED = Claim(
    "C7",
    "The chip certifies the vTPM's endorsement key",
    "openssl verify up to the vendor's root; tpm2_createek makes the certified key",
)
MOVES = Claim(
    "C6a, C6b",
    "A hibernated vTPM leaves as a file, and goes on elsewhere",
    "export, import: NV, PCRs and keys as before",
)
OPENS_ONCE = Claim(
    "C4, B3",
    "Its file opens for its owner, in a chip of the fleet, once",
    "another owner, another fleet, a second time: refused",
)
RECOVERS = Claim(
    "C6c",
    "After a power loss the owner takes the vTPM out of NV",
    "export without a boot; it goes on at the other host",
)
OWNER_CLAIMS = (VERIFIES, ENDORSED, MOVES, OPENS_ONCE, RECOVERS)

_EK_INDEX = "0x1c0000a"
"""Where a TPM keeps the certificate of its ECC P-256 EK. Source: TCG EK Credential Profile 2.5, section 2.2.1.5."""


def meet(cast: Cast) -> None:
    """Vendor, host and owner; the owner verifies whom he talks to."""
    story = cast.story
    story.chapter(
        "An owner meets a secure processor",
        "A vendor makes a chip and certifies it; a cloud host runs a secure processor (SP) on it: here a daemon whose "
        "processes stand for the chip. The owner of two VMs is somewhere else, and trusts the vendor's root, not the cloud.",
    )
    cast.host.make(cast.vendor.manufacture("chip-1"))
    cast.host.start()
    owner = cast.owner
    with story.showing(VERIFIES):
        owner.trust(cast.vendor)
        verified = owner.run("verify", "--channel", cast.host.name)
        story.check(
            "the chip is genuine, not revoked, and can do what it has to", "verified: chip" in verified.remarks[0]
        )
        story.say("\nThe cloud has another one, on a chip that it has made by itself, under the same vendor's name:")
        with story.only_checks():
            cast.impostor.make(cast.forger.manufacture("chip-x"))
            cast.impostor.start()
        refused = owner.attempt("verify", "--channel", cast.impostor.name)
        story.output([refused.complaint])
        story.check("refused before anything was sent", not refused.ok and "not trusted" in refused.complaint)
    story.say(
        "\nThe owner gives the genuine one, through an encrypted channel, each VM's memory key and his own secret:"
    )
    for vm in cast.vms:
        owner.provision(vm, cast.host)


def endorse(cast: Cast) -> None:
    """The certificates of VM A's EKs, fetched by the owner and checked with other people's programs."""
    story, vm = cast.story, cast.vms[0]
    story.chapter(
        "The vTPM's birth certificate",
        "No vendor could honestly vouch for a vTPM that the cloud can copy. This one was derived inside the chip, and the "
        "chip signs that. The owner fetches the certificates from the SP, not from the guest, and checks them with OpenSSL.",
    )
    with story.showing(ENDORSED):
        cast.owner.run("endorsement", str(vm.vm_id), "--channel", cast.host.name, "--output", f"{vm.name}/ek")
        root, issuer = cast.vendor.directory / "root.pem", "ek/issuer.pem"
        verify = ("openssl", "verify", "-CAfile", str(root), "-untrusted", issuer)
        checked = vm.attempt(*verify, "ek/ek-1.pem", "ek/ek-2.pem", "ek/ek-3.pem")
        story.output(checked.output.decode().splitlines())
        story.check(
            "OpenSSL verifies RSA-2048, P-256 and P-384 up to the vendor's root", checked.output.count(b": OK") == 3
        )
        vm.run("tpm2_nvread", _EK_INDEX, "-C", "o", "-o", "ek.der")
        vm.run("openssl", "x509", "-inform", "der", "-in", "ek.der", "-noout", "-pubkey", "-out", "ek.certified")
        key = endorsement_key(vm)
        story.check(
            "the guest finds the P-256 one in its TPM, and tpm2_createek makes that very key", certified(vm) == key
        )


def certified(vm: EmulatedVm) -> bytes:
    """The public key in the certificate that the VM's TPM keeps, as PEM."""
    return vm.run("openssl", "x509", "-inform", "der", "-in", "ek.der", "-noout", "-pubkey")


def move(cast: Cast) -> None:
    """VM A is hibernated, its vTPM goes to its owner, and to another host."""
    story, vm, host, next_host = cast.story, cast.vms[0], cast.host, cast.next_host
    story.chapter(
        "VM A goes to sleep, and wakes on another host",
        "The hypervisor suspends VM A. Its vTPM, PCRs and all, goes to the owner as a file that takes two secrets to open: "
        "the owner's, and the fleet's inside the chips. Then the SP destroys what it has.",
    )
    with story.showing(MOVES):
        pcr = vm.pcr(PCR)
        vm.kill()
        host.hypervisor("hibernate", messages.HibernateVm(vm_id=vm.vm_id))
        file = cast.owner.export(vm, host)
        listed = host.hypervisor("list", messages.ListVms())
        gone = isinstance(listed, messages.VmList) and vm.vm_id not in [info.vm_id for info in listed.vms]
        story.check("the SP has no VM A any more", gone)
        content = (cast.directory / file).read_bytes()
        story.check("the file shows nothing of VM A's password", password_of(vm) not in content)
        story.say("\nAnother host of the same cloud, with a chip of the same fleet:")
        next_host.make(cast.vendor.manufacture("chip-2"))
        next_host.start()
    with story.showing(OPENS_ONCE):
        _open_elsewhere(cast, vm, file)
    with story.showing(MOVES):
        _bring(cast, vm, next_host, file)
        story.check(f"PCR {PCR} is what it was: the TPM did not start anew", vm.pcr(PCR) == pcr != ZERO)
        read = vm.run("tpm2_nvread", NV_INDEX, "-C", "o", show=True)
        story.check("the password is there", read == password_of(vm))
    with story.showing(OPENS_ONCE):
        again = cast.owner.attempt_import(vm, host, file)
        story.output([again.complaint])
        story.check("the owner's own terminal refuses to bring it back a second time", not again.ok)


def _open_elsewhere(cast: Cast, vm: EmulatedVm, file: str) -> None:
    story = cast.story
    story.say("\nSomebody else has got hold of the file, and has a genuine SP of the fleet:")
    thief = cast.thief()
    thief.trust(cast.vendor)
    stolen = thief.attempt_import(vm, cast.next_host, file)
    story.output([stolen.complaint])
    story.check("it does not open with another owner's secret", not stolen.ok and "secrets" in stolen.complaint)
    story.say("\nThe owner himself is talked into trusting the other vendor, whose chips are of another fleet:")
    cast.owner.trust(cast.forger)
    abroad = cast.owner.attempt_import(vm, cast.impostor, file)
    story.output([abroad.complaint])
    story.check("it does not open in a chip of another fleet", not abroad.ok and "fleet" in abroad.complaint)


def _bring(cast: Cast, vm: EmulatedVm, host: SecureProcessorHost, file: str) -> None:
    story = cast.story
    story.say("\nThe owner brings it to the other host, and the hypervisor there launches the VM:")
    brought = cast.owner.attempt_import(vm, host, file)
    story.output([*brought.remarks, *brought.output.decode().splitlines()])
    if not brought.ok:
        raise ActFailed(f"the import of {vm.name}: {brought.complaint}")
    host.hypervisor("launch", messages.LaunchVm(vm_id=vm.vm_id))
    vm.move_to(host)
    vm.boot()


def recover(cast: Cast) -> None:
    """The first host loses power while VM B runs, and never boots it again."""
    story, vm, host = cast.story, cast.vms[1], cast.host
    story.chapter(
        "The first host loses power again, and VM B moves out",
        "VM B dies with its host. The SP's non-volatile storage survives, so nobody has to boot VM B there ever again: its "
        "owner takes the vTPM out of it.",
    )
    with story.showing(RECOVERS):
        key = endorsement_key(vm)
        running = host.processes()
        story.command("host-1#", ["kill", "-KILL", str(host.pid)])
        host.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in running))
        vm.kill()
        host.start()
        file = cast.owner.export(vm, host)
        _bring(cast, vm, cast.next_host, file)
        read = vm.run("tpm2_nvread", NV_INDEX, "-C", "o", show=True)
        story.check("what VM B's TPM had acknowledged is there, on another host", read == password_of(vm))
        story.check("its endorsement key is the one that chip 1 certified", endorsement_key(vm) == key)
        status = cast.owner.run("status").output.decode()
        story.check("the owner's terminal knows where both vTPMs live", status.count("at the chip") == 2)
