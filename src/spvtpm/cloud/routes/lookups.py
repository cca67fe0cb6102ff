"""Operations, chips, and oneself: looked at. And one thing to do: operations may be cancelled."""

from __future__ import annotations

import uuid
from typing import Final, Literal

import msgspec
from msgspec import UNSET, UnsetType
from sqlalchemy import Connection

from spvtpm.cloud import operations, queries
from spvtpm.cloud.routing import Call, Route
from spvtpm.wire.errors import NotFound, WrongState
from spvtpm.wire.platform_api import Chip, Me, Operation, OperationPage


class OperationsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which operations.

    Attributes:
        vm_id: those of this VM.
        before: the last one of the page before.
        all: everybody's, for administrators.
    """

    vm_id: uuid.UUID | UnsetType = UNSET  # None would be `?vm_id=null`
    before: uuid.UUID | UnsetType = UNSET
    all: Literal["true", "false"] = "false"


def _operations(connection: Connection, call: Call) -> OperationPage:
    query: OperationsQuery = call.query
    user: str | None = call.principal.user
    if query.all == "true":
        call.principal.require("admin")
        user = None
    return queries.list_operations(connection, user, vm_id=query.vm_id or None, before=query.before or None)


def _operation(connection: Connection, call: Call) -> Operation:
    return queries.find_operation(connection, call.principal.sees, call.path["operation_id"])


def _cancel(connection: Connection, call: Call) -> Operation:
    return operations.cancel(connection, call.principal.user, call.path["operation_id"])


def _chips(connection: Connection, _: Call) -> list[Chip]:
    return queries.list_chips(connection)


def _chip(connection: Connection, call: Call) -> Chip:
    return queries.find_chip(connection, call.path["chip_id"])


def _me(_: Connection, call: Call) -> Me:
    return Me(name=call.principal.user, scopes=list(call.principal.granted))


LOOKUPS: Final = (
    Route(
        "GET",
        "/v1/operations",
        "read",
        "Operations, newest first.",
        _operations,
        query=OperationsQuery,
        answer=OperationPage,
        errors=(NotFound,),
    ),
    Route(
        "GET",
        "/v1/operations/{operation_id}",
        "read",
        "One operation.",
        _operation,
        answer=Operation,
        errors=(NotFound,),
    ),
    Route(
        "POST",
        "/v1/operations/{operation_id}/cancel",
        "vms",
        "Give up a migration, unless the VM has left its host.",
        _cancel,
        writes=True,
        answer=Operation,
        errors=(NotFound, WrongState),
    ),
    Route("GET", "/v1/chips", "read", "All chips, by id.", _chips, answer=list[Chip]),
    Route("GET", "/v1/chips/{chip_id}", "read", "One chip.", _chip, answer=Chip, errors=(NotFound,)),
    Route("GET", "/v1/me", "read", "Who the token's user is.", _me, answer=Me),
)
