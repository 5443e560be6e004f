"""Reads the log: all of it for folding, parts of it for history, and every byte of it for verification.

Rows are taken as the tuples that sqlite3 makes: SQLAlchemy's rows with names cost as much again as reading them. What
the events mean is folded elsewhere (`service.domain.state`); where folding may begin, `service.store.snapshots` says.
"""

import datetime
import hashlib
import ipaddress
import socket
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.state import State, evolve
from service.domain.values import Address, InterfaceId, NodeId
from service.store import codec, schema
from service.store.database import UNREADABLE, node_id, open_reader, unreadable

PAGE = 500  # rows fetched at a time; half a megabyte
PROBLEMS_MAX = 20  # a broken chain is told by its first breaks; the rest follows from them
VERSIONS_KEPT = 65_536  # streams whose version a walk remembers if it can ask for the others

Row = tuple[Any, ...]  # of `events`, in the order of its columns

_events = schema.events.c
_UNREADABLE = (*UNREADABLE, sqlite3.DatabaseError)  # the latter where sqlite3 is used without SQLAlchemy around it


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which events; what is not given does not matter.

    Attributes:
        types: any of these.
        after, before: positions, both exclusive.
        since, until: recorded at or after, and before; UTC, in the form of `recorded_at`.
        bounded: whether `after` and `before` lie around the times already (see `LogReader.bounded`).
    """

    stream: str | None = None
    types: tuple[str, ...] = ()
    actor: str | None = None
    command_id: str | None = None
    after: int = 0
    before: int | None = None
    since: str | None = None
    until: str | None = None
    bounded: bool = False

    def matches(self, event: ev.Recorded) -> bool:
        """Whether an event is among them: the same answer as the database gives."""
        return (
            (self.stream is None or event.stream == self.stream)
            and (not self.types or type(event.body).__name__ in self.types)
            and (self.actor is None or event.actor == self.actor)
            and (self.command_id is None or event.command_id == self.command_id)
            and event.position > self.after
            and (self.before is None or event.position < self.before)
            and (self.since is None or event.recorded_at >= self.since)
            and (self.until is None or event.recorded_at < self.until)
        )


def stamp(moment: datetime.datetime) -> str:
    """A time in the form of `recorded_at`."""
    # Not strftime, which writes the year 9 with one digit.
    return moment.astimezone(datetime.UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


@dataclass(slots=True)
class Verification:
    """What reading the whole log found. Sound if there are no problems."""

    events: int = 0
    head_position: int = 0
    head_hash: str = codec.GENESIS
    problems: list[str] = field(default_factory=list)
    state: State = field(default_factory=State)


class LogReader:
    """Read-only access; may be used from several threads. Every method raises TunledgerError: log_corrupt."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine = open_reader(path)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def node(self) -> NodeId:
        """The id of the node whose log this is: as the database has it, and as its last event has it."""
        try:
            found = node_id(self._engine)
        except UNREADABLE as error:
            raise unreadable(self._path, error) from error
        for (last,) in self.tuples(sa.select(_events.node).order_by(_events.position.desc()).limit(1)):
            if last != found:
                raise TunledgerError(
                    ErrorCode.LOG_CORRUPT, f"{self._path}: the log is of node {last}, but the database says {found}"
                )
        return found

    def events(self, *, after: int = 0, upto: int | None = None) -> Iterator[ev.Recorded]:
        """Events in order of position."""
        for row in self.rows(after=after, upto=upto):
            yield _recorded(row)

    def rows(self, *, after: int | None = None, upto: int | None = None) -> Iterator[Row]:
        """The same as they are stored. One read transaction from the first row to the last: do not take long."""
        for rows in self.batches(after=after, upto=upto):
            yield from rows

    def batches(self, *, after: int | None = None, upto: int | None = None) -> Iterator[Sequence[Row]]:
        """Rows of events, a page at a time. Without `after`, whatever is before position 1 comes too."""
        query = sa.select(schema.events).order_by(_events.position)
        if after is not None:
            query = query.where(_events.position > after)
        if upto is not None:
            query = query.where(_events.position <= upto)
        return self._batches(query)

    def page(self, wanted: Selection, *, limit: int, newest_first: bool = False) -> list[ev.Recorded]:
        """Up to `limit` of the wanted events; go on with `after` (or `before`) the position of the last one."""
        return [_recorded(row) for row in self.tuples(_query(self.bounded(wanted), limit, newest_first))]

    def select(self, wanted: Selection, *, newest_first: bool = False) -> Iterator[ev.Recorded]:
        """All wanted events, a page in memory at a time.

        Each page is a read transaction of its own, so that a slow taker keeps no checkpoint waiting; events that are
        recorded meanwhile are among them, if they are wanted.
        """
        following = self.bounded(wanted)
        while True:
            found = self.page(following, limit=PAGE, newest_first=newest_first)
            yield from found
            if len(found) < PAGE:
                return
            last = found[-1].position
            following = replace(following, before=last) if newest_first else replace(following, after=last)

    def bounded(self, wanted: Selection) -> Selection:
        """The selection with the positions between which its times lie: work to be done once for all its pages.

        The clock may have been set back, so events are not in the order of their times: the bounds are those of all
        that match, and the times are still compared. Read from the index alone, 0.1 s for a million events.
        """
        if wanted.bounded or (wanted.since is None and wanted.until is None):
            return wanted
        during = []
        if wanted.since is not None:
            during.append(_events.recorded_at >= wanted.since)
        if wanted.until is not None:
            during.append(_events.recorded_at < wanted.until)
        after, before = wanted.after, wanted.before
        if wanted.since is not None:
            ((first,),) = self.tuples(sa.select(sa.func.min(_events.position)).where(*during))
            # None of that time yet: then only what is recorded from now on can be.
            after = max(after, first - 1 if first is not None else self.head()[0])
        if wanted.until is not None:
            ((last,),) = self.tuples(sa.select(sa.func.max(_events.position)).where(*during))
            end = last + 1 if last is not None else 1
            before = end if before is None else min(before, end)
        return replace(wanted, after=after, before=before, bounded=True)

    def position_at(self, moment: str) -> int:
        """The position of the last event recorded by a time (in the form of `recorded_at`); 0 if there is none.

        Last by position: where the clock was once set back, what came after that counts, whatever the time then said.
        So a later moment never gives an earlier position, and the present is the head.
        """
        query = (
            sa.select(_events.position)
            .where(_events.recorded_at <= moment)
            .order_by(_events.recorded_at.desc(), _events.position.desc())
            .limit(1)
        )
        found = next((int(row[0]) for row in self.tuples(query)), 0)
        # Later ones that say they are older, by whichever way is the shorter: over what follows, or over what is older.
        if found > self.head()[0] // 2:
            both = (_unindexed(_events.recorded_at) <= moment, _events.position > found)
        else:
            both = (_events.recorded_at <= moment, _unindexed(_events.position) > found)
        later = sa.select(sa.func.max(_events.position)).where(*both)
        return max(found, *(int(row[0] or 0) for row in self.tuples(later)))

    def mark(self, position: int) -> tuple[str, str | None] | None:
        """Hash and time of the event at a position, None if the log has no such event. Position 0 is before all."""
        if position == 0:
            return codec.GENESIS, None
        query = sa.select(_events.hash, _events.recorded_at).where(_events.position == position)
        return next(((row[0], row[1]) for row in self.tuples(query)), None)

    def last_version(self, stream: str, before: int) -> int:
        """The version that a stream had reached before a position; 0 if it had not begun."""
        query = (
            sa.select(_events.version)
            .where(_events.stream == stream, _events.position < before)
            .order_by(_events.position.desc())
            .limit(1)
        )
        return next((row[0] for row in self.tuples(query)), 0)

    def head(self) -> tuple[int, str]:
        """Position and hash of the last event."""
        query = sa.select(_events.position, _events.hash).order_by(_events.position.desc()).limit(1)
        return next(((row[0], row[1]) for row in self.tuples(query)), (0, codec.GENESIS))

    def interfaces_named(self, name: str) -> list[InterfaceId]:
        """The ids of all interfaces that ever had a name, oldest first."""
        names = schema.interface_names.c
        query = sa.select(names.interface_id).where(names.name == name).order_by(names.position)
        return [InterfaceId(row[0]) for row in self.tuples(query)]

    def declared(self, ids: Collection[str]) -> set[InterfaceId]:
        """Which of these ids the log has ever declared, whatever became of them since.

        An interface is in the log before it is on the host. One on the host with our token that is not among them
        shows that the log lost its end, or is an older copy.
        """
        found: set[InterfaceId] = set()
        wanted = list(ids)
        for start in range(0, len(wanted), PAGE):
            streams = [ev.interface_stream(InterfaceId(each)) for each in wanted[start : start + PAGE]]
            # By the events themselves: the index of names is derived from them. A stream begins with its declaration.
            query = sa.select(_events.stream).where(
                _events.stream.in_(streams), _events.version == 1, _unindexed(_events.type) == "InterfaceDeclared"
            )
            prefix = len(ev.interface_stream(InterfaceId("")))
            found.update(InterfaceId(row[0][prefix:]) for row in self.tuples(query))
        return found

    def history(
        self, name: str | None, *, limit: int, interface_id: str | None = None, before: int | None = None
    ) -> list[ev.Recorded]:
        """The latest events before a position, newest first: about a name with all interfaces that ever had it,
        about one interface, or about everything.
        """
        found = sa.select(_events.position).order_by(_events.position.desc()).limit(limit)
        if before is not None:
            found = found.where(_events.position < before)
        if interface_id is not None:
            found = found.where(_events.stream == ev.interface_stream(InterfaceId(interface_id)))
        elif name is not None:
            # A query in the query: a list of ids would grow beyond the variables SQLite takes.
            names = schema.interface_names.c
            streams = sa.select(sa.literal(ev.interface_stream(InterfaceId(""))) + names.interface_id)
            refused = sa.select(sa.literal(ev.name_stream(name)))
            found = found.where(_events.stream.in_(streams.where(names.name == name).union_all(refused)))
        # Sorted by position from the index alone; only what is on the page is then read from the table.
        query = sa.select(schema.events).where(_events.position.in_(found)).order_by(_events.position.desc())
        return [_recorded(row) for row in self.tuples(query)]

    def command(self, command_id: str) -> list[ev.Recorded]:
        """The events of one command: its intent and, once there is one, its outcome."""
        query = sa.select(schema.events).where(_events.command_id == command_id).order_by(_events.position)
        return [_recorded(row) for row in self.tuples(query)]

    def verify(
        self,
        *,
        upto: int | None = None,
        head: tuple[int, str] | None = None,
        pause: Callable[[], None] | None = None,
    ) -> Verification:
        """Read every event; check positions, versions, chain and sense; and fold what is sound.

        Problems are collected, not raised: up to 20, the first ones telling most.

        Args:
            head: position and hash of an event as known from before, which must still be there.
            pause: called between pages, for a caller that others share the processor with.
        """
        found = Verification()
        walk = Walk(lambda event: evolve(found.state, event))
        try:
            for rows in self.batches(upto=upto):
                walk.take(rows)
                if walk.broken:
                    break
                if pause is not None:
                    pause()
            if not walk.broken:
                if upto is None:
                    walk.problems += self.misnamed()
                if head is not None:
                    walk.problems += self._gone(*head)
        except TunledgerError as error:
            walk.problems.append(error.message)
        found.events, found.head_position, found.head_hash = walk.events, walk.position, walk.head
        found.problems = walk.problems
        return found

    def misnamed(self, *, after: int | None = None, upto: int | None = None) -> Iterator[str]:
        """Differences between the index of names and the declarations that it is made from.

        Args:
            after, upto: look at this stretch of the log only.
        """
        names = schema.interface_names.c
        index = sa.select(names.interface_id, names.position, names.name)
        stream = sa.func.substr(_events.stream, len(ev.interface_stream(InterfaceId(""))) + 1).label("interface_id")
        name = sa.func.json_extract(_events.payload, "$.name").label("name")
        query = sa.select(stream, _events.position, name).where(_events.type == "InterfaceDeclared")
        if after is not None:
            index, query = index.where(names.position > after), query.where(_events.position > after)
        if upto is not None:
            index, query = index.where(names.position <= upto), query.where(_events.position <= upto)
        # In one statement, which sees one moment of the log: events may be coming in.
        differing = sa.union_all(
            sa.select(sa.except_(index, query).subquery()), sa.select(sa.except_(query, index).subquery())
        )
        found = {(position, interface_id) for interface_id, position, _ in self.tuples(differing)}
        for position, interface_id in sorted(found, key=str):  # a damaged page can hold anything in any column
            yield f"position {position}: the index of names and the log disagree on interface {interface_id}"

    def tuples(self, query: sa.Select[Any] | sa.CompoundSelect[Any]) -> Iterator[Row]:
        """The rows of a query as plain tuples. Raises TunledgerError: log_corrupt."""
        for rows in self._batches(query):
            yield from rows

    def _batches(self, query: sa.Select[Any] | sa.CompoundSelect[Any]) -> Iterator[Sequence[Row]]:
        try:
            with self._engine.connect() as connection, connection.execute(query) as result:
                cursor = result.cursor
                assert cursor is not None
                while rows := cursor.fetchmany(PAGE):
                    yield rows
        except _UNREADABLE as error:
            raise unreadable(self._path, error) from error

    def _gone(self, position: int, known: str) -> Iterator[str]:
        """What is wrong with a head that is known from before."""
        found = self.mark(position)
        if found is None:
            yield f"position {position}: the log ends before this head that is known from before; it was cut off"
        elif found[0] != known:
            yield (
                f"position {position}: hash {str(found[0])[:12]}, but the head known from before is {known[:12]}: "
                "this is another log, or it was rewritten"
            )


