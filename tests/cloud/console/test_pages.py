"""What pages show, to whom, and what a hostile name can do there: nothing."""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid

import pytest

from spvtpm.cli import app
from spvtpm.cloud import queries
from tests.cloud.console.conftest import Console

PAGES = ("/console/", "/console/hosts", "/console/vms", "/console/operations")
TOKENS = "/console/tokens"
HOSTILE = "<script>alert(1)</script>\"'&{{7*7}}"


def test_every_page_shows_what_there_is(console: Console) -> None:
    console.filled.fill()
    operation_id = console.filled.add_operation("alice", "web")
    with console.client("alice") as client:
        found = {path: client.get(path) for path in PAGES}
        assert {path: answer.status_code for path, answer in found.items()} == dict.fromkeys(PAGES, 200)
        assert "choosing a host" in found["/console/"].text
        assert "the machine left at once" in found["/console/"].text
        for name in ("web", "database", "build", "mail"):
            assert f"/console/vms/{console.filled.vms[name]}" in found["/console/vms"].text
        assert "host host-2 does not answer" in found["/console/operations"].text
        assert "swap is not encrypted" in found["/console/hosts"].text
        vm = client.get(f"/console/vms/{console.filled.vms['web']}").text
        assert "As the owner published at" in vm
        assert "a7" * 32 in vm
        assert "spvtpm vm shutdown web" in vm
        operation = client.get(f"/console/operations/{operation_id}").text
        assert 'value="1"' in operation
        assert "choosing a host" in operation


def test_an_empty_console_says_what_to_type(console: Console) -> None:
    with console.client("alice") as client:
        for path in ("/console/", "/console/vms"):
            page = client.get(path).text
            assert f"spvtpm login {console.origin}" in page
            assert "spvtpm vm create web" in page
        assert "spvtpm vm create web" in client.get("/console/operations").text


def test_hostile_names_are_text(console: Console) -> None:
    vm_id = console.filled.add_vm("alice", HOSTILE, failure=HOSTILE, state="failed")
    console.filled.add_event(vm_id, HOSTILE, HOSTILE)
    operation_id = console.filled.add_operation("alice", HOSTILE, step=HOSTILE)
    console.filled.add_host("h-3", "03" * 16, failure=HOSTILE, address=HOSTILE)
    with console.client("root") as client:
        for path in (*PAGES, f"/console/vms/{vm_id}", f"/console/operations/{operation_id}"):
            page = client.get(path).text
            assert "&lt;script&gt;" in page, path
            assert "<script>" not in page, path
            assert "{{7*7}}" in page, path
            with client.stream("GET", path, headers={"Accept": "text/event-stream"}) as stream:
                first = next(line for line in stream.iter_lines() if line.startswith("data: "))
            told = json.loads(first.removeprefix("data: "))
            assert "&lt;script&gt;" in told["html"]
            assert "<script>" not in told["html"]


def test_commands_to_type_quote_a_hostile_name(console: Console) -> None:
    vm_id = console.filled.add_vm("alice", "x; rm -rf ~", pcrs=None)
    with console.client("alice") as client:
        page = client.get(f"/console/vms/{vm_id}").text
    assert "spvtpm vm shutdown &#39;x; rm -rf ~&#39;" in page
    assert page.count("spvtpm vm publish-pcrs &#39;x; rm -rf ~&#39;") == 2
    assert not re.search(r"spvtpm vm [a-z-]+ x; rm", page)


def test_a_user_sees_his_own_vms_and_another_ones_are_none(console: Console) -> None:
    console.filled.fill()
    operation_id = console.filled.add_operation("alice", "web")
    with console.client("bob") as bob, console.client("alice") as alice:
        assert "secret-of-bob" in bob.get("/console/vms").text
        for path in PAGES:
            assert "secret-of-bob" not in alice.get(path).text, path
            assert not {"web", "database"} & set(re.findall(r">([a-z]+)</a>", bob.get(path).text)), path
        theirs = [
            bob.get(f"/console/vms/{console.filled.vms['web']}"),
            bob.get(f"/console/operations/{operation_id}"),
        ]
        nobodys = [bob.get(f"/console/vms/{uuid.UUID(int=1)}"), bob.get(f"/console/operations/{uuid.UUID(int=1)}")]
    assert [answer.status_code for answer in (*theirs, *nobodys)] == [404] * 4
    ids = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
    assert [ids.sub("", answer.text) for answer in theirs] == [ids.sub("", answer.text) for answer in nobodys]


