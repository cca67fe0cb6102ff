"""`spvtpm login`, `chips` and `vm` as their user sees them, through a real platform, agent and secure processor to a VM."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spvtpm.terminal import vm_attestation
from spvtpm.terminal.platform_relay import PlatformRelay
from spvtpm.wire.errors import ChannelError, MessageError
from spvtpm.wire.event_log import MAX_LOG_BYTES
from spvtpm.wire.messages import GetStatus, Status
from spvtpm.wire.tpm_structures import sized
from tests.attesting import FEW, log_event, log_head
from tests.clients.tools import Tools
from tests.cloud_stack import SPVTPM, CloudStack, CloudUser

COLUMNS = 80
EVENTS = ((0, 8, "firmware 1\0".encode("utf-16-le")), (7, 0x80000007, b"Secure Boot"), (7, 4, bytes(4)))


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


@pytest.fixture(scope="module")
def booted(alice: CloudUser) -> CloudUser:
    """Alice, with a VM `measured` that has booted as `EVENTS` say."""
    alice.run("vm", "create", "measured")
    extended = [f"{pcr}:sha256={hashlib.sha256(data).hexdigest()}" for pcr, _, data in EVENTS]
    alice.run("vm", "exec", "measured", "--", "tpm2_pcrextend", *extended)
    log = log_head() + b"".join(log_event(*event) for event in EVENTS)
    alice.run("vm", "exec", "measured", "--", "sh", "-c", "cat > log", stdin=log)
    return alice


def attest(user: CloudUser, code: int, *words: str) -> dict[str, Any]:
    done = user.attempt("vm", "attest", "measured", *words, "--json")
    assert done.returncode == code, done
    told: dict[str, Any] = json.loads(done.stdout or done.stderr.splitlines()[-1])
    return told


@pytest.mark.claim("C7")
def test_a_result_becomes_the_policy_for_the_next_and_a_change_is_refused(booted: CloudUser, tmp_path: Path) -> None:
    genuine = attest(booted, 0, "--pcrs", "sha256:0,1,16")
    assert (genuine["verdict"], genuine["reasons"]) == ("genuine", [])
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"pcrs": genuine["pcrs"]}))
    assert attest(booted, 0, "--policy", str(policy))["verdict"] == "trusted"
    booted.run("vm", "exec", "measured", "--", "tpm2_pcrextend", f"16:sha256={'ab' * 32}")
    refused = attest(booted, 3, "--policy", str(policy), "--pcrs", "sha256:2")
    assert (refused["verdict"], refused["reasons"]) == ("refused", ["PCR 16 of sha256 is not as expected"])
    assert {(pcr["index"], pcr["expected"]) for pcr in refused["judged"]} == {
        (0, True),
        (1, True),
        (2, None),
        (16, False),
    }
    policy.write_text("{}")
    assert attest(booted, 2, "--policy", str(policy))["error"] == "usage"


@pytest.mark.claim("C7")
def test_the_result_holds_what_tpm2_checkquote_checks(booted: CloudUser, tmp_path: Path) -> None:
    told, tools = attest(booted, 0), Tools("none", tmp_path)
    evidence = told["evidence"]
    tools.write("ak.pub", sized(bytes.fromhex(evidence["ak_public"])))
    tools.write("quote", bytes.fromhex(evidence["attested"]))
    tools.write("signature", bytes.fromhex(evidence["signature"]))
    words = ("-u", "ak.pub", "-m", "quote", "-s", "signature", "-g", "sha256", "-q", evidence["nonce"])
    tools.run("tpm2_checkquote", *words)


@pytest.mark.claim("C7")
def test_an_event_log_explains_the_pcrs_or_is_refused(booted: CloudUser) -> None:
    told = attest(booted, 0, "--event-log", "--event-log-path", "log")
    assert [(event["pcr"], event["words"]) for event in told["event_log"]] == [
        (0, "firmware 1"),
        (7, "Secure Boot"),
        (7, ""),
    ]
    assert {pcr["index"] for pcr in told["judged"] if pcr["logged"]} == {0, 7}
    assert attest(booted, 3, "--event-log")["error"] == "evidence"  # where Linux would have it, this VM has none
    head, first = log_head(), log_event(*EVENTS[0])
    with booted.site() as site:
        for name, log in {
            "lie": head + first + log_event(7, 4, bytes(4)),
            "cut": head + first[:-1],
            "long": None,
        }.items():
            write = f"cat > {name}" if log else f"head -c {2 * MAX_LOG_BYTES} /dev/zero > {name}"
            booted.run("vm", "exec", "measured", "--", "sh", "-c", write, stdin=log or b"")
            if name == "lie":
                reasons = vm_attestation.attest(site, "measured", FEW, log_path=name).appraisal.reasons
                assert reasons == ["PCR 7 of sha256 is not what the event log gives"]
                continue
            with pytest.raises(MessageError):
                vm_attestation.attest(site, "measured", FEW, log_path=name)


@pytest.mark.claim("C7")
def test_a_person_reads_it_in_80_columns(booted: CloudUser) -> None:
    printed = booted.run("vm", "attest", "measured", "--event-log", "--event-log-path", "log").decode()
    assert printed.startswith("measured: genuine\n")
    assert max(map(len, printed.splitlines())) <= COLUMNS
    assert "Secure Boot" in printed and "explained by the event log" in printed


@pytest.mark.attack("A32")
def test_a_host_that_has_another_vm_attest_in_its_place_is_refused(cloud: CloudStack, booted: CloudUser) -> None:
    said = booted.run_json("vm", "show", "measured")["platform_says"]
    (other,) = booted.run_json("vm", "create", "liar", "--host", said["host"])
    host = next(host for host in cloud.hosts if host.name == said["host"])
    consoles = {
        vm_id: next(path for path in host.agent_state.rglob("console.sock") if vm_id in str(path))
        for vm_id in (said["vm_id"], other["vm_id"])
    }
    console = consoles[said["vm_id"]]
    aside = console.rename(console.with_suffix(".aside"))
    console.symlink_to(consoles[other["vm_id"]])
    assert attest(booted, 5)["error"] == "channel"  # the two have not one key
    aside.replace(console)
    assert attest(booted, 0)["attester"]["vm_id"] == said["vm_id"]
    booted.run("vm", "destroy", "liar", "--yes")


@pytest.mark.claim("C7")
def test_a_vtpm_that_has_moved_shows_the_same_key_of_the_chip_that_made_it(booted: CloudUser) -> None:
    before = attest(booted, 0)
    booted.run("vm", "migrate", "measured", "--auto")
    after = attest(booted, 0)
    assert after["endorser"] == before["endorser"]
    assert after["attester"] != before["attester"]
    booted.run("vm", "shutdown", "measured")
    assert attest(booted, 3)["error"] == "wrong-state"
