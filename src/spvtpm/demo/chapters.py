"""The demo's chapters. Each shows one or more claims; every fact that it states is checked."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from spvtpm.demo.attacker import HostView, PlainVtpm, Watch, borrow_interface
from spvtpm.demo.cast import Cast
from spvtpm.demo.cloud_vm import CloudVm
from spvtpm.demo.migration_chapter import MIGRATION_CLAIMS, migrate
from spvtpm.demo.owner_chapters import OWNER_CLAIMS, audit, endorse, meet, move, recover
from spvtpm.demo.stage import ActFailed, wait_until
from spvtpm.demo.story import Claim, Story
from spvtpm.demo.tpm_use import (
    FIRMWARE,
    MEASURES,
    NV_INDEX,
    PCR,
    QUOTES,
    SEALS,
    SIGNS,
    STORES,
    ZERO,
    endorsement_key,
    measure,
    password_of,
    use_tpm,
)
from spvtpm.wire import mailbox, messages
from spvtpm.wire.crb import COMMAND_ADDRESS, AttachError

BOUND = Claim(
    "C1, C2",
    "A vTPM is made inside the secure processor and bound to one VM",
    "VM A's tools on VM B's vTPM: refused; two endorsement keys; PCRs independent",
)
HIDES = Claim("C9", "The hypervisor sees only ciphertext", "search of all shared memory while secrets pass through it")
REPLAYS = Claim(
    "B4", "An old request written back is never executed", "replayed and altered frames; the PCR does not move"
)
PARKS = Claim(
    "B6", "An idle vTPM needs no process", "parked: its process is gone; the next command wakes it, PCRs as before"
)
SURVIVES = Claim(
    "C6c",
    "A power cut loses the VM, not what its vTPM had acknowledged",
    "SIGKILL, restart: NV content and keys are there, PCRs are those of a new boot",
)
CLAIMS = (
    BOUND,
    MEASURES,
    STORES,
    SIGNS,
    SEALS,
    QUOTES,
    HIDES,
    REPLAYS,
    PARKS,
    SURVIVES,
    *MIGRATION_CLAIMS,
    *OWNER_CLAIMS,
)

_PCR_EXTEND_BYTES = 65
"""Size of TPM2_PCR_Extend with one SHA-256 digest and an empty password. Source: TPM 2.0 Library Part 3, section 22.2."""


def create(cast: Cast) -> None:
    """Two VMs, and a hypervisor that connects the wrong one."""
    story, host = cast.story, cast.host
    story.chapter(
        "A secure processor makes two virtual TPMs",
        "Each user asks the platform for a VM. It picks a host; the user's terminal verifies that host's chip, and gives it, "
        "through an encrypted channel, the VM's memory key and his own secret. Then the VM boots, and the SP makes its TPM.",
    )
    with story.showing(BOUND):
        for vm in cast.vms:
            vm.owner.run("vm", "create", vm.name, "--minimum-firmware", "1")
            made = vm.owner.attempt("vm", "show", vm.name)
            story.check(f"{vm.name} runs, and its SP says so itself", made.ok and b"active" in made.output)
        story.say("\nNow the hypervisor gives VM A the interface of VM B's vTPM:")
        outcome = borrow_interface(cast.vms[0], cast.vms[1], host, cast.directory)
        story.output([outcome.complaint])
        refused = not outcome.ok and "not authentic" in outcome.complaint
        story.check("refused: the vTPM answers only requests sealed with VM B's key", refused)
    story.say(
        "\nBoth boot again, as they should, and on the way the hypervisor keeps a copy of VM A's interface for itself."
    )
    cast.view = HostView.on_the_way(host, cast.vms[0].vm_id)
    if not all(wait_until(vm.answers) for vm in cast.vms):
        raise ActFailed("a VM does not come up again")


def use(cast: Cast) -> None:
    """What people do with a TPM, in both VMs."""
    story = cast.story
    story.chapter(
        "Both VMs use their TPM, with the usual tools",
        "tpm2-tools run unmodified in each VM. They reach the SP through the VM's encrypted memory; no hypervisor process "
        "takes part. Every result is checked outside of the TPM where that can be done.",
    )
    use_tpm(story, cast.vms[0])
    story.say("\nVM B does all of the same on its own TPM; only the checks are printed:")
    with story.only_checks():
        use_tpm(story, cast.vms[1])


def compare(cast: Cast) -> None:
    """Two TPMs, not one."""
    story = cast.story
    story.chapter(
        "Two VMs, two TPMs",
        "Each vTPM has seeds of its own: another endorsement key (EK), by which the world knows it, and its own PCRs.",
    )
    with story.showing(BOUND):
        cast.keys = {vm.name: endorsement_key(vm) for vm in cast.vms}
        for name, key in cast.keys.items():
            story.output([f"EK of {name}: SHA-256 {hashlib.sha256(key).hexdigest()}"])
        story.check("the endorsement keys differ", len(set(cast.keys.values())) == len(cast.vms))
        first, second = cast.vms
        before = second.pcr(PCR)
        measure(first, FIRMWARE)
        story.check("extending VM A's PCR does not touch VM B's", second.pcr(PCR) == before != first.pcr(PCR))


def look(cast: Cast) -> None:
    """The hypervisor searches the memory between VM and SP; beside it, a plain vTPM."""
    story = cast.story
    secret = password_of(cast.vms[0])
    story.chapter(
        "What the hypervisor sees",
        "The memory between VM and SP belongs to the host, and its root can read it at any time. While VM A writes and "
        "reads its password, a thread of the hypervisor searches all of that memory over and over.",
    )
    with story.showing(HIDES):
        clear = _look_at_plain(cast, secret)
        _look_at_encrypted(cast, secret, clear)


def _look_at_plain(cast: Cast, secret: bytes) -> bytes:
    story = cast.story
    story.say("First the contrast, a vTPM as hosts run them today: its commands pass the host's socket in clear.")
    plain = cast.plain = PlainVtpm(cast.directory / "plain", story)
    plain.write("password", secret)
    plain.run("tpm2_nvdefine", "-Q", NV_INDEX, "-C", "o", "-s", str(len(secret)), "-a", "ownerread|ownerwrite")
    plain.run("tpm2_nvwrite", NV_INDEX, "-C", "o", "-i", "password")
    leak = next((message for message in plain.copied if secret in message), b"")
    story.output(hexdump(leak, 0), style="yellow")
    story.check("the search works: on the plain vTPM's socket it finds the password", secret in leak)
    return leak


def _look_at_encrypted(cast: Cast, secret: bytes, clear: bytes) -> None:
    story, vm, view = cast.story, cast.vms[0], _view(cast)
    story.say("\nNow VM A and its vTPM in the SP:")
    with view.watch(secret, vm.key) as watch:
        frame = _catch_frame(vm, watch, len(clear) + mailbox.OVERHEAD_BYTES)
        read = vm.run("tpm2_nvread", NV_INDEX, "-C", "o")
    story.say("The same TPM2_NV_Write as it lay there: a header of 64 bytes (its length, its number), then ciphertext.")
    story.output(hexdump(frame, COMMAND_ADDRESS), style="yellow")
    story.check("the password went through this memory both ways", bool(frame) and read == secret)
    story.output([f"{watch.looks} searches while {len(watch.frames)} TPM commands passed: {len(watch.found)} hits"])
    story.check("in it neither the password nor the VM's key was ever found", not watch.found and len(watch.frames) > 1)


def _catch_frame(vm: CloudVm, watch: Watch, size_bytes: int) -> bytes:
    """Has the VM write its password until the hypervisor's thread was quick enough to copy that request's frame."""
    for _ in range(20):
        vm.run("tpm2_nvwrite", NV_INDEX, "-C", "o", "-i", "password")
        for frame in list(watch.frames.values()):
            if len(frame) == size_bytes:
                return frame
    return b""


def _view(cast: Cast) -> HostView:
    if cast.view is None:
        raise ActFailed("the hypervisor has no view of VM A")
    return cast.view


def hexdump(content: bytes, address: int, most_lines: int = 10) -> list[str]:
    """Lines of 16 bytes: address, hex, and the letters among them."""
    lines = []
    for offset in range(0, len(content), 16):
        row = content[offset : offset + 16]
        letters = "".join(chr(byte) if 0x20 <= byte < 0x7F else "·" for byte in row)
        lines.append(f"{address + offset:04x}  {row.hex(' ', 2):<39}  {letters}")
    return lines if len(lines) <= most_lines else [*lines[: most_lines - 1], "…"]


def replay(cast: Cast) -> None:
    """A copied request sent again: to a plain vTPM, then to VM A's."""
    story = cast.story
    story.chapter(
        "The hypervisor replays a request",
        "It cannot read requests, but it can write an old one back into memory and ring the doorbell. Executed twice, a "
        "measurement would ruin the PCRs, and an old NV write would undo a newer one.",
    )
    with story.showing(REPLAYS):
        if cast.plain is not None:
            _replay_on_plain(story, cast.plain)
        _replay_encrypted(cast)


