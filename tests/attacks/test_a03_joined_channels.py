"""A03: the relay joins two owners' channels, or plays a recorded conversation again. Handshake or owner do not fit."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from spvtpm.terminal.desk import Desk
from spvtpm.terminal.keyring import Keyring
from spvtpm.terminal.socket_relay import through_socket
from spvtpm.wire.errors import ChannelError, PeerError
from spvtpm.wire.introductions import Introduce, encode_clear, parse_clear
from spvtpm.wire.owner_certificates import fingerprint, parse_owner_certificate
from tests.owner import ANYTHING
from tests.relay import Relay, Side
from tests.terminal.conftest import estate  # noqa: F401  # the fixture
from tests.terminal.estate import Estate, new_keyring

pytestmark = pytest.mark.attack("A03")


@pytest.fixture
def relay(estate: Estate, tmp_path: Path) -> Iterator[Relay]:  # noqa: F811
    """A relay to the first chip."""
    with Relay(tmp_path / "relay", estate.channel()) as relay:
        yield relay


@pytest.fixture
def mallory(tmp_path: Path) -> Keyring:
    """Another owner, in league with the relay."""
    return new_keyring(tmp_path / "mallory")


def test_who_would_believe_the_introduction_would_take_anybody_for_the_owner(
    estate: Estate,  # noqa: F811
    mallory: Keyring,
) -> None:
    """The attack on the unprotected value: the certificate is public, and saying that one has it is easy."""
    overheard = encode_clear(Introduce(estate.keyring.content.certificate))
    said = parse_clear(overheard)
    assert isinstance(said, Introduce)
    owner = fingerprint(parse_owner_certificate(said.certificate))
    assert owner == fingerprint(parse_owner_certificate(estate.keyring.content.certificate))
    assert owner != fingerprint(parse_owner_certificate(mallory.content.certificate))


@pytest.mark.attack("A05")
def test_an_introduction_with_another_owners_certificate_opens_nothing(
    estate: Estate,  # noqa: F811
    relay: Relay,
    mallory: Keyring,
) -> None:
    vm_id = estate.stopped_vm()
    victim = encode_clear(Introduce(estate.keyring.content.certificate))

    def hook(sender: Side, number: int, frame: bytes) -> list[bytes]:
        return [victim] if (sender, number) == ("owner", 1) else [frame]

    relay.hook = hook
    with pytest.raises(ChannelError):
        Desk(mallory, through_socket(relay.path), timeout_s=30).destroy(vm_id)
    assert vm_id in {vm.vm_id for vm in estate.desk().list_mine()}


def test_an_owner_who_is_introduced_as_another_opens_nothing(
    estate: Estate,  # noqa: F811
    relay: Relay,
    mallory: Keyring,
) -> None:
    """The reverse: the victim's secrets would land in VMs of Mallory's."""
    other = encode_clear(Introduce(mallory.content.certificate))

    def hook(sender: Side, number: int, frame: bytes) -> list[bytes]:
        return [other] if (sender, number) == ("owner", 1) else [frame]

    relay.hook = hook
    with pytest.raises(ChannelError):
        estate.desk(channel=relay.path).list_mine()
    assert not Desk(mallory, through_socket(estate.channel()), timeout_s=30).list_mine()


def test_frames_of_one_channel_say_nothing_in_another(
    estate: Estate,  # noqa: F811
    relay: Relay,
    mallory: Keyring,
) -> None:
    """Both are open; the relay hands what one owner says to the secure processor as the other one's words."""
    vm_id = estate.stopped_vm()
    said: list[bytes] = []

    def keep(sender: Side, number: int, frame: bytes) -> list[bytes]:
        if (sender, number) == ("owner", 5):
            said.append(frame)
            return []
        return [frame]

    relay.hook = keep
    with pytest.raises(ChannelError):  # nobody answers
        estate.desk(channel=relay.path, timeout_s=1).destroy(vm_id)

    def swap(sender: Side, number: int, frame: bytes) -> list[bytes]:
        return said if (sender, number) == ("owner", 4) else [frame]

    relay.hook = swap
    with pytest.raises(ChannelError):
        Desk(mallory, through_socket(relay.path), timeout_s=30).list_mine()
    assert vm_id in {vm.vm_id for vm in estate.desk().list_mine()}


def test_a_recorded_conversation_opens_nothing_and_does_nothing(estate: Estate, relay: Relay) -> None:  # noqa: F811
    """Played to the secure processor: every frame that the owner has sent, in a connection of its own."""
    vm_id = estate.stopped_vm()
    estate.desk(channel=relay.path).destroy(vm_id)
    recorded = relay.frames("owner")

    def play(sender: Side, number: int, _frame: bytes) -> list[bytes]:
        return recorded if (sender, number) == ("owner", 0) else [_frame]

    again = uuid.UUID(int=vm_id.int)
    estate.desk().provision(again, bytes(32), ANYTHING, "")
    relay.hook = play
    with pytest.raises(PeerError):
        estate.desk(channel=relay.path).list_mine()
    assert again in {vm.vm_id for vm in estate.desk().list_mine()}


def test_recorded_answers_are_no_answers(estate: Estate, relay: Relay) -> None:  # noqa: F811
    """Played to the terminal: what the secure processor has answered the last time."""
    estate.desk(channel=relay.path).list_mine()
    recorded = relay.frames("sp")
    for first in (1, 2):

        def play(sender: Side, number: int, frame: bytes, first: int = first) -> list[bytes]:
            return [recorded[number]] if sender == "sp" and number >= first else [frame]

        relay.hook = play
        with pytest.raises(ChannelError):
            estate.desk(channel=relay.path).list_mine()
