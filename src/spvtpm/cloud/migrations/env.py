"""What alembic runs for each of its commands: on the connection that it was given, within its transaction."""

from __future__ import annotations

from alembic import context

from spvtpm.cloud.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,  # SQLite too: pysqlite's own transactions, which would end at DDL, are switched off
    include_name=lambda name, kind, _: kind != "table" or name in metadata.tables,  # the workflow engine has its own
)
with context.begin_transaction():
    context.run_migrations()
