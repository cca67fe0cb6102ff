"""Moves through a whole cloud: platform, agents, secure processors and machines are real, and owners use their VMs meanwhile."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spvtpm.terminal.migration import migrate
from spvtpm.terminal.remote_command import run_in_vm
from tests.cloud_stack import CloudStack, CloudUser
from tests.guest.running_machine import Pipe

pytestmark = pytest.mark.claim("C8")


@pytest.fixture(scope="module")
def cloud() -> Iterator[CloudStack]:
    """Two hosts behind a platform."""
    with tempfile.TemporaryDirectory(prefix="spv-") as directory, CloudStack(Path(directory) / "c", hosts=2) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def alice(cloud: CloudStack) -> CloudUser:
    return cloud.user("alice")


@pytest.fixture(scope="module")
def admin(cloud: CloudStack) -> CloudUser:
    """The platform's administrator."""
    admin = CloudUser(cloud.directory / "administrator" / "spvtpm", cloud.directory / "admin-0.token")
    admin.run("terminal", "init")
    admin.use(cloud.urls[0])
    return admin


class Loop:
    """Commands in a VM, one after the other, until it is told to end.

    Args:
        user: whose VM it is.
        name: of the VM.
        command: which; what it reads comes back, if it is `cat`.
    """

    def __init__(self, user: CloudUser, name: str, *command: str) -> None:
        self._user, self._name, self._command = user, name, command
        self._stop = threading.Event()

    def end(self) -> None:
        self._stop.set()

    def run(self) -> set[tuple[int, bytes]]:
        """The different exit codes and outputs that there were."""
        seen, given = set(), os.urandom(40_000)
        with self._user.site() as site:
            owned = site.keyring.owned(self._name)
            while not self._stop.is_set():
                written = bytearray()
                with Pipe(given) as pipe:
                    take = lambda _stream, data, into=written: into.extend(data)  # noqa: E731
                    code = run_in_vm(site, owned, self._command, take, pipe.descriptor)
                seen.add((code, b"as given" if written == given else bytes(written)))
        return seen


def test_loops_of_commands_see_pauses_and_no_error_while_their_vm_moves_to_and_fro(alice: CloudUser) -> None:
    alice.run("vm", "create", "web")
    alice.run("vm", "exec", "web", "--", "tpm2_pcrextend", f"16:sha256={'ab' * 32}")
    loops = [Loop(alice, "web", "tpm2_pcrread", "sha256:16"), Loop(alice, "web", "cat")]
    with ThreadPoolExecutor(len(loops)) as pool, alice.site() as site:
        results = [pool.submit(loop.run) for loop in loops]
        try:
            for _ in range(4):
                moved = migrate(site, "web")
                assert moved.has_moved and moved.source_says == "migrated"
        finally:
            for loop in loops:
                loop.end()
        pcr, given = [result.result(60) for result in results]
    assert len(pcr) == 1 and next(iter(pcr))[0] == 0  # the same each time
    assert given == {(0, b"as given")}
    alice.run("vm", "destroy", "web", "--yes")


def test_owners_find_their_vms_behind_a_drain_and_a_policy_holds_one_where_it_is(
    alice: CloudUser, admin: CloudUser
) -> None:
    alice.run("vm", "create", "follows")
    alice.run("vm", "create", "stays", "--no-migration")
    host = alice.run_json("vm", "show", "stays")["platform_says"]["host"]
    if alice.run_json("vm", "show", "follows")["platform_says"]["host"] != host:
        alice.run("vm", "migrate", "follows", "--to", host)

    done = admin.attempt("host", "drain", host, "--json")
    assert done.returncode == 3, done
    lines = {line["name"]: line for line in json.loads(done.stdout)["vms"]}
    assert (lines["follows"]["outcome"], lines["stays"]["runs"]) == ("moved", True)
    assert "does not allow its migration" in lines["stays"]["why"]

    alice.run("vm", "shutdown", "follows")  # its vTPM is at a chip that the keyring did not know
    alice.run("vm", "shutdown", "stays")
    assert admin.attempt("host", "drain", host).returncode == 0
    alice.run("vm", "start", "stays")  # at the other host: this one takes none
    assert alice.run_json("vm", "show", "stays")["platform_says"]["host"] != host
    assert admin.run_json("host", "undrain", host)["is_draining"] is False
    for name in ("follows", "stays"):
        alice.run("vm", "destroy", name, "--yes")
