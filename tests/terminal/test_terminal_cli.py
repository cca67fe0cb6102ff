"""`spvtpm terminal` as its user sees it: a story from the first keyring to the last file, and what is refused on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from spvtpm.terminal.keyring import Keyring
from spvtpm.wire import messages
from tests.papers import DAY, todays_papers
from tests.terminal.estate import Estate

Done = subprocess.CompletedProcess[str]


class Owner:
    """Whoever types the commands.

    Args:
        directory: his home.
        estate: with the chips.
    """

    def __init__(self, directory: Path, estate: Estate) -> None:
        self.home, self.estate = directory, estate
        self.root, self.revoked = directory / "root.pem", directory / "revoked.pem"
        self.root.write_bytes(todays_papers().root.certificate.public_bytes(Encoding.PEM))
        revoked = todays_papers().revocation_list(at=datetime.now(UTC) - DAY)
        self.revoked.write_bytes(revoked.crl.public_bytes(Encoding.PEM))
        self.vm = str(uuid.uuid4())
        self.key = directory / "vm.key"
        self.run("guest", "new-key", self.key)

    def run(self, *words: str | Path) -> Done:
        """One command."""
        environment = {**os.environ, "HOME": str(self.home), "XDG_DATA_HOME": ""}
        command = [sys.executable, "-m", "spvtpm.cli", *map(str, words)]
        return subprocess.run(
            command,
            env=environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )

    def done(self, *words: str | Path, at: int | None = None) -> Done:
        """One terminal command that succeeds, perhaps at a chip."""
        result = self.run("terminal", *words, *(() if at is None else self.at(at)))
        assert result.returncode == 0, result.stderr
        if at is not None:
            assert result.stderr.startswith(("verified: chip ", '{"verified":{')), result.stderr
        return result

    def refused(self, code: int, *words: str | Path) -> str:
        """One terminal command that does not; its sentence."""
        result = self.run("terminal", *words)
        assert result.returncode == code, (result.stdout, result.stderr)
        assert "Traceback" not in result.stderr
        assert not result.stdout
        *_verified, sentence, hint = result.stderr.splitlines()
        assert hint.startswith("  ") and hint.endswith(".")
        return sentence

    def at(self, chip: int) -> tuple[str | Path, ...]:
        """The way to a chip."""
        return ("--channel", self.estate.sps[chip].state)

    def begin(self, *words: str | Path) -> None:
        """A keyring that trusts the vendor."""
        self.done("init", *words)
        self.done("trust", self.root, "--revoked", self.revoked, *words)

    def boot(self, chip: int, begin: type[messages.LaunchVm] | type[messages.StartVm]) -> None:
        """The hypervisor boots the VM and powers it off."""
        self.estate.run_and_stop(uuid.UUID(self.vm), chip, begin(vm_id=uuid.UUID(self.vm)))


@pytest.fixture
def owner(tmp_path: Path, estate: Estate) -> Owner:
    return Owner(tmp_path, estate)


@pytest.mark.claim("C6a")
@pytest.mark.claim("C6b")
@pytest.mark.claim("C7")
def test_from_the_first_keyring_to_the_last_file(owner: Owner) -> None:
    owner.begin()
    assert (owner.home / ".local/share/spvtpm/keyring").stat().st_mode & 0o777 == 0o600
    verified = owner.done("verify", at=0)
    for part in ("vendor Example Silicon", "model test chip", "firmware 1", "not revoked (list 1 of "):
        assert part in verified.stderr

    made = owner.done("provision", owner.vm, "--vm-key", owner.key, "--label", "web 1", "--no-migration", at=0)
    assert made.stdout == f"{owner.vm}  stopped, boot 0, no vTPM yet  web 1\n"
    owner.boot(0, messages.LaunchVm)
    (listed,) = json.loads(owner.done("list", "--json", at=0).stdout)
    assert (listed["vm_id"], listed["policy"]["migration_allowed"]) == (owner.vm, False)
    assert listed["policy"]["direct_path_only"], "unless he allows the TPM emulator interface"
    assert "provisioned" in owner.done("events", owner.vm, at=0).stdout

    owner.done("endorsement", owner.vm, "--output", "ek", at=0)
    assert len(x509.load_pem_x509_certificates((owner.home / "ek/issuer.pem").read_bytes())) == 3
    assert x509.load_pem_x509_certificates((owner.home / "ek/ek-1.pem").read_bytes())
    assert "BEGIN CERTIFICATE" in owner.done("endorsement", owner.vm, at=0).stdout

    exported = owner.done("export", owner.vm, "web.instance", at=0).stdout
    assert exported == f"vTPM {listed['vtpm_id']} exported as version 1: {owner.home}/web.instance\n"
    again = owner.done("export", owner.vm, "web.instance", at=0).stdout
    assert again == f"vTPM {listed['vtpm_id']} exported already as version 1: {owner.home}/web.instance\n"
    assert f"in the file {owner.home}/web.instance" in owner.done("status").stdout
    told = json.loads(owner.done("inspect", "web.instance", "--json").stdout)
    assert (told["vtpm_id"], told["version"], told["hibernated"]) == (listed["vtpm_id"], 1, False)
    assert owner.done("fate", listed["vtpm_id"], at=0).stdout == f"vTPM {listed['vtpm_id']}: exported, version 1\n"

    assert owner.done("rotate-secret", at=1).stdout == "VMs that have the new secret: 0\n"
    owner.done("provision", owner.vm, "--vm-key", owner.key, "--import", "web.instance", at=1)
    assert owner.done("rotate-secret", "--same", at=1).stdout == "VMs that have the new secret: 1\n"
    owner.boot(1, messages.LaunchVm)
    assert "needs" not in owner.refused(2, "destroy", owner.vm, *owner.at(1))
    owner.done("destroy", owner.vm, "--yes", at=1)
    assert owner.done("status").stdout.endswith("  destroyed\n")
    owner.done("forget", listed["vtpm_id"])
    assert not owner.done("status").stdout


def test_what_is_remembered_and_told_as_json(owner: Owner) -> None:
    owner.begin()
    owner.done("provision", owner.vm, "--vm-key", owner.key, "--chip", owner_chip(owner), "--emulator", "--json", at=0)
    owner.boot(0, messages.LaunchVm)
    (vm,) = json.loads(owner.done("list", "--json", at=0).stdout)
    assert vm["policy"]["chips"] == [owner_chip(owner)]
    assert vm["policy"]["direct_path_only"] is False
    (known,) = json.loads(owner.done("status", "--json").stdout)
    assert known["place"] == f"at the chip {owner_chip(owner)}"
    result = owner.run("terminal", "export", owner.vm, "out", *owner.at(1), "--json")
    first, second = map(json.loads, result.stderr.splitlines())
    assert (result.returncode, set(first), second["error"]) == (3, {"verified"}, "not-found")
    assert not (owner.home / "out").exists()
    assert json.loads(owner.done("verify", "--json", at=0).stdout)["chip_id"] == owner_chip(owner)
    assert json.loads(owner.done("fate", vm["vtpm_id"], "--json", at=0).stdout)["state"] == "here"
    assert json.loads(owner.done("events", owner.vm, "--json", at=0).stdout)
    assert json.loads(owner.done("endorsement", owner.vm, "--json", at=0).stdout)["chip"]["firmware"] is None
    assert json.loads(owner.done("export", owner.vm, "out", "--json", at=0).stdout)["version"] == 1


def owner_chip(owner: Owner) -> str:
    with owner.estate.desk(0).connect() as session:
        return session.verified.chip_id.hex()


@pytest.mark.attack("A24")
def test_a_passphrase_comes_from_a_private_file(owner: Owner) -> None:
    secret = owner.home / "passphrase"
    secret.touch(mode=0o600)
    secret.write_text("correct horse\n")
    words = ("--passphrase-file", secret)
    owner.begin(*words)
    assert not owner.done("status", *words).stdout
    assert "there is no terminal to ask on" in owner.refused(2, "status")
    secret.write_text("wrong\n")
    assert "the passphrase is not the keyring's" in owner.refused(3, "status", *words)
    secret.chmod(0o644)
    assert "can be read by others" in owner.refused(4, "status", *words)


def test_what_is_refused_says_why(owner: Owner) -> None:
    at = owner.at(0)
    assert "there is no keyring in" in owner.refused(4, "status")
    owner.done("init")
    assert "there is a keyring in" in owner.refused(3, "init")
    assert "no vendor is trusted yet" in owner.refused(3, "verify", *at)
    owner.done("trust", owner.root)
    assert "no revocation list" in owner.refused(3, "verify", *at)
    owner.done("trust", "--revoked", owner.revoked)
    owner.done("verify", at=0)

    assert "is not among those that are allowed" in owner.refused(3, "verify", *at, "--chip", "00" * 16)
    assert "needed: 99" in owner.refused(3, "list", *at, "--minimum-firmware", "99")
    assert "is no chip id" in owner.refused(2, "list", *at, "--chip", "xyz")
    assert "no secure processor answers" in owner.refused(4, "list", "--channel", "nowhere")
    assert "give a vendor's ROOT.pem" in owner.refused(2, "trust")
    assert "no PEM" in owner.refused(2, "trust", owner.key)
    provision = ("provision", owner.vm, *at, "--vm-key")
    assert "no VM key" in owner.refused(4, *provision, "none")
    assert "keeps its policy" in owner.refused(2, *provision, owner.key, "--import", "x", "--label", "y")
    assert "no such policy" in owner.refused(2, *provision, owner.key, "--pcr-bank", "SHA 256")
    assert "there is no VM" in owner.refused(3, "destroy", owner.vm, *at, "--yes")
    assert "knows no vTPM" in owner.refused(3, "forget", owner.vm)
    assert "does not begin as an instance file" in owner.refused(5, "inspect", owner.root)


def test_the_hypervisors_socket_is_no_way_to_a_channel(owner: Owner) -> None:
    owner.begin()
    owner.refused(5, "verify", "--channel", owner.estate.sps[0].socket)


def test_the_keyring_lies_where_xdg_says_or_where_it_is_told(owner: Owner) -> None:
    owner.done("init", "--keyring", owner.home / "elsewhere")
    assert Keyring.open(owner.home / "elsewhere", bytes).content.user_secrets
    environment = {**os.environ, "XDG_DATA_HOME": str(owner.home / "data")}
    command = [sys.executable, "-m", "spvtpm.cli", "terminal", "init"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert (owner.home / "data/spvtpm/keyring").exists()


@pytest.mark.attack("A24")
def test_a_command_that_has_opened_the_keyring_leaves_no_core_dump(owner: Owner) -> None:
    owner.done("init", "--keyring", owner.home / "own")
    program = (
        "import pathlib, resource; from spvtpm.cli.terminal_parts import Own;"
        f"Own(pathlib.Path({str(owner.home / 'own')!r})).open(); print(resource.getrlimit(resource.RLIMIT_CORE))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "(0, 0)\n", done.stderr
