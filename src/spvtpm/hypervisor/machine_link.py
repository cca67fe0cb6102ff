"""What the agent asks of an emulated VM's machine, on its control socket, and what that answers."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TypeVar

from spvtpm.hypervisor.frames import ask
from spvtpm.wire.decoding import printable
from spvtpm.wire.errors import MessageError, NotRunning, error_from_code
from spvtpm.wire.machine_control import (
    MAX_CONTROL_BYTES,
    ControlRequest,
    MachineState,
    MemoryCopied,
    encode_control,
    parse_control_reply,
)
from spvtpm.wire.messages import ErrorReply
from spvtpm.wire.platform_errors import MachineFailed

_Reply = TypeVar("_Reply", MachineState, MemoryCopied)


async def ask_machine(
    path: Path, vm_id: uuid.UUID, request: ControlRequest, answer: type[_Reply], timeout_s: float, pid: int | None
) -> _Reply:
    """One request, and its answer.

    Args:
        path: of the control socket.
        vm_id: whose machine it has to be.
        request: what is asked.
        answer: what kind of answer that has.
        timeout_s: how long it may take.
        pid: process id of the machine.

    Raises:
        MachineFailed: it is not there, or not any more.
        SpvtpmError: its refusal, or it does not answer as it should.
    """
    try:
        frame = await ask(path, "machine", encode_control(request), MAX_CONTROL_BYTES, timeout_s, pid)
    except NotRunning as error:  # which would be said of the secure processor
        raise MachineFailed(str(error)) from None
    reply = parse_control_reply(frame)
    if isinstance(reply, ErrorReply):
        raise error_from_code(reply.code, printable(reply.message))
    if not isinstance(reply, answer):
        raise MessageError(f"the machine of VM {vm_id} answers {type(request).__name__} with {type(reply).__name__}")
    if reply.vm_id != vm_id:
        raise MessageError(f"the machine of VM {vm_id} says that it is that of VM {reply.vm_id}")
    return reply
