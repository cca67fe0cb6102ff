"""The demo's chapters in which the owner acts: a vTPM's certificates, its way to another host, and back from a lost one."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

from spvtpm.demo.cast import Cast
from spvtpm.demo.cloud_vm import CloudVm
from spvtpm.demo.owner import OwnerTerminal
from spvtpm.demo.stage import ActFailed, ChipVendor, SecureProcessorHost, wait_until
from spvtpm.demo.story import Claim
from spvtpm.demo.tpm_use import NV_INDEX, PCR, ZERO, endorsement_key, password_of
from spvtpm.wire import messages
from spvtpm.wire.errors import SpvtpmError

VERIFIES = Claim(
    "C4",
    "The owner verifies the chip before he sends it anything",
    "spvtpm chips; an impostor is refused before a VM is made",
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
    "Its file opens for its owner alone, and once",
    "another user's secret, a second time: refused",
)
RECOVERS = Claim(
    "C6c",
    "After a power loss the owner takes the vTPM out of NV",
    "export without a boot; it goes on at the other host",
)
ALONE = Claim(
    "C1 to C6",
    "The platform runs all of it, and is trusted with nothing",
    "its database, log and agents searched for every secret; another user's VM does not exist for Bob",
)
OWNER_CLAIMS = (VERIFIES, ENDORSED, MOVES, OPENS_ONCE, RECOVERS, ALONE)

_EK_INDEX = "0x1c0000a"
"""Where a TPM keeps the certificate of its ECC P-256 EK. Source: TCG EK Credential Profile 2.5, section 2.2.1.5."""


def meet(cast: Cast) -> None:
    """Vendor, platform, hosts and two users; they verify what they talk to."""
    story, cloud = cast.story, cast.cloud
    story.chapter(
        "A cloud, and two users who do not trust it",
        "A vendor makes a chip and certifies it; a host runs a secure processor (SP) on it, here a daemon whose processes stand "
        "for the chip, and an agent that runs VMs. A platform takes requests, and relays what it cannot read.",
    )
    cloud.make()
    add_host(cast, cast.host, cast.vendor, "chip-1")
    cloud.start()
    with story.showing(VERIFIES):
        for user in (cast.alice, cast.bob):
            user.trust(cast.vendor)
            user.log_in()
        verified = _chips(cast.alice, 1)
        story.check("Alice's terminal finds the chip genuine, not revoked, and able", "verified: chip" in verified)
        story.say("\nThe cloud has another host, on a chip that it has made by itself, under the same vendor's name:")
        with story.only_checks():
            add_host(cast, cast.impostor, cast.forger, "chip-x")
            wait_until(lambda: is_online(cast, cast.impostor))
        refused = cast.alice.attempt("vm", "create", "trap", "--host", cast.impostor.name)
        story.output([refused.complaint])
        story.check("refused before anything was sent", not refused.ok and "not trusted" in refused.complaint)
        with story.only_checks():
            cast.impostor.stop_agent()


def add_host(cast: Cast, host: SecureProcessorHost, vendor: ChipVendor, chip: str) -> None:
    """A host with a chip of this vendor, known to the platform."""
    host.make(vendor.manufacture(chip))
    host.start()
    host.make_agent(vendor)
    host.start_agent()
    cast.cloud.add_host(host)


def _chips(owner: OwnerTerminal, count: int) -> str:
    """What a user's terminal finds, once the platform has heard of so many hosts."""
    if not wait_until(lambda: len(owner.platform().chips()) >= count):
        raise ActFailed("the platform hears nothing of its hosts")
    return owner.run("chips").output.decode()


def is_online(cast: Cast, host: SecureProcessorHost) -> bool:
    """Whether the platform hears of a host."""
    return any(chip.host == host.name and chip.is_online for chip in cast.alice.platform().chips())


def endorse(cast: Cast) -> None:
    """The certificates of VM A's EKs, fetched by the owner and checked with other people's programs."""
    story, vm = cast.story, cast.vms[0]
    story.chapter(
        "The vTPM's birth certificate",
        "No vendor could honestly vouch for a vTPM that the cloud can copy. This one was derived inside the chip, and the "
        "chip signs that. The owner fetches the certificates from the SP, not from the guest, and checks them with OpenSSL.",
    )
    with story.showing(ENDORSED):
        words = ("endorsement", str(vm.vm_id), "--channel", cast.host.name, "--output", "ek")
        vm.owner.run("terminal", *words)
        vm.run("mkdir", "ek")
        for name in ("ek-1.pem", "ek-2.pem", "ek-3.pem", "issuer.pem"):
            vm.write(f"ek/{name}", (cast.directory / "ek" / name).read_bytes())
        vm.write("root.pem", (cast.vendor.directory / "root.pem").read_bytes())
        root, issuer = "root.pem", "ek/issuer.pem"
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


def certified(vm: CloudVm) -> bytes:
    """The public key in the certificate that the VM's TPM keeps, as PEM."""
    return vm.run("openssl", "x509", "-inform", "der", "-in", "ek.der", "-noout", "-pubkey")


