"""The log's one writer: a thread that takes all that is queued and makes it one transaction and one fsync.

Nothing else writes or checkpoints. It gives out positions, stream versions and hashes; it does not know what events
mean. A request whose expected version does not hold, or whose job makes a mistake, fails alone.

A full disk refuses writes and nothing else. What tells of work that is done on the host, and what makes that less, goes
on a reserve (`service.store.reserve`); the rest is refused at once, without touching the disk, until all of the reserve
can be had again, which is tried every second. After an I/O error nothing more is written, since what the page cache
then holds cannot be trusted (the process has to start again from what is on disk).

The -wal is neither grown beforehand nor cut after each checkpoint: it keeps the size it had between two checkpoints,
and overwriting it needs no room. Should a reader hold checkpoints up for so long that the -shm has to grow as well, on
a full disk, then SQLite finds that out when the commit is in the -wal already: see `_after`.
"""

import contextlib
import queue
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec
import sqlalchemy as sa

from service import failpoints
from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.values import NodeId
from service.store import codec, headfile, reserve, rows, schema
from service.store.database import UNREADABLE, allocate_index, errorname, open_writer, refused, unreadable, unwritable
from service.store.headfile import HeadFile

QUEUE_MAX = 1024  # requests waiting; more are refused as overloaded
BATCH_MAX = 256  # requests in one transaction; bounds how long the first of them waits
VERSIONS_KEPT = 8192  # streams whose version is remembered; others are asked for
PROBE_S = 1.0  # from one look whether a full disk has room again to the next
FRAME_BYTES = 24 + 4096
CHECKPOINT_FRAMES = 1000  # pages in the -wal, 4 MB: as many as SQLite itself would let come together
# On a full disk, so that the -wal need not grow; and more of them after a checkpoint that somebody who reads cut short.
AGAIN_FRAMES = 250
# Pages that a commit writes, estimated; a checkpoint then says how many there are. Measured: 10 to 12 for one event,
# 106 for 255 of them.
COMMIT_FRAMES, EVENTS_A_FRAME, JOB_FRAMES = 10, 3, 4

# As text: building and looking up a statement costs Core three times what SQLite needs for it.
_INSERT_EVENT = f"INSERT INTO events ({', '.join(schema.events.columns.keys())})"
_INSERT_NAME = f"INSERT INTO interface_names ({', '.join(schema.interface_names.columns.keys())})"
_LAST_VERSIONS = (
    "SELECT stream, max(version) FROM events WHERE stream IN (SELECT value FROM json_each(?)) GROUP BY stream"
)

Job = Callable[[sa.Connection], None]


@runtime_checkable
class Joinable(Protocol):
    """A job that can be done together with others of its kind in a transaction."""

    @property
    def kind(self) -> object:
        """Equal to that of those it can be joined with."""
        ...

    def joined(self, jobs: "Sequence[Any]") -> Job:
        """One job that does what these do, of which it is the last."""
        ...

    def __call__(self, connection: sa.Connection) -> None:
        """Do it alone."""
        ...


# What may be written on the reserve. First what tells of work that was done on the host, each once for something that
# had room before; then the orders that make what is on the host less, which leave a part of it to the former.
_DONE = (
    *(ev.CommandApplied, ev.CommandFailed, ev.DriftRepaired, ev.RepairFailed, ev.OrphanRemoved),
    *(ev.DriftEnded, ev.InterfaceContested, ev.ContestEnded),
    *(ev.CaptureStopped, ev.StartupReconciled, ev.ServiceStopped),
)
_LESS = (ev.InterfaceRetired, ev.ChangeConfirmed)
TAKE_BACK = "take_back"  # the call of the request that undoes a change nobody confirmed

# Failures of a commit that may be in the -wal all the same: its frames were written, and what came after failed.
_MAYBE_WRITTEN = ("SQLITE_IOERR_FSYNC", "SQLITE_IOERR_DIR_FSYNC", "SQLITE_IOERR_SHM")


class Claim(IntEnum):
    """How far into the reserve a request may go."""

    NONE = 0
    LESS = 1
    DONE = 2


