"""Keeps counters: the last raw value of every incarnation, and lifetime totals over time in three resolutions.

Not in the log: folding never scans them, and they are thinned. Written by the log's writer, in its transactions: a
sample is one job, and rolling up and thinning are jobs of their own that take a bounded bite each, so that a command
waits for one of them at most. What rows mean and how they are merged is `service.domain.series`' business.
"""

# ruff: noqa: S608 -- the SQL is put together from this module's own words; Core would cost more than SQLite does

import datetime
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from service import failpoints
from service.domain.counters import Book, Reading, Source
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.series import (
    HOUR_MS,
    NO_CLASSES,
    NONE,
    Classes,
    Figures,
    Point,
    Progress,
    Row,
    Tier,
    bucket_end,
    bucket_start,
    figures_of,
    merge,
    points,
    sample_row,
    spans,
    thin_upto,
)
from service.domain.values import InterfaceId, InterfaceName
from service.store import schema
from service.store.database import UNREADABLE, open_reader, unreadable
from service.store.rows import insert as write_rows
from service.store.writer import Job

BITE_ROWS = 1000  # rows that one job rolls up or thins, if the samples are not larger still: some 10 ms
POINTS_MAX = 5000  # points in one answer
ROWS_MAX = 100_000  # rows read for one answer: a day of samples a second apart
REMEMBERED_MAX = 16_384  # interfaces whose last sample is remembered; others are asked for
LATE_MS = 1000  # a clock that went back by less is taken to stand still; by more, nothing is put before what is there
LOOK_BACK_MS = 6 * HOUR_MS  # for the sample before a range, when rolling up is late
INTEGER_MAX = 2**63 - 1  # SQLite's; 9.2 exabytes, where a total stops
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

Incarnation = tuple[str, ...]  # a row of counter_incarnations, without its id
Totals = tuple[InterfaceId, Figures, Classes]

_RAW = msgspec.json.Decoder(dict[str, int])
_CLASSES = msgspec.json.Decoder(dict[str, tuple[int, int]])
_MISSED = msgspec.json.Decoder(tuple[int, ...])
_encode = msgspec.json.encode

_TABLE = {tier: f"counter_{tier.name.lower()}" for tier in Tier}
_COLUMNS = ", ".join(column.name for column in schema.counter_raw.columns)
_FIRST = 3  # columns before the figures
_LAST = _FIRST + len(NONE)

_INSERT_INCARNATION = "INSERT INTO counter_incarnations (interface_id, source, key, opened_at, sampled_at, raw)"
_OR_UPDATE = (
    "ON CONFLICT (interface_id, source, key) DO UPDATE SET sampled_at = excluded.sampled_at, raw = excluded.raw"
)
# OR REPLACE: a row that is there already must not stop the log's writer.
_INSERT_ROWS = {tier: f"INSERT OR REPLACE INTO {name} ({_COLUMNS})" for tier, name in _TABLE.items()}
# The times in (?1, ?2], found by skipping from each to the next: a step costs one look into the tree.
_TIMES = {
    tier: f"""
        WITH RECURSIVE times(at) AS (
            SELECT min(at) FROM {name} WHERE at > ?1
            UNION ALL
            SELECT (SELECT min(at) FROM {name} WHERE at > times.at) FROM times WHERE times.at < ?2
        )
    """
    for tier, name in _TABLE.items()
}
_MOMENTS = {tier: f"{times} SELECT at FROM times WHERE at <= ?2" for tier, times in _TIMES.items()}
_SERIES = {
    tier: f"""
        {times}
        SELECT {", ".join(f"rows.{column.name}" for column in schema.counter_raw.columns)}
        FROM times CROSS JOIN {_TABLE[tier]} AS rows ON rows.at = times.at AND rows.interface = ?3
        WHERE times.at <= ?2 LIMIT ?4
    """
    for tier, times in _TIMES.items()
}
_LAST_HOUR = f"""
    WITH RECURSIVE times(at) AS (
        SELECT max(at) FROM counter_hours WHERE at <= ?1
        UNION ALL
        SELECT (SELECT max(at) FROM counter_hours WHERE at < times.at) FROM times WHERE times.at >= ?2
    )
    SELECT {", ".join(f"rows.{column.name}" for column in schema.counter_raw.columns)}
    FROM times CROSS JOIN counter_hours AS rows ON rows.at = times.at AND rows.interface = ?3 LIMIT 1
"""
_AT_MOMENT = {
    tier: f"SELECT {_COLUMNS} FROM {name} WHERE at = ? AND interface > ? ORDER BY interface LIMIT ?"
    for tier, name in _TABLE.items()
}
_KEY_AFTER_A_BITE = {
    tier: f"SELECT at, interface FROM {name} WHERE at <= ? ORDER BY at, interface LIMIT 1 OFFSET ?"
    for tier, name in _TABLE.items()
}
_CUT_BITE = {tier: f"DELETE FROM {name} WHERE (at, interface) < (?, ?)" for tier, name in _TABLE.items()}
_CUT = {tier: f"DELETE FROM {name} WHERE at <= ?" for tier, name in _TABLE.items()}


