"""Brings a database to this release's schema. The only place that imports alembic."""

import secrets
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

from service.store import schema
from service.store.database import UNREADABLE, open_writer, require_current, revision, unreadable, unwritable

NODE_ID_BYTES = 6  # 12 hex digits: short enough for ifalias and for people


def scripts() -> Path:
    """Where the migrations are: inside an installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent.parent
    packaged = here / "migrations"
    return packaged if packaged.is_dir() else here.parent / "migrations"


def migrate(path: Path, *, now: Callable[[], str]) -> tuple[str | None, str]:
    """Upgrade the database, making it and its folder if need be; the revisions before and after.

    Raises:
        TunledgerError: schema_mismatch for one of a newer release, log_unavailable, log_corrupt. The database is
            then what it was.
    """
    from alembic import command
    from alembic.config import Config

    before = revision(path)
    if before is not None and before not in schema.REVISIONS:
        require_current(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        if not path.exists():
            path.touch(mode=0o600)
    except OSError as error:
        raise unwritable(path, error) from error
    config = Config()
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    engine = open_writer(path)
    try:
        with engine.connect() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        with engine.begin() as connection:
            if connection.execute(sa.select(schema.node.c.id)).first() is None:
                connection.execute(schema.node.insert().values(id=secrets.token_hex(NODE_ID_BYTES), created_at=now()))
    except UNREADABLE as error:
        raise unreadable(path, error) from error
    finally:
        engine.dispose()
    return before, schema.REVISIONS[-1]
