"""A02: the relay reads, changes, drops, reorders, repeats or holds back frames. The channel fails closed and can be opened again.

What is unprotected is the same conversation without TLS: the messages as they are, in frames. There each of these attacks works.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spvtpm.terminal.keyring import Keyring
from spvtpm.terminal.whereabouts import AtChip, Importing, InFile
from spvtpm.wire.errors import CertificateRefused, ChannelError, PeerError, SpvtpmError
from spvtpm.wire.introductions import encode_clear
from spvtpm.wire.messages import ErrorReply
from spvtpm.wire.owner_messages import (
    DestroyVm,
    ListMine,
    MyVm,
    NewVtpm,
    Provision,
    encode_owner_message,
    parse_owner_request,
)
from tests.owner import ANYTHING
from tests.relay import Held, Relay, Side
from tests.terminal.conftest import estate  # noqa: F401  # the fixture
from tests.terminal.estate import VM_KEY, Estate

pytestmark = pytest.mark.attack("A02")
Alteration = Callable[[bytes], list[bytes]]


def flipped(frame: bytes) -> list[bytes]:
    middle = len(frame) // 2
    return [frame[:middle] + bytes([frame[middle] ^ 1]) + frame[middle + 1 :]]


def cut_short(frame: bytes) -> list[bytes]:
    return [frame[:-1]]


def repeated(frame: bytes) -> list[bytes]:
    return [frame, frame]


def made_up(frame: bytes) -> list[bytes]:
    return [os.urandom(len(frame)), frame]


ALTERATIONS: dict[str, Alteration] = {
    "flipped": flipped,
    "cut short": cut_short,
    "repeated": repeated,
    "made up": made_up,
}


@pytest.fixture
def relay(estate: Estate, tmp_path: Path) -> Iterator[Relay]:  # noqa: F811
    """A relay to the first chip."""
    with Relay(tmp_path / "relay", estate.channel()) as relay:
        yield relay


# The attacks, where nothing protects


def test_without_a_channel_the_relay_reads_changes_and_repeats_what_it_likes() -> None:
    vm_id, other, secret = uuid.uuid4(), uuid.uuid4(), os.urandom(32)
    provision = Provision(vm_id=vm_id, user_secret=secret, vm_key=VM_KEY, vtpm=NewVtpm(policy=ANYTHING))
    said = encode_owner_message(provision)
    assert secret in said and VM_KEY in said
    changed = said.replace(str(vm_id).encode(), str(other).encode())
    assert isinstance(parse_owner_request(changed), Provision)
    destroy = encode_owner_message(DestroyVm(vm_id=vm_id))
    assert parse_owner_request(destroy) == parse_owner_request(destroy)  # a second time as good as the first


# The same in the channel


@pytest.mark.attack("A24")
def test_the_relay_reads_no_secret_no_id_and_no_state(estate: Estate, relay: Relay) -> None:  # noqa: F811
    vm_id, key = uuid.uuid4(), os.urandom(32)
    estate.desk(channel=relay.path).provision(vm_id, key, ANYTHING, "a label of mine")
    seen = b"".join(frame for _side, frame in relay.seen)
    secrets = [key, *estate.keyring.content.user_secrets, vm_id.bytes, str(vm_id).encode(), b"a label of mine"]
    assert len(seen) > 3000
    assert not [secret for secret in secrets if secret in seen]


@pytest.mark.parametrize("name", ALTERATIONS)
@pytest.mark.parametrize("side", ["owner", "sp"])
def test_a_frame_that_is_altered_ends_the_channel_and_the_next_one_works(
    estate: Estate,  # noqa: F811
    relay: Relay,
    side: Side,
    name: str,
) -> None:
    vm_id = estate.stopped_vm()
    for attacked in range(8):
        done = False

        def hook(sender: Side, number: int, frame: bytes, attacked: int = attacked) -> list[bytes]:
            nonlocal done
            if (sender, number) == (side, attacked):
                done = True
                return ALTERATIONS[name](frame)
            return [frame]

        relay.hook = hook
        try:
            with estate.desk(channel=relay.path, timeout_s=1).connect() as session:  # where nothing more comes
                assert vm_id in {vm.vm_id for vm in session.list_mine()}
            if not done:
                break
            # What came after the last answer changes nothing; before it, nothing altered was believed.
            assert attacked >= 2
        except (PeerError, CertificateRefused):  # a certificate's signature may be where it was altered
            pass
    assert attacked > 2
    relay.hook = lambda _side, _number, frame: [frame]
    with estate.desk(channel=relay.path).connect() as session:
        assert vm_id in {vm.vm_id for vm in session.list_mine()}


@pytest.mark.parametrize("how", ["reordered", "repeated", "dropped"])
def test_requests_are_carried_out_once_in_order_or_not_at_all(
    estate: Estate,  # noqa: F811
    relay: Relay,
    how: str,
) -> None:
    """Two provisions, then the relay's work on their frames."""
    first, second = uuid.uuid4(), uuid.uuid4()
    kept: list[bytes] = []

    def hook(sender: Side, number: int, frame: bytes) -> list[bytes]:
        if sender == "owner" and number == 4:
            kept.append(frame)
            return {"reordered": [], "repeated": [frame, frame], "dropped": []}[how]
        if sender == "owner" and number == 5:
            return [frame, *kept] if how == "reordered" else [frame]
        return [frame]

    relay.hook = hook
    with pytest.raises(ChannelError), estate.desk(channel=relay.path).connect() as session:
        for vm_id in (first, second):
            session._send(Provision(vm_id=vm_id, user_secret=bytes(32), vm_key=VM_KEY, vtpm=NewVtpm(policy=ANYTHING)))
        for _ in range(2):
            session._receive(MyVm)
    found = {vm.vm_id for vm in estate.desk().list_mine()} & {first, second}
    assert found == ({first} if how == "repeated" else set())


