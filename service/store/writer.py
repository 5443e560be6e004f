"""The log's one writer: a thread that takes all that is queued and makes it one transaction and one fsync.

Nothing else writes or checkpoints. It gives out positions, stream versions and hashes; it does not know what events
mean. A request whose expected version does not hold fails alone, before anything is written. When the disk is full
the transaction is refused and the next one tried; after an I/O error nothing more is written, since what the page
cache then holds cannot be trusted (the process has to start again from what is on disk).
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from service import failpoints
from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.values import NodeId
from service.store import codec, schema
from service.store.database import UNREADABLE, open_writer

QUEUE_MAX = 1024  # requests waiting; more are refused as overloaded
BATCH_MAX = 256  # requests in one transaction; bounds how long the first of them waits
VERSIONS_KEPT = 8192  # streams whose version is remembered; others are asked for

# Compiled once from the tables: building and looking up a statement costs Core three times what SQLite needs for it.
_DIALECT = sqlite.dialect()
_INSERT_EVENT = str(schema.events.insert().compile(dialect=_DIALECT))
_LAST_VERSION = str(
    sa.select(sa.func.max(schema.events.c.version))
    .where(schema.events.c.stream == sa.bindparam("stream"))
    .compile(dialect=_DIALECT)
)

Job = Callable[[sa.Connection], None]


@dataclass(slots=True)
class _Append:
    drafts: Sequence[ev.Draft]
    encoded: Sequence[tuple[str, int, str]]
    also: Job | None = None
    done: "Future[list[ev.Recorded]]" = field(default_factory=Future)


@dataclass(slots=True)
class _Run:
    job: Job
    done: "Future[None]" = field(default_factory=Future)


@dataclass(slots=True)
class _Stop:
    pass


class LogWriter:
    """Start it with `start`; `append` and `run` may be called from any thread.

    Args:
        now: UTC time, ISO 8601 with microseconds.
        on_recorded: called in the writer's thread after each commit, in order of position, before the waiting
            callers are told.
        on_broken: called once, in the writer's thread, when the log cannot be written any more.
    """

    def __init__(
        self,
        path: Path,
        node: NodeId,
        *,
        now: Callable[[], str],
        on_recorded: Callable[[list[ev.Recorded]], None],
        on_broken: Callable[[str], None],
    ) -> None:
        self._path, self._node, self._now = path, node, now
        self._on_recorded, self._on_broken = on_recorded, on_broken
        self._queue: queue.Queue[_Append | _Run | _Stop] = queue.Queue(QUEUE_MAX)
        self._thread = threading.Thread(target=self._work, name="log-writer", daemon=True)
        self._versions: OrderedDict[str, int] = OrderedDict()
        self._position, self._head = 0, codec.GENESIS
        self._trouble: str | None = None
        self._broken: str | None = None
        self._closed = False
        self._gate = threading.Lock()  # between `close` and the last request: none may queue behind the stop
        self._engine = open_writer(path)
        self._connection: sa.Connection | None = None

    def start(self) -> None:
        """Open the connection, find the head, start the thread.

        Raises:
            TunledgerError: log_unavailable, log_corrupt.
        """
        try:
            self._connection = self._engine.connect()
            head = self._connection.execute(
                sa.select(schema.events.c.position, schema.events.c.hash).order_by(schema.events.c.position.desc())
            ).first()
            self._connection.rollback()
        except UNREADABLE as error:
            if self._connection is not None:
                self._connection.close()
            raise self._refusal(error) from error
        if head is not None:
            self._position, self._head = head.position, head.hash
        self._thread.start()

    def append(self, drafts: Sequence[ev.Draft], also: Job | None = None) -> "Future[list[ev.Recorded]]":
        """Queue events that belong together; the future tells when they are durable, all of them or none.

        `also` are statements on other tables that stand or fall with the events.

        The future raises TunledgerError: version_conflict, log_full, log_unavailable. Raised at once: overloaded,
        shutting_down, log_unavailable; and internal, for what has no place in the log: it must not fail its batch.
        """
        request = _Append(drafts, [self._encoded(draft) for draft in drafts], also)
        self._submit(request)
        return request.done

    def run(self, job: Job) -> "Future[None]":
        """Queue statements on other tables; they share the transaction of what is queued beside them."""
        request = _Run(job)
        self._submit(request)
        return request.done

    def trouble(self) -> str | None:
        """Why the log cannot be written now, or None when the last write went well."""
        return self._broken or self._trouble

    def close(self) -> None:
        """Write what is queued, then stop."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
        if self._thread.is_alive():
            self._queue.put(_Stop())
            self._thread.join()
        if self._connection is not None:
            self._connection.close()
        self._engine.dispose()

    def _submit(self, request: _Append | _Run) -> None:
        if self._broken is not None:
            raise TunledgerError(ErrorCode.LOG_UNAVAILABLE, f"the log cannot be written: {self._broken}")
        with self._gate:
            if self._closed:
                raise TunledgerError(ErrorCode.SHUTTING_DOWN, "the service is stopping", retry=True)
            try:
                self._queue.put_nowait(request)
            except queue.Full:
                raise TunledgerError(
                    ErrorCode.OVERLOADED, f"{QUEUE_MAX} writes are waiting for the disk; try again", retry=True
                ) from None

    def _work(self) -> None:
        stopping = False
        while not stopping:
            batch = [self._queue.get()]
            while len(batch) < BATCH_MAX:
                try:
                    batch.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            stopping = any(isinstance(request, _Stop) for request in batch)
            self._commit([request for request in batch if not isinstance(request, _Stop)])

    def _commit(self, batch: list[_Append | _Run]) -> None:
        batch = [request for request in batch if request.done.set_running_or_notify_cancel()]
        if not batch:
            return
        if self._broken is not None:
            for request in batch:
                request.done.set_exception(TunledgerError(ErrorCode.LOG_UNAVAILABLE, self._broken))
            return
        assert self._connection is not None
        before = (self._position, self._head)
        accepted: list[tuple[_Append, list[ev.Recorded]]] = []
        jobs: list[_Run] = []
        rows: list[tuple[Any, ...]] = []
        try:
            with self._connection.begin():
                for request in batch:
                    if isinstance(request, _Run):
                        request.job(self._connection)
                        jobs.append(request)
                        continue
                    conflict = self._conflict(request.drafts)
                    if conflict is not None:
                        request.done.set_exception(conflict)
                        continue
                    placed = zip(request.drafts, request.encoded, strict=True)
                    accepted.append((request, [self._place(draft, encoded, rows) for draft, encoded in placed]))
                if rows:
                    self._connection.exec_driver_sql(_INSERT_EVENT, rows)
                    self._index_names(accepted)
                for request, _events in accepted:
                    if request.also is not None:
                        request.also(self._connection)
                failpoints.reach("store.commit.before")
        except Exception as error:  # noqa: BLE001  # every waiting caller must hear of it, whatever it was
            self._position, self._head = before
            self._versions.clear()
            self._fail(batch, error)
            return
        failpoints.reach("store.commit.after")
        self._trouble = None
        flat = [event for _request, events in accepted for event in events]
        if flat:
            self._on_recorded(flat)
        for request, events in accepted:
            request.done.set_result(events)
        for job in jobs:
            job.done.set_result(None)

    def _encoded(self, draft: ev.Draft) -> tuple[str, int, str]:
        for text in (draft.event_id, draft.stream, draft.actor, draft.command_id or "", self._node):
            if "\n" in text:
                raise TunledgerError(ErrorCode.INTERNAL, f"a line break in {text!r} would blur the hash chain")
        try:
            return codec.encode(draft.body)
        except UnicodeEncodeError as error:
            raise TunledgerError(ErrorCode.INTERNAL, f"{draft.stream}: text that is not Unicode: {error}") from error

    def _place(self, draft: ev.Draft, encoded: tuple[str, int, str], rows: list[tuple[Any, ...]]) -> ev.Recorded:
        kind, schema_version, payload = encoded
        position, version = self._position + 1, self._version(draft.stream) + 1
        recorded_at = self._now()
        digest = codec.chain_hash(
            self._head,
            position,
            draft.event_id,
            draft.stream,
            version,
            kind,
            schema_version,
            draft.actor,
            draft.command_id,
            self._node,
            recorded_at,
            payload,
        )
        # In the order of the table's columns.
        rows.append(
            (
                position,
                draft.event_id,
                draft.stream,
                version,
                kind,
                schema_version,
                payload,
                draft.actor,
                draft.command_id,
                self._node,
                recorded_at,
                self._head,
                digest,
            )
        )
        self._position, self._head = position, digest
        self._remember(draft.stream, version)
        return ev.Recorded(
            position=position,
            event_id=draft.event_id,
            stream=draft.stream,
            version=version,
            actor=draft.actor,
            command_id=draft.command_id,
            node=self._node,
            recorded_at=recorded_at,
            hash=digest,
            body=draft.body,
        )

    def _conflict(self, drafts: Sequence[ev.Draft]) -> TunledgerError | None:
        for draft in drafts:
            if draft.expected_version is not None and self._version(draft.stream) != draft.expected_version:
                return TunledgerError(
                    ErrorCode.VERSION_CONFLICT,
                    f"{draft.stream}: expected version {draft.expected_version}, found {self._version(draft.stream)}",
                    retry=True,
                )
        return None

    def _version(self, stream: str) -> int:
        known = self._versions.get(stream)
        if known is None:
            assert self._connection is not None
            known = self._connection.exec_driver_sql(_LAST_VERSION, (stream,)).scalar() or 0
            self._remember(stream, known)
        return known

    def _remember(self, stream: str, version: int) -> None:
        self._versions[stream] = version
        self._versions.move_to_end(stream)
        if len(self._versions) > VERSIONS_KEPT:
            self._versions.popitem(last=False)

    def _index_names(self, accepted: list[tuple[_Append, list[ev.Recorded]]]) -> None:
        assert self._connection is not None
        declared = [
            {"interface_id": event.body.interface_id, "name": event.body.name, "position": event.position}
            for _request, events in accepted
            for event in events
            if isinstance(event.body, ev.InterfaceDeclared)
        ]
        if declared:
            self._connection.execute(schema.interface_names.insert(), declared)

    def _fail(self, batch: list[_Append | _Run], error: Exception) -> None:
        refusal = self._refusal(error)
        waiting = [request for request in batch if not request.done.done()]
        if refusal.retry:
            self._trouble = refusal.message
        else:
            self._broken = refusal.message
            self._on_broken(refusal.message)
        for request in waiting:
            request.done.set_exception(refusal)

    def _refusal(self, error: Exception) -> TunledgerError:
        """What a failed transaction means: full and busy pass, everything else ends writing."""
        if isinstance(error, TunledgerError):
            return error
        origin = getattr(error, "orig", error)
        name = getattr(origin, "sqlite_errorname", None) or type(origin).__name__
        if name.startswith("SQLITE_FULL"):
            return TunledgerError(
                ErrorCode.LOG_FULL, f"{self._path}: no space left on the disk; free some, writes then go on", retry=True
            )
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return TunledgerError(
                ErrorCode.LOG_UNAVAILABLE, f"{self._path}: another process holds the database locked", retry=True
            )
        return TunledgerError(ErrorCode.LOG_UNAVAILABLE, f"{self._path}: {origin} ({name})")
