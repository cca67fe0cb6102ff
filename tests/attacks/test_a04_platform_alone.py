"""A04: the platform asks for an export, or a destruction, without the owner. The owner's key is not in its channel."""

from __future__ import annotations

import typing
from dataclasses import replace

import msgspec
import pytest

from spvtpm.hypervisor.sp_client import SecureProcessorClient
from spvtpm.wire import messages
from spvtpm.wire.errors import MessageError, NotFound
from spvtpm.wire.framing import encode_frame
from spvtpm.wire.owner_messages import (
    AcknowledgeExport,
    DestroyVm,
    Done,
    ExportBegins,
    ExportVtpm,
    Fate,
    OwnerRequest,
    encode_owner_message,
)
from tests.guests_view import find_traces, stopped_with_traces
from tests.harness import RunningSp
from tests.owner import Owner

pytestmark = [pytest.mark.attack("A04"), pytest.mark.claim("C6b")]


def test_with_the_owners_key_it_works(sp: RunningSp) -> None:
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel:
        assert channel.ask(ExportVtpm(vm_id=vm_id), ExportBegins).version == 1
    with sp.channel() as channel:
        channel.ask(DestroyVm(vm_id=vm_id), Done)


def test_with_a_key_of_its_own_the_platform_gets_nothing_and_destroys_nothing(sp: RunningSp) -> None:
    vm_id, traces = stopped_with_traces(sp)
    requests = (
        ExportVtpm(vm_id=vm_id),
        DestroyVm(vm_id=vm_id),
        AcknowledgeExport(vm_id=vm_id, version=1, sha256=bytes(32)),
    )
    with sp.channel(Owner()) as channel:
        for request in requests:
            with pytest.raises(NotFound):
                channel.ask(request, Fate)
    sp.info(messages.StartVm(vm_id=vm_id))
    assert find_traces(sp, vm_id, start=True) == replace(traces, pcr=bytes(32))


def test_an_export_that_its_owner_began_cannot_be_acknowledged_by_the_platform(sp: RunningSp) -> None:
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel, sp.channel(Owner()) as platform:
        begins, file = channel.take_export(vm_id)
        with pytest.raises(NotFound):
            platform.acknowledge(vm_id, begins, file)
        assert channel.fate(begins.vtpm_id).state == "here"


@pytest.mark.parametrize("request_type", typing.get_args(OwnerRequest))
def test_the_hypervisors_socket_knows_none_of_the_owners_commands(
    sp: RunningSp, request_type: type[msgspec.Struct]
) -> None:
    names = {kind.__name__ for kind in typing.get_args(messages.Request)}
    assert request_type.__name__ not in names - {"GetEndorsement"}
    vm_id, _traces = stopped_with_traces(sp)
    payload = encode_owner_message(DestroyVm(vm_id=vm_id))
    with SecureProcessorClient(sp.socket) as client:
        client._socket.sendall(encode_frame(payload))
        reply = messages.parse_reply(client._receive())
    assert isinstance(reply, messages.ErrorReply)
    assert reply.code == MessageError.code
    assert sp.vm(vm_id).state == "stopped"
