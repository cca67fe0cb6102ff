"""VMs that move: handoffs, what a migration was asked, hosts that are being emptied."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_NAME = sa.String(length=63).with_variant(sa.String(length=63, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "handoffs",
        sa.Column("operation", sa.Uuid(), nullable=False),
        sa.Column("vm_id", sa.Uuid(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("source", _NAME, nullable=False),
        sa.Column("destination", _NAME, nullable=False),
        sa.Column("handoff", sa.String(length=32), nullable=True),
        sa.Column("outcome", sa.String(length=8), nullable=False),
        sa.Column("token", sa.String(length=64), nullable=True),
        sa.Column("receipt", sa.String(length=64), nullable=True),
        sa.Column("failure", sa.Text(), nullable=False),
        sa.Column("is_told", sa.Boolean(), nullable=False),
        sa.Column("created_s", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("operation", name=op.f("pk_handoffs")),
    )
    op.create_index(op.f("ix_handoffs_vm_id"), "handoffs", ["vm_id"], unique=False)
    no = sa.false()
    op.add_column("hosts", sa.Column("is_draining", sa.Boolean(), server_default=no, nullable=False))
    op.add_column("operations", sa.Column("is_cancelled", sa.Boolean(), server_default=no, nullable=False))
    op.add_column("operations", sa.Column("destination", _NAME, nullable=True))