def test_a_recorded_message_says_nothing_in_another_channel(estate: Estate, relay: Relay) -> None:  # noqa: F811
    vm_id = estate.stopped_vm()
    estate.desk(channel=relay.path).destroy(vm_id)
    destroyed = relay.frames("owner")
    again = estate.stopped_vm()

    def hook(sender: Side, number: int, frame: bytes) -> list[bytes]:
        return [destroyed[number]] if sender == "owner" and number == 5 else [frame]

    relay.hook = hook
    with pytest.raises(ChannelError):
        estate.desk(channel=relay.path).destroy(again)
    assert again in {vm.vm_id for vm in estate.desk().list_mine()}


# Held back


def hold_back(relay: Relay, wanted: int) -> list[bytes]:
    """Has the relay keep this frame of the owner's, and what comes after it in that channel; where it will be."""
    held: list[bytes] = []

    def hook(sender: Side, number: int, frame: bytes) -> list[bytes]:
        if sender == "owner" and number == wanted:
            held.append(frame)
            raise Held
        return [frame]

    relay.hook = hook
    return held


@pytest.mark.attack("A09")
@pytest.mark.claim("B3")
def test_an_import_that_is_held_back_until_its_owner_has_gone_elsewhere_makes_no_second_life(
    estate: Estate,  # noqa: F811
    relay: Relay,
) -> None:
    """The relay keeps the last piece; the owner asks, is told that nothing came, and imports at another chip."""
    vm_id = estate.stopped_vm()
    vtpm_id = estate.export(vm_id, "held").known.vtpm_id
    held = hold_back(relay, 5)
    with pytest.raises(ChannelError):
        estate.bring(vm_id, "held", channel=relay.path)
    assert isinstance(estate.place(vtpm_id), Importing)
    assert estate.desk().fate(vtpm_id).state == "exported"
    assert isinstance(estate.place(vtpm_id), InFile)
    estate.bring(vm_id, "held", chip=1)

    relay.inject(held[0])  # what came late is answered, in a channel that nobody reads any more
    assert estate.desk().fate(vtpm_id).state == "exported"
    assert isinstance(estate.place(vtpm_id), AtChip)
    assert vm_id not in {vm.vm_id for vm in estate.desk().list_mine()}


def test_an_import_that_is_held_back_is_made_if_nobody_has_asked(estate: Estate, relay: Relay) -> None:  # noqa: F811
    """The attack on the unprotected value: but for the question, what comes late is as good as what comes in time."""
    vm_id = estate.stopped_vm()
    vtpm_id = estate.export(vm_id, "late").known.vtpm_id
    held = hold_back(relay, 5)
    with pytest.raises(ChannelError):
        estate.bring(vm_id, "late", channel=relay.path)
    forgetful = Keyring.open(estate.keyring.directory, bytes)
    relay.inject(held[0])
    with estate.desk().connect() as session:
        assert session.ask_fate(vtpm_id).state == "here"
    place = forgetful.known(vtpm_id)
    assert place is not None
    assert isinstance(place.place, Importing)
    assert estate.bring(vm_id, "late").vtpm_id == vtpm_id  # the terminal had kept in mind that it may have come


def test_an_acknowledgement_that_is_held_back_until_its_owner_was_told_that_all_is_here_destroys_nothing(
    estate: Estate,  # noqa: F811
    relay: Relay,
) -> None:
    vm_id = estate.stopped_vm()
    vtpm_id = estate.vtpm_of(vm_id)
    held = hold_back(relay, 6)
    with pytest.raises(ChannelError):
        estate.export(vm_id, "unheard", channel=relay.path)
    assert estate.desk().fate(vtpm_id).state == "here"
    relay.inject(held[0])
    assert estate.desk().fate(vtpm_id).state == "here"
    assert estate.export(vm_id, "unheard").file.version == 2


def test_a_refusal_in_clear_is_never_taken_for_the_secure_processors_word(estate: Estate, relay: Relay) -> None:  # noqa: F811
    lie = encode_clear(ErrorReply("not-found", "there is no such VM\x1b[2J"))
    for at in range(3):

        def hook(sender: Side, number: int, frame: bytes, at: int = at) -> list[bytes]:
            return [lie] if (sender, number) == ("sp", at) else [frame]

        relay.hook = hook
        with pytest.raises(SpvtpmError) as caught:
            estate.desk(channel=relay.path).destroy(uuid.uuid4())
        assert isinstance(caught.value, ChannelError)
        assert "in clear" in str(caught.value)
        assert "\x1b" not in str(caught.value)


def test_frames_of_any_kind_in_the_handshakes_place(estate: Estate, relay: Relay) -> None:  # noqa: F811
    junk = [b"\0", b"\x01\x80", os.urandom(64), encode_owner_message(ListMine()), bytes(1 << 16)]
    for frame in junk:
        for at in (0, 1):

            def hook(sender: Side, number: int, old: bytes, at: int = at, frame: bytes = frame) -> list[bytes]:
                return [frame] if (sender, number) == ("sp", at) else [old]

            relay.hook = hook
            with pytest.raises(PeerError), estate.desk(channel=relay.path, timeout_s=1).connect():
                pass
