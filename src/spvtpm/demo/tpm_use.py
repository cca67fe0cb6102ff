"""What people do with a TPM, done with tpm2-tools in one VM: measure, keep a secret, sign, seal, quote."""

from __future__ import annotations

import hashlib

from spvtpm.demo.cloud_vm import CloudVm
from spvtpm.demo.story import Claim, Story

MEASURES = Claim("C9", "The VM's unmodified TPM tools work: PCRs", "tpm2_pcrextend, tpm2_pcrread against SHA-256 here")
STORES = Claim("C9", "… NV storage", "tpm2_nvdefine, tpm2_nvwrite, tpm2_nvread")
SIGNS = Claim("C9", "… keys and signatures", "tpm2_sign; OpenSSL verifies it, and refuses an altered file")
SEALS = Claim("C9", "… secrets sealed to PCRs", "tpm2_unseal works, and is refused once the PCR has changed")
QUOTES = Claim("C9", "… quotes", "tpm2_quote; tpm2_checkquote verifies it, and refuses another nonce")

PCR = 7
NV_INDEX = "0x1500010"
ZERO = bytes(32)
FIRMWARE = hashlib.sha256(b"the VM's firmware, version 1").digest()


def password_of(vm: CloudVm) -> bytes:
    """The secret that a VM keeps in its vTPM; the demo looks for it where it must not be."""
    return f"the disk password of {vm.name} is tr0ub4dor&3".encode()


def measure(vm: CloudVm, digest: bytes) -> None:
    """Extends the PCR of the story."""
    vm.run("tpm2_pcrextend", f"{PCR}:sha256={digest.hex()}")


def endorsement_key(vm: CloudVm) -> bytes:
    """The public half of the VM's endorsement key, as PEM."""
    vm.run("tpm2_createek", "-c", "ek.ctx", "-G", "ecc", "-u", "ek.pem", "-f", "pem")
    return vm.read("ek.pem")


def use_tpm(story: Story, vm: CloudVm) -> None:
    """All of it, each under its claim."""
    with story.showing(MEASURES):
        _measure_boot(story, vm)
    with story.showing(STORES):
        _keep_password(story, vm)
    with story.showing(SIGNS):
        _sign(story, vm)
    with story.showing(SEALS):
        _seal(story, vm)
    with story.showing(QUOTES):
        _quote(story, vm)


def _measure_boot(story: Story, vm: CloudVm) -> None:
    story.say("Measured boot: the firmware's hash goes into a PCR, which can be extended but never set.")
    measure(vm, FIRMWARE)
    pcr = vm.pcr(PCR)
    story.check(
        f"PCR {PCR} = SHA-256(zeros ‖ firmware hash), as computed here", pcr == hashlib.sha256(ZERO + FIRMWARE).digest()
    )


def _keep_password(story: Story, vm: CloudVm) -> None:
    story.say("\nNV storage: a password that the VM keeps in its TPM.")
    password = password_of(vm)
    vm.write("password", password)
    vm.run("tpm2_nvdefine", NV_INDEX, "-C", "o", "-s", str(len(password)), "-a", "ownerread|ownerwrite")
    vm.run("tpm2_nvwrite", NV_INDEX, "-C", "o", "-i", "password")
    read = vm.run("tpm2_nvread", NV_INDEX, "-C", "o", show=True)
    story.check("what was written is read back", read == password)


def _sign(story: Story, vm: CloudVm) -> None:
    story.say("\nA signing key that never leaves the TPM, checked by somebody who has only its public half.")
    vm.write("order", f"pay 100 to {vm.name}\n".encode())
    vm.write("forged", f"pay 900 to {vm.name}\n".encode())
    vm.run("tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", "primary.ctx")
    parts = ("-u", "sign.pub", "-r", "sign.priv", "-c", "sign.ctx")
    vm.run("tpm2_create", "-Q", "-C", "primary.ctx", "-G", "ecc256:ecdsa", *parts)
    vm.run("tpm2_readpublic", "-Q", "-c", "sign.ctx", "-f", "pem", "-o", "sign.pem")
    vm.run("tpm2_sign", "-c", "sign.ctx", "-g", "sha256", "-f", "plain", "-o", "order.sig", "order")
    verify = ("openssl", "dgst", "-sha256", "-verify", "sign.pem", "-signature", "order.sig")
    genuine = vm.attempt(*verify, "order")
    story.output(genuine.output.decode().splitlines())
    forged = vm.attempt(*verify, "forged")
    story.output(forged.output.decode().splitlines())
    story.check("OpenSSL verifies the signature, and refuses the altered order", genuine.ok and not forged.ok)


def _seal(story: Story, vm: CloudVm) -> None:
    story.say(f"\nA secret that the TPM gives back only while PCR {PCR} is as it is now.")
    password = password_of(vm)
    vm.run("tpm2_createpolicy", "-Q", "--policy-pcr", "-l", f"sha256:{PCR}", "-L", "pcr.policy")
    parts = ("-u", "seal.pub", "-r", "seal.priv", "-c", "seal.ctx")
    vm.run("tpm2_create", "-Q", "-C", "primary.ctx", "-L", "pcr.policy", "-i", "password", *parts)
    unsealed = vm.run("tpm2_unseal", "-c", "seal.ctx", "-p", f"pcr:sha256:{PCR}", show=True)
    story.check("unsealed while the PCR is right", unsealed == password)
    measure(vm, hashlib.sha256(b"a boot loader that nobody knows").digest())
    refused = vm.attempt("tpm2_unseal", "-c", "seal.ctx", "-p", f"pcr:sha256:{PCR}")
    story.output([refused.complaint])
    story.check("refused once the PCR was extended", not refused.ok and "policy check failed" in refused.complaint)


def _quote(story: Story, vm: CloudVm) -> None:
    story.say("\nA quote: the TPM signs its PCRs and a fresh number, for somebody far away.")
    nonce, other = hashlib.sha256(vm.name.encode()).hexdigest()[:16], "00" * 8
    vm.run("tpm2_createek", "-c", "ek.ctx", "-G", "ecc", "-u", "ek.pub")
    names = ("-u", "ak.pem", "-f", "pem", "-n", "ak.name")
    vm.run("tpm2_createak", "-Q", "-C", "ek.ctx", "-c", "ak.ctx", "-G", "ecc", "-g", "sha256", "-s", "ecdsa", *names)
    files = ("-m", "quote.msg", "-s", "quote.sig")
    vm.run("tpm2_quote", "-Q", "-c", "ak.ctx", "-l", f"sha256:{PCR}", "-q", nonce, *files, "-o", "quote.pcrs")
    check = ("tpm2_checkquote", "-u", "ak.pem", *files, "-f", "quote.pcrs", "-g", "sha256", "-q")
    genuine = vm.attempt(*check, nonce)
    story.output([line.strip() for line in genuine.output.decode().splitlines() if line.strip().startswith(str(PCR))])
    replayed = vm.attempt(*check, other)
    story.output([replayed.complaint])
    story.check("the quote verifies for its nonce, and for no other", genuine.ok and not replayed.ok)
