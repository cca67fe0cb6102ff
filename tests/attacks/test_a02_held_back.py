"""A02: the relay holds back what an owner said in a channel that he has given up, and hands it on when all has changed."""

from __future__ import annotations

import uuid

import pytest

from spvtpm.wire import messages
from spvtpm.wire.errors import StaleInstance
from spvtpm.wire.owner_messages import (
    DestroyVm,
    Done,
    OwnerReply,
    OwnerRequest,
    Rotated,
    RotateUserSecret,
    encode_owner_message,
)
from tests.guests_view import find_traces, stopped_with_traces
from tests.harness import RunningSp
from tests.owner import OwnerChannel

pytestmark = pytest.mark.attack("A02")


def held_back(channel: OwnerChannel, request: OwnerRequest) -> list[bytes]:
    """What the owner says, as the relay has it."""
    channel.channel.send(encode_owner_message(request))
    return channel.channel.frames()


def handed_on(channel: OwnerChannel, frames: list[bytes]) -> OwnerReply:
    channel.send_frames(frames)
    return channel.hear()


def away_and_back(sp: RunningSp, vm_id: uuid.UUID) -> None:
    """In a channel of their own, an export and an import."""
    with sp.channel() as newer:
        newer.bring(vm_id, sp.key(vm_id), newer.export(vm_id))


def test_a_word_that_is_late_and_that_nothing_has_overtaken_is_obeyed(sp: RunningSp) -> None:
    """What the attack needs: a relay can hold words back for as long as the channel is open."""
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as older:
        frames = held_back(older, DestroyVm(vm_id=vm_id))
        assert handed_on(older, frames) == Done()
    assert sp.vms() == []


def test_a_destruction_that_was_held_back_does_not_meet_the_vtpm_that_came_back(sp: RunningSp) -> None:
    vm_id, traces = stopped_with_traces(sp)
    with sp.channel() as older:
        frames = held_back(older, DestroyVm(vm_id=vm_id))
        away_and_back(sp, vm_id)
        with pytest.raises(StaleInstance, match="newer channel"):
            handed_on(older, frames)
    sp.info(messages.LaunchVm(vm_id=vm_id))
    assert find_traces(sp, vm_id, start=True).nv == traces.nv


def test_what_was_said_of_another_vm_still_counts(sp: RunningSp) -> None:
    (one, _), (two, _) = stopped_with_traces(sp), stopped_with_traces(sp)
    with sp.channel() as older:
        frames = held_back(older, DestroyVm(vm_id=two))
        away_and_back(sp, one)
        assert handed_on(older, frames) == Done()
    assert [vm.vm_id for vm in sp.vms()] == [one]


def test_a_rotation_that_was_held_back_does_not_bring_an_older_secret_back(sp: RunningSp) -> None:
    stopped_with_traces(sp)
    with sp.channel() as older, sp.channel() as newer:
        frames = held_back(older, RotateUserSecret(user_secret=bytes(32)))
        newer.ask(RotateUserSecret(user_secret=sp.owner.user_secret), Rotated)
        with pytest.raises(StaleInstance, match="newer channel"):
            handed_on(older, frames)


def test_a_channel_that_was_left_behind_very_often_is_out_of_date_altogether(sp: RunningSp) -> None:
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as older, sp.channel() as newer:
        frames = held_back(older, DestroyVm(vm_id=vm_id))
        for _ in range(257):
            passing = uuid.uuid4()
            newer.provision(passing, bytes(32))
            newer.ask(DestroyVm(vm_id=passing), Done)
        with pytest.raises(StaleInstance, match="newer channel"):
            handed_on(older, frames)
