"""The offer of an interface: only the one sequence of messages that QEMU's document names is an offer."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.wire.errors import InterfaceError
from spvtpm.wire.ivshmem import Offer, OfferParser, encode_offer

Message = tuple[bytes, int | None]

# Source: QEMU docs/specs/ivshmem-spec.rst, "The ivshmem client-server protocol", for peer 0 of a server with peer 1.
EXPECTED = [(0, None), (0, None), (-1, 30), (1, 31), (0, 32)]

numbers = st.sampled_from([-(1 << 63), -2, -1, 0, 1, 2, 0xFFFF, 0x10000]) | st.integers(-(1 << 63), (1 << 63) - 1)
messages = st.tuples(
    numbers.map(lambda number: struct.pack("<q", number)) | st.binary(max_size=9), st.none() | st.integers(3, 40)
)


def feed_all(offered: list[Message]) -> Offer | None:
    parser = OfferParser()
    for message, descriptor in offered:
        offer = parser.feed(message, descriptor)
        if offer is not None:
            return offer
    return None


def test_an_offer_is_the_five_messages_of_the_protocol() -> None:
    sent = encode_offer(Offer(30, 31, 32))
    assert [(struct.unpack("<q", message)[0], descriptor) for message, descriptor in sent] == EXPECTED


@given(st.lists(st.integers(3, 1000), min_size=3, max_size=3))
def test_what_the_server_sends_the_client_understands(descriptors: list[int]) -> None:
    offer = Offer(*descriptors)
    assert feed_all(encode_offer(offer)) == offer


@given(st.permutations(encode_offer(Offer(30, 31, 32))))
def test_messages_in_any_other_order_are_no_offer(shuffled: list[Message]) -> None:
    if shuffled == encode_offer(Offer(30, 31, 32)):
        return
    with pytest.raises(InterfaceError):
        feed_all(shuffled)


@given(st.integers(0, 4), messages)
def test_one_wrong_message_is_refused_where_it_stands(position: int, wrong: Message) -> None:
    offered: list[Message] = list(encode_offer(Offer(30, 31, 32)))
    right, descriptor = offered[position]
    same_shape = (wrong[1] is None) == (descriptor is None)
    # A client may be given another number, but then the last message must carry it too.
    renumbered = position == 1 and len(wrong[0]) == 8 and wrong[1] is None and wrong[0][2:] == bytes(6)
    if (same_shape and wrong[0] == right) or renumbered:
        return
    offered[position] = wrong
    with pytest.raises(InterfaceError):
        feed_all(offered)


@given(st.integers(2, 0xFFFF))
def test_a_client_may_be_given_another_number(number: int) -> None:
    offered: list[Message] = list(encode_offer(Offer(30, 31, 32)))
    offered[1] = (struct.pack("<q", number), None)
    offered[4] = (struct.pack("<q", number), 32)
    assert feed_all(offered) == Offer(30, 31, 32)


@given(st.lists(messages, max_size=12))
def test_garbage_gives_nothing_or_an_interface_error(garbage: list[Message]) -> None:
    try:
        offer = feed_all(garbage)
    except InterfaceError:
        return
    assert offer is None or garbage[0] == encode_offer(offer)[0]
