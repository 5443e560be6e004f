"""The one writer: durable, in order, many at once, and each refusal for itself."""

import queue
import sqlite3
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.store import codec, schema, writer
from service.store.database import open_writer
from service.store.reader import LogReader
from tests.store.conftest import OpenLog
from tests.store.log import DEADLINE_S, NODE, NOW, Log, draft, note, rows
from tests.store.samples import SAMPLES


class _Forgetful(sqlite3.Connection):
    """SQLite on a disk where synchronous cannot be raised, say."""

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        """Let every pragma through but the one for synchronous."""
        return super().execute("SELECT 1" if sql == "PRAGMA synchronous=FULL" else sql, *parameters)


def test_the_writer_has_wal_and_synchronous_full(path: Path, log: Log) -> None:
    assert log.pragma("synchronous") == 2
    assert log.pragma("journal_mode") == "wal"
    assert rows(path, "PRAGMA journal_mode") == [("wal",)], "kept in the file, for every connection"


def test_the_writer_refuses_where_synchronous_full_does_not_take(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.dbapi2.connect

    def forgetful(*arguments: Any, **named: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, factory=_Forgetful, **named)
        connection.execute("PRAGMA synchronous=NORMAL")
        return connection

    monkeypatch.setattr(sqlite3.dbapi2, "connect", forgetful)
    with pytest.raises(TunledgerError, match=r"journal_mode=wal, synchronous=1 instead of wal and 2") as refusal:
        Log(path)
    assert refusal.value.code is ErrorCode.LOG_UNAVAILABLE


def test_the_writer_refuses_where_wal_does_not_take() -> None:
    with pytest.raises(TunledgerError, match=r"journal_mode=memory.*network file system") as refusal:
        open_writer(Path(":memory:")).connect()
    assert refusal.value.code is ErrorCode.LOG_UNAVAILABLE


def test_a_recorded_event_says_what_the_row_says(log: Log, reader: LogReader) -> None:
    for name, body in SAMPLES.items():
        (recorded,) = log.append(draft(body, f"stream/{name}", command_id="command-1", actor="uid:1000"))
        assert recorded.body == body
        assert (recorded.actor, recorded.command_id, recorded.node) == ("uid:1000", "command-1", NODE)
        assert recorded.recorded_at == NOW
    assert list(reader.events()) == log.recorded
    assert reader.head() == (log.recorded[-1].position, log.recorded[-1].hash)


def test_an_acknowledged_event_is_in_the_file_when_its_caller_hears_of_it(path: Path, log: Log) -> None:
    for number in range(20):
        (recorded,) = log.append(draft(note(number)))
        assert rows(path, "SELECT max(position) FROM events") == [(recorded.position,)]


def test_a_new_writer_goes_on_where_the_last_one_ended(open_log: OpenLog, reader: LogReader) -> None:
    for _ in range(3):
        log = open_log()
        log.append(draft(note()), draft(note(), "other"))
        log.close()
    assert [event.position for event in reader.events()] == [1, 2, 3, 4, 5, 6]
    assert [event.version for event in reader.events()] == [1, 1, 2, 2, 3, 3]
    assert reader.verify().problems == []


def test_what_is_queued_at_once_becomes_one_transaction(log: Log) -> None:
    statements = log.statements()
    with log.held():
        futures = [log.queue(draft(note(number))) for number in range(writer.BATCH_MAX - 1)]
    for future in futures:
        future.result(DEADLINE_S)
    assert statements.count("COMMIT") == 2, "one for the job that held the writer, one for all the rest"
    assert len(log.recorded) == len(futures)


def test_a_batch_is_bounded(log: Log) -> None:
    with log.held():
        futures = [log.queue(draft(note(number))) for number in range(writer.BATCH_MAX * 3)]
    for future in futures:
        future.result(DEADLINE_S)
    assert max(map(len, log.batches)) <= writer.BATCH_MAX
    assert len(log.batches) <= 4


def test_a_full_queue_is_overloaded_and_nothing_that_was_taken_is_lost(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Future[list[ev.Recorded]]] = []
    with log.held():
        taken.extend(log.queue(draft(note(number))) for number in range(writer.QUEUE_MAX))
        with pytest.raises(TunledgerError) as refusal:
            log.queue(draft(note()))
    assert refusal.value.code is ErrorCode.OVERLOADED
    assert refusal.value.retry
    assert [future.result(DEADLINE_S)[0].position for future in taken] == list(range(1, writer.QUEUE_MAX + 1))


def test_a_conflict_fails_alone_within_its_batch(log: Log, reader: LogReader) -> None:
    log.append(draft(note(1), "s"), draft(note(2), "s"))
    with log.held():
        good = log.queue(draft(note(3), "s", expected_version=2))
        stale = log.queue(draft(note(4), "s", expected_version=2))
        unknown = log.queue(draft(note(5), "new", expected_version=1))
        other = log.queue(draft(note(6), "new", expected_version=0))
        careless = log.queue(draft(note(7), "s"))
    for future, words in (
        (stale, "s: expected version 2, found 3"),
        (unknown, "new: expected version 1, found 0"),
    ):
        with pytest.raises(TunledgerError, match=words) as refusal:
            future.result(DEADLINE_S)
        assert refusal.value.code is ErrorCode.VERSION_CONFLICT
        assert refusal.value.retry
    positions = [future.result(DEADLINE_S)[0].position for future in (good, other, careless)]
    assert positions == [3, 4, 5]
    assert [event.body for event in reader.events(after=2)] == [note(3), note(6), note(7)]
    assert log.broken == []


def test_a_conflict_takes_all_drafts_of_its_request_along(log: Log) -> None:
    with pytest.raises(TunledgerError):
        log.append(draft(note(1), "a"), draft(note(2), "b", expected_version=7))
    assert log.append(draft(note(3), "a", expected_version=0))[0].position == 1


def test_a_version_is_known_however_long_its_stream_was_not_written(
    open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "VERSIONS_KEPT", 2)
    log = open_log()
    for turn in range(3):
        for stream in "abcd":
            (recorded,) = log.append(draft(note(), stream, expected_version=turn))
            assert recorded.version == turn + 1


def test_eight_threads_leave_no_gap(log: Log, reader: LogReader) -> None:
    results: queue.Queue[list[ev.Recorded]] = queue.Queue()
    threads, each = 8, 100

    def append(stream: str) -> None:
        for number in range(each):
            results.put(log.append(draft(note(number), stream), draft(note(number), "shared")))

    workers = [threading.Thread(target=append, args=(f"own-{n}",)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(DEADLINE_S)
    together = [results.get_nowait() for _ in range(threads * each)]
    assert sorted(e.position for events in together for e in events) == list(range(1, 2 * threads * each + 1))
    assert all(second.position == first.position + 1 for first, second in together), "drafts of a request stay together"
    assert reader.verify().problems == []


def test_on_recorded_hears_everything_once_and_in_order_of_position(log: Log) -> None:
    threads = [threading.Thread(target=lambda: [log.append(draft(note())) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert [event.position for event in log.recorded] == list(range(1, 401))


def test_on_recorded_is_told_before_the_caller(log: Log) -> None:
    future = log.queue(draft(note()))
    heard: list[int] = []
    future.add_done_callback(lambda _: heard.append(len(log.recorded)))
    future.result(DEADLINE_S)
    log.close()
    assert heard == [1]


def test_a_job_shares_the_transaction_of_what_is_queued_beside_it(log: Log) -> None:
    statements = log.statements()
    insert = schema.node.insert().values(id="another", created_at=NOW)

    def job(connection: sa.Connection) -> None:
        connection.execute(insert)

    with log.held():
        done = log.writer.run(job)
        log.queue(draft(note()))
    done.result(DEADLINE_S)
    assert statements.count("COMMIT") == 2, "one for the job that held the writer, one for both of these"
    assert rows(log.path, "SELECT count(*) FROM node") == [(2,)]


def test_declarations_are_indexed_by_name(log: Log) -> None:
    body = SAMPLES["InterfaceDeclared"]
    assert isinstance(body, ev.InterfaceDeclared)
    (recorded,) = log.append(draft(body, ev.interface_stream(body.interface_id), command_id="c"))
    assert rows(log.path, "SELECT * FROM interface_names") == [(body.interface_id, "tun0", recorded.position)]


@pytest.mark.parametrize(
    "bad",
    [
        draft(note(), "name/a\nb"),
        draft(note(), actor="uid:0\n"),
        draft(note(), command_id="\n"),
        draft(ev.ServiceStopped(pid=1, reason="\ud800", interfaces="keep")),
    ],
    ids=["stream", "actor", "command", "lone surrogate"],
)
def test_what_has_no_place_in_the_log_is_refused_alone(log: Log, reader: LogReader, bad: ev.Draft) -> None:
    """Once it broke the whole log: a client only had to send a name with a line break in it."""
    with log.held():
        before = log.queue(draft(note(1)))
        with pytest.raises(TunledgerError) as refusal:
            log.queue(draft(note(2)), bad)
        after = log.queue(draft(note(3)))
    assert refusal.value.code is ErrorCode.INTERNAL
    assert [future.result(DEADLINE_S)[0].position for future in (before, after)] == [1, 2]
    assert log.broken == []
    assert reader.verify().problems == []


def test_a_request_that_was_cancelled_in_time_is_not_written(log: Log) -> None:
    with log.held():
        given_up = log.queue(draft(note(1)))
        kept = log.queue(draft(note(2)))
        assert given_up.cancel()
    kept.result(DEADLINE_S)
    assert [event.body for event in log.recorded] == [note(2)]


def test_closing_writes_what_is_queued_and_refuses_what_comes_after(log: Log, reader: LogReader) -> None:
    with log.held():
        futures = [log.queue(draft(note(number))) for number in range(600)]
        closing = threading.Thread(target=log.close)
        closing.start()
    closing.join(DEADLINE_S)
    assert [future.result(0)[0].position for future in futures] == list(range(1, 601))
    with pytest.raises(TunledgerError) as refusal:
        log.queue(draft(note()))
    assert refusal.value.code is ErrorCode.SHUTTING_DOWN
    log.close()
    assert reader.head()[0] == 600


def test_readers_see_whole_transactions_while_the_writer_writes(log: Log, reader: LogReader) -> None:
    stop = threading.Event()
    problems: list[str] = []

    def read() -> None:
        while not stop.is_set():
            found = reader.verify()
            problems.extend(found.problems)
            if found.events % 2:
                problems.append(f"half a request at {found.events}")

    readers = [threading.Thread(target=read) for _ in range(4)]
    for thread in readers:
        thread.start()
    for number in range(60):
        log.append(draft(note(number)), draft(note(number)))
    stop.set()
    for thread in readers:
        thread.join(DEADLINE_S)
    assert problems == []


def test_only_the_writer_checkpoints(path: Path, log: Log, reader: LogReader) -> None:
    """A reader that is the last to close a WAL database would checkpoint it, if it could."""
    log.append(draft(note()))
    before = path.read_bytes()
    assert reader.head()[0] == 1
    reader.close()
    assert path.read_bytes() == before
    log.close()
    assert path.read_bytes() != before


def test_the_genesis_hash_is_the_first_events_previous_hash(path: Path, log: Log) -> None:
    log.append(draft(note()))
    assert rows(path, "SELECT previous_hash FROM events") == [(codec.GENESIS,)]
