"""What the platform keeps: tables of one database, SQLite or PostgreSQL. No secret of a VM's owner is in them.

Times are seconds since 1970, UTC. A state is a word of `wire/platform_api.py`. Structs of it are kept as JSON.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    false,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_Name = String(63).with_variant(String(63, collation="C"), "postgresql")
"""Ordered by its bytes, as whoever reads on after a name expects."""

_Json = JSON(none_as_null=True)

_Counter = BigInteger().with_variant(Integer, "sqlite")
"""SQLite counts up by itself for an INTEGER PRIMARY KEY alone."""

users = Table(
    "users",
    metadata,
    Column("name", _Name, primary_key=True),
    Column("created_s", Float, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("token_id", Uuid, primary_key=True),
    Column("user", _Name, ForeignKey("users.name", ondelete="CASCADE"), nullable=False, index=True),
    Column("sha256", LargeBinary(32), nullable=False, unique=True),  # of the token, which is 256 random bits
    Column("scopes", _Json, nullable=False),
    Column("note", String(64), nullable=False),
    Column("created_s", Float, nullable=False),
    Column("expires_s", Float),
)

hosts = Table(
    "hosts",
    metadata,
    Column("name", _Name, primary_key=True),
    Column("address", String(300), nullable=False),
    Column("token", String(128), nullable=False),
    Column("chip_id", String(32), unique=True),
    Column("report", _Json),  # HostReport, as it was heard last
    Column("seen_s", Float),
    Column("failure", Text, nullable=False, default=""),
    Column("created_s", Float, nullable=False),
    Column("is_draining", Boolean, nullable=False, server_default=false()),  # it takes no VMs any more
)

vms = Table(
    "vms",
    metadata,
    Column("vm_id", Uuid, primary_key=True),
    Column("user", _Name, ForeignKey("users.name"), nullable=False),
    Column("name", _Name, nullable=False),
    Column("state", String(16), nullable=False),
    Column("host", _Name, ForeignKey("hosts.name"), index=True),
    Column("wants", _Json, nullable=False),  # Wants
    Column("sequence", BigInteger, nullable=False),  # of the newest order to an agent
    Column("operation", Uuid),  # the one under way; one at a time
    Column("vtpm_id", Uuid),
    Column("vtpm", String(16), nullable=False),
    Column("boots", Integer, nullable=False),
    Column("failure", Text, nullable=False),
    Column("pcrs", _Json),  # PublishedPcrs
    Column("created_s", Float, nullable=False),
    Column("changed_s", Float, nullable=False),
    UniqueConstraint("user", "name"),
)

images = Table(
    "images",
    metadata,
    Column("vm_id", ForeignKey("vms.vm_id", ondelete="CASCADE"), primary_key=True),
    Column("content", LargeBinary, nullable=False),  # ciphertext, at most agent_api.MAX_IMAGE_BYTES
)

operations = Table(
    "operations",
    metadata,
    Column("operation_id", Uuid, primary_key=True),
    Column("user", String(63), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("vm_id", Uuid, nullable=False, index=True),  # which may be gone
    Column("vm_name", String(63), nullable=False),
    Column("sequence", BigInteger, nullable=False),  # of its orders: none is newer but of a later operation
    Column("state", String(16), nullable=False, index=True),
    Column("step", Text, nullable=False),
    Column("steps_done", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("error", _Json),  # Problem
    Column("idempotency_key", String(64)),
    Column("request_sha256", LargeBinary(32), nullable=False),  # of what was asked, to tell a repetition from a misuse
    Column("handed_over", Boolean, nullable=False),  # whether the workflow engine has it
    Column("created_s", Float, nullable=False),
    Column("changed_s", Float, nullable=False),
    Column("destination", _Name),  # the host that was asked for; of a migration
    Column("is_cancelled", Boolean, nullable=False, server_default=false()),  # whether its user has asked for that
    UniqueConstraint("user", "idempotency_key"),
    Index("ix_operations_user_created", "user", "created_s"),
)

handoffs = Table(
    "handoffs",
    metadata,
    Column("operation", Uuid, primary_key=True),  # a migration; it may have ended before the handoff has
    Column("vm_id", Uuid, nullable=False, index=True),
    Column("sequence", BigInteger, nullable=False),  # of the operation
    Column("source", _Name, nullable=False),
    Column("destination", _Name, nullable=False),
    Column("handoff", String(32)),  # its id, as the source told it; until then nothing is ordered at the destination
    Column("outcome", String(8), nullable=False),  # open, kept or gone; as the source said
    Column("token", String(64)),  # of the source, for the destination
    Column("receipt", String(64)),  # of the destination, for the source
    Column("failure", Text, nullable=False),
    Column("is_told", Boolean, nullable=False),  # whether both sides know the end
    Column("created_s", Float, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("number", _Counter, primary_key=True, autoincrement=True),
    Column("vm_id", Uuid, nullable=False, index=True),
    Column("time_s", Float, nullable=False),
    Column("what", String(32), nullable=False),
    Column("detail", Text, nullable=False),
)

replicas = Table(
    "replicas",
    metadata,
    Column("executor_id", String(64), primary_key=True),
    Column("seen_s", Float, nullable=False),
)

console_sessions = Table(
    "console_sessions",
    metadata,
    Column("sha256", LargeBinary(32), primary_key=True),  # of the cookie
    Column("token_id", ForeignKey("tokens.token_id", ondelete="CASCADE"), nullable=False),
    Column("expires_s", Float, nullable=False),
)