def load(path: Path) -> Book:
    """The totals as they were last stored. Raises TunledgerError: log_corrupt."""
    book, table = Book(), schema.counter_incarnations
    engine = open_reader(path)
    try:
        with engine.connect() as connection:
            for row in connection.execute(sa.select(table).order_by(table.c.id)):
                book.resume(Reading(InterfaceId(row.interface_id), Source(row.source), row.key, _RAW.decode(row.raw)))
    except (*UNREADABLE, msgspec.MsgspecError, ValueError) as error:  # or a row that says nothing
        raise unreadable(path, error) from error
    finally:
        engine.dispose()
    return book


@dataclass(frozen=True, slots=True)
class Sample:
    """The job that writes one sample. Several that come together are written as one: a delete brings one each."""

    kind: Callable[[sa.Connection, Sequence[Incarnation], Sequence[Totals], str], None]
    incarnations: Sequence[Incarnation]
    figures: Sequence[Totals]
    now: str

    def joined(self, samples: "Sequence[Sample]") -> "Sample":
        """All of these, at the time of the last."""
        incarnations = [each for sample in samples for each in sample.incarnations]
        figures = {each[0]: each for sample in samples for each in sample.figures}
        return Sample(self.kind, incarnations, list(figures.values()), self.now)

    def __call__(self, connection: sa.Connection) -> None:
        """Write it."""
        self.kind(connection, self.incarnations, self.figures, self.now)


