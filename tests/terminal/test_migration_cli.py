"""`spvtpm vm migrate` and `spvtpm host` as their users see them, before real secure processors."""

from __future__ import annotations

import json
import signal
import subprocess
import uuid
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from spvtpm.terminal.creation import create
from spvtpm.terminal.machines import Site
from spvtpm.terminal.owned import Account, OwnedVm
from spvtpm.terminal.platform import Platform
from tests.cloud_stack import SPVTPM, CloudUser
from tests.owner import ANYTHING
from tests.terminal.estate import VM_KEY, Estate
from tests.terminal.platform_double import TOKEN, PlatformDouble

pytestmark = pytest.mark.claim("C8")


@pytest.fixture
def cloud(estate: Estate) -> Iterator[PlatformDouble]:
    with PlatformDouble(estate.sps) as cloud:
        yield cloud


@pytest.fixture
def user(estate: Estate, cloud: PlatformDouble) -> CloudUser:
    """Its token has all scopes there are."""
    estate.keyring.use_platform(Account(url=cloud.url, token=TOKEN))
    return CloudUser(estate.keyring.directory)


def made(estate: Estate, cloud: PlatformDouble, *, migration_allowed: bool = True) -> OwnedVm:
    """A VM that runs."""
    name = f"vm-{uuid.uuid4().hex[:12]}"
    policy = replace(ANYTHING, migration_allowed=migration_allowed)
    with Platform(Account(url=cloud.url, token=TOKEN)) as platform:
        create(
            Site(estate.keyring, platform),
            OwnedVm(name=name, vm_id=uuid.uuid4(), vm_key=VM_KEY, policy=policy),
        )
    return estate.keyring.owned(name)


def attempt(user: CloudUser, *words: str) -> subprocess.CompletedProcess[bytes]:
    done = user.attempt(*words, "--keyring", str(user.keyring))
    assert b"Traceback" not in done.stderr, done.stderr
    return done


def told(user: CloudUser, *words: str, code: int = 0) -> dict[str, object]:
    done = attempt(user, *words, "--json")
    assert done.returncode == code, done
    answer = json.loads(done.stdout if code in (0, 3, 130) and done.stdout else done.stderr.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


def test_a_vm_is_moved_and_its_user_is_told_what_the_chips_say(
    estate: Estate, cloud: PlatformDouble, user: CloudUser
) -> None:
    web = made(estate, cloud)
    first = cloud.vms[web.vm_id]
    assert told(user, "vm", "migrate", web.name, code=2)["error"] == "usage"
    assert told(user, "vm", "migrate", web.name, "--to", "host-0", "--auto", code=2)["error"] == "usage"
    moved = told(user, "vm", "migrate", web.name, "--auto")
    assert (moved["source_chip_id"], moved["source_says"], moved["has_moved"]) == (first.chip_id, "migrated", True)
    assert moved["host"] == cloud.vms[web.vm_id].host != first.host
    done = attempt(user, "vm", "migrate", web.name, "--to", str(first.host))
    assert b"confirms that it has given its vTPM away" in done.stdout
    assert b"verified: chip" in done.stderr
    assert told(user, "vm", "migrate", web.name, "--to", "nowhere", code=3)["error"] == "no-host"

    known = next(known for known in estate.keyring.content.vtpms if known.vm_id == web.vm_id)
    given_away = next(sp for chip, sp in cloud.sps.items() if chip == moved["chip_id"])
    fate = told(user, "terminal", "fate", str(known.vtpm_id), "--channel", str(given_away.state))
    assert (fate["state"], fate["chip_id"]) == ("migrated", first.chip_id)
    done = attempt(user, "terminal", "fate", str(known.vtpm_id), "--channel", str(given_away.state))
    assert f"migrated to the chip {first.chip_id}".encode() in done.stdout
    attempt(user, "vm", "destroy", web.name, "--yes")


def test_ctrl_c_cancels_it_and_says_so(estate: Estate, cloud: PlatformDouble, user: CloudUser) -> None:
    web = made(estate, cloud)
    cloud.moving.begun.clear()
    cloud.moving.may_go_on.clear()
    words = ["vm", "migrate", web.name, "--auto", "--keyring", str(user.keyring)]
    with subprocess.Popen([*SPVTPM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as terminal:
        assert cloud.moving.begun.wait(60)
        while not any("/events" in asked for asked in cloud.asked):  # it waits
            pass
        terminal.send_signal(signal.SIGINT)
        out, err = terminal.communicate(timeout=60)
    assert (terminal.returncode, b"Traceback" in err) == (130, False), err
    assert out.startswith(b"cancelled: ") and b"where it was" in out
    attempt(user, "vm", "destroy", web.name, "--yes")


def test_a_policy_without_migration_is_shown_and_kept(estate: Estate, cloud: PlatformDouble, user: CloudUser) -> None:
    stays = made(estate, cloud, migration_allowed=False)
    assert told(user, "vm", "migrate", stays.name, "--auto", code=3)["error"] == "migration-forbidden"
    assert b"it may not move while it runs" in attempt(user, "vm", "show", stays.name).stdout
    attempt(user, "vm", "destroy", stays.name, "--yes")


def test_a_host_is_drained_and_what_stays_is_told_with_its_reason(
    estate: Estate, cloud: PlatformDouble, user: CloudUser
) -> None:
    vms = [made(estate, cloud) for _ in range(3)]
    stays, sleeps = made(estate, cloud, migration_allowed=False), made(estate, cloud)
    host = str(cloud.vms[stays.vm_id].host)
    everything = [*vms, stays, sleeps]
    for owned in everything:
        if cloud.vms[owned.vm_id].host != host:
            cloud.move(cloud.vms[owned.vm_id], cloud.sps[cloud.destination(cloud.vms[owned.vm_id])])
    cloud.carry_out("shutdown", cloud.vms[sleeps.vm_id])

    drained = told(user, "host", "drain", host, code=3)
    assert drained["is_empty"] is False
    lines = {line["name"]: line for line in drained["vms"]}  # type: ignore[attr-defined]
    assert {lines[vm.name]["outcome"] for vm in vms} == {"moved"}
    assert (lines[stays.name]["outcome"], lines[stays.name]["runs"]) == ("failed", True)
    assert "does not allow its migration" in lines[stays.name]["why"]
    assert (lines[sleeps.name]["outcome"], lines[sleeps.name]["runs"]) == ("remaining", False)
    listed = attempt(user, "host", "list").stdout.decode().splitlines()
    assert [("being drained" in line) for line in listed] == [name == host for name in ("host-0", "host-1")]

    attempt(user, "vm", "shutdown", stays.name)
    done = attempt(user, "host", "drain", host)
    assert done.returncode == 0, done
    assert f"{host}: 0 moved away; 1 there still, of which 0 run".encode() in done.stdout
    assert told(user, "host", "undrain", host)["is_draining"] is False
    for owned in everything:
        attempt(user, "vm", "destroy", owned.name, "--yes")
