"""Reading parts of the log: the history of a name over all the interfaces that had it, and single commands."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.spec import InterfaceSpec
from service.domain.values import InterfaceId, InterfaceName
from service.store import reader as reading
from service.store.reader import LogReader
from tests.store.log import NODE, Log, draft, note
from tests.store.samples import REQUEST, SAMPLES


def _live_and_die(log: Log, number: int, name: str) -> list[ev.Recorded]:
    """Four events: one interface, declared and retired."""
    interface, called = InterfaceId(f"id-{number}"), InterfaceName(name)
    stream = ev.interface_stream(interface)
    spec = InterfaceSpec(name=called)
    done = ev.CommandApplied(interface_id=interface, name=called, by="command", took_us=1, steps=[])
    return log.append(
        draft(
            ev.InterfaceDeclared(interface_id=interface, name=called, spec=spec, request=REQUEST),
            stream,
            command_id=f"declare-{number}",
        ),
        draft(done, stream, command_id=f"declare-{number}"),
        draft(
            ev.InterfaceRetired(interface_id=interface, name=called, request=REQUEST),
            stream,
            command_id=f"retire-{number}",
        ),
        draft(done, stream, command_id=f"retire-{number}"),
    )


def _reject(log: Log, name: str) -> list[ev.Recorded]:
    body = ev.CommandRejected(
        name=name, command="DeclareInterface", code="c", message="m", field=None, request=REQUEST, suppressed=0
    )
    return log.append(draft(body, ev.name_stream(name), command_id="rejected"))


def test_a_names_history_is_that_of_all_its_interfaces_and_refusals_newest_first(log: Log, reader: LogReader) -> None:
    expected = []
    for number in range(3):
        expected += _live_and_die(log, number, "tun0")
        _live_and_die(log, 100 + number, "tun1")
        log.append(draft(note()))
        expected += _reject(log, "tun0")
    _reject(log, "tun00")
    _reject(log, "0")
    assert reader.history("tun0", limit=1000) == expected[::-1]
    assert reader.interfaces_named("tun0") == ["id-0", "id-1", "id-2"]


def test_history_has_the_latest_when_there_is_more(log: Log, reader: LogReader) -> None:
    expected = _live_and_die(log, 1, "tun0") + _live_and_die(log, 2, "tun0")
    assert reader.history("tun0", limit=5) == expected[:2:-1]
    assert reader.history(None, limit=3) == log.recorded[:-4:-1]


def test_history_of_a_name_nobody_had_is_empty(log: Log, reader: LogReader) -> None:
    _live_and_die(log, 1, "tun0")
    for name in ("tun1", "", "%", "tun_", "TUN0", "id-1", "' OR 1=1 --"):
        assert reader.history(name, limit=10) == []


def test_history_of_a_name_with_more_interfaces_than_sqlite_has_variables(
    path: Path, log: Log, reader: LogReader
) -> None:
    """A lab that makes and deletes tun0 for every test gets there in a day."""
    last = _live_and_die(log, 1, "tun0")
    with closing(sqlite3.connect(path)) as connection, connection:
        earlier = ((f"earlier-{number}", "tun0", -number) for number in range(500))
        connection.executemany("INSERT INTO interface_names VALUES (?, ?, ?)", earlier)

    @sa.event.listens_for(reader._engine, "connect")
    def _few_variables(connection: sqlite3.Connection, _record: object) -> None:
        connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 100)

    assert reader.history("tun0", limit=10) == last[::-1]


def test_a_command_is_its_intent_and_its_outcome(log: Log, reader: LogReader) -> None:
    recorded = _live_and_die(log, 1, "tun0")
    _live_and_die(log, 2, "tun0")
    assert reader.command("retire-1") == recorded[2:]
    assert reader.command("never-heard-of") == []


def test_events_can_be_read_from_one_position_to_another(log: Log, reader: LogReader) -> None:
    log.fill(10)
    assert [event.position for event in reader.events(after=3, upto=6)] == [4, 5, 6]
    assert list(reader.events(after=10)) == []


def test_a_log_of_several_pages_is_read_whole(log: Log, reader: LogReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAGE", 7)
    log.fill(30)
    assert [event.position for event in reader.events()] == list(range(1, 31))
    assert reader.verify().events == 30


def test_the_head_of_an_empty_log_is_position_zero(reader: LogReader) -> None:
    assert reader.head() == (0, "0" * 64)
    assert reader.verify().problems == []


def test_reading_can_be_given_up_half_way(log: Log, reader: LogReader) -> None:
    log.fill(50)
    for _ in range(30):  # more than there are connections
        next(iter(reader.events()))
    assert reader.head()[0] == 50


def test_which_interfaces_the_log_has_ever_declared(log: Log, reader: LogReader) -> None:
    """Retired and failed ones are among them; one that it only removed as an orphan is not."""

    def identity(number: int) -> InterfaceId:
        return InterfaceId(f"0192f0c0-0000-7000-8000-{number:012x}")

    def record(sample: str, number: int) -> None:
        body: Any = msgspec.structs.replace(SAMPLES[sample], interface_id=identity(number))
        log.append(draft(body, ev.interface_stream(identity(number))))

    for number in range(1, 8):
        record("InterfaceDeclared", number)
    for number in (1, 2):
        record("InterfaceRetired", number)
    record("CommandFailed", 3)
    record("OrphanRemoved", 9)
    everything = [identity(number) for number in range(20)]
    assert reader.declared(everything) == {identity(number) for number in range(1, 8)}
    assert reader.declared([]) == set()
    many = [identity(number) for number in range(1000, 41_000)]  # more than SQLite takes variables
    assert reader.declared([*many, identity(5)]) == {identity(5)}
    assert reader.declared(["'; DROP TABLE events", "\n", ""]) == set()


def test_a_log_whose_node_is_another_one_than_its_events_say_is_refused(path: Path, log: Log) -> None:
    """Renamed, all interfaces of ours would be strangers'."""
    log.close()
    reader = LogReader(path)
    try:
        assert len(reader.node()) == 12, "nothing is in the log yet"
        again = Log(path)
        again.append(draft(SAMPLES["ServiceStopped"]))
        again.close()
        with pytest.raises(TunledgerError, match=f"the log is of node {NODE}, but the database says") as refused:
            reader.node()
        assert refused.value.code is ErrorCode.LOG_CORRUPT
    finally:
        reader.close()