def _query(wanted: Selection, limit: int, newest_first: bool) -> sa.Select[Any]:
    """One page. Which index leads is decided here, since SQLite would guess: the narrowest that is asked for."""
    order = _events.position.desc() if newest_first else _events.position.asc()

    def bounded(query: sa.Select[Any]) -> sa.Select[Any]:
        query = query.where(_events.position > wanted.after)
        if wanted.before is not None:
            query = query.where(_events.position < wanted.before)
        if wanted.since is not None:
            query = query.where(_unindexed(_events.recorded_at) >= wanted.since)
        if wanted.until is not None:
            query = query.where(_unindexed(_events.recorded_at) < wanted.until)
        return query.order_by(order).limit(limit)

    if wanted.stream is not None or wanted.command_id is not None or (wanted.actor is None and not wanted.types):
        query = sa.select(schema.events)
        if wanted.command_id is not None:
            query = query.where(_events.command_id == wanted.command_id)
        if wanted.stream is not None:
            stream = _events.stream if wanted.command_id is None else _unindexed(_events.stream)
            query = query.where(stream == wanted.stream)
        if wanted.actor is not None:
            query = query.where(_unindexed(_events.actor) == wanted.actor)
        if wanted.types:
            query = query.where(_unindexed(_events.type).in_(wanted.types))
        return bounded(query)
    # A page of each type from its index, and of those the first: with one IN, SQLite would sort all there are.
    arms = []
    for kind in dict.fromkeys(wanted.types or codec.TYPES):
        arm = sa.select(_events.position)
        if wanted.actor is not None:
            arm = arm.where(_events.actor == wanted.actor, _events.type == kind)
        else:
            arm = arm.where(_events.type == kind)
        arms.append(sa.select(bounded(arm).subquery().c.position))
    merged = sa.union_all(*arms).subquery()
    first = sa.select(merged.c.position)
    first = first.order_by(merged.c.position.desc() if newest_first else merged.c.position.asc()).limit(limit)
    return sa.select(schema.events).where(_events.position.in_(first)).order_by(order)


