"""The tests' own cloud, whole: two replicas on PostgreSQL, two hosts, two users; each part is killed, and VMs are used on."""

from __future__ import annotations

import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cloud_stack import CloudStack
from tests.postgres import Database
from tests.processor.processes import wait_until

PCR_0 = ("vm", "exec", "web", "--", "tpm2_pcrread", "sha256:0")


@pytest.fixture
def directory() -> Iterator[Path]:
    """With a short name; does not exist yet."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-", ignore_cleanup_errors=True) as parent:
        Path(parent).chmod(0o711)
        yield Path(parent) / "c"


def test_two_replicas_on_postgresql_serve_the_same_cloud(directory: Path, postgres: Database) -> None:
    with CloudStack(directory, hosts=2, replicas=2, database_url=postgres.url) as cloud:
        alice, bob = cloud.user("alice"), cloud.user("bob", replica=1)
        alice.run("vm", "create", "web", "--host", "host-0")
        bob.run("vm", "create", "web", "--host", "host-1")  # a name is its user's own
        before = alice.run(*PCR_0)
        cloud.replicas[0].kill()
        alice.use(cloud.urls[1])
        assert alice.run(*PCR_0) == before
        cloud.hosts[0].agent.kill()
        cloud.hosts[0].agent.start()
        wait_until(lambda: alice.attempt(*PCR_0).stdout == before)
        alice.run("vm", "shutdown", "web")
        cloud.replicas[0].start()
        alice.use(cloud.urls[0])
        alice.run("vm", "start", "web")
        assert alice.run(*PCR_0) == before
        assert [vm["name"] for vm in bob.run_json("vm", "ls")] == ["web"]


def test_a_postgresql_that_was_away_is_used_again(directory: Path, postgres: Database) -> None:
    with CloudStack(directory, database_url=postgres.url) as cloud:
        alice = cloud.user("alice")
        alice.run("vm", "create", "web")
        postgres.server.stop("immediate")
        refused = alice.attempt("vm", "ls")
        assert refused.returncode == 4 and b"[unavailable]" in refused.stderr
        postgres.server.start()
        wait_until(lambda: alice.attempt("vm", "ls").returncode == 0)
        alice.run("vm", "shutdown", "web")


def test_a_host_is_reached_over_tls_by_a_platform_that_trusts_its_authority_alone(
    directory: Path, tmp_path: Path
) -> None:
    """As in docs/how-to/run-a-cloud.md: the agent on a port, with a certificate of an authority of one's own."""
    certificate, key = new_certificate(tmp_path)
    with CloudStack(directory, hosts=0, environment={"SSL_CERT_FILE": str(certificate)}) as cloud:
        trusted = cloud.add_host(*tls_options(certificate, key))
        stranger = cloud.add_host(*tls_options(*new_certificate(directory)))
        assert trusted.address.startswith("https://127.0.0.1:")
        alice = cloud.user("alice")
        wait_until(lambda: b"host-0" in alice.run("chips"))
        alice.run("vm", "create", "web")
        alice.run(*PCR_0)
        refused = alice.attempt("vm", "create", "other", "--host", stranger.name)
        assert refused.returncode == 3 and b"[no-host]" in refused.stderr
        wait_until(lambda: b"CERTIFICATE_VERIFY_FAILED" in cloud.admin("list-hosts"))


def new_certificate(directory: Path) -> tuple[Path, Path]:
    """Of an authority that is its own host: certificate and key."""
    certificate, key = directory / "tls.pem", directory / "tls-key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    names = ["-subj", f"/CN={directory.name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*words, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    key.chmod(0o600)
    return certificate, key


def tls_options(certificate: Path, key: Path) -> tuple[str | Path, ...]:
    """Of `spvtpm agent init`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ("--listen", f"127.0.0.1:{port}", "--tls-certificate", certificate, "--tls-key", key)


def test_a_user_without_a_token_of_the_right_scope_is_refused(directory: Path) -> None:
    with CloudStack(directory) as cloud:
        alice = cloud.user("alice", scopes=("read",))
        refused = alice.attempt("vm", "create", "web")
        assert refused.returncode == 3 and b"[scope]" in refused.stderr
