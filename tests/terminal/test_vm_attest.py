"""`spvtpm vm attest` as its user sees it, through a real platform, agent and secure processor to tpm2-tools in a VM."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from spvtpm.wire.tpm_structures import sized
from tests.attesting import log_event, log_head
from tests.clients.tools import Tools
from tests.cloud_stack import CloudStack, CloudUser

pytestmark = pytest.mark.claim("C7")

COLUMNS = 80
EVENTS = ((0, 8, "firmware 1\0".encode("utf-16-le")), (7, 0x80000007, b"Secure Boot"), (7, 4, bytes(4)))


@pytest.fixture(scope="module")
def alice() -> Iterator[CloudUser]:
    """With a VM `web` that has booted as `EVENTS` say."""
    with tempfile.TemporaryDirectory(prefix="spv-") as directory, CloudStack(Path(directory) / "c", hosts=2) as cloud:
        alice = cloud.user("alice")
        alice.run("vm", "create", "web")
        measured = [f"{pcr}:sha256={hashlib.sha256(data).hexdigest()}" for pcr, _, data in EVENTS]
        alice.run("vm", "exec", "web", "--", "tpm2_pcrextend", *measured)
        keep_log(alice, "log", log_head() + b"".join(log_event(*event) for event in EVENTS))
        yield alice


def keep_log(user: CloudUser, name: str, log: bytes) -> None:
    user.run("vm", "exec", "web", "--", "sh", "-c", f"cat > {name}", stdin=log)


def attest(user: CloudUser, code: int, *words: str) -> dict[str, object]:
    done = user.attempt("vm", "attest", "web", *words, "--json")
    assert done.returncode == code, done
    told: dict[str, object] = json.loads(done.stdout or done.stderr.splitlines()[-1])
    return told


def test_a_result_becomes_the_policy_for_the_next_and_a_change_is_refused(alice: CloudUser, tmp_path: Path) -> None:
    genuine = attest(alice, 0, "--pcrs", "sha256:0,1,16")
    assert (genuine["verdict"], genuine["reasons"]) == ("genuine", [])
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"pcrs": genuine["pcrs"]}))
    assert attest(alice, 0, "--policy", str(policy))["verdict"] == "trusted"
    alice.run("vm", "exec", "web", "--", "tpm2_pcrextend", f"16:sha256={'ab' * 32}")
    refused = attest(alice, 3, "--policy", str(policy), "--pcrs", "sha256:2")
    assert (refused["verdict"], refused["reasons"]) == ("refused", ["PCR 16 of sha256 is not as expected"])
    assert {(pcr["index"], pcr["expected"]) for pcr in refused["judged"]} == {  # type: ignore[attr-defined]
        (0, True),
        (1, True),
        (2, None),
        (16, False),
    }
    policy.write_text(json.dumps({"pcrs": {"sha256": {"16": ["00" * 32, refused["pcrs"]["sha256"]["16"]]}}}))  # type: ignore[index]
    assert attest(alice, 0, "--policy", str(policy))["verdict"] == "trusted"
    for wrong in ("{}", '{"pcrs":{"sha256":{"24":""}}}', json.dumps({"pcrs": {"sha256": {"0": "00" * 20}}})):
        policy.write_text(wrong)
        assert attest(alice, 2, "--policy", str(policy))["error"] == "usage"
    assert attest(alice, 2, "--pcrs", "sha256:24")["error"] == "usage"


def test_the_result_holds_what_tpm2_checkquote_checks(alice: CloudUser, tmp_path: Path) -> None:
    told, tools = attest(alice, 0), Tools("none", tmp_path)
    evidence = told["evidence"]
    assert isinstance(evidence, dict)
    tools.write("ak.pub", sized(bytes.fromhex(evidence["ak_public"])))
    tools.write("quote", bytes.fromhex(evidence["attested"]))
    tools.write("signature", bytes.fromhex(evidence["signature"]))
    words = ("-u", "ak.pub", "-m", "quote", "-s", "signature", "-g", "sha256", "-q", evidence["nonce"])
    tools.run("tpm2_checkquote", *words)


def test_an_event_log_explains_the_pcrs_or_is_refused(alice: CloudUser) -> None:
    told = attest(alice, 0, "--event-log", "--event-log-path", "log")
    assert [(event["pcr"], event["words"]) for event in told["event_log"]] == [  # type: ignore[attr-defined]
        (0, "firmware 1"),
        (7, "Secure Boot"),
        (7, ""),
    ]
    assert {pcr["index"] for pcr in told["judged"] if pcr["logged"]} == {0, 7}  # type: ignore[attr-defined]
    keep_log(alice, "lie", log_head() + log_event(*EVENTS[0]) + log_event(7, 4, bytes(4)))
    lie = attest(alice, 3, "--event-log", "--event-log-path", "lie")
    assert lie["reasons"] == ["PCR 7 of sha256 is not what the event log gives"]
    keep_log(alice, "none", log_head())
    assert attest(alice, 3, "--event-log", "--event-log-path", "none")["verdict"] == "refused"
    keep_log(alice, "cut", log_head() + log_event(*EVENTS[0])[:-1])
    assert attest(alice, 5, "--event-log", "--event-log-path", "cut")["error"] == "bad-message"
    assert attest(alice, 3, "--event-log", "--event-log-path", "missing")["error"] == "evidence"


def test_a_person_reads_it_in_80_columns(alice: CloudUser) -> None:
    printed = alice.run("vm", "attest", "web", "--event-log", "--event-log-path", "log").decode()
    assert printed.startswith("web: genuine\n")
    assert max(map(len, printed.splitlines())) <= COLUMNS
    assert "Secure Boot" in printed and "explained by the event log" in printed


def test_a_vtpm_that_has_moved_shows_the_same_key_of_the_chip_that_made_it(alice: CloudUser) -> None:
    before = attest(alice, 0)
    alice.run("vm", "migrate", "web", "--auto")
    after = attest(alice, 0)
    assert after["endorser"] == before["endorser"]
    assert after["attester"] != before["attester"]
    alice.run("vm", "shutdown", "web")
    assert attest(alice, 3)["error"] == "wrong-state"