def claim_of(drafts: Sequence[ev.Draft]) -> Claim:
    """What events that belong together may use: as much as the least of them."""
    return min((_claim(draft.body) for draft in drafts), default=Claim.NONE)


def _claim(body: ev.Event) -> Claim:
    if isinstance(body, _DONE):
        return Claim.DONE
    request = getattr(body, "request", None)
    if isinstance(body, _LESS) or (isinstance(body, ev.Intent) and request is not None and request.call == TAKE_BACK):
        return Claim.LESS
    return Claim.NONE


@dataclass(slots=True)
class _Append:
    drafts: Sequence[ev.Draft]
    encoded: Sequence[tuple[str, int, str]]
    also: Job | None = None
    claim: Claim = Claim.NONE
    done: "Future[list[ev.Recorded]]" = field(default_factory=Future)


@dataclass(slots=True)
class _Run:
    job: Job
    claim: Claim = Claim.NONE
    done: "Future[None]" = field(default_factory=Future)


@dataclass(slots=True)
class _Stop:
    pass


@dataclass(slots=True)
class _Placed:
    """A batch as it went into one transaction."""

    accepted: list[tuple[_Append, list[ev.Recorded]]] = field(default_factory=list)
    jobs: list[_Run] = field(default_factory=list)
    conflicts: list[tuple[_Append, TunledgerError]] = field(default_factory=list)
    rows: list[tuple[Any, ...]] = field(default_factory=list)


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
        self._queue: queue.SimpleQueue[_Append | _Run | _Stop] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="log-writer", daemon=True)
        self._versions: OrderedDict[str, int] = OrderedDict()
        self._position, self._head = 0, codec.GENESIS
        self._trouble: str | None = None
        self._broken: str | None = None
        self._full: TunledgerError | None = None
        self._probed = 0.0
        self._reserve = reserve.Reserve(path)
        self._headfile = HeadFile(path)
        self._frames = 0
        self._checkpoint_at = CHECKPOINT_FRAMES
        self._committing = False
        self._closed = False
        # Between `close` and the last request: none may queue behind the stop. And between all that put: it is bounded.
        self._gate = threading.Lock()
        self._engine = open_writer(path)
        self._connection: sa.Connection | None = None

    def start(self) -> None:
        """Open the connection, find the head, start the thread.

        Raises:
            TunledgerError: log_unavailable, log_full, log_corrupt.
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
            raise unreadable(self._path, error) from error
        if head is not None:
            self._position, self._head = head.position, head.hash
        known = headfile.read(self._path)
        if known is not None and known[0] > self._position:
            self._connection.close()
            raise TunledgerError(ErrorCode.LOG_CORRUPT, headfile.cut_off(self._path, known[0], self._position))
        allocate_index(self._path)
        self._frames = self._frames_there()
        self._probe()
        self._thread.start()

    def append(self, drafts: Sequence[ev.Draft], also: Job | None = None) -> "Future[list[ev.Recorded]]":
        """Queue events that belong together; the future tells when they are durable, all of them or none.

        `also` are statements on other tables that stand or fall with the events.

        The future raises TunledgerError: version_conflict, log_full, log_unavailable, outcome_unknown (the commit
        failed, and may be found in the log all the same by the next start), internal (a mistake in `also`). Raised at
        once: overloaded, shutting_down, log_unavailable; and internal, for what has no place in the log.
        """
        request = _Append(drafts, [self._encoded(draft) for draft in drafts], also, claim_of(drafts))
        self._submit(request)
        return request.done

    def run(self, job: Job) -> "Future[None]":
        """Queue statements on other tables; they share the transaction of what is queued beside them.

        They may run more than once, the transactions before being rolled back, and never go on the reserve.
        """
        request = _Run(job)
        self._submit(request)
        return request.done

    def trouble(self) -> str | None:
        """Why the log cannot be written now, or None when the last write went well."""
        full = self._full
        return self._broken or (full.message if full is not None else self._trouble)

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
        self._headfile.close()

    def _submit(self, request: _Append | _Run) -> None:
        if self._broken is not None:
            raise TunledgerError(ErrorCode.LOG_UNAVAILABLE, f"the log cannot be written: {self._broken}")
        with self._gate:
            if self._closed:
                raise TunledgerError(ErrorCode.SHUTTING_DOWN, "the service is stopping", retry=True)
            if self._queue.qsize() >= QUEUE_MAX:
                raise TunledgerError(
                    ErrorCode.OVERLOADED, f"{QUEUE_MAX} writes are waiting for the disk; try again", retry=True
                )
            self._queue.put(request)

    def _work(self) -> None:
        stopping = False
        while not stopping:
            try:
                batch = [self._queue.get(timeout=PROBE_S if self._full is not None else None)]
            except queue.Empty:
                self._probe()
                continue
            while len(batch) < BATCH_MAX:
                try:
                    batch.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            stopping = any(isinstance(request, _Stop) for request in batch)
            self._commit([request for request in batch if not isinstance(request, _Stop)])

    def _commit(self, batch: list[_Append | _Run]) -> None:
        """Write what can be written of a batch; every caller hears what became of its own."""
        batch = [request for request in batch if request.done.set_running_or_notify_cancel()]
        if self._full is not None and time.monotonic() - self._probed >= PROBE_S:
            self._probe()
        if self._full is not None:
            batch = self._turned_away(batch, self._full)
        self._write_out(batch)

    def _write_out(self, batch: list[_Append | _Run]) -> None:
        while batch:
            if self._broken is not None:
                _tell(batch, TunledgerError(ErrorCode.LOG_UNAVAILABLE, f"the log cannot be written: {self._broken}"))
                return
            try:
                placed = self._write(batch)
            except Exception as error:  # noqa: BLE001  # every waiting caller must hear of it, whatever it was
                batch = self._after(batch, error)
            else:
                self._told(placed)
                return

    def _write(self, batch: Sequence[_Append | _Run]) -> _Placed:
        """One transaction. Raises whatever went wrong; nothing was changed then, here or on the disk."""
        assert self._connection is not None
        before = (self._position, self._head)
        placed = _Placed()
        try:
            with self._connection.begin():
                self._place_all(batch, placed)
                failpoints.reach("store.commit.before", fails=True)
                self._committing = True
        except BaseException:
            self._position, self._head = before
            self._versions.clear()
            if self._driver().in_transaction:
                self._break([], TunledgerError(ErrorCode.LOG_UNAVAILABLE, f"{self._path}: it could not be rolled back"))
            raise
        self._committing = False
        failpoints.reach("store.commit.after")
        return placed

    def _place_all(self, batch: Sequence[_Append | _Run], placed: _Placed) -> None:
        assert self._connection is not None
        self._look_up(draft.stream for request in batch if isinstance(request, _Append) for draft in request.drafts)
        for request in batch:
            if isinstance(request, _Run):
                request.job(self._connection)
                placed.jobs.append(request)
                continue
            conflict = self._conflict(request.drafts)
            if conflict is not None:
                placed.conflicts.append((request, conflict))
                continue
            drafts = zip(request.drafts, request.encoded, strict=True)
            placed.accepted.append((request, [self._place(draft, encoded, placed.rows) for draft, encoded in drafts]))
        if placed.rows:
            rows.insert(self._connection, _INSERT_EVENT, placed.rows)
            self._index_names(placed.accepted)
        for job in _joined([request.also for request, _events in placed.accepted if request.also is not None]):
            job(self._connection)

    def _told(self, placed: _Placed) -> None:
        """The transaction is durable: say so to everybody, then see to the -wal."""
        self._trouble = None
        flat = [event for _request, events in placed.accepted for event in events]
        if flat:
            self._headfile.write(self._position, self._head)
            self._on_recorded(flat)
        for refused_one, conflict in placed.conflicts:
            refused_one.done.set_exception(conflict)
        for request, events in placed.accepted:
            request.done.set_result(events)
        for job in placed.jobs:
            job.done.set_result(None)
        others = len(placed.jobs) + sum(request.also is not None for request, _events in placed.accepted)
        self._frames += COMMIT_FRAMES + len(flat) // EVENTS_A_FRAME + others * JOB_FRAMES
        if self._frames >= self._checkpoint_at:
            self._checkpoint()

    # -- trouble

    def _after(self, batch: list[_Append | _Run], error: Exception) -> list[_Append | _Run]:
        """A transaction of this batch failed: tell those for whom that is the end of it; the others are tried again."""
        name, committing, self._committing = errorname(error), self._committing, False
        written = committing and name.startswith(_MAYBE_WRITTEN)
        if self._broken is not None:
            _tell(batch, TunledgerError(ErrorCode.LOG_UNAVAILABLE, f"the log cannot be written: {self._broken}"))
            return []
        if written and "FSYNC" not in name and self._reserve.release():
            # The -shm could not grow. The frames are in the -wal with their commit, and a crash now would bring to
            # light what nobody was promised. The next transaction takes their place, so make it the same one again.
            return batch
        fault = refused(self._path, error)
        if written:
            fault = TunledgerError(
                ErrorCode.OUTCOME_UNKNOWN,
                f"{self._path}: {getattr(error, 'orig', error)} ({name}); the next start tells whether it was written",
                retry=True,
            )
            self._break(batch, fault)
        elif fault is not None and fault.code is ErrorCode.LOG_FULL:
            return self._make_room(batch, fault)
        elif fault is not None and fault.retry:
            self._trouble = fault.message
            _tell(batch, fault)
        elif fault is None and not _of_the_log(name):
            return self._one_by_one(batch, error)
        else:
            if fault is None:
                code = ErrorCode.LOG_CORRUPT if _is_damage(name) else ErrorCode.LOG_UNAVAILABLE
                fault = TunledgerError(code, f"{self._path}: {getattr(error, 'orig', error)} ({name})")
            self._break(batch, fault)
        return []

    def _make_room(self, batch: list[_Append | _Run], fault: TunledgerError) -> list[_Append | _Run]:
        """The disk is full: refuse what has to wait; for what has not, give back a slice of the reserve."""
        self._full = fault
        batch = self._turned_away(batch, fault)
        for claim in (Claim.LESS, Claim.DONE):
            entitled = [request for request in batch if request.claim >= claim]
            if entitled and self._reserve.release(down_to=_down_to(claim)):
                _tell([request for request in batch if request.claim < claim], fault)
                self._checkpoint()
                return entitled
        _tell(batch, fault)
        if self._probe():  # for less than this there is room
            self._trouble = fault.message
        return []

    def _turned_away(self, batch: list[_Append | _Run], fault: TunledgerError) -> list[_Append | _Run]:
        """Those of a batch that may be written on a full disk; the others are told."""
        let_in = Claim.LESS if self._reserve.left > reserve.OUTCOMES_BYTES else Claim.DONE
        _tell([request for request in batch if request.claim < let_in], fault)
        return [request for request in batch if request.claim >= let_in]

    def _probe(self) -> bool:
        """Whether the disk has room for the whole reserve, and a margin. Where there can be no reserve, do without."""
        error = self._reserve.fill()
        self._probed = time.monotonic()
        full = error is not None and error.errno in reserve.FULL
        self._full = unwritable(self._path, error) if error is not None and full else None
        if full:
            self._checkpoint_at = min(self._checkpoint_at, self._frames + AGAIN_FRAMES)
        return not full

    def _one_by_one(self, batch: list[_Append | _Run], error: Exception) -> list[_Append | _Run]:
        """Somebody's job made a mistake, which is for him alone."""
        if len(batch) > 1:
            for request in batch:
                self._write_out([request])
        else:
            _tell(batch, TunledgerError(ErrorCode.INTERNAL, f"it cannot be written: {error!r}"))
        return []

    def _break(self, batch: Sequence[_Append | _Run], fault: TunledgerError) -> None:
        """Nothing more is written from now on."""
        self._broken = fault.message
        self._on_broken(fault.message)
        _tell(batch, fault)

    # -- the -wal

    def _checkpoint(self) -> None:
        """Take over into the database what the -wal has, as far as readers let it."""
        failpoints.reach("store.checkpoint.before")
        try:
            (_busy, frames, taken) = self._driver().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error as error:
            fault = refused(self._path, error)
            if fault is not None and fault.code is ErrorCode.LOG_FULL:
                self._probe()
            elif fault is None or not fault.retry:
                self._break([], fault or TunledgerError(ErrorCode.LOG_CORRUPT, f"{self._path}: {error}"))
            self._checkpoint_at = self._frames + AGAIN_FRAMES
            return
        failpoints.reach("store.checkpoint.after")
        if taken >= frames:  # the next commit begins at the beginning of the -wal
            self._frames = 0
            self._checkpoint_at = CHECKPOINT_FRAMES if self._full is None else AGAIN_FRAMES
        else:
            self._frames = frames
            self._checkpoint_at = max(CHECKPOINT_FRAMES, frames + AGAIN_FRAMES)

    def _frames_there(self) -> int:
        """How many pages the -wal may hold as it was found."""
        with contextlib.suppress(OSError):
            return self._path.with_name(self._path.name + "-wal").stat().st_size // FRAME_BYTES
        return 0

    def _driver(self) -> sqlite3.Connection:
        assert self._connection is not None
        driver = self._connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        return driver

    # -- a batch

    def _encoded(self, draft: ev.Draft) -> tuple[str, int, str]:
        for text in (draft.event_id, draft.stream, draft.actor, draft.command_id or "", self._node):
            if "\n" in text:
                raise TunledgerError(ErrorCode.INTERNAL, f"a line break in {text!r} would blur the hash chain")
        try:
            return codec.encode(draft.body)
        except UnicodeEncodeError as error:
            raise TunledgerError(ErrorCode.INTERNAL, f"{draft.stream}: text that is not Unicode: {error}") from error

    def _place(self, draft: ev.Draft, encoded: tuple[str, int, str], placed: list[tuple[Any, ...]]) -> ev.Recorded:
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
        placed.append(
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
        if stream not in self._versions:
            self._look_up([stream])
        return self._versions[stream]

    def _look_up(self, streams: Iterable[str]) -> None:
        """Remember the versions of streams, in one question for all that are not known."""
        unknown = {stream: 0 for stream in streams if stream not in self._versions}
        if not unknown:
            return
        assert self._connection is not None
        asked = msgspec.json.encode(list(unknown)).decode()
        unknown.update((row[0], row[1]) for row in self._connection.exec_driver_sql(_LAST_VERSIONS, (asked,)))
        for stream, version in unknown.items():
            self._remember(stream, version)

    def _remember(self, stream: str, version: int) -> None:
        self._versions[stream] = version
        self._versions.move_to_end(stream)
        if len(self._versions) > VERSIONS_KEPT:
            self._versions.popitem(last=False)

    def _index_names(self, accepted: list[tuple[_Append, list[ev.Recorded]]]) -> None:
        assert self._connection is not None
        declared = [
            (event.body.interface_id, event.body.name, event.position)
            for _request, events in accepted
            for event in events
            if isinstance(event.body, ev.InterfaceDeclared)
        ]
        rows.insert(self._connection, _INSERT_NAME, declared)


def _joined(jobs: Sequence[Job]) -> list[Job]:
    """The same jobs, with those that can be done as one in the place of the last of them."""
    alike = [job for job in jobs if isinstance(job, Joinable)]
    if len(alike) < 2:
        return list(jobs)
    kinds: dict[object, list[Joinable]] = {}
    for each in alike:
        kinds.setdefault(each.kind, []).append(each)
    found: list[Job] = []
    for job in reversed(jobs):
        if not isinstance(job, Joinable):
            found.append(job)
        elif (others := kinds.pop(job.kind, None)) is not None:
            found.append(job.joined(others))
    return found[::-1]


def _down_to(claim: Claim) -> int:
    return 0 if claim is Claim.DONE else reserve.OUTCOMES_BYTES


def _tell(batch: Sequence[_Append | _Run], fault: TunledgerError) -> None:
    for request in batch:
        request.done.set_exception(fault)


def _of_the_log(name: str) -> bool:
    """Whether an error says that the log is not what it should be: that it is damaged, or that others write to it."""
    return name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_CONSTRAINT_TRIGGER", "UnicodeDecodeError"))


def _is_damage(name: str) -> bool:
    """Whether an error says that the file is damaged."""
    return name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))
