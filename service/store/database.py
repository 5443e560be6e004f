"""Opens the database the way the log needs it, and refuses one that it should not touch.

SQLite by default opens transactions late, syncs little and lets any connection checkpoint. Here: explicit BEGIN
IMMEDIATE on the one writing connection, WAL with synchronous=FULL read back, checkpoints by the writer only (the
WAL-reset bug of SQLite 3.7.0 to 3.51.2 needs two connections that write or checkpoint), all others read-only.
"""

import fcntl
import json
import os
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.pool import NullPool, QueuePool

from service.domain.errors import ErrorCode, TunledgerError
from service.domain.values import NodeId
from service.store import schema

# What SQLite and its module raise on a damaged file: in a schema, bytes that are no text come as the latter.
UNREADABLE = (sa.exc.DatabaseError, UnicodeDecodeError)
BUSY_TIMEOUT_MS = 5000  # a person with the sqlite3 shell may hold the lock; then a write waits this long


def path_of(url: str) -> Path:
    """The file of a SQLAlchemy SQLite URL.

    Raises:
        TunledgerError: log_unavailable, for another kind of database or one without a file.
    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database == ":memory:":
        raise TunledgerError(
            ErrorCode.LOG_UNAVAILABLE,
            f"database.url: {url} is not a SQLite file; expected one such as sqlite:////var/lib/tunledger/tunledger.db",
        )
    return Path(parsed.database)


def open_writer(path: Path) -> sa.Engine:
    """The engine for the one connection that writes. Its pragmas are read back, not believed.

    Raises (on first connect):
        TunledgerError: log_unavailable, if WAL or synchronous=FULL did not take.
    """
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        poolclass=NullPool,
        connect_args={"isolation_level": None, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        connection.execute("PRAGMA synchronous=FULL")
        (level,) = connection.execute("PRAGMA synchronous").fetchone()
        if (mode, level) != ("wal", 2):
            raise TunledgerError(
                ErrorCode.LOG_UNAVAILABLE,
                f"{path}: SQLite answers journal_mode={mode}, synchronous={level} instead of wal and 2 (FULL); "
                "is the file on a network file system?",
            )
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def open_reader(path: Path) -> sa.Engine:
    """An engine for reading only: its connections can neither write nor checkpoint."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{_quoted(path)}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
        )
        connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA query_only=ON")
        return connection

    return sa.create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_size=4, max_overflow=8)


def _quoted(path: Path) -> str:
    return str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def revision(path: Path) -> str | None:
    """The schema revision of a database, None if it has none (new, or empty).

    Raises:
        TunledgerError: log_corrupt; log_unavailable, if there is no looking at it.
    """
    try:
        if not path.exists() or path.stat().st_size == 0:
            return None
    except OSError as error:
        raise unwritable(path, error) from error
    engine = open_reader(path)
    try:
        with engine.connect() as connection:
            if not sa.inspect(connection).has_table("alembic_version"):
                return None
            found: str | None = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
            return found
    except UNREADABLE as error:
        raise unreadable(path, error) from error
    finally:
        engine.dispose()


def require_current(path: Path) -> None:
    """Check that the database has exactly the schema of this release.

    Raises:
        TunledgerError: schema_mismatch, saying which revision was found and what to do; log_corrupt.
    """
    from service import __version__

    found, newest = revision(path), schema.REVISIONS[-1]
    if found == newest:
        return
    if found is None:
        raise TunledgerError(ErrorCode.SCHEMA_MISMATCH, f"{path} has no log yet: run tunledger migrate")
    if found in schema.REVISIONS:
        raise TunledgerError(
            ErrorCode.SCHEMA_MISMATCH,
            f"{path} is at schema {found}, this release needs {newest}: run tunledger migrate",
        )
    raise TunledgerError(
        ErrorCode.SCHEMA_MISMATCH,
        f"{path} is at schema {found}, which is newer than tunledger {__version__} knows (up to {newest}): "
        "run the release that wrote it, or a later one",
    )


def is_migrated(path: Path) -> bool:
    """Whether a migration has nothing left to do. Raises TunledgerError: log_corrupt, log_unavailable."""
    if revision(path) != newest():
        return False
    engine = open_reader(path)
    try:
        with engine.connect() as connection:  # named last: a migration that was cut short leaves it out
            return connection.execute(sa.select(schema.node.c.id)).first() is not None
    except UNREADABLE as error:
        raise unreadable(path, error) from error
    finally:
        engine.dispose()


def node_id(engine: sa.Engine) -> NodeId:
    """The id of this node, made with the database. Raises TunledgerError: log_corrupt if it is not there."""
    with engine.connect() as connection:
        found = connection.execute(sa.select(schema.node.c.id)).scalar()
    if found is None:
        raise TunledgerError(ErrorCode.LOG_CORRUPT, "the database names no node; it was not made by tunledger migrate")
    return NodeId(found)


def newest() -> str:
    """The schema revision of this release."""
    return schema.REVISIONS[-1]


def unwritable(path: Path, error: OSError) -> TunledgerError:
    """Why a database or its folder could not be made."""
    return TunledgerError(ErrorCode.LOG_UNAVAILABLE, f"{path}: {error.strerror}; is the folder there and writable?")


def unreadable(path: Path, error: Exception) -> TunledgerError:
    """Why SQLite could not read the database, in its own words."""
    words = getattr(error, "orig", None) or error
    return TunledgerError(ErrorCode.LOG_CORRUPT, f"{path} does not read: {words}")


class InstanceLock:
    """One service on a database: an flock on `<database>.lock`, which also says who holds it.

    The kernel lets go of it when the process ends, however it ends (flock(2)).
    """

    def __init__(self, database: Path, who: dict[str, Any]) -> None:
        self._path = database.with_name(database.name + ".lock")
        self._who = who
        self._fd: int | None = None

    def __enter__(self) -> Self:
        """Take the lock. Raises TunledgerError: already_serving, naming the holder; log_unavailable."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise unwritable(self._path, error) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 4096, 0).decode("utf-8", "replace")
            os.close(fd)
            raise TunledgerError(
                ErrorCode.ALREADY_SERVING, f"{self._path}: this database is in use by {_described(holder)}"
            ) from None
        self._fd = fd
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(self._who).encode(), 0)
        except OSError:
            pass  # a full disk: the lock holds all the same, only its holder goes unnamed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = None


def _described(holder: str) -> str:
    try:
        who = json.loads(holder)
        return f"{who['what']} (pid {who['pid']}, since {who['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