def _unindexed(column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """The column for comparing only: SQLite leads no query by an index on `+column` (its query planner, section 6)."""
    return sa.sql.elements.UnaryExpression(column, operator=sa.sql.operators.custom_op("+"), type_=column.type)


def decode_value(kind: type, value: object) -> object:
    """msgspec's hook for what the log holds, as the codec's: an IPv4 address in a third of the time."""
    if kind is Address and isinstance(value, str):
        host, _, length = value.partition("/")
        try:
            return Address(ipaddress.IPv4Address(socket.inet_pton(socket.AF_INET, host)), int(length))
        except OSError:
            return Address(ipaddress.ip_address(host), int(length))
    raise TypeError(f"cannot make {kind.__name__} from {value!r}")


# Payloads of today's versions, that is nearly all; what they cannot read is the codec's to read or refuse.
_SHORT: Final = {
    (name, version): msgspec.json.Decoder(kind, dec_hook=decode_value).decode
    for name, (version, kind) in codec.TYPES.items()
}


def _body(kind: Any, schema_version: Any, payload: Any) -> ev.Event:
    try:
        return _SHORT[kind, schema_version](payload)
    except (KeyError, ValueError, TypeError, msgspec.MsgspecError):
        return codec.decode(kind, schema_version, payload)


def _recorded(row: Row) -> ev.Recorded:
    """A row of `events` as the event it holds. Raises TunledgerError: log_corrupt."""
    (
        position,
        event_id,
        stream,
        version,
        kind,
        schema_version,
        payload,
        actor,
        command_id,
        node,
        recorded_at,
        _previous_hash,
        digest,
    ) = row
    return ev.Recorded(
        position=position,
        event_id=event_id,
        stream=stream,
        version=version,
        actor=actor,
        command_id=command_id,
        node=node,
        recorded_at=recorded_at,
        hash=digest,
        body=_body(kind, schema_version, payload),
    )


class Walk:
    """Goes through the log in order, checks every event and folds it. Rows come from outside: no I/O in here.

    Args:
        fold: takes an event in; raises TunledgerError if it cannot follow.
        position, head: behind which event it begins.
        last_version: tells a stream's version before a position. Needed where it does not begin at the beginning.

    Attributes:
        problems: what was found, in words; up to 20 of them, then one that says there are more.
        broken: whether it is pointless to go on.
    """

    def __init__(
        self,
        fold: Callable[[ev.Recorded], None],
        *,
        position: int = 0,
        head: str = codec.GENESIS,
        last_version: Callable[[str, int], int] | None = None,
    ) -> None:
        self.events, self.position, self.head = 0, position, head
        self.problems: list[str] = []
        self._fold: Callable[[ev.Recorded], None] | None = fold
        self._last_version = last_version
        self._versions: dict[str, int] = {}

    @property
    def broken(self) -> bool:
        """Whether there are so many problems that more say nothing."""
        return len(self.problems) > PROBLEMS_MAX

    def take(self, rows: Sequence[Row]) -> None:
        """Check the next events, as they are stored."""
        sha256, versions = hashlib.sha256, self._versions
        if self._last_version is not None and len(versions) > VERSIONS_KEPT:
            versions.clear()
        for row in rows:
            # The codec's `chain_hash` written out, and nothing else in the way: this is what start-up waits for.
            (
                position,
                event_id,
                stream,
                version,
                kind,
                schema_version,
                payload,
                actor,
                command_id,
                node,
                recorded_at,
                previous,
                digest,
            ) = row
            known = versions.get(stream)
            if known is None:
                known = 0 if self._last_version is None else self._last_version(stream, position)
            text = (
                f"{previous}\n{position}\n{event_id}\n{stream}\n{version}\n{kind}\n{schema_version}\n{actor}\n"
                f"{command_id or ''}\n{node}\n{recorded_at}\n{payload}"
            )
            problems: list[str] = []
            if (
                position != self.position + 1
                or previous != self.head
                or version != known + 1
                or command_id == ""
                or digest != sha256(text.encode()).hexdigest()
            ):
                problems += self._told(row, known)
            self.events += 1
            self.position, self.head = position, str(digest)
            if isinstance(version, int):  # a damaged page can hold anything in any column
                versions[stream] = version
            if self._fold is not None:
                try:
                    self._fold(
                        ev.Recorded(
                            position=position,
                            event_id=event_id,
                            stream=stream,
                            version=version,
                            actor=actor,
                            command_id=command_id,
                            node=node,
                            recorded_at=recorded_at,
                            hash=digest,
                            body=_body(kind, schema_version, payload),
                        )
                    )
                except TunledgerError as error:
                    self._fold = None
                    problems.append(error.message)
            if problems:
                self.problems += problems
                if len(self.problems) >= PROBLEMS_MAX:
                    self.problems.append("more problems follow; these are the first")
                    return

    def _told(self, row: Row, known: int) -> Iterator[str]:
        """What is wrong with an event, in words."""
        (
            position,
            event_id,
            stream,
            version,
            kind,
            schema_version,
            payload,
            actor,
            command_id,
            node,
            recorded_at,
            previous,
            digest,
        ) = row
        where = f"position {position}"
        if position != self.position + 1:
            yield f"{where}: follows position {self.position}; events are missing"
        if previous != self.head:
            yield f"{where}: names {str(previous)[:12]} as the hash before it, which is {self.head[:12]}"
        if version != known + 1:
            yield f"{where}: version {version} of {stream} follows version {known}"
        if command_id == "":  # hashes like none at all, and the writer never writes it
            yield f"{where}: {kind} has an empty command id; it was changed after it was written"
        expected = codec.chain_hash(
            previous,
            position,
            event_id,
            stream,
            version,
            kind,
            schema_version,
            actor,
            command_id,
            node,
            recorded_at,
            payload,
        )
        if digest != expected:
            said = str(digest)[:12]
            yield f"{where}: {kind} was changed after it was written (hash {said}, content {expected[:12]})"


def corrupt(verification: Verification) -> TunledgerError:
    """The refusal that a failed verification stands for."""
    return TunledgerError(ErrorCode.LOG_CORRUPT, "the log does not verify: " + "; ".join(verification.problems[:3]))
