"""A replica as a process: made, run, ended; without its database it says so, and goes on once that is back."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from spvtpm.cloud.database import Database
from tests.cloud.served import ServedPlatform, new_vm, problem
from tests.postgres import Database as PostgresDatabase
from tests.postgres import PostgresServer


def cloud(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """`spvtpm cloud …`."""
    command = [sys.executable, "-m", "spvtpm.cli", "cloud", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_init_makes_a_private_platform_and_one_token(tmp_path: Path) -> None:
    directory = tmp_path / "p"
    made = cloud("init", directory)
    secret = made.stdout.splitlines()[-1]
    assert secret.startswith("spv_")
    assert len(secret) == 47
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    again = cloud("init", directory)
    assert (again.returncode, again.stdout) == (3, "")
    assert "[initialised]" in again.stderr


def test_users_tokens_and_hosts_are_made_by_hand(tmp_path: Path) -> None:
    directory, written, agent = tmp_path / "p", tmp_path / "alice.token", tmp_path / "agent.token"
    cloud("init", directory)
    assert cloud("add-user", directory, "alice").returncode == 0
    made = cloud(
        "new-token", directory, "alice", "--scope", "vms", "--scope", "read", "--days", "30", "--output", written
    )
    assert made.returncode == 0, made.stderr
    secret = written.read_text().strip()
    assert secret not in made.stdout
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    listed = json.loads(cloud("list-users", directory, "--json").stdout)
    (token,) = next(user for user in listed if user["name"] == "alice")["tokens"]
    assert token["scopes"] == ["read", "vms"]
    assert cloud("remove-token", directory, "alice", token["token_id"]).returncode == 0
    assert cloud("remove-user", directory, "alice").returncode == 0
    agent.write_text("a" * 43 + "\n")
    agent.chmod(0o600)
    added = cloud("add-host", directory, "h1", "unix:/run/agent.sock", "--token-file", agent)
    assert added.returncode == 0, added.stderr
    assert [host["name"] for host in json.loads(cloud("list-hosts", directory, "--json").stdout)] == ["h1"]
    assert "not online" in cloud("list-hosts", directory).stdout
    assert cloud("remove-host", directory, "h1").returncode == 0
    for words in (
        ("add-user", directory, "Alice"),
        ("add-host", directory, "h1", "ftp://x", "--token-file", agent),
        ("new-token", directory, "admin", "--scope", "read", "--days", "nan"),
    ):
        assert cloud(*words).returncode == 2, words
    assert cloud("new-token", directory, "nobody", "--scope", "read").returncode == 3


def test_a_replica_starts_on_its_own_tables_alone(tmp_path: Path) -> None:
    directory = tmp_path / "p"
    cloud("init", directory)
    database = Database(f"sqlite:///{directory / 'platform.sqlite'}")
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'later'"))
    database.close()
    refused = cloud("run", directory)
    assert (refused.returncode, refused.stdout) == (4, "")
    assert "[not-migrated]" in refused.stderr


def test_a_directory_has_one_replica_and_a_dead_ones_socket_is_taken(tmp_path: Path) -> None:
    with ServedPlatform(tmp_path / "p") as served:
        assert "[in-use]" in cloud("run", served.directory).stderr
        assert served.process is not None
        assert served.process.stdout is not None
        served.process.kill()
        served.process.wait()
        served.process.stdout.close()
        assert served.socket.exists()
        served.start()
        with served.client(None) as client:
            assert client.get("/healthz").status_code == 200
        assert served.stop() == 0
        assert not served.socket.exists()


@pytest.mark.attack("A24")
def test_no_secret_is_on_the_command_line_or_in_the_log(tmp_path: Path, postgres: PostgresDatabase) -> None:
    with ServedPlatform(tmp_path / "p", postgres.url) as served:
        password = postgres.url.split(":")[2].split("@")[0]
        with served.client(served.admin_token) as client:
            assert client.get("/readyz").status_code == 200
        assert served.process is not None
        shown = Path(f"/proc/{served.process.pid}/cmdline").read_bytes().decode()
        assert served.stop() == 0
        for secret in (password, served.admin_token):
            assert secret not in shown + served.log()


def test_without_its_database_the_platform_is_unavailable_and_goes_on_once_that_is_back(
    tmp_path: Path, postgres: PostgresDatabase, postgres_server: PostgresServer
) -> None:
    with ServedPlatform(tmp_path / "p", postgres.url) as served:
        with served.client(served.token("alice", "vms")) as client:
            body, key = new_vm(), {"Idempotency-Key": "k"}
            assert client.post("/v1/vms", json=body, headers=key).status_code == 202
            postgres_server.stop("immediate")
            for method, path in (("GET", "/v1/vms"), ("POST", "/v1/vms"), ("GET", "/readyz")):
                response = client.request(method, path, json=new_vm("other") if method == "POST" else None)
                assert (response.status_code, problem(response).code) == (503, "unavailable")
                assert int(response.headers["retry-after"]) >= 1
            assert client.get("/healthz").status_code == 200
            postgres_server.start()
            assert client.get("/readyz").status_code == 200
            assert client.post("/v1/vms", json=body, headers=key).status_code == 202
            assert [vm["name"] for vm in client.get("/v1/vms").json()["vms"]] == ["web"]
        assert served.stop() == 0


def test_two_replicas_answer_from_one_postgresql(tmp_path: Path, postgres: PostgresDatabase) -> None:
    with (
        ServedPlatform(tmp_path / "p1", postgres.url) as first,
        ServedPlatform(tmp_path / "p2", postgres.url) as second,
    ):
        token = first.token("alice", "vms")
        body, key = new_vm(), {"Idempotency-Key": "k"}
        with first.client(token) as here, second.client(token) as there:
            asked = [client.post("/v1/vms", json=body, headers=key).json()["operation_id"] for client in (here, there)]
            assert asked[0] == asked[1]
            assert there.get(f"/v1/operations/{asked[0]}").status_code == 200
