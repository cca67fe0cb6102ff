"""`spvtpm login`, `chips` and `vm` as their user sees them, through a real platform, agent and secure processor to a VM."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from spvtpm.terminal.platform_relay import PlatformRelay
from spvtpm.wire.errors import ChannelError
from spvtpm.wire.messages import GetStatus, Status
from tests.cloud_stack import SPVTPM, CloudStack, CloudUser


@pytest.fixture(scope="module")
def cloud() -> Iterator[CloudStack]:
    """Two hosts behind a platform."""
    with tempfile.TemporaryDirectory(prefix="spv-") as directory, CloudStack(Path(directory) / "c", hosts=2) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def alice(cloud: CloudStack) -> CloudUser:
    return cloud.user("alice")


def refused(user: CloudUser, code: int, *words: str) -> str:
    """The code of an error's class, of a command that ends with this exit code."""
    done = user.attempt(*words, "--json")
    assert done.returncode == code, done
    assert b"Traceback" not in done.stderr
    return str(json.loads(done.stderr.splitlines()[-1])["error"])


@pytest.mark.claim("C3")
@pytest.mark.claim("C6a")
@pytest.mark.claim("C6b")
def test_a_vm_from_creation_to_destruction(alice: CloudUser) -> None:
    assert {chip["verified"]["vendor"] for chip in alice.run_json("chips")} == {"Example Silicon"}
    (made,) = alice.run_json("vm", "create", "web", "--label", "mine")
    assert (made["state"], made["label"]) == ("running", "mine")
    assert refused(alice, 3, "vm", "create", "web") == "exists"

    alice.run("vm", "exec", "web", "--", "tpm2_pcrextend", f"16:sha256={'ab' * 32}")
    read = ("vm", "exec", "web", "--", "tpm2_pcrread", "sha256:16")
    pcr = alice.run(*read)
    alice.run("vm", "exec", "web", "--", "sh", "-c", "cat > kept", stdin=b"in its memory")
    done = alice.attempt("vm", "exec", "web", "--", "sh", "-c", "cat; exit 7", stdin=b"said")
    assert (done.returncode, done.stdout) == (7, b"said")
    told = alice.attempt("vm", "exec", "web", "--json", "--", "sh", "-c", "echo no >&2; exit 3")
    assert (told.returncode, json.loads(told.stdout)) == (3, {"code": 3, "stdout": "", "stderr": "no\n"})
    assert alice.run_json("vm", "publish-pcrs", "web")["banks"]["sha256"]["16"] != "00" * 32

    gone = alice.run_json("vm", "hibernate", "web")
    assert gone["path"] == str(alice.keyring / "instances" / "web-1.vtpm")
    assert [(line["platform_says"]["state"], line["differences"]) for line in alice.run_json("vm", "ls")] == [
        ("away", [])
    ]
    assert refused(alice, 3, "vm", "start", "web") == "wrong-state"
    alice.run("vm", "resume", "web")
    assert alice.run(*read) == pcr  # goes on where it was, memory and vTPM
    assert alice.run("vm", "exec", "web", "--", "cat", "kept") == b"in its memory"

    elsewhere = str(alice.keyring.parent / "web.vtpm")
    alice.run("vm", "shutdown", "web")
    assert alice.run_json("vm", "export", "web", elsewhere)["path"] == elsewhere
    assert not list((alice.keyring / "instances").iterdir())
    alice.run("vm", "import", "web", elsewhere)
    alice.run("vm", "start", "web")
    assert alice.run(*read) != pcr  # another boot
    assert {event["by"] for event in alice.run_json("vm", "events", "web")} == {"platform", "secure processor"}
    shown = alice.run_json("vm", "show", "web")
    assert (shown["secure_processor_says"]["state"], shown["differences"]) == ("running", [])
    assert refused(alice, 2, "vm", "destroy", "web") == "usage"
    alice.run("vm", "destroy", "web", "--yes")
    assert alice.run_json("vm", "ls") == []
    assert refused(alice, 3, "vm", "show", "web") == "not-found"