def _replay_on_plain(story: Story, plain: PlainVtpm) -> None:
    story.say("The contrast again, on the plain vTPM:")
    plain.run("tpm2_pcrextend", f"{PCR}:sha256={FIRMWARE.hex()}")
    extend = next(message for message in reversed(plain.copied) if len(message) == _PCR_EXTEND_BYTES)
    before = plain.run("tpm2_pcrread", f"sha256:{PCR}")
    story.say("The host sends its copy of that TPM2_PCR_Extend once more.")
    plain.replay(extend)
    after = plain.run("tpm2_pcrread", f"sha256:{PCR}")
    story.check("the attack works there: the PCR has changed", after != before)


def _replay_encrypted(cast: Cast) -> None:
    story, vm, view = cast.story, cast.vms[0], _view(cast)
    story.say("\nNow VM A. The hypervisor keeps the frame of a TPM2_PCR_Extend:")
    measure(vm, FIRMWARE)
    old = view.command_frame()
    story.check("the kept frame is that command, by its length", len(old) == mailbox.OVERHEAD_BYTES + _PCR_EXTEND_BYTES)
    before = vm.pcr(PCR)
    story.say("It writes the frame back into VM A's memory, and rings:")
    verdict = view.start(old)
    story.output([f"the vTPM's interface: {verdict.name}"])
    story.check("refused as a replay", verdict is AttachError.REPLAYED)
    story.say("It raises the frame's sequence number, and rings again:")
    altered = bytearray(old)
    altered[16:24] = (int.from_bytes(old[16:24], "little") + 100).to_bytes(8, "little")
    verdict = view.start(bytes(altered))
    story.output([f"the vTPM's interface: {verdict.name}"])
    story.check("refused as not authentic", verdict is AttachError.NOT_AUTHENTIC)
    story.check("nothing was executed: VM A reads the same PCR, and works on", vm.pcr(PCR) == before)
    story.say("The SP's log:")
    story.output(cast.host.log_lines("refused")[-2:])


