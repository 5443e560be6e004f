"""Opens the database the way the log needs it, and refuses one that it should not touch.

SQLite by default opens transactions late, syncs little and lets any connection checkpoint. Here: explicit BEGIN
IMMEDIATE on the one writing connection, WAL with synchronous=FULL read back, checkpoints by the writer only (the
WAL-reset bug of SQLite 3.7.0 to 3.51.2 needs two connections that write or checkpoint), all others read-only.
"""

import contextlib
import errno
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

from service import failpoints
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.values import NodeId
from service.store import reserve, schema

# What SQLite and its module raise on a damaged file: in a schema, bytes that are no text come as the latter.
UNREADABLE = (sa.exc.DatabaseError, UnicodeDecodeError)
BUSY_TIMEOUT_MS = 5000  # a person with the sqlite3 shell may hold the lock; then a write waits this long
WAL_KEPT_BYTES = 8 * 1024 * 1024  # of a -wal that grew behind a long reader; twice what it has between checkpoints

INDEX_BYTES = 5 * 32768  # of the -shm: pieces of 4,096 frames, so enough for a -wal of 80 MB

# What SQLite calls a write that was refused, or a file that cannot be made or grown. Of all errnos it tells apart only
# ENOSPC, on a write (unixWrite in os_unix.c): EDQUOT and EROFS come as SQLITE_IOERR_WRITE, a -shm that cannot grow as
# SQLITE_IOERR_SHMSIZE. A failed fsync is not among them: after it nothing else is believed either.
_REFUSED_WRITES = (
    *("SQLITE_IOERR_WRITE", "SQLITE_IOERR_TRUNCATE", "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_SHMOPEN"),
    *("SQLITE_IOERR_SHMMAP", "SQLITE_IOERR_DELETE", "SQLITE_CANTOPEN", "SQLITE_READONLY"),
)
_TROUBLE = ("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH", "SQLITE_PROTOCOL")


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

    It does not checkpoint by itself: SQLite would keep the errors of that to itself.

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
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute(f"PRAGMA journal_size_limit={WAL_KEPT_BYTES}")
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def open_reader(path: Path) -> sa.Engine:
    """An engine for reading only: its connections can neither write nor checkpoint.

    Sorting stays in memory: a full disk must not keep anybody from reading.
    """

    def connect() -> sqlite3.Connection:
        options = "mode=ro&immutable=1" if _lies_still(path) else "mode=ro"
        connection = sqlite3.connect(
            f"file:{_quoted(path)}?{options}", uri=True, isolation_level=None, check_same_thread=False
        )
        connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA query_only=ON")
        connection.execute("PRAGMA temp_store=MEMORY")
        return connection

    return sa.create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_size=4, max_overflow=8)


def allocate_index(path: Path) -> None:
    """Have the -shm's blocks really there, those that it will grow into too; for a process that has the database open.

    SQLite writes one byte into each of its 4 KiB pages and then maps them. Where blocks are smaller, as in an ext4 of
    less than 512 MB, the rest is holes, and touching one on a full disk ends the process by SIGBUS. Done through
    SQLite's own descriptor: closing another one would drop all its locks (fcntl(2)). Without room, nothing is done.
    """
    try:
        index = path.with_name(path.name + "-shm").stat()
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found = os.fstat(int(entry.name))
                if (found.st_dev, found.st_ino) == (index.st_dev, index.st_ino):
                    os.posix_fallocate(int(entry.name), 0, INDEX_BYTES)
                    return
    except OSError:
        return


def _lies_still(path: Path) -> bool:
    """Whether the database can be read without a -shm, as SQLite has to where it cannot make one: it is on a read-only
    file system, and there is no -wal whose content would be passed over.
    """
    try:
        return (
            on_read_only_files(path)
            and not path.with_name(path.name + "-shm").exists()
            and not _has_bytes(path.with_name(path.name + "-wal"))
        )
    except OSError:
        return False


def on_read_only_files(path: Path) -> bool:
    """Whether a file lies on a file system that is mounted read-only (statvfs(3)); not if there is none."""
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def obstacle(path: Path) -> TunledgerError | None:
    """Why the file system would not take a write to the database now, or None. Does not touch the database."""
    if on_read_only_files(path):
        return unwritable(path, OSError(errno.EROFS, os.strerror(errno.EROFS)))
    said = reserve.refusal(path)
    return unwritable(path, said) if said is not None else None


