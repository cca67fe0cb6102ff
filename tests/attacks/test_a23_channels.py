"""A23 for channels: opened and left, filled with nonsense, too many. Others are served all the while."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spvtpm.processor.channel_port import MAX_CHANNELS, MAX_CHANNELS_OF_ONE_OWNER
from spvtpm.wire.errors import ResourceError
from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.instance_file import MAX_FILE_BYTES
from spvtpm.wire.introductions import Introduce, Knock, Papers, encode_clear, parse_clear
from spvtpm.wire.messages import ErrorReply
from spvtpm.wire.owner_messages import Done, ImportVtpm, ListMine, MyVms
from tests.harness import RunningSp
from tests.owner import Owner
from tests.processor.processes import wait_until

pytestmark = pytest.mark.attack("A23")


@contextmanager
def raw(sp: RunningSp) -> Iterator[socket.socket]:
    """A connection that says what it likes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(sp.state / "run" / "channel.sock"))
        yield connection


def said(connection: socket.socket) -> list[bytes]:
    """All frames up to the end of the connection."""
    decoder, frames = FrameDecoder(), list[bytes]()
    with suppress(ConnectionResetError):  # it had not read all
        while data := connection.recv(1 << 16):
            frames += decoder.feed(data)
    return frames


def test_channels_that_are_opened_and_left_do_not_lock_others_out(sp: RunningSp) -> None:
    with ExitStack() as left:
        for _ in range(MAX_CHANNELS):
            left.enter_context(raw(sp))
        with raw(sp) as turned_away:
            reply = parse_clear(said(turned_away)[0])
            assert isinstance(reply, ErrorReply)
            assert reply.code == ResourceError.code
    wait_until(lambda: answers(sp))


def answers(sp: RunningSp) -> bool:
    """Whether an owner gets through."""
    try:
        with sp.channel() as channel:
            return channel.ask(ListMine(), MyVms).vms == []
    except ResourceError:
        return False


def test_one_owner_has_so_many_channels_and_another_owner_is_not_kept_out(sp: RunningSp) -> None:
    with ExitStack() as opened:
        for _ in range(MAX_CHANNELS_OF_ONE_OWNER):
            opened.enter_context(sp.channel())
        with pytest.raises(ResourceError, match="8 channels"), sp.channel() as one_more:
            one_more.ask(ListMine(), MyVms)
        with sp.channel(Owner()) as other:
            assert other.ask(ListMine(), MyVms).vms == []


def test_imports_that_are_begun_and_left_keep_no_vm(sp: RunningSp) -> None:
    vm_id = uuid.uuid4()
    for _ in range(3 * MAX_CHANNELS_OF_ONE_OWNER):
        with sp.channel() as channel:
            announced = ImportVtpm(size_bytes=MAX_FILE_BYTES, newest_version=0)
            channel.ask(channel.owner.provision(vm_id, bytes(32), announced), Done)
    with sp.channel() as channel:
        assert channel.provision(vm_id, bytes(32)).state == "stopped"


@pytest.mark.attack("A25")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=4), steps=st.integers(0, 2))
def test_nonsense_at_any_step_ends_that_channel_alone(sp: RunningSp, frames: list[bytes], steps: int) -> None:
    with raw(sp) as connection:
        introductions = [encode_clear(Knock()), encode_clear(Introduce(_certificate()))][:steps]
        with suppress(BrokenPipeError):  # it has had enough
            for frame in (*introductions, *frames):
                connection.sendall(encode_frame(frame))
        connection.shutdown(socket.SHUT_WR)
        heard = said(connection)
    if steps and heard:
        assert isinstance(parse_clear(heard[0]), Papers)
    with sp.channel() as channel:
        assert channel.ask(ListMine(), MyVms).vms == []


def _certificate() -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return _OWNER.certificate.public_bytes(Encoding.DER)


_OWNER = Owner()


@pytest.mark.parametrize("length", [0, (1 << 16) + 1, 1 << 31])
def test_a_frame_that_is_empty_or_too_long_ends_the_channel(sp: RunningSp, length: int) -> None:
    with raw(sp) as connection:
        connection.sendall(length.to_bytes(4, "big") + os.urandom(64))
        reply = parse_clear(said(connection)[0])
        assert isinstance(reply, ErrorReply)
        assert reply.code == "bad-frame"


@pytest.mark.attack("A27")
def test_the_channels_socket_is_for_the_relay_alone(sp: RunningSp) -> None:
    assert (sp.state / "run" / "channel.sock").stat().st_mode & 0o077 == 0
