"""What users get from a running replica: who may do what, exactly the requests that make sense, every error a problem."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import msgspec
import pytest

from spvtpm.cloud import tables
from spvtpm.cloud.database import Database
from spvtpm.cloud.events import record_event
from spvtpm.wire.platform_api import (
    MAX_BODY_BYTES,
    PAGE_VMS,
    Chip,
    EventPage,
    Host,
    MadeToken,
    Operation,
    OperationPage,
    User,
    Vm,
    VmPage,
    Wants,
)
from tests.cloud.agent_double import TOKEN
from tests.cloud.served import REPORT, ServedPlatform, new_vm, problem

PCRS = {"banks": {"sha256": {"0": "ab" * 32, "23": "00" * 32}}, "read_s": 1.5}

_VM_ID = uuid.UUID("6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11")


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPlatform]:
    """A replica on each kind of database, for all tests of this module; one host is known, and away."""
    url = None if request.param == "sqlite" else request.getfixturevalue("_session_postgres").new_database().url
    directory = tmp_path_factory.mktemp("cloud") / "p"
    with ServedPlatform(directory, url, {"vms_per_user": 110}) as running:
        running.add_host("h1", "http://127.0.0.1:1")
        yield running


@pytest.fixture
def alice(served: ServedPlatform) -> Iterator[httpx.Client]:
    """A new user, who may operate VMs."""
    with served.client(served.token(f"alice-{uuid.uuid4().hex[:8]}", "vms")) as client:
        yield client


@pytest.fixture
def bob(served: ServedPlatform) -> Iterator[httpx.Client]:
    """Another one."""
    with served.client(served.token(f"bob-{uuid.uuid4().hex[:8]}", "vms")) as client:
        yield client


@pytest.fixture
def admin(served: ServedPlatform) -> Iterator[httpx.Client]:
    """The administrator."""
    with served.client(served.admin_token) as client:
        yield client


def put_vm(database: Database, user: str, name: str, *, host: str | None = None, state: str = "stopped") -> uuid.UUID:
    """A VM that no operation made."""
    vm_id = uuid.uuid4()
    with database.write() as connection:
        connection.execute(
            tables.vms.insert().values(
                vm_id=vm_id,
                user=user,
                name=name,
                state=state,
                host=host,
                wants=msgspec.to_builtins(Wants()),
                sequence=1,
                vtpm="",
                boots=0,
                failure="",
                created_s=time.time(),
                changed_s=time.time(),
            )
        )
    return vm_id


def name_of(client: httpx.Client) -> str:
    """Whose client it is."""
    return str(client.get("/v1/me").json()["name"])


# Who


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Basic YWxpY2U6eA==", "Bearer nonsense", "Bearer spv_" + "A" * 43]
)
def test_without_a_token_that_is_known_nobody_is_answered(served: ServedPlatform, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    with served.client(None) as client:
        for method, path in (("GET", "/v1/me"), ("POST", "/v1/vms"), ("DELETE", "/v1/hosts/h1"), ("GET", "/v1/users")):
            response = client.request(method, path, headers=headers)
            assert (response.status_code, problem(response).code) == (401, "no-token")
            assert response.headers["www-authenticate"].startswith("Bearer")


def test_a_token_that_has_ended_or_was_removed_is_not_known(served: ServedPlatform, admin: httpx.Client) -> None:
    with served.client(served.token("carol", "read", expires_s=time.time() - 1)) as client:
        assert "ended" in problem(client.get("/v1/me")).detail
    made = msgspec.json.decode(admin.post("/v1/users/carol/tokens", json={"scopes": ["read"]}).content, type=MadeToken)
    with served.client(made.secret) as client:
        assert client.get("/v1/me").json() == {"name": "carol", "scopes": ["read"]}
        assert admin.delete(f"/v1/users/carol/tokens/{made.token.token_id}").status_code == 204
        assert problem(client.get("/v1/me")).code == "no-token"
    assert problem(admin.delete(f"/v1/users/carol/tokens/{made.token.token_id}")).code == "not-found"


def test_a_token_allows_what_its_scopes_say(served: ServedPlatform, alice: httpx.Client, admin: httpx.Client) -> None:
    with served.client(served.token(name_of(alice), "read")) as reader:
        assert reader.get("/v1/vms").status_code == 200
        assert problem(reader.post("/v1/vms", json=new_vm())).code == "scope"
        assert problem(reader.get("/v1/vms?all=true")).code == "scope"
    for client in (alice,):
        for method, path in (("GET", "/v1/hosts"), ("PUT", "/v1/users/x"), ("DELETE", "/v1/users/x")):
            assert problem(client.request(method, path)).code == "scope"
    assert problem(admin.post("/v1/vms", json=new_vm())).code == "scope"  # an administrator looks, and does not touch
    assert admin.get("/v1/vms?all=true").status_code == 200


@pytest.mark.attack("A05")
def test_another_users_vm_is_as_one_that_does_not_exist(
    served: ServedPlatform, alice: httpx.Client, bob: httpx.Client
) -> None:
    vm_id = put_vm(served.database, name_of(alice), "mine", host="h1")
    assert alice.get(f"/v1/vms/{vm_id}").status_code == 200  # it is there
    nowhere = uuid.uuid4()
    requests: list[tuple[str, str, object]] = [
        ("GET", "", None),
        ("DELETE", "", None),
        ("GET", "/events", None),
        ("PUT", "/pcrs", PCRS),
        ("POST", "/place", {}),
        *(("POST", f"/{verb}", None) for verb in ("start", "shutdown", "hibernate", "resume", "release")),
    ]
    for method, path, body in requests:
        told = []
        for one in (vm_id, nowhere):
            response = bob.request(method, f"/v1/vms/{one}{path}", json=body)
            assert response.status_code == 404
            told.append(response.text.replace(str(one), "ID"))
        assert told[0] == told[1], (method, path)
    assert bob.get("/v1/operations", params={"vm_id": str(vm_id)}).json() == {"operations": [], "more": False}
    assert bob.get("/v1/vms").json() == {"vms": [], "more": False}
    found = msgspec.json.decode(alice.get(f"/v1/vms/{vm_id}").content, type=Vm)
    assert (found.state, found.operation, found.pcrs) == ("stopped", None, None)


@pytest.mark.attack("A05")
def test_another_users_operation_is_as_one_that_does_not_exist(alice: httpx.Client, bob: httpx.Client) -> None:
    asked = alice.post("/v1/vms", json=new_vm()).json()["operation_id"]
    assert alice.get(f"/v1/operations/{asked}").status_code == 200
    for path in ("", "/events"):
        assert problem(bob.get(f"/v1/operations/{asked}{path}")).code == "not-found"


# What


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"vm_id": "6c0e0f7a-5f0e-4f3c-8f2c-0d9d6f4f1c11"}',
        b'{"vm_id": "6c0e0f7a-5f0e-4f3c-8f2c-0d9d6f4f1c11", "name": "web", "more": 1}',
        b'{"vm_id": "6c0e0f7a-5f0e-4f3c-8f2c-0d9d6f4f1c11", "name": "Web"}',
        b'{"vm_id": "6c0e0f7a-5f0e-4f3c-8f2c-0d9d6f4f1c11", "name": "web\\n"}',
        b'{"vm_id": "x", "name": "web"}',
        b"[" * 50_000,
    ],
)
@pytest.mark.attack("A25")
def test_a_body_that_makes_no_sense_is_refused(alice: httpx.Client, body: bytes) -> None:
    response = alice.post("/v1/vms", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, problem(response).code) == (400, "bad-message")


@pytest.mark.attack("A25")
def test_requests_are_taken_exactly_as_they_are_described(alice: httpx.Client) -> None:
    body = msgspec.json.encode(new_vm())
    refused = [
        alice.post("/v1/vms", content=body, headers={"Content-Type": "text/plain"}),
        alice.post("/v1/vms?what=1", content=body, headers={"Content-Type": "application/json"}),
        alice.post("/v1/vms", content=body, headers={"Content-Type": "application/json", "Idempotency-Key": "a b"}),
        alice.post("/v1/vms", content=body, headers={"Content-Type": "application/json", "Idempotency-Key": "k" * 65}),
        alice.get("/v1/vms?after=a&after=b"),
        alice.get("/v1/vms?after=%00"),
        alice.get(f"/v1/vms/{uuid.uuid4()}/events?after=-1"),
        alice.get("/v1/operations?before=x"),
        alice.get("/v1/operations?vm_id=null"),
        alice.request("GET", "/v1/me", content=b"x"),
    ]
    assert [(one.status_code, problem(one).code) for one in refused] == [(400, "bad-message")] * len(refused)


@pytest.mark.parametrize("vm_id", ["x", "%00", str(_VM_ID).upper(), _VM_ID.hex, f"{{{_VM_ID}}}"])
def test_an_id_that_is_none_leads_nowhere(alice: httpx.Client, vm_id: str) -> None:
    assert problem(alice.get(f"/v1/vms/{vm_id}")).code == "not-found"


@pytest.mark.attack("A23")
def test_a_body_is_taken_up_to_its_bound_and_no_further(served: ServedPlatform, alice: httpx.Client) -> None:
    longest = msgspec.json.encode(new_vm()).ljust(MAX_BODY_BYTES)
    headers = {"Content-Type": "application/json"}
    assert alice.post("/v1/vms", content=longest, headers=headers).status_code == 202

    def endless() -> Iterator[bytes]:  # chunked: nobody says how long it will be
        for _ in range(1 << 20):
            yield b" " * 65_536

    assert problem(alice.post("/v1/vms", content=longest + b" ", headers=headers)).code == "too-large"
    try:
        response = alice.post("/v1/vms", content=endless(), headers=headers)
    except httpx.TransportError:
        pass  # cut off while it was still sending
    else:
        assert problem(response).code == "too-large"
    assert alice.get("/v1/me").status_code == 200


def test_what_no_route_is_there_for_is_a_problem_too(alice: httpx.Client) -> None:
    for path in ("/", "/v1", "/v1/nothing", "/v1/vms/", "/v2/vms"):
        assert problem(alice.get(path)).status == 404
    response = alice.patch("/v1/vms")
    assert problem(response).status == 405
    assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}
    assert problem(alice.get(f"/v1/chips/{REPORT.chip_id}/channel")).status == 426


def test_no_answer_is_for_a_browser_to_keep_or_to_frame(alice: httpx.Client) -> None:
    for path in ("/v1/me", "/nothing", "/openapi.json"):
        headers = alice.get(path, headers={"Origin": "https://elsewhere.example"}).headers
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert not [name for name in headers if name.startswith("access-control")]


# VMs and operations


def test_a_vm_is_asked_for_and_its_operation_followed_by_name_and_by_list(alice: httpx.Client) -> None:
    body = new_vm("web", wants={"chips": ["ab" * 16]})
    response = alice.post("/v1/vms", json=body)
    assert response.status_code == 202
    operation = msgspec.json.decode(response.content, type=Operation)
    assert (operation.kind, str(operation.vm_id), operation.vm_name) == ("create", body["vm_id"], "web")
    page = msgspec.json.decode(alice.get("/v1/operations").content, type=OperationPage)
    assert [one.operation_id for one in page.operations] == [operation.operation_id]
    assert alice.get(f"/v1/operations/{operation.operation_id}").status_code == 200


def test_the_same_request_with_the_same_key_gives_the_same_operation(alice: httpx.Client) -> None:
    body, headers = new_vm(), {"Idempotency-Key": "only-once"}
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: alice.post("/v1/vms", json=body, headers=headers), range(8)))
    assert {one.status_code for one in answers} == {202}
    assert len({one.json()["operation_id"] for one in answers}) == 1
    assert problem(alice.post("/v1/vms", json=new_vm("other"), headers=headers)).code == "idempotency-mismatch"


@pytest.mark.attack("A23")
def test_a_user_has_no_more_vms_than_he_may(served: ServedPlatform, alice: httpx.Client) -> None:
    for number in range(109):
        put_vm(served.database, name_of(alice), f"vm-{number}")
    last, headers = new_vm("last"), {"Idempotency-Key": "k"}
    assert alice.post("/v1/vms", json=last, headers=headers).status_code == 202
    refused = new_vm("one-more")
    response = alice.post("/v1/vms", json=refused)
    assert (response.status_code, problem(response).code) == (429, "too-many")
    assert problem(alice.get(f"/v1/vms/{refused['vm_id']}")).code == "not-found"


def test_vms_come_in_pages_by_name(served: ServedPlatform, alice: httpx.Client, admin: httpx.Client) -> None:
    names = sorted([f"a-{number}" for number in range(60)] + [f"a{number}" for number in range(45)])
    for name in names:
        put_vm(served.database, name_of(alice), name)
    for client, path, cursor in (
        (alice, "/v1/vms?", lambda vm: vm.name),
        (admin, "/v1/vms?all=true&", lambda vm: f"{vm.user}/{vm.name}"),
    ):
        found: list[Vm] = []
        after = ""
        while True:
            page = msgspec.json.decode(client.get(path + after).content, type=VmPage)
            assert len(page.vms) <= PAGE_VMS
            found += page.vms
            if not page.more:
                break
            after = f"after={cursor(page.vms[-1])}"
        assert [vm.name for vm in found if vm.user == name_of(alice)] == names
        assert len({vm.vm_id for vm in found}) == len(found)


def test_events_come_in_pages_and_never_from_before_the_vm(served: ServedPlatform, alice: httpx.Client) -> None:
    vm_id = uuid.uuid4()
    with served.database.write() as connection:
        record_event(connection, vm_id, "another", "of one that had this id before")
    with served.database.write() as connection:
        connection.execute(tables.events.update().where(tables.events.c.vm_id == vm_id).values(time_s=1))
    body = {**new_vm(), "vm_id": str(vm_id)}
    assert alice.post("/v1/vms", json=body).status_code == 202
    with served.database.write() as connection:
        for number in range(150):
            record_event(connection, vm_id, "noted", str(number))
    found, after = [], 0
    while True:
        page = msgspec.json.decode(alice.get(f"/v1/vms/{vm_id}/events?after={after}").content, type=EventPage)
        found += page.events
        after = page.events[-1].number
        if not page.more:
            break
    assert [one.detail for one in found if one.what == "noted"] == [str(number) for number in range(150)]
    assert "another" not in [one.what for one in found]


def test_an_owner_publishes_pcrs(alice: httpx.Client, served: ServedPlatform) -> None:
    vm_id = put_vm(served.database, name_of(alice), "shown")
    assert alice.put(f"/v1/vms/{vm_id}/pcrs", json=PCRS).status_code == 204
    assert alice.get(f"/v1/vms/{vm_id}").json()["pcrs"] == PCRS
    bad = {**PCRS, "banks": {"sha256": {"24": "ab" * 32}}}
    assert problem(alice.put(f"/v1/vms/{vm_id}/pcrs", json=bad)).code == "bad-message"


# Chips, hosts, users


def test_chips_are_there_for_everybody(alice: httpx.Client) -> None:
    (chip,) = msgspec.json.decode(alice.get("/v1/chips").content, type=list[Chip])
    assert (chip.chip_id, chip.host, chip.is_online, chip.papers) == (REPORT.chip_id, "h1", False, REPORT.papers)
    assert msgspec.json.decode(alice.get(f"/v1/chips/{chip.chip_id}").content, type=Chip).host == "h1"
    assert problem(alice.get(f"/v1/chips/{'ff' * 16}")).code == "not-found"


def test_a_host_is_removed_once_no_vm_is_placed_there(
    served: ServedPlatform, admin: httpx.Client, alice: httpx.Client
) -> None:
    where = {"address": "unix:/nowhere/agent.sock", "token": TOKEN}
    put = admin.put("/v1/hosts/h2", json=where)
    assert put.status_code == 200
    host = msgspec.json.decode(put.content, type=Host)
    assert (host.name, host.address, host.vms) == ("h2", where["address"], 0)
    vm_id = put_vm(served.database, name_of(alice), "there", host="h2")
    assert problem(admin.delete("/v1/hosts/h2")).code == "wrong-state"
    with served.database.write() as connection:
        connection.execute(tables.vms.update().where(tables.vms.c.vm_id == vm_id).values(host=None))
    assert admin.delete("/v1/hosts/h2").status_code == 204
    assert problem(admin.delete("/v1/hosts/h2")).code == "not-found"


@pytest.mark.attack("A24")
def test_tokens_of_agents_and_users_are_told_to_nobody(served: ServedPlatform, admin: httpx.Client) -> None:
    made = admin.post("/v1/users/admin/tokens", json={"scopes": ["read"]})
    secret = made.json()["secret"]
    assert made.status_code == 201
    told = "".join(admin.get(path).text for path in ("/v1/hosts", "/v1/users"))
    refused = admin.put("/v1/hosts/h3", json={"address": "ftp://x", "token": "s3cr3t" * 10})
    assert problem(refused).code == "bad-message"
    for known in (TOKEN, secret, served.admin_token, "s3cr3t"):
        assert known not in told + refused.text
        assert known not in served.log()
    kept = b"".join(path.read_bytes() for path in served.directory.iterdir())
    assert secret.encode() not in kept


def test_users_come_and_go(served: ServedPlatform, admin: httpx.Client) -> None:
    assert admin.put("/v1/users/dave").status_code == 200
    assert admin.put("/v1/users/dave").status_code == 200
    assert admin.post("/v1/users/dave/tokens", json={"scopes": ["vms"], "note": "laptop"}).status_code == 201
    users = {user.name: user for user in msgspec.json.decode(admin.get("/v1/users").content, type=list[User])}
    assert [token.note for token in users["dave"].tokens] == ["laptop"]
    put_vm(served.database, "dave", "kept")
    assert problem(admin.delete("/v1/users/dave")).code == "wrong-state"
    with served.database.write() as connection:
        connection.execute(tables.vms.delete().where(tables.vms.c.user == "dave"))
    assert admin.delete("/v1/users/dave").status_code == 204
    assert problem(admin.post("/v1/users/dave/tokens", json={"scopes": ["vms"]})).code == "not-found"
