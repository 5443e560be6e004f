"""Runs migrations on the connection that `service.store.migrate` hands in, or on the configured database.

With the `alembic` command itself, the URL comes from alembic.ini or TUNLEDGER_DATABASE__URL.
"""

import os

from alembic import context

from service.store import schema
from service.store.database import open_writer, path_of

connection = context.config.attributes.get("connection")


def migrate(target: object) -> None:
    """One transaction for each migration: DDL in SQLite is transactional when BEGIN is explicit."""
    context.configure(
        connection=target,  # type: ignore[arg-type]  # alembic leaves it untyped in attributes
        target_metadata=schema.metadata,
        transactional_ddl=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


if connection is not None:
    migrate(connection)
else:
    url = os.environ.get("TUNLEDGER_DATABASE__URL") or context.config.get_main_option("sqlalchemy.url") or ""
    with open_writer(path_of(url)).connect() as own:
        migrate(own)