@pytest.mark.claim("C6c")
def test_a_vtpm_comes_home_after_a_power_loss(cloud: CloudStack, alice: CloudUser) -> None:
    alice.run("vm", "create", "lost")
    name = alice.run_json("vm", "show", "lost")["platform_says"]["host"]
    alice.run("vm", "exec", "lost", "--", "tpm2_nvdefine", "-Q", "-s", "4", "0x1500016")
    alice.run("vm", "exec", "lost", "--", "tpm2_nvwrite", "-Q", "-i", "-", "0x1500016", stdin=b"kept")
    host = next(host for host in cloud.hosts if host.name == name)
    host.agent.kill()  # first, or it would boot the VM again
    host.sp.kill()
    assert refused(alice, 4, "vm", "recover", "lost") == "unavailable"
    host.sp.start()
    host.agent.start()
    done = alice.attempt("vm", "recover", "lost")
    if done.returncode:  # the agent was quicker, and has booted it
        assert b"shut it down" in done.stderr
        alice.run("vm", "shutdown", "lost")
    alice.run("vm", "start", "lost")  # perhaps at the other host
    assert alice.run("vm", "exec", "lost", "--", "tpm2_nvread", "0x1500016") == b"kept"
    alice.run("vm", "destroy", "lost", "--yes")


def test_a_command_may_say_much_before_it_reads(alice: CloudUser) -> None:
    said, given = 64 << 20, bytes(32 << 20)  # more than is on its way at a time, both ways
    alice.run("vm", "create", "talks")
    done = alice.run("vm", "exec", "talks", "--", "sh", "-c", f"head -c {said} /dev/zero; wc -c", stdin=given)
    assert done == bytes(said) + b"%d\n" % len(given)


def test_a_relay_that_was_closed_says_nothing_more_and_closes_once(cloud: CloudStack, alice: CloudUser) -> None:
    status = cloud.hosts[0].sp.call(GetStatus())
    assert isinstance(status, Status)
    with alice.site() as site:
        relay = PlatformRelay(site.platform, f"/v1/chips/{status.chip_id}/channel", 20)
    relay.close()
    relay.close()
    relay.send([b"late"])
    with pytest.raises(ChannelError):
        relay.receive(relay.deadline())


def test_ctrl_c_ends_the_command_in_the_vm(alice: CloudUser) -> None:
    alice.run("vm", "create", "stops")
    words = ["vm", "exec", "stops", "--keyring", str(alice.keyring), "--", "sh", "-c", "echo $$; exec sleep 1000"]
    with subprocess.Popen([*SPVTPM, *words], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as terminal:
        assert terminal.stdout is not None
        pid = int(terminal.stdout.readline())
        terminal.send_signal(signal.SIGINT)
        assert terminal.wait(60) == 130
    ended = alice.attempt("vm", "exec", "stops", "--", "sh", "-c", f"while kill -0 {pid}; do sleep 0.1; done")
    assert ended.returncode == 0
    alice.run("vm", "destroy", "stops", "--yes")


def test_what_is_refused_says_why(cloud: CloudStack, alice: CloudUser, tmp_path: Path) -> None:
    other = cloud.user("bob")
    assert refused(alice, 3, "vm", "create", "no", "--minimum-firmware", "99") in ("no-host", "firmware-too-old")
    assert refused(alice, 3, "vm", "create", "no", "--chip", "00" * 16) == "no-host"
    assert "no" not in {vm["name"] for vm in alice.run_json("vm", "ls")}
    assert refused(alice, 2, "vm", "create", "No Name") == "usage"
    assert refused(alice, 3, "vm", "exec", "none", "--", "true") == "not-found"

    other.run("logout")
    assert refused(other, 3, "vm", "ls") == "not-logged-in"
    wrong = tmp_path / "token"
    wrong.touch(mode=0o600)
    wrong.write_text("x" * 43)
    assert refused(other, 3, "login", cloud.urls[0], "--token-file", str(wrong)) == "no-token"
    assert refused(other, 2, "login", "http://192.0.2.1", "--token-file", str(wrong)) == "usage"
    assert refused(other, 4, "login", "unix:/nowhere", "--token-file", str(wrong)) == "unavailable"
    wrong.chmod(0o644)
    assert refused(other, 4, "login", cloud.urls[0], "--token-file", str(wrong)) == "storage"
    assert refused(other, 2, "login", cloud.urls[0]) == "usage"  # no terminal to ask on
    nobody = CloudUser(tmp_path / "none" / "spvtpm")
    assert refused(nobody, 4, "login", cloud.urls[0], "--token-file", str(wrong)) == "keyring"


def test_a_base_installation_says_what_is_missing(alice: CloudUser) -> None:
    program = (
        "import sys; sys.modules['httpx'] = None; from spvtpm.cli import main;"
        f"sys.argv = ['spvtpm', 'vm', 'ls', '--keyring', {str(alice.keyring)!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "pip install 'spvtpm[platform]'" in done.stderr) == (2, True), done.stderr
