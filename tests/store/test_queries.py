"""Events by filter: what the database gives is what the pure filter says, in order, a page at a time, by an index."""

import datetime
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.dialects import sqlite as dialect

from service.domain import events as ev
from service.domain.values import Address, InterfaceId
from service.store import codec
from service.store import reader as reading
from service.store.migrate import migrate
from service.store.reader import LogReader, Selection, stamp
from tests.store import lives, strategies
from tests.store.lives import moment
from tests.store.log import NODE, NOW, Log, draft, note, rows, tamper

LENGTH: Final = 1500


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of some hundred interfaces' lives."""
    path = tmp_path_factory.mktemp("lived") / "log.db"
    migrate(path, now=lambda: NOW)
    lives.fill(path, LENGTH, 12)
    return path


@pytest.fixture(scope="module")
def all_events(lived: Path) -> list[ev.Recorded]:
    """All of its events, by the reader that other tests hold to account."""
    reader = LogReader(lived)
    try:
        return list(reader.events())
    finally:
        reader.close()


@pytest.fixture
def reader(lived: Path) -> Iterator[LogReader]:
    """A reader of it."""
    one = LogReader(lived)
    yield one
    one.close()


def test_made_up_logs_are_sound_and_as_the_writer_would_have_written_them(lived: Path, path: Path) -> None:
    one = LogReader(lived)
    found = one.verify()
    assert found.problems == []
    assert found.events == LENGTH
    log = Log(path)
    ours = islice(lives.Lives(12).drafts(), 300)
    log.append(*ours)
    log.close()
    own = "event_id, stream, version, type, schema_version, payload, actor, command_id"
    query = f"SELECT {own} FROM events WHERE position <= 300 ORDER BY position"  # noqa: S608 -- our own words
    assert rows(lived, query) == rows(path, query)
    names = "SELECT * FROM interface_names WHERE position <= 300 ORDER BY position"
    assert rows(lived, names) == rows(path, names)
    one.close()


def _some(chance: random.Random, events: list[ev.Recorded]) -> Selection:
    """Filters taken from an event, so that they seldom find nothing."""
    one = chance.choice(events)
    positions = sorted(chance.randrange(0, LENGTH + 20) for _ in range(2))
    return Selection(
        stream=chance.choice([None, None, None, one.stream]),
        types=tuple({type(one.body).__name__, *chance.sample(list(codec.TYPES), 2)} if chance.random() < 0.5 else ()),
        actor=chance.choice([None, None, one.actor, "nobody"]),
        command_id=chance.choice([None, None, None, None, one.command_id]),
        after=chance.choice([0, positions[0]]),
        before=chance.choice([None, positions[1]]),
        since=chance.choice([None, None, moment(positions[0])]),
        until=chance.choice([None, None, moment(positions[1])]),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("newest_first", [False, True])
def test_any_filter_gives_exactly_what_it_matches_in_order(
    reader: LogReader, all_events: list[ev.Recorded], seed: int, newest_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PAGE", 50)
    chance = random.Random(seed)
    found_some = 0
    for _ in range(40):
        wanted = _some(chance, all_events)
        expected = [event for event in all_events if wanted.matches(event)]
        expected = expected[::-1] if newest_first else expected
        assert list(reader.select(wanted, newest_first=newest_first)) == expected, wanted
        assert reader.page(wanted, limit=7, newest_first=newest_first) == expected[:7], wanted
        found_some += bool(expected)
    assert found_some > 10


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (Selection(after=LENGTH), 0),
        (Selection(after=10, before=11), 0),
        (Selection(after=10, before=12), 1),
        (Selection(before=1), 0),
        (Selection(since=moment(10), until=moment(13)), 3),
        (Selection(since=moment(10), until=moment(10)), 0),
        (Selection(since=moment(LENGTH)), 1),
        (Selection(since=moment(LENGTH + 1)), 0),
        (Selection(until=moment(1)), 0),
        (Selection(until="9999"), LENGTH),
    ],
)
def test_bounds(reader: LogReader, wanted: Selection, count: int) -> None:
    for newest_first in (False, True):
        assert len(list(reader.select(wanted, newest_first=newest_first))) == count


def test_times_are_compared_event_by_event_where_the_clock_was_set_back(path: Path) -> None:
    log = Log(path)
    log.fill(30)
    log.close()
    # Written at 10, 11, ... 19, then set back to 05, and on.
    for position in range(1, 31):
        minute = position + 9 if position <= 10 else position - 6
        tamper(
            path,
            (
                "UPDATE events SET recorded_at = ? WHERE position = ?",
                (f"2026-01-01T00:{minute:02}:00.000000Z", position),
            ),
        )
    one = LogReader(path)
    try:
        everything = list(one.events())
        for first in range(0, 60, 3):
            for last in range(first, 60, 4):
                wanted = Selection(
                    since=f"2026-01-01T00:{first:02}:00.000000Z", until=f"2026-01-01T00:{last:02}:00.000000Z"
                )
                expected = [event for event in everything if wanted.matches(event)]
                assert list(one.select(wanted)) == expected
                assert list(one.select(wanted, newest_first=True)) == expected[::-1]
    finally:
        one.close()


