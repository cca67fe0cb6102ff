"""The first tables: users and tokens, hosts, VMs and their images, operations, events, replicas, sessions of the console."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NAME = sa.String(length=63).with_variant(sa.String(length=63, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("vm_id", sa.Uuid(), nullable=False),
        sa.Column("time_s", sa.Float(), nullable=False),
        sa.Column("what", sa.String(length=32), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_events")),
    )
    op.create_index(op.f("ix_events_vm_id"), "events", ["vm_id"], unique=False)
    op.create_table(
        "hosts",
        sa.Column("name", _NAME, nullable=False),
        sa.Column("address", sa.String(length=300), nullable=False),
        sa.Column("token", sa.String(length=128), nullable=False),
        sa.Column("chip_id", sa.String(length=32), nullable=True),
        sa.Column("report", sa.JSON(), nullable=True),
        sa.Column("seen_s", sa.Float(), nullable=True),
        sa.Column("failure", sa.Text(), nullable=False),
        sa.Column("created_s", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_hosts")),
        sa.UniqueConstraint("chip_id", name=op.f("uq_hosts_chip_id")),
    )
    op.create_table(
        "operations",
        sa.Column("operation_id", sa.Uuid(), nullable=False),
        sa.Column("user", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("vm_id", sa.Uuid(), nullable=False),
        sa.Column("vm_name", sa.String(length=63), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("step", sa.Text(), nullable=False),
        sa.Column("steps_done", sa.Integer(), nullable=False),
        sa.Column("steps", sa.Integer(), nullable=False),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("idempotency_key", sa.String(length=64), nullable=True),
        sa.Column("request_sha256", sa.LargeBinary(length=32), nullable=False),
        sa.Column("handed_over", sa.Boolean(), nullable=False),
        sa.Column("created_s", sa.Float(), nullable=False),
        sa.Column("changed_s", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("operation_id", name=op.f("pk_operations")),
        sa.UniqueConstraint("user", "idempotency_key", name=op.f("uq_operations_user")),
    )
    op.create_index(op.f("ix_operations_state"), "operations", ["state"], unique=False)
    op.create_index("ix_operations_user_created", "operations", ["user", "created_s"], unique=False)
    op.create_index(op.f("ix_operations_vm_id"), "operations", ["vm_id"], unique=False)
    op.create_table(
        "replicas",
        sa.Column("executor_id", sa.String(length=64), nullable=False),
        sa.Column("seen_s", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("executor_id", name=op.f("pk_replicas")),
    )
    op.create_table(
        "users",
        sa.Column("name", _NAME, nullable=False),
        sa.Column("created_s", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_users")),
    )
    op.create_table(
        "tokens",
        sa.Column("token_id", sa.Uuid(), nullable=False),
        sa.Column("user", _NAME, nullable=False),
        sa.Column("sha256", sa.LargeBinary(length=32), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("note", sa.String(length=64), nullable=False),
        sa.Column("created_s", sa.Float(), nullable=False),
        sa.Column("expires_s", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["user"], ["users.name"], name=op.f("fk_tokens_user_users"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("token_id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("sha256", name=op.f("uq_tokens_sha256")),
    )
    op.create_index(op.f("ix_tokens_user"), "tokens", ["user"], unique=False)
    op.create_table(
        "vms",
        sa.Column("vm_id", sa.Uuid(), nullable=False),
        sa.Column("user", _NAME, nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("host", _NAME, nullable=True),
        sa.Column("wants", sa.JSON(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("operation", sa.Uuid(), nullable=True),
        sa.Column("vtpm_id", sa.Uuid(), nullable=True),
        sa.Column("vtpm", sa.String(length=16), nullable=False),
        sa.Column("boots", sa.Integer(), nullable=False),
        sa.Column("failure", sa.Text(), nullable=False),
        sa.Column("pcrs", sa.JSON(), nullable=True),
        sa.Column("created_s", sa.Float(), nullable=False),
        sa.Column("changed_s", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["host"], ["hosts.name"], name=op.f("fk_vms_host_hosts")),
        sa.ForeignKeyConstraint(["user"], ["users.name"], name=op.f("fk_vms_user_users")),
        sa.PrimaryKeyConstraint("vm_id", name=op.f("pk_vms")),
        sa.UniqueConstraint("user", "name", name=op.f("uq_vms_user")),
    )
    op.create_index(op.f("ix_vms_host"), "vms", ["host"], unique=False)
    op.create_table(
        "console_sessions",
        sa.Column("sha256", sa.LargeBinary(length=32), nullable=False),
        sa.Column("token_id", sa.Uuid(), nullable=False),
        sa.Column("expires_s", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["token_id"], ["tokens.token_id"], name=op.f("fk_console_sessions_token_id_tokens"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_console_sessions")),
    )
    op.create_table(
        "images",
        sa.Column("vm_id", sa.Uuid(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["vm_id"], ["vms.vm_id"], name=op.f("fk_images_vm_id_vms"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("vm_id", name=op.f("pk_images")),
    )
