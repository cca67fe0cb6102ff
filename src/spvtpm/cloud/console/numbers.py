"""Counts that the overview shows. The console's views come in.

As in `queries.py`, `user` is whose VMs are counted; None stands for an administrator, who sees all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, select

from spvtpm.cloud.tables import operations, vms

if TYPE_CHECKING:
    import uuid

    from sqlalchemy import Connection


def count_vms(connection: Connection, user: str | None) -> dict[str, int]:
    """How many VMs are in each state."""
    query = select(vms.c.state, func.count()).group_by(vms.c.state)
    if user is not None:
        query = query.where(vms.c.user == user)
    return {state: count for state, count in connection.execute(query)}  # noqa: C416  # of rows


def under_way(connection: Connection, user: str | None, limit: int) -> set[uuid.UUID]:
    """Ids of the newest operations that have not ended."""
    query = select(operations.c.operation_id).where(operations.c.state.in_(("queued", "running")))
    if user is not None:
        query = query.where(operations.c.user == user)
    return set(connection.scalars(query.order_by(operations.c.created_s.desc()).limit(limit)))


def failed_vms(connection: Connection, user: str | None, limit: int) -> list[uuid.UUID]:
    """Ids of VMs that are not as they should be."""
    query = select(vms.c.vm_id).where((vms.c.state == "failed") | (vms.c.failure != ""))
    if user is not None:
        query = query.where(vms.c.user == user)
    return list(connection.scalars(query.order_by(vms.c.changed_s.desc()).limit(limit)))