def test_an_administrator_sees_all_vms_and_the_agents_addresses(console: Console) -> None:
    console.filled.fill()
    with console.client("root") as root, console.client("alice") as alice:
        vms = root.get("/console/vms").text
        assert "secret-of-bob" in vms
        assert "alice" in vms
        shown, hidden = root.get("/console/hosts").text, alice.get("/console/hosts").text
        assert "https://host-1.example:7581" in shown
        assert "https://10.0.0.2:7581 refuses to connect" in shown
        assert "7581" not in hidden
        assert "7581" not in alice.get("/console/").text
        assert "spvtpm vm shutdown" not in root.get(f"/console/vms/{console.filled.vms['web']}").text


def test_a_user_sees_his_own_tokens_and_none_of_what_makes_them_tokens(console: Console) -> None:
    console.filled.add_user("carol", "read", expires_s=time.time() - 86_400, note=HOSTILE)
    old = console.filled.tokens["carol"]
    console.filled.add_user("carol", "vms", expires_s=time.time() + 86_400 * 3.5)
    with console.filled.database.read() as connection:
        tokens = {user.name: user.tokens for user in queries.list_users(connection)}
    with console.client("carol") as carol, console.client("root") as root:
        page, of_root = carol.get(TOKENS).text, root.get(TOKENS).text
    assert [token.token_id for token in tokens["carol"]] == [
        uuid.UUID(found) for found in re.findall(r'<code class="id" title="([0-9a-f-]{36})"', page)
    ]
    assert "ended 1 d ago" in page
    assert "in 3 d" in page
    assert page.count('<span class="tag">this session') == 1
    assert f"spvtpm cloud remove-token . carol {tokens['carol'][1].token_id}" in page
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    for secret in (old, console.filled.tokens["carol"]):
        assert secret not in page
        assert hashlib.sha256(secret.encode()).hexdigest()[:16] not in page
    assert not [token for token in tokens["carol"] if str(token.token_id) in of_root]


def test_every_command_that_is_shown_is_one(console: Console) -> None:
    console.filled.fill()
    for state in ("placed", "stopped", "hibernated"):
        console.filled.add_vm("alice", f"vm-{state}", state=state, pcrs=None)
    with console.client("alice") as alice, console.client("bob") as bob:
        vms = [f"/console/vms/{vm_id}" for name, vm_id in console.filled.vms.items() if name != "secret-of-bob"]
        text = "".join(alice.get(path).text for path in (*PAGES, TOKENS, *vms))
        text += "".join(bob.get(path).text for path in PAGES)
    shown = set(re.findall(r"<code>spvtpm ([a-z]+(?: [a-z]+(?:-[a-z]+)*)?)", text))
    assert {"vm shutdown", "vm resume", "vm recover", "vm publish-pcrs", "cloud new-token", "chips"} <= shown
    for words in shown:
        assert callable(app.parse_commands(words.split())[1][-1].default_command), words


def test_lists_have_pages(console: Console) -> None:
    for number in range(101):
        console.filled.add_vm("alice", f"vm-{number:03}")
        console.filled.add_operation("alice", f"vm-{number:03}", state="done", created_s=float(number))
    with console.client("alice") as alice, console.client("root") as root:
        for client in (alice, root):
            for path, last in (("/console/vms", "vm-100"), ("/console/operations", "vm-000")):
                first = client.get(path).text
                assert f">{last}<" not in first
                (following,) = re.findall(r'rel="next" href="([^"]+)"', first)
                assert f">{last}<" in client.get(following).text


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/console/vms/not-an-id", 404),
        ("/console/nothing", 404),
        ("/console/static/../pages.py", 404),
        ("/console/vms?unknown=1", 400),
        ("/console/operations?before=x", 400),
        (f"/console/vms?after={'a' * 200}", 400),
    ],
)
def test_what_is_not_there_or_makes_no_sense_is_said_in_a_page(console: Console, path: str, status: int) -> None:
    with console.client("alice") as client:
        answer = client.get(path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'self'" in answer.headers["content-security-policy"]