def test_a_time_is_the_position_of_the_last_event_by_then(reader: LogReader) -> None:
    assert reader.position_at(moment(0)) == 0
    assert reader.position_at(moment(1)) == 1
    assert reader.position_at(moment(700)) == 700
    assert reader.position_at(moment(700)[:-2] + "9Z") == 700
    assert reader.position_at("9999-12-31T23:59:59.999999Z") == LENGTH


def test_a_mark_is_an_events_hash_and_time(reader: LogReader, all_events: list[ev.Recorded]) -> None:
    assert reader.mark(700) == (all_events[699].hash, moment(700))
    assert reader.mark(0) == (codec.GENESIS, None)
    assert reader.mark(LENGTH + 1) is None


def test_a_streams_version_before_a_position(reader: LogReader, all_events: list[ev.Recorded]) -> None:
    for event in all_events[::37]:
        assert reader.last_version(event.stream, event.position) == event.version - 1
    assert reader.last_version("interface/none", 100) == 0


def test_what_is_recorded_while_it_is_read_comes_too(log: Log, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAGE", 10)
    log.fill(15)
    one = LogReader(path)
    try:
        found = one.select(Selection())
        first = [next(found).position for _ in range(3)]
        log.fill(15)
        assert first + [event.position for event in found] == list(range(1, 31))
    finally:
        one.close()


def test_no_page_keeps_a_read_transaction_open(log: Log, path: Path) -> None:
    """One that stays open would keep the writer from ever starting its WAL anew."""
    log.fill(10)
    one = LogReader(path)
    found = one.select(Selection())
    next(found)
    try:
        log.fill(10)
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            busy, pages, done = connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        assert (busy, pages) == (0, done)
    finally:
        found.close()  # type: ignore[attr-defined]  # a generator
        one.close()


class _Plans:
    """What SQLite says it would do for a selection."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path)

    def of(self, wanted: Selection, *, newest_first: bool = False) -> list[str]:
        compiled = reading._query(wanted, 100, newest_first).compile(
            dialect=dialect.dialect(), compile_kwargs={"render_postcompile": True}
        )
        names = compiled.positiontup or []
        plan = self._connection.execute(f"EXPLAIN QUERY PLAN {compiled}", [compiled.params[n] for n in names])
        return [step[3] for step in plan]

    def close(self) -> None:
        self._connection.close()


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (Selection(), "INTEGER PRIMARY KEY (rowid>?)"),
        (Selection(after=5, before=9), "INTEGER PRIMARY KEY (rowid>? AND rowid<?)"),
        (Selection(stream="x"), "INDEX events_by_stream (stream=? AND rowid>?)"),
        (Selection(stream="x", types=("DriftDetected",), actor="y"), "INDEX events_by_stream (stream=? AND rowid>?)"),
        (Selection(stream="x", since="2026", until="2027"), "INDEX events_by_stream (stream=? AND rowid>?)"),
        (Selection(command_id="x"), "INDEX events_by_command (command_id=? AND rowid>?)"),
        (Selection(command_id="x", stream="y", actor="z"), "INDEX events_by_command (command_id=? AND rowid>?)"),
        (Selection(types=("DriftDetected", "DriftRepaired")), "INDEX events_by_type (type=? AND rowid>?)"),
        (Selection(actor="x"), "INDEX events_by_actor (actor=? AND type=? AND rowid>?)"),
        (Selection(actor="x", types=("DriftDetected",)), "INDEX events_by_actor (actor=? AND type=? AND rowid>?)"),
        (Selection(types=("DriftDetected",), since="2026"), "INDEX events_by_type (type=? AND rowid>?)"),
    ],
)
@pytest.mark.parametrize("newest_first", [False, True])
def test_every_filter_is_led_by_its_index_and_nothing_is_sorted(
    lived: Path, wanted: Selection, index: str, newest_first: bool
) -> None:
    plans = _Plans(lived)
    try:
        plan = plans.of(wanted, newest_first=newest_first)
    finally:
        plans.close()
    searches = [step for step in plan if step.startswith(("SEARCH events", "SCAN events"))]
    assert any(index in step for step in searches), plan
    assert not any(step.startswith("SCAN events") for step in searches), plan
    if wanted.stream or wanted.command_id or not (wanted.types or wanted.actor):
        assert not any("TEMP B-TREE" in step for step in plan), plan  # else a page of each type is, once merged


def test_a_page_of_a_names_history_is_sorted_by_the_index_alone(lived: Path, reader: LogReader) -> None:
    seen: list[str] = []

    @sa.event.listens_for(reader._engine, "before_cursor_execute")
    def _see(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        seen.append(statement)

    reader.history("tun3", limit=5)
    with closing(sqlite3.connect(lived)) as connection:
        marks = (1,) * seen[-1].count("?")
        plan = [step[3] for step in connection.execute(f"EXPLAIN QUERY PLAN {seen[-1]}", marks)]
    assert any("COVERING INDEX events_by_stream" in step or "COVERING INDEX sqlite_autoindex" in step for step in plan)


# -- the short way of decoding


@given(strategies.events())
def test_the_short_way_of_decoding_gives_what_the_codec_gives(event: ev.Event) -> None:
    name, version, payload = codec.encode(event)
    assert reading._body(name, version, payload) == codec.decode(name, version, payload) == event


@given(st.ip_addresses().map(str) | st.text(max_size=20), st.integers(-1, 200))
def test_addresses_are_read_as_the_codec_reads_them(host: str, length: int) -> None:
    text = f"{host}/{length}"

    def by(hook: Any) -> Any:
        try:
            return hook(Address, text)
        except ValueError:
            return ValueError

    assert by(reading.decode_value) == by(codec._decode_value)


# -- a version that does not follow, where the chain says nothing


def test_a_version_that_does_not_follow_is_found_though_the_chain_is_sound(path: Path) -> None:
    """As somebody writes it who makes the hashes anew."""
    log = Log(path)
    log.fill(3)
    log.close()
    (told,) = rows(
        path,
        "SELECT previous_hash, position, event_id, stream, 77, type, schema_version, actor, command_id, node, "
        "recorded_at, payload FROM events WHERE position = 3",
    )
    chain_hash: Any = codec.chain_hash
    digest = chain_hash(*told)
    tamper(path, ("UPDATE events SET version = 77, hash = ? WHERE position = 3", (digest,)))
    one = LogReader(path)
    try:
        (problem,) = one.verify().problems
    finally:
        one.close()
    assert problem == f"position 3: version 77 of {ev.node_stream(NODE)} follows version 2"


# -- a head that is known from before


def test_a_head_that_is_still_there_is_no_problem(reader: LogReader, all_events: list[ev.Recorded]) -> None:
    for position in (1, 700, LENGTH):
        assert reader.verify(head=(position, all_events[position - 1].hash)).problems == []
    assert reader.verify(head=(0, codec.GENESIS)).problems == []


def test_a_head_that_is_another_one_now_is_told(reader: LogReader) -> None:
    (problem,) = reader.verify(head=(700, "f" * 64)).problems
    assert problem.startswith("position 700: hash ")
    assert "another log, or it was rewritten" in problem


def test_a_head_that_was_cut_off_is_told(path: Path, log: Log) -> None:
    known = log.append(draft(note()), draft(note()))[-1]
    log.close()
    tamper(path, ("DELETE FROM events WHERE position = 2", ()))
    one = LogReader(path)
    try:
        assert one.verify().problems == []
        (problem,) = one.verify(head=(known.position, known.hash)).problems
        assert problem == "position 2: the log ends before this head that is known from before; it was cut off"
    finally:
        one.close()


def test_verifying_pauses_between_pages(reader: LogReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAGE", 100)
    pauses: list[None] = []
    assert reader.verify(pause=lambda: pauses.append(None)).problems == []
    assert len(pauses) == LENGTH // 100


def test_names_are_compared_in_one_moment_while_events_come_in(log: Log, path: Path) -> None:
    """Index and log read one after the other once gave a false alarm."""
    one = LogReader(path)
    try:
        for each in islice(lives.Lives(200).drafts(), 300):
            log.queue(each)
        problems = [list(one.misnamed()) for _ in range(50)]
        log.append(draft(note()))
        assert problems == [[]] * 50
    finally:
        one.close()


def test_stamps_sort_as_the_times_they_are() -> None:
    early = datetime.datetime(9, 1, 1, tzinfo=datetime.UTC)
    assert stamp(early) == "0009-01-01T00:00:00.000000Z"
    there = datetime.datetime(2026, 1, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    assert stamp(there) == "2026-01-01T00:00:00.000000Z"


def test_a_selection_says_what_it_is_bounded_by_once(reader: LogReader) -> None:
    wanted = Selection(since=moment(100), until=moment(200))
    bounded = reader.bounded(wanted)
    assert (bounded.after, bounded.before, bounded.bounded) == (99, 200, True)
    assert reader.bounded(bounded) is bounded
    assert reader.bounded(replace(wanted, after=150, before=160)) == replace(
        wanted, after=150, before=160, bounded=True
    )


def test_ids_of_streams_are_no_patterns(reader: LogReader) -> None:
    for stream in ("interface/%", "interface/", "%", "' OR 1=1 --"):
        assert list(reader.select(Selection(stream=stream))) == []
        assert reader.history(None, limit=5, interface_id=InterfaceId(stream)) == []
