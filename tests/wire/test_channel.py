"""Both ends of a channel without a relay between them: how it opens, and how it ends."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from spvtpm.vendor.factory import ALL_FEATURES
from spvtpm.wire.certificate_building import Validity, build_channel_certificate
from spvtpm.wire.certificate_extensions import ChannelIdentity
from spvtpm.wire.channel import SecureChannel
from spvtpm.wire.errors import ChannelError
from tests.owner import Owner
from tests.papers import DAY, todays_papers


def open_channel() -> tuple[SecureChannel, SecureChannel]:
    """The owner's end and the secure processor's."""
    owner, key, chip = Owner(), ec.generate_private_key(ec.SECP256R1()), todays_papers()
    identity = ChannelIdentity(chip.made.chip_id, 1, ALL_FEATURES)
    validity = Validity.lasting(datetime.now(UTC) - DAY, 7 * DAY)
    certificate = build_channel_certificate(chip.chip, key.public_key(), identity, validity)
    introduction = owner.certificate
    shown, introduced = (each.public_bytes(Encoding.DER) for each in (certificate, introduction))
    ours = SecureChannel(owner.key, introduction, shown, is_server=False, max_message_bytes=100)
    theirs = SecureChannel(key, certificate, introduced, is_server=True, max_message_bytes=100)
    while not (ours.is_open and theirs.is_open):
        pass_on(ours, theirs)
        pass_on(theirs, ours)
    return ours, theirs


def pass_on(sender: SecureChannel, receiver: SecureChannel) -> list[bytes]:
    return [message for frame in sender.frames() for message in receiver.receive(frame)]


def test_messages_arrive_whole_and_in_order_either_way() -> None:
    ours, theirs = open_channel()
    for sender, receiver in ((ours, theirs), (theirs, ours)):
        for message in (b"first", b"second" * 16):
            sender.send(message)
        assert pass_on(sender, receiver) == [b"first", b"second" * 16]


def test_messages_sent_together_arrive_one_by_one() -> None:
    ours, theirs = open_channel()
    messages = [bytes([number]) * 100 for number in range(250)]  # in several TLS records
    ours.send(*messages)
    assert pass_on(ours, theirs) == messages


@pytest.mark.parametrize("in_one_frame", [True, False])
def test_last_words_are_heard_though_the_channel_is_closed_behind_them(in_one_frame: bool) -> None:
    ours, theirs = open_channel()
    ours.send(b"last words")
    heard = [] if in_one_frame else pass_on(ours, theirs)
    ours.close()
    if in_one_frame:
        heard = pass_on(ours, theirs)
        assert not theirs.is_open
    assert heard == [b"last words"]
    with pytest.raises(ChannelError, match="has closed the channel"):
        for frame in ours.frames() or [b"more"]:
            theirs.receive(frame)
    with pytest.raises(ChannelError, match="not open"):
        theirs.send(b"an answer")
