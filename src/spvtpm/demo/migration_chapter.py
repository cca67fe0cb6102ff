"""The demo's chapter in which VM A moves between hosts while it runs, and is used all the time."""

from __future__ import annotations

import threading
import time

from spvtpm.demo.cast import Cast
from spvtpm.demo.cloud_vm import CloudVm
from spvtpm.demo.owner_chapters import add_host, is_online
from spvtpm.demo.stage import ActFailed, SecureProcessorHost, wait_until
from spvtpm.demo.story import Claim
from spvtpm.demo.tpm_use import FIRMWARE, PCR, measure
from spvtpm.wire import messages
from spvtpm.wire.errors import SpvtpmError

MIGRATES = Claim(
    "C8",
    "A running VM moves; who uses its vTPM sees a pause, and no error",
    "vm migrate under a loop; PCR, attestation key, sealed secret, session as before",
)
REFUSES = Claim(
    "C8",
    "… from chip to chip, verified by both: a forger's chip, or old firmware, gets nothing",
    "both refused; the VM runs on where it is",
)
MIGRATION_CLAIMS = (MIGRATES, REFUSES)

_SECRET = b"the key of a database"
_FURNITURE = (
    "tpm2_createek -c ek.ctx -G ecc -u ek.pub",
    "tpm2_createak -Q -C ek.ctx -c moving-ak.ctx -G ecc -g sha256 -s ecdsa -u moving-ak.pem -f pem -n moving-ak.name",
    "tpm2_createprimary -Q -C o -G ecc -c primary.ctx",
    f"tpm2_createpolicy -Q --policy-pcr -l sha256:{PCR} -L moving.policy",
    "tpm2_create -Q -C primary.ctx -L moving.policy -i moving-secret -u moving.pub -r moving.priv -c moving-seal.ctx",
)


class _Client(threading.Thread):
    """Uses a VM's TPM again and again, as a program does that knows of nothing.

    Args:
        vm: the VM.
    """

    def __init__(self, vm: CloudVm) -> None:
        super().__init__(daemon=True)
        self._vm = vm
        self._is_over = threading.Event()
        self.answers = 0
        self.errors: list[str] = []
        self.longest_s = 0.0

    def run(self) -> None:
        """Until it is ended."""
        with self._vm.owner.connected() as site:
            last = time.monotonic()
            while not self._is_over.is_set():
                outcome = self._vm.execute(site, "tpm2_getrandom", "--hex", "8")
                now = time.monotonic()
                self.longest_s, last = max(self.longest_s, now - last), now
                if outcome.ok:
                    self.answers += 1
                else:
                    self.errors.append(outcome.complaint)

    def end(self) -> None:
        """Returns when it has ended."""
        self._is_over.set()
        self.join()


def migrate(cast: Cast) -> None:
    """VM A moves to another host, and back; then two hosts want it that must not have it."""
    story, vm = cast.story, cast.vms[0]
    story.chapter(
        "VM A moves while it runs",
        "The two chips verify each other, and open an encrypted channel; agents and platform carry its frames, and read nothing. "
        "VM A's memory goes while it runs; for the last of it, VM and vTPM stand still. The old chip gives the vTPM up before "
        "the new one may run it. Meanwhile a client asks VM A's TPM for random numbers, again and again.",
    )
    with story.showing(MIGRATES):
        story.say("Another host of the same cloud, with a chip of the same fleet:")
        add_host(cast, cast.next_host, cast.vendor, "chip-2")
        if not wait_until(lambda: is_online(cast, cast.next_host)):
            raise ActFailed("host 2 does not come up")
        _furnish(cast)
        known = _known(vm)
        for host, left in ((cast.next_host, cast.host), (cast.host, cast.next_host)):
            _move(cast, host, left)
            story.check(f"PCR {PCR} and the sealed secret are what they were", _known(vm) == known)
        _use_what_was_open(cast)
    with story.showing(REFUSES):
        with story.only_checks():
            cast.impostor.start_agent()
            add_host(cast, cast.outdated, cast.vendor, "chip-3")
            wait_until(lambda: is_online(cast, cast.impostor) and is_online(cast, cast.outdated))
        _refuse(cast, cast.impostor, "a chip of another vendor gets nothing")
        _refuse(cast, cast.outdated, "nor does one whose firmware is older than Alice's policy wants")
        with story.only_checks():
            cast.impostor.stop_agent()
            cast.outdated.stop_agent()


def _furnish(cast: Cast) -> None:
    """A PCR, an attestation key, a sealed secret, and a session that stays open."""
    story, vm = cast.story, cast.vms[0]
    story.say("\nVM A makes an attestation key, seals a secret, and opens a session that it keeps open:")
    with story.only_checks():
        measure(vm, FIRMWARE)
        vm.write("moving-secret", _SECRET)
        for script in _FURNITURE:
            vm.use(script)
    vm.use("tpm2_startauthsession --policy-session -S moving.ctx")


def _known(vm: CloudVm) -> tuple[bytes, bytes]:
    """What must not change: a PCR, and what is sealed to it."""
    pcr = vm.use(f"tpm2_pcrread sha256:{PCR}")
    return pcr, vm.use(f"tpm2_unseal -c moving-seal.ctx -p pcr:sha256:{PCR}")


def _use_what_was_open(cast: Cast) -> None:
    story, vm = cast.story, cast.vms[0]
    policy = f"tpm2_policypcr -Q -S moving.ctx -l sha256:{PCR} -L moving.session && cmp moving.session moving.policy"
    secret = vm.use(f"{policy} && tpm2_unseal -c moving-seal.ctx -p session:moving.ctx")
    story.check("the session that was opened before unseals the secret", secret == _SECRET)
    files = "-m moving.msg -s moving.sig"
    vm.use(f"tpm2_quote -Q -c moving-ak.ctx -l sha256:{PCR} -q 0123456789abcdef {files} -o moving.pcrs")
    checked = vm.use(f"tpm2_checkquote -u moving-ak.pem {files} -f moving.pcrs -g sha256 -q 0123456789abcdef")
    story.check("a quote verifies with the attestation key's public half from before", bool(checked))


def _move(cast: Cast, host: SecureProcessorHost, left: SecureProcessorHost) -> None:
    story, vm = cast.story, cast.vms[0]
    client = _Client(vm)
    client.start()
    wait_until(lambda: client.answers > 0)
    try:
        vm.owner.run("vm", "migrate", vm.name, "--to", host.name)
        before = client.answers
        wait_until(lambda: client.answers > before)
    finally:
        client.end()
    wait = f"its longest wait was {client.longest_s:.1f} s"
    story.output(
        [
            f"meanwhile the client got {client.answers} answers and {len(client.errors)} errors; {wait}",
            *client.errors[:3],
        ]
    )
    story.check("the client saw a pause, and no error", not client.errors and client.answers > 1)
    try:
        left.hypervisor("start", messages.StartVm(vm_id=vm.vm_id))
    except SpvtpmError as error:
        story.output([str(error)])
        story.check(
            f"the secure processor of {left.name} has no VM A any more, and cannot start it", error.code == "not-found"
        )
    else:
        story.check(f"the secure processor of {left.name} cannot start VM A any more", False)


def _refuse(cast: Cast, host: SecureProcessorHost, why: str) -> None:
    story, vm = cast.story, cast.vms[0]
    refused = vm.owner.attempt("vm", "migrate", vm.name, "--to", host.name)
    story.output([refused.complaint])
    placed = vm.owner.platform().vm(vm.vm_id)
    story.check(f"{why}; VM A runs on", not refused.ok and placed.host == cast.host.name and vm.answers())
