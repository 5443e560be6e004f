"""Brings a database to this release's schema. The only place that imports alembic."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import event

from service import failpoints
from service.domain.errors import ErrorCode, TunledgerError
from service.store import headfile, schema
from service.store.database import (
    UNREADABLE,
    allocate_index,
    obstacle,
    open_writer,
    require_current,
    revision,
    unreadable,
    unwritable,
)

NODE_ID_BYTES = 6  # 12 hex digits: short enough for ifalias and for people


def scripts() -> Path:
    """Where the migrations are: inside an installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent.parent
    packaged = here / "migrations"
    return packaged if packaged.is_dir() else here.parent / "migrations"


def migrate(path: Path, *, now: Callable[[], str]) -> tuple[str | None, str]:
    """Upgrade the database, making it and its folder if need be; the revisions before and after.

    Raises:
        TunledgerError: schema_mismatch for one of a newer release, log_unavailable, log_full, log_corrupt, also if a
            log was here and is gone. The database is then what it was.
    """
    from alembic import command
    from alembic.config import Config

    failpoints.arm(os.environ)
    _roll_back(path)
    before = revision(path)
    if before is not None and before not in schema.REVISIONS:
        require_current(path)
    if before is None:
        _refuse_to_begin_anew(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        if not path.exists():
            path.touch(mode=0o600)
    except OSError as error:
        raise unwritable(path, error) from error
    refusal = obstacle(path)
    if refusal is not None:
        raise refusal
    config = Config()
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    engine = open_writer(path)
    event.listen(engine, "before_cursor_execute", lambda *_: failpoints.reach("migrate.statement.before", fails=True))
    event.listen(engine, "after_cursor_execute", lambda *_: failpoints.reach("migrate.statement.after", fails=True))
    event.listen(engine, "commit", lambda _: failpoints.reach("migrate.commit.before", fails=True))
    try:
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT count(*) FROM sqlite_master"))
            allocate_index(path)
            connection.rollback()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        failpoints.reach("migrate.upgraded")
        with engine.begin() as connection:
            if connection.execute(sa.select(schema.node.c.id)).first() is None:
                connection.execute(schema.node.insert().values(id=secrets.token_hex(NODE_ID_BYTES), created_at=now()))
    except (*UNREADABLE, OSError) as error:
        raise unreadable(path, error) from error
    finally:
        engine.dispose()
    failpoints.reach("migrate.after")
    return before, schema.REVISIONS[-1]


def _roll_back(path: Path) -> None:
    """Undo a first migration that a loss of power cut short before the database was in WAL mode: looking at it, which
    is done without writing, would be refused for what its rollback journal holds (SQLITE_READONLY_ROLLBACK).
    """
    try:
        if not path.with_name(path.name + "-journal").exists():
            return
    except OSError:
        return  # whoever looks at the database itself says why
    engine = open_writer(path)
    try:
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT count(*) FROM sqlite_master"))
    except (*UNREADABLE, OSError) as error:
        raise unreadable(path, error) from error
    finally:
        engine.dispose()


def _refuse_to_begin_anew(path: Path) -> None:
    """Where a log was, none is begun as if there had never been one: its interfaces may be on the host still."""
    known = headfile.read(path)
    if known is not None:
        raise TunledgerError(
            ErrorCode.LOG_CORRUPT,
            f"{path}: a log was here that had come to position {known[0]}, and it is gone: restore it; or, to begin "
            f"anew without it, remove {headfile.path_of(path)}",
        )
