"""A02 to A05 and A10 through the whole of a real cloud: platform, agent, secure processor, machine.

What a platform does that lies is in `test_a10_lying_platform.py`; here the platform is the real one, and what is on its way is
altered, played again, or asked for by somebody else.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from spvtpm.terminal.desk import Desk
from spvtpm.terminal.keyring import Keyring
from spvtpm.terminal.owned import OwnedVm
from spvtpm.terminal.platform import Platform
from spvtpm.terminal.platform_relay import to_chip, to_console
from spvtpm.terminal.relay import OpenRelay, Relay
from spvtpm.wire.errors import AlreadyExists, ChannelError, NotFound, PeerError, SpvtpmError
from spvtpm.wire.platform_api import NewVm, Operation
from tests.cloud_stack import CloudStack, CloudUser
from tests.processor.processes import wait_until

RANDOM = ("vm", "exec", "web", "--", "tpm2_getrandom", "--hex", "4")
Change = Callable[[int, bytes], bytes | None]


class Between:
    """Stands in the way of one connection: `change` gets number and content of each frame, and says what goes on instead."""

    def __init__(self, way: OpenRelay, change: Change, seen: list[bytes]) -> None:
        self._way, self._change, self._seen = way, change, seen

    def __call__(self, timeout_s: float) -> Relay:
        return _Carrier(self._way(timeout_s), self._change, self._seen)


class _Carrier:
    def __init__(self, relay: Relay, change: Change, seen: list[bytes]) -> None:
        self._relay, self._change, self._seen, self._count = relay, change, seen, 0

    def deadline(self) -> float:
        return self._relay.deadline()

    def _passed(self, frame: bytes) -> bytes | None:
        self._count += 1
        return self._change(self._count - 1, frame)

    def send(self, frames: Iterable[bytes]) -> None:
        frames = list(frames)
        self._seen += frames
        self._relay.send([passed for frame in frames if (passed := self._passed(frame)) is not None])

    def receive(self, deadline: float) -> bytes:
        while (frame := self._passed(self._relay.receive(deadline))) is None:
            pass
        return frame

    def close(self) -> None:
        self._relay.close()


class Side:
    """One user: keyring, platform, and the way to the one chip."""

    def __init__(self, user: CloudUser) -> None:
        self.user = user
        self.keyring = Keyring.open(user.keyring, lambda: b"")
        account = self.keyring.content.account
        assert account is not None
        self.platform = Platform(account)
        (chip,) = self.platform.chips()
        self.way = to_chip(self.platform, bytes.fromhex(chip.chip_id))

    @property
    def web(self) -> OwnedVm:
        return self.keyring.owned("web")


@pytest.fixture(scope="module")
def cloud() -> Iterator[CloudStack]:
    with tempfile.TemporaryDirectory(prefix="spvtpm-", ignore_cleanup_errors=True) as parent:
        Path(parent).chmod(0o711)
        with CloudStack(Path(parent) / "c") as running:
            yield running


@pytest.fixture(scope="module")
def alice(cloud: CloudStack) -> Iterator[Side]:
    user = cloud.user("alice")
    user.run("vm", "create", "web")
    side = Side(user)
    with side.platform:
        yield side


@pytest.fixture(scope="module")
def bob(cloud: CloudStack) -> Iterator[Side]:
    side = Side(cloud.user("bob"))
    with side.platform:
        yield side


def flipped(number: int) -> Change:
    return lambda at, frame: frame[:-1] + bytes([frame[-1] ^ 1]) if at == number else frame


def dropped(number: int) -> Change:
    return lambda at, frame: None if at == number else frame


@pytest.mark.attack("A02")
@pytest.mark.parametrize("number", range(8))
def test_a_frame_that_is_altered_on_its_way_through_the_platform_ends_the_channel(alice: Side, number: int) -> None:
    seen: list[bytes] = []
    with pytest.raises(SpvtpmError) as refused:
        Desk(alice.keyring, Between(alice.way, flipped(number), seen), timeout_s=5).list_mine()
    assert not isinstance(refused.value, NotFound)
    assert alice.web.vm_key not in b"".join(seen)
    assert [vm.vm_id for vm in Desk(alice.keyring, alice.way).list_mine()] == [alice.web.vm_id]


@pytest.mark.attack("A02")
@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_frame_that_is_lost_ends_the_channel_and_the_next_one_works(alice: Side, number: int) -> None:
    with pytest.raises(PeerError):
        Desk(alice.keyring, Between(alice.way, dropped(number), []), timeout_s=3).list_mine()
    assert Desk(alice.keyring, alice.way).list_mine()


@pytest.mark.attack("A03")
def test_a_recorded_session_that_is_played_again_does_nothing(cloud: CloudStack, alice: Side) -> None:
    recorded: list[bytes] = []
    Desk(alice.keyring, Between(alice.way, lambda _at, frame: frame, recorded)).list_mine()
    before = cloud.hosts[0].sp.vms()
    relay = alice.way(5.0)
    with suppress(ChannelError):
        relay.send(recorded)
        heard = [relay.receive(relay.deadline()) for _ in range(8)]
        pytest.fail(f"a recording was answered with {len(heard)} frames")
    relay.close()
    assert cloud.hosts[0].sp.vms() == before
    alice.user.run(*RANDOM)


def ended(side: Side, operation: Operation) -> Operation:
    wait_until(lambda: side.platform.operation(operation.operation_id).state in ("done", "failed"))
    return side.platform.operation(operation.operation_id)


@pytest.mark.attack("A04")
@pytest.mark.parametrize("what", ["release", "destroy"])
def test_the_platform_alone_can_neither_take_a_vtpm_nor_destroy_it(cloud: CloudStack, alice: Side, what: str) -> None:
    vm_id = alice.web.vm_id
    with suppress(SpvtpmError):  # refused at once, or by the agent: the owner has said nothing to the secure processor
        asked = alice.platform.destroy(vm_id) if what == "destroy" else alice.platform.command(vm_id, "release")
        assert ended(alice, asked).state == "failed"
    assert vm_id in [vm.vm_id for vm in cloud.hosts[0].sp.vms()]
    wait_until(lambda: alice.user.attempt(*RANDOM).returncode == 0)


@pytest.mark.attack("A05")
def test_another_users_vm_does_not_exist_at_the_platform_nor_at_the_chip(alice: Side, bob: Side) -> None:
    nobodys = uuid.uuid4()
    told = []
    for vm_id in (alice.web.vm_id, nobodys):
        with pytest.raises(NotFound) as missing:
            bob.platform.vm(vm_id)
        with pytest.raises(SpvtpmError) as unreachable:
            to_console(bob.platform, vm_id)(5.0)
        with pytest.raises(SpvtpmError) as undone:
            bob.platform.command(vm_id, "shutdown")
        with pytest.raises(NotFound) as unknown:
            Desk(bob.keyring, bob.way).destroy(vm_id)
        told.append([str(error.value).replace(str(vm_id), "ID") for error in (missing, unreachable, undone, unknown)])
    assert told[0] == told[1]
    alice.user.run(*RANDOM)


@pytest.mark.attack("A10")
def test_no_second_vm_takes_the_id_of_another(cloud: CloudStack, alice: Side, bob: Side) -> None:
    before = cloud.hosts[0].sp.vms()
    for side in (alice, bob):
        with pytest.raises(AlreadyExists):
            side.platform.create(NewVm(vm_id=alice.web.vm_id, name="twin"))
    with pytest.raises(SpvtpmError):  # nor at the chip, whatever the platform says
        Desk(bob.keyring, bob.way).provision(alice.web.vm_id, bytes(32), alice.web.policy, "twin")
    assert cloud.hosts[0].sp.vms() == before
    alice.user.run(*RANDOM)