def park(cast: Cast) -> None:
    """A vTPM without a process, and back."""
    story, host, vm = cast.story, cast.host, cast.vms[0]
    story.chapter(
        "An idle vTPM is parked",
        "A host with thousands of VMs cannot keep a process for each TPM. An idle one is parked: kept sealed, without a "
        "process. PCRs must not notice, or parking would be a way to reset them.",
    )
    with story.showing(PARKS):
        before = vm.pcr(PCR)
        running = host.processes()
        reply = host.hypervisor("park", messages.ParkVtpm(vm_id=vm.vm_id))
        story.check("parked", _residency(reply) == "parked")
        gone = wait_until(lambda: len(running - host.processes()) == 1)
        ended = ", ".join(str(pid) for pid in sorted(running - host.processes()))
        story.check(f"its process is gone ({ended or 'none ended'})", gone)
        story.say("VM A knows nothing of that, and uses its TPM:")
        begun = time.monotonic()
        after = vm.pcr(PCR)
        story.output([f"answered within {1000 * (time.monotonic() - begun):.0f} ms, the start of all tools included"])
        story.check("awake again by itself, with the same PCR", after == before != ZERO)
        listed = host.hypervisor("list", messages.ListVms())
        active = isinstance(listed, messages.VmList) and all(_residency(info) == "active" for info in listed.vms)
        story.check("the SP lists it as active again", active)


def _residency(reply: messages.Reply) -> str:
    return reply.vtpm.residency if isinstance(reply, messages.VmInfo) and reply.vtpm is not None else ""


def cut_power(cast: Cast) -> None:
    """SIGKILL of the SP, restart, new boots of the VMs."""
    story, host, vm = cast.story, cast.host, cast.vms[0]
    story.chapter(
        "The host loses power",
        "All of host 1 is killed without warning. The VMs die with it, and so do PCRs. But what a TPM has acknowledged must "
        "never be lost: passwords in NV, and the seeds from which its keys come.",
    )
    with story.showing(SURVIVES):
        for each in cast.vms:
            each.save_disk("seal.pub", "seal.priv", "password")
        running = host.processes()
        story.command("host-1#", ["kill", "-KILL", str(host.pid), "…"])
        host.lose_power()
        orphans = wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in running))
        story.check(f"the SP and its {len(running)} processes are gone", orphans)
        lost = vm.attempt("tpm2_pcrread", f"sha256:{PCR}")
        story.output([lost.complaint])
        story.check("VM A has lost its TPM", not lost.ok)
        story.say(
            "\nThe power is back. The same SP starts from its sealed store, and the agent boots the VMs by itself:"
        )
        host.start()
        host.start_agent()
        story.check("both VMs are up again", all(wait_until(each.answers) for each in cast.vms))
        for each in cast.vms:
            each.load_disk()
        _after_power_cut(story, vm)
        story.say("\nVM B, in short:")
        with story.only_checks():
            _after_power_cut(story, cast.vms[1])
        story.say("")
        keys = {each.name: endorsement_key(each) for each in cast.vms}
        story.check("both endorsement keys are those from before the power cut", keys == cast.keys)


def _after_power_cut(story: Story, vm: CloudVm) -> None:
    read = vm.run("tpm2_nvread", NV_INDEX, "-C", "o", show=True)
    story.check("the password in NV has survived", read == password_of(vm))
    story.check(f"PCR {PCR} is zero, as after any power-on", vm.pcr(PCR) == ZERO)
    vm.run("tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", "primary.ctx")
    vm.run("tpm2_load", "-Q", "-C", "primary.ctx", "-u", "seal.pub", "-r", "seal.priv", "-c", "seal.ctx")
    refused = vm.attempt("tpm2_unseal", "-c", "seal.ctx", "-p", f"pcr:sha256:{PCR}")
    story.output([refused.complaint])
    story.check("the sealed secret is refused before the firmware is measured", not refused.ok)
    measure(vm, FIRMWARE)
    unsealed = vm.run("tpm2_unseal", "-c", "seal.ctx", "-p", f"pcr:sha256:{PCR}", show=True)
    story.check("unsealed again once the PCR is right", unsealed == password_of(vm))


CHAPTERS = (meet, create, use, compare, endorse, look, replay, park, cut_power, migrate, move, recover, audit)