class CounterKeeper:
    """Makes the jobs that write counters. One for a database; its jobs run in the writer's thread, in order.

    It remembers the last sample of every interface. A transaction that fails takes the memory with it: the number of
    samples written, kept in the database, tells whether both still belong together.

    Args:
        interval_s: the sampling interval, which decides what is a gap.
        raw_s, minutes_s, hours_s: how long each tier is kept, to the next hour; a coarser one as long as a finer one,
            at least.
    """

    def __init__(
        self,
        *,
        interval_s: float = 10.0,
        raw_s: float = 86_400.0,
        minutes_s: float = 14 * 86_400.0,
        hours_s: float = 400 * 86_400.0,
    ) -> None:
        self._interval_ms = round(interval_s * 1000)
        self._raw_ms = round(raw_s * 1000)
        self._minutes_ms = max(round(minutes_s * 1000), self._raw_ms)
        self._hours_ms = max(round(hours_s * 1000), self._minutes_ms)
        self._sequence: int | None = None
        self._last: dict[InterfaceId, Row] = {}
        self._numbers: dict[InterfaceId, int] = {}
        self._went_back = False
        self._sampled = 0  # rows of the largest sample since the last bites

    def store(
        self,
        readings: Sequence[Reading],
        totals: Mapping[InterfaceId, Mapping[str, Mapping[str, int]]],
        now: str,
    ) -> Job:
        """The job that writes one sample: incarnations and lifetime totals.

        Args:
            totals: by interface, source and name, as a book has them after `readings`.
            now: UTC, ISO 8601.
        """
        incarnations = [(r.interface_id, r.source.value, r.key, now, now, _encode(r.raw).decode()) for r in readings]
        figures = [(interface_id, *figures_of(each)) for interface_id, each in totals.items()]
        return Sample(self._store, incarnations, figures, now)

    def tend(self, now: str) -> tuple[Job, ...]:
        """The jobs that roll up and thin, a bite each; to be run after every sample, each by itself.

        A bite is half as many rows again as a sample, or `BITE_ROWS` if that is more, so that they keep up.
        """
        at = milliseconds(now)
        return (
            partial(self._roll_up, Tier.RAW, Tier.MINUTES, at),
            partial(self._roll_up, Tier.MINUTES, Tier.HOURS, at),
            partial(self._thin, at),
        )

    # -- samples

    def _store(
        self,
        connection: sa.Connection,
        incarnations: Sequence[Incarnation],
        figures: Sequence[Totals],
        now: str,
    ) -> None:
        failpoints.reach("store.sample.before", fails=True)
        progress = connection.exec_driver_sql("SELECT sequence, last_at, minutes_at FROM counter_progress").one()
        if progress.sequence != self._sequence:  # the first one, or what was remembered was not written
            self._last.clear()
            self._numbers.clear()
        behind = max(progress.last_at, progress.minutes_at) - milliseconds(now)
        late = behind >= LATE_MS
        rows = [] if late else self._rows(figures, milliseconds(now) + max(0, behind + 1), connection, back=behind > 0)
        write_rows(connection, _INSERT_INCARNATION, incarnations, _OR_UPDATE)
        if late:
            self._went_back = True
            return
        write_rows(connection, _INSERT_ROWS[Tier.RAW], rows)
        self._sampled, self._went_back = max(self._sampled, len(rows)), False
        self._sequence = progress.sequence + 1
        connection.exec_driver_sql(
            "UPDATE counter_progress SET sequence = ?, last_at = ?",
            (self._sequence, rows[0][0] if rows else progress.last_at),
        )
        failpoints.reach("store.sample.after", fails=True)

    def _rows(
        self,
        figures: Sequence[tuple[InterfaceId, Figures, Classes]],
        at: int,
        connection: sa.Connection,
        *,
        back: bool,
    ) -> list[tuple[Any, ...]]:
        rows = []
        whole = back or self._went_back
        if len(self._last) > max(REMEMBERED_MAX, 2 * len(figures)):  # more than these: others are retired by now
            self._last.clear()
            self._numbers.clear()
        self._recall([interface_id for interface_id, _now, _classes in figures], at, connection)
        for interface_id, now, classes in figures:
            previous = self._last.get(interface_id)
            row = sample_row(previous, at, now, classes, interval_ms=self._interval_ms, whole=whole)
            rows.append(_values(row, self._numbers[interface_id]))
            self._last[interface_id] = row if not classes else Row(at, at, now, classes=classes)
        return rows

    def _recall(self, interfaces: Sequence[InterfaceId], at: int, connection: sa.Connection) -> None:
        """Ask for what is not remembered of these interfaces, and give numbers to those that have none."""
        unknown = [each for each in interfaces if each not in self._last]
        self._last |= _stored(connection, unknown)
        unknown = [each for each in interfaces if each not in self._numbers]
        self._numbers |= _numbers(connection, unknown)
        new = [(each, at) for each in unknown if each not in self._numbers]
        write_rows(connection, "INSERT INTO counter_interfaces (interface_id, first_at)", new)
        self._numbers |= _numbers(connection, [each for each, _at in new])

    # -- bites

    @property
    def _bite(self) -> int:
        return max(BITE_ROWS, self._sampled + self._sampled // 2)

    def _roll_up(self, source: Tier, target: Tier, now: int, connection: sa.Connection) -> None:
        """Take the next rows over into the coarser tier: whole buckets, or some interfaces of one."""
        failpoints.reach(f"store.roll_up.{target.name.lower()}", fails=True)
        name = target.name.lower()
        found = connection.exec_driver_sql(
            f"SELECT {name}_at, {name}_interface, minutes_at FROM counter_progress"
        ).one()
        done, after, width = found[0], found[1], target.value
        # A later sample is never at or before `now`; and hours take whole minutes.
        complete = bucket_start(now - 1 if source is Tier.RAW else min(now - 1, found.minutes_at), width)
        left = self._bite
        while left > 0 and done < complete:
            first = connection.exec_driver_sql(
                f"SELECT min(at) FROM {_TABLE[source]} WHERE at > ?",
                (done,),
            ).scalar()
            end = complete if first is None else min(bucket_end(first, width), complete)
            taken, after = self._take_bucket(connection, source, target, end, after, left)
            left -= taken
            if not after:
                done = end
        if (done, after) != (found[0], found[1]):
            connection.exec_driver_sql(
                f"UPDATE counter_progress SET {name}_at = ?, {name}_interface = ?",
                (done, after),
            )

    @staticmethod
    def _take_bucket(
        connection: sa.Connection, source: Tier, target: Tier, end: int, after: int, most: int
    ) -> tuple[int, int]:
        """Merge rows of the bucket at `end` from the interface after `after` on.

        Returns how many rows were read, and the last interface that was taken over, 0 if that was all.
        """
        moments = connection.exec_driver_sql(_MOMENTS[source], (end - target.value, end)).scalars().all()
        each = max(1, most // max(1, len(moments)))
        read, whole_upto = 0, None
        by_interface: defaultdict[int, list[Row]] = defaultdict(list)
        for moment in moments:
            rows = connection.exec_driver_sql(_AT_MOMENT[source], (moment, after, each)).all()
            read += len(rows)
            for values in rows:
                by_interface[values[1]].append(_row(values))
            if len(rows) == each:
                whole_upto = rows[-1][1] if whole_upto is None else min(whole_upto, rows[-1][1])
        merged = [
            _values(merge(rows, end), number)
            for number, rows in sorted(by_interface.items())
            if whole_upto is None or number <= whole_upto
        ]
        write_rows(connection, _INSERT_ROWS[target], merged)
        return max(1, read), whole_upto or 0

    def _thin(self, now: int, connection: sa.Connection) -> None:
        """Cut off a bite of what is too old; samples and minutes only once they are taken over."""
        failpoints.reach("store.thin.before", fails=True)
        found = connection.exec_driver_sql(
            "SELECT minutes_at, hours_at, raw_thinned, minutes_thinned FROM counter_progress"
        ).one()
        raw = max(found.raw_thinned, thin_upto(now, self._raw_ms, found.minutes_at))
        minutes = max(found.minutes_thinned, thin_upto(now, self._minutes_ms, found.hours_at))
        if (raw, minutes) != (found.raw_thinned, found.minutes_thinned):  # readers look elsewhere from now on
            connection.exec_driver_sql(
                "UPDATE counter_progress SET raw_thinned = ?, minutes_thinned = ?", (raw, minutes)
            )
        cuts = {Tier.RAW: raw, Tier.MINUTES: minutes, Tier.HOURS: thin_upto(now, self._hours_ms, now)}
        for tier, upto in cuts.items():
            key = connection.exec_driver_sql(_KEY_AFTER_A_BITE[tier], (upto, self._bite)).first()
            if key is None:
                connection.exec_driver_sql(_CUT[tier], (upto,))
            else:
                connection.exec_driver_sql(_CUT_BITE[tier], tuple(key))
        self._sampled = 0
        failpoints.reach("store.thin.after", fails=True)


@dataclass(frozen=True, slots=True)
class Present:
    """Lifetime totals by source and name, as last stored, and when that was (UTC, ISO 8601)."""

    sampled_at: str
    totals: Mapping[str, Mapping[str, int]]


class CounterReader:
    """Reads counters, of retired interfaces too; may be used from several threads. Blocking.

    Every method raises TunledgerError: log_corrupt.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine = open_reader(path)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def name_of(self, interface_id: str) -> InterfaceName | None:
        """The name that an interface has or had; None if there never was one with this id."""
        names = schema.interface_names.c
        with self._snapshot() as connection:
            found = connection.execute(sa.select(names.name).where(names.interface_id == interface_id)).scalar()
        return InterfaceName(found) if found is not None else None

    def present(self, interface_id: InterfaceId) -> Present | None:
        """The last totals; None if it was never sampled."""
        with self._snapshot() as connection:
            found = _totals(connection, [interface_id]).get(interface_id)
        return None if found is None else Present(found[1], found[0])

    def series(self, interface_id: InterfaceId, after: int, upto: int, step_ms: int | None) -> list[Point]:
        """Points with `after` < at <= `upto`, oldest first: one for each step that has a sample, or for each sample.

        Args:
            after, upto: ms since the epoch.
            step_ms: width of a bucket; buckets end at its multiples, and only whole ones are shown.

        Raises:
            TunledgerError: invalid_field, naming `step`, for more than `POINTS_MAX` points.
        """
        if step_ms is not None:
            after, upto = bucket_start(after, step_ms), bucket_start(upto, step_ms)
            if (upto - after) // step_ms > POINTS_MAX:
                raise _too_many()
        with self._snapshot() as connection:
            known = connection.exec_driver_sql(
                "SELECT number, first_at FROM counter_interfaces WHERE interface_id = ?", (interface_id,)
            ).first()
            if known is None or upto <= after:
                return []
            row = connection.exec_driver_sql(
                "SELECT minutes_at, hours_at, raw_thinned, minutes_thinned FROM counter_progress"
            ).one()
            progress = Progress(*row)
            # From an hour's start on, so that all classes are found, and the last sample before the range.
            hour = bucket_start(after - 1, HOUR_MS)
            lead = min(hour, max(progress.hours_at, hour - LOOK_BACK_MS))
            rows: list[Row] = []
            for span in spans(lead, upto, step_ms, progress):
                limits = (span.after, span.upto, known.number, ROWS_MAX + 1 - len(rows))
                rows += map(_row, connection.exec_driver_sql(_SERIES[span.tier], limits))
                if len(rows) > ROWS_MAX:
                    raise _too_many()
            before = [row for row in rows if row.at <= after]
            previous = merge(before, before[-1].at) if before else None
            if previous is None and known.first_at <= lead:
                found = connection.exec_driver_sql(_LAST_HOUR, (lead, known.first_at, known.number)).first()
                previous = _row(found) if found is not None else None
        shown = list(points(previous, rows[len(before) :], step_ms))
        if len(shown) > POINTS_MAX:
            raise _too_many()
        return shown

    @contextmanager
    def _snapshot(self) -> Iterator[sa.Connection]:
        """One state of the database for several questions: rows move from tier to tier."""
        try:
            with self._engine.connect() as connection:
                connection.exec_driver_sql("BEGIN")
                try:
                    yield connection
                finally:
                    connection.exec_driver_sql("ROLLBACK")
        except (*UNREADABLE, msgspec.MsgspecError) as error:
            raise unreadable(self._path, error) from error


def milliseconds(stamp: str) -> int:
    """A UTC time, ISO 8601, as ms since the epoch. Exact: no binary fractions on the way."""
    return (datetime.datetime.fromisoformat(stamp) - EPOCH) // datetime.timedelta(milliseconds=1)


def stamp_of(at: int) -> str:
    """Milliseconds since the epoch as a UTC time, ISO 8601."""
    moment = EPOCH + datetime.timedelta(milliseconds=at)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at % 1000:03}Z"


def _too_many() -> TunledgerError:
    return TunledgerError(
        ErrorCode.INVALID_FIELD, f"step: too fine for this range; at most {POINTS_MAX:,} points are shown", field="step"
    )


def _totals(
    connection: sa.Connection, interfaces: Sequence[InterfaceId]
) -> dict[InterfaceId, tuple[dict[str, dict[str, int]], str]]:
    """The sums over the incarnations of interfaces by source and name, and when each was last sampled, where it was.

    A row that says nothing raises ValueError (msgspec's are that too).
    """
    found: dict[InterfaceId, tuple[dict[str, dict[str, int]], str]] = {}
    for interface_id, source, at, raw in _of_each(
        connection, "SELECT interface_id, source, sampled_at, raw FROM counter_incarnations", interfaces
    ):
        totals, sampled_at = found.get(interface_id) or ({source.value: {} for source in Source}, "")
        found[interface_id] = totals, max(sampled_at, at)
        figures = totals[source]
        for name, value in _RAW.decode(raw).items():
            figures[name] = figures.get(name, 0) + value
    return found


def _stored(connection: sa.Connection, interfaces: Sequence[InterfaceId]) -> dict[InterfaceId, Row]:
    """The last samples of interfaces from their incarnations. Without classes: the next rows then have all of them."""
    found: dict[InterfaceId, Row] = {}
    try:
        for interface_id, (totals, sampled_at) in _totals(connection, interfaces).items():
            at = milliseconds(sampled_at)
            found[interface_id] = Row(at, at, figures_of(totals)[0])
    except (msgspec.MsgspecError, ValueError):
        if len(interfaces) == 1:
            return {}  # a row that says nothing: `load` tells of it; the log's writer must not stop for it
        for each in interfaces:
            found |= _stored(connection, [each])
    return found


def _numbers(connection: sa.Connection, interfaces: Sequence[InterfaceId]) -> dict[InterfaceId, int]:
    """The numbers of those interfaces that have one."""
    query = "SELECT interface_id, number FROM counter_interfaces"
    return {InterfaceId(each): number for each, number in _of_each(connection, query, interfaces)}


def _of_each(connection: sa.Connection, query: str, interfaces: Sequence[InterfaceId]) -> Sequence[Any]:
    """What a query has of some interfaces."""
    if not interfaces:
        return []
    asked = f"{query} WHERE interface_id IN (SELECT value FROM json_each(?))"
    return connection.exec_driver_sql(asked, (_encode(interfaces).decode(),)).all()


def _values(row: Row, number: int) -> tuple[Any, ...]:
    """A row in the order of the table's columns."""
    figures = row.figures if max(row.figures) <= INTEGER_MAX else tuple(min(f, INTEGER_MAX) for f in row.figures)
    missed = _encode(row.missed).decode() if row.missed is not None else None
    classes = _encode(row.classes).decode() if row.classes else None
    return (row.at, number, row.at - row.sampled_at, *figures, row.gap_ms, missed, classes)


def _row(values: Sequence[Any]) -> Row:
    """A row out of the table's columns."""
    gap_ms, missed, classes = values[_LAST:]
    return Row(
        values[0],
        values[0] - values[2],
        tuple(values[_FIRST:_LAST]),
        gap_ms,
        _MISSED.decode(missed) if missed is not None else None,
        _CLASSES.decode(classes) if classes is not None else NO_CLASSES,
    )