def _has_bytes(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


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
    """Why a file or folder could not be made or written, from what the system said."""
    words = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in reserve.FULL:
        full = "the disk quota is used up" if error.errno == errno.EDQUOT else "no space left on the disk"
        return TunledgerError(ErrorCode.LOG_FULL, f"{path}: {full}; free some, writes then go on", retry=True)
    if error.errno == errno.EROFS:
        return TunledgerError(
            ErrorCode.LOG_UNAVAILABLE,
            f"{path}: the file system is read-only; what is there can be read, and writes go on when it is writable",
            retry=True,
        )
    return TunledgerError(ErrorCode.LOG_UNAVAILABLE, f"{path}: {words}; is the folder there and writable?")


def unreadable(path: Path, error: Exception) -> TunledgerError:
    """What an error of SQLite means, for one who reads or migrates: the log's damage, or trouble that may pass."""
    return refused(path, error) or TunledgerError(
        ErrorCode.LOG_CORRUPT, f"{path} does not read: {getattr(error, 'orig', None) or error}"
    )


def refused(path: Path, error: Exception) -> TunledgerError | None:
    """What an error of SQLite, or of the system, means if it says nothing against the log itself; else None.

    SQLite does not tell the errno, so a write that was refused is asked about once more, of the file system. What that
    takes after all was no full disk: it is a failure, and not to be tried again.
    """
    if isinstance(error, TunledgerError):
        return error
    origin = getattr(error, "orig", None) or error
    if isinstance(origin, OSError):
        return unwritable(path, origin)
    name = errorname(error)
    if name.startswith("SQLITE_FULL"):
        return unwritable(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return TunledgerError(
            ErrorCode.LOG_UNAVAILABLE, f"{path}: another process holds the database locked", retry=True
        )
    if not name.startswith(_TROUBLE) or os.path.isdir(path):  # noqa: PTH112  # which minds no folder that may not be entered
        return None
    if name.startswith(_REFUSED_WRITES):
        said = reserve.refusal(path)
        if said is not None and (said.errno in reserve.FULL or said.errno == errno.EROFS):
            return unwritable(path, said)
    return TunledgerError(ErrorCode.LOG_UNAVAILABLE, f"{path}: {origin} ({name})")


def errorname(error: Exception) -> str:
    """SQLite's name for an error (https://sqlite.org/rescode.html), or the name of its type."""
    origin = getattr(error, "orig", None) or error
    return getattr(origin, "sqlite_errorname", None) or type(origin).__name__


class InstanceLock:
    """One service on a database: an flock on `<database>.lock`, which also says who holds it.

    The kernel lets go of it when the process ends, however it ends (flock(2)). On a read-only file system without such
    a file nothing is held, since nobody can write there; `renew` when that has changed.
    """

    def __init__(self, database: Path, who: dict[str, Any]) -> None:
        self._path = database.with_name(database.name + ".lock")
        self._who = who
        self._fd: int | None = None

    def __enter__(self) -> Self:
        """Take the lock. Raises TunledgerError: already_serving, naming the holder; log_unavailable, log_full."""
        fd = self._open()
        if fd is None:
            return self
        failpoints.reach("store.lock.before")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 4096, 0).decode("utf-8", "replace")
            os.close(fd)
            raise TunledgerError(
                ErrorCode.ALREADY_SERVING, f"{self._path}: this database is in use by {_described(holder)}"
            ) from None
        self._fd = fd
        failpoints.reach("store.lock.taken")
        self._write(json.dumps(self._who).encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            self._write(b"")
            os.close(self._fd)
            self._fd = None

    def renew(self) -> None:
        """Take the lock if it could not be had before. Raises TunledgerError as entering does."""
        if self._fd is None:
            self.__enter__()

    def _open(self) -> int | None:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno == errno.EROFS:
                try:
                    return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError:
                    return None
            if error.errno == errno.EACCES and os.path.exists(self._path):  # noqa: PTH110  # as above
                raise TunledgerError(ErrorCode.LOG_UNAVAILABLE, self._not_ours()) from error
            raise unwritable(self._path, error) from error

    def _not_ours(self) -> str:
        found = self._path.stat()
        return (
            f"{self._path}: belongs to uid {found.st_uid} (mode {found.st_mode & 0o777:o}), and this process is "
            f"uid {os.geteuid()}: another user served or migrated this database; stop that service, then remove the "
            "file or give it (and the database's files beside it) to this user"
        )

    def _write(self, text: bytes) -> None:
        assert self._fd is not None
        try:
            failpoints.reach("store.lock.name", fails=True)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, text, 0)
        except OSError:
            pass  # a full or read-only disk: the lock holds all the same, only its holder goes unnamed


def _described(holder: str) -> str:
    try:
        who = json.loads(holder)
        return f"{who['what']} (pid {who['pid']}, since {who['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