def move(cast: Cast) -> None:
    """VM A is hibernated, its vTPM goes to its owner, and to another host."""
    story, vm, alice = cast.story, cast.vms[0], cast.alice
    story.chapter(
        "VM A goes to sleep, and wakes on another host",
        "Alice has VM A hibernated. Its vTPM, PCRs and all, comes to her as a file that takes two secrets to open: hers, and the "
        "fleet's inside the chips. Then the SP destroys what it has. VM A's memory stays with the cloud, as ciphertext.",
    )
    with story.showing(MOVES):
        pcr = vm.pcr(PCR)
        alice.run("vm", "hibernate", vm.name)
        listed = cast.host.hypervisor("list", messages.ListVms())
        gone = isinstance(listed, messages.VmList) and vm.vm_id not in [info.vm_id for info in listed.vms]
        story.check("the SP has no VM A any more", gone)
        (file,) = alice.keyring().instances().glob(f"{vm.name}-*")
        story.check("the file shows nothing of VM A's password", password_of(vm) not in file.read_bytes())
    with story.showing(OPENS_ONCE):
        _steal(cast, file)
    with story.showing(MOVES):
        story.say("\nAlice has VM A go on, wherever there is room:")
        alice.run("vm", "resume", vm.name)
        placed = alice.platform().vm(vm.vm_id).host
        story.check("it is at host 2, where there is most room", placed == cast.next_host.name)
        story.check(f"PCR {PCR} is what it was: the TPM did not start anew", vm.pcr(PCR) == pcr != ZERO)
        read = vm.run("tpm2_nvread", NV_INDEX, "-C", "o", show=True)
        story.check("the password is there", read == password_of(vm))
        story.check("and so is the VM's memory", vm.read("password") == password_of(vm))
    with story.showing(OPENS_ONCE):
        again = alice.attempt("vm", "import", "twin", str(file))
        story.output([again.complaint])
        story.check("Alice's own terminal refuses to bring it back a second time", not again.ok)


def _steal(cast: Cast, file: Path) -> None:
    story = cast.story
    story.say("\nBob has got hold of the file, and has a genuine SP of the fleet:")
    stolen = cast.bob.attempt("vm", "import", "stolen", str(file))
    story.output([stolen.complaint])
    story.check("it does not open with another user's secret", not stolen.ok and "secrets" in stolen.complaint)
    with story.only_checks():
        cast.bob.run("vm", "destroy", "stolen", "--yes")


def recover(cast: Cast) -> None:
    """The first host loses power while VM B is shut down there, and VM B moves out."""
    story, vm, host, bob = cast.story, cast.vms[1], cast.host, cast.bob
    story.chapter(
        "The first host loses power again, and VM B moves out",
        "VM B is shut down; Bob has left its vTPM at the host, in the SP's non-volatile storage. That survives, so nobody has to "
        "boot VM B there ever again: he takes the vTPM out of it.",
    )
    with story.showing(RECOVERS):
        key = endorsement_key(vm)
        bob.run("vm", "shutdown", vm.name, "--stay")
        running = host.processes()
        story.command("host-1#", ["kill", "-KILL", str(host.pid), "…"])
        host.lose_power()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in running))
        host.start()
        host.start_agent()
        bob.run("vm", "recover", vm.name)
        with story.only_checks():
            host.stop_agent()  # it is mended, say
        wait_until(lambda: not is_online(cast, host))
        bob.run("vm", "start", vm.name)
        read = vm.run("tpm2_nvread", NV_INDEX, "-C", "o", show=True)
        story.check("what VM B's TPM had acknowledged is there, on another host", read == password_of(vm))
        story.check("its endorsement key is the one that chip 1 certified", endorsement_key(vm) == key)
        status = bob.run("terminal", "status").output.decode()
        story.check("Bob's terminal knows where it lives", status.count("at the chip") == 1)


def audit(cast: Cast) -> None:
    """All that the cloud's side has kept is searched for secrets; and one user asks for another one's VM."""
    story, vm = cast.story, cast.vms[0]
    story.chapter(
        "What the platform has",
        "It has placed, booted, hibernated and moved two VMs, and every secret has gone through it. Now all that it has kept is "
        "searched: its database, its log, the agents' directories and logs.",
    )
    with story.showing(ALONE):
        secrets = [secret for each in cast.vms for secret in _secrets_of(each)]
        kept = [path for path in _kept_by_cloud(cast) if path.is_file()]
        found = [path for path in kept if any(secret in path.read_bytes() for secret in secrets)]
        size = sum(path.stat().st_size for path in kept)
        story.output([f"{len(kept)} files, {size} bytes, searched for {len(secrets)} secrets: {len(found)} hits"])
        story.check("no VM key, no user's secret, no password in any of them", bool(kept) and not found)
        story.output([f"{cast.cloud.relayed_bytes} bytes went through it, and it knows how many they were"])
        story.say("\nBob asks the platform for Alice's VM, by its id, and for one that nobody has:")
        answers = [_answer(cast.bob, vm_id) for vm_id in (vm.vm_id, uuid.UUID(int=0))]
        story.output(answers)
        story.check("both do not exist for him", len({answer.partition("VM")[0] for answer in answers}) == 1)


def _secrets_of(vm: CloudVm) -> list[bytes]:
    return [password_of(vm), vm.key, *vm.owner.keyring().content.user_secrets]


def _kept_by_cloud(cast: Cast) -> Iterator[Path]:
    """All files of the cloud's side, but those in the memory directories of VMs: those stand for encrypted memory."""
    yield cast.cloud.log
    yield from cast.cloud.state.rglob("*")
    for host in (cast.host, cast.next_host, cast.impostor, cast.outdated):
        yield from (path for path in host.agent_state.rglob("*") if "memory" not in path.parts)
        yield host.state / "nv.db"


def _answer(owner: OwnerTerminal, vm_id: uuid.UUID) -> str:
    try:
        owner.platform().vm(vm_id)
    except SpvtpmError as error:
        return f"{error} [{error.code}]"
    return "there it is"
