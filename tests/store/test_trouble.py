"""The disk is full, the disk fails, somebody else holds the lock: refused in words, and nothing half done."""

import errno
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.domain.errors import ErrorCode, TunledgerError
from service.store import database, reserve
from service.store.migrate import migrate
from service.store.reader import LogReader
from tests.store.conftest import OpenLog
from tests.store.log import DEADLINE_S, NOW, Log, draft, note

REPOSITORY = Path(__file__).parents[2]


def _bring_into_trouble(kind: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.store.disk_trouble", kind, str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    if "skip" in told:
        pytest.skip(f"missing: {told['skip']}")
    return told


def test_a_full_disk_refuses_writes_serves_reads_and_heals(tmp_path: Path) -> None:
    told = _bring_into_trouble("full", tmp_path)
    assert told["trouble_before"] is None
    assert told["ballast"] == "No space left on device"
    for refusal in (told["refusal"], told["again"]):
        assert refusal["code"] == "log_full"
        assert refusal["retry"] is True
        assert "no space left on the disk; free some" in refusal["message"]
    assert told["trouble"] == told["again"]["message"]
    assert told["reading"] == {"events": told["acknowledged"], "problems": []}, "what was refused left no trace"
    assert told["healed"] == {"code": None}
    assert told["trouble_after"] is None
    assert told["broken"] == []
    assert told["acknowledged_after"] == told["acknowledged"] + 2
    assert told["reading_after"] == {"events": told["acknowledged_after"], "problems": []}


def test_the_instance_lock_can_be_taken_on_a_full_disk(tmp_path: Path) -> None:
    assert _bring_into_trouble("full", tmp_path)["lock"] == {"code": None}


def test_after_a_write_error_nothing_more_is_written(tmp_path: Path) -> None:
    told = _bring_into_trouble("failing", tmp_path)
    for refusal in (*told["waiting"], *told["later"], told["job"]):
        assert refusal["code"] == "log_unavailable"
        assert refusal["retry"] is False
        assert "SQLITE_IOERR" in refusal["message"]
    assert len(told["broken"]) == 1, "told once"
    assert told["trouble"] == told["broken"][0]
    assert told["reading"] == {"events": told["acknowledged"], "problems": []}


def test_a_new_process_goes_on_from_what_is_on_the_disk_after_a_write_error(tmp_path: Path) -> None:
    told = _bring_into_trouble("failing", tmp_path)
    assert told["restarted"] == {"code": None}
    assert told["reading_after"] == {"events": told["acknowledged"] + 1, "problems": []}


def _append_until_refused(log: Log) -> None:
    for _ in range(1000):
        log.append(draft(note(), "s"), draft(note(), "s"))


def test_a_database_that_may_not_grow_is_full_and_heals(log: Log, reader: LogReader) -> None:
    log.fill(10)
    log.pragma(f"max_page_count={log.pragma('page_count')}")
    with pytest.raises(TunledgerError) as refusal:
        _append_until_refused(log)
    assert refusal.value.code is ErrorCode.LOG_FULL
    acknowledged = len(log.recorded)
    assert reader.verify().events == acknowledged
    log.pragma("max_page_count=100000")
    (recorded,) = log.append(draft(note()))
    assert recorded.position == acknowledged + 1
    assert reader.verify().problems == []
    assert log.broken == []


def test_a_transaction_that_was_rolled_back_leaves_no_wrong_version_behind(log: Log) -> None:
    """Versions are remembered while rows are placed; those of a transaction that failed must be forgotten."""
    log.append(draft(note(), "s"))
    log.pragma(f"max_page_count={log.pragma('page_count')}")
    with pytest.raises(TunledgerError):
        _append_until_refused(log)
    log.pragma("max_page_count=100000")
    acknowledged = len(log.recorded)
    (recorded,) = log.append(draft(note(), "s", expected_version=acknowledged))
    assert (recorded.position, recorded.version) == (acknowledged + 1, acknowledged + 1)


@contextmanager
def _another_writer(path: Path) -> Iterator[None]:
    """Another process in the middle of a transaction on the database, like a person with the sqlite3 shell."""
    code = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN IMMEDIATE'); "
        "print('holds', flush=True); sys.stdin.read(); c.execute('ROLLBACK'); c.close()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "holds\n"
        yield
        other.communicate(timeout=DEADLINE_S)
    assert other.returncode == 0


def test_another_process_with_the_write_lock_is_said_and_passes(
    path: Path, open_log: OpenLog, reader: LogReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 50)
    log = open_log()
    log.append(draft(note(1)))
    with _another_writer(path):
        with pytest.raises(TunledgerError, match="another process holds the database locked") as refusal:
            log.append(draft(note(2)))
        assert refusal.value.code is ErrorCode.LOG_UNAVAILABLE
        assert refusal.value.retry
        assert log.writer.trouble() == refusal.value.message
        assert reader.verify().events == 1, "readers do not care"
    assert log.append(draft(note(3)))[0].position == 2
    assert log.writer.trouble() is None
    assert log.broken == []


def test_a_short_lock_of_another_process_is_waited_for(path: Path, log: Log) -> None:
    with _another_writer(path):
        future = log.queue(draft(note()))
        assert not future.done()
    assert future.result(DEADLINE_S)[0].position == 1


def test_a_writer_that_finds_the_database_locked_does_not_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 50)
    with _another_writer(path), pytest.raises(TunledgerError, match="another process holds") as refusal:
        Log(path)
    assert refusal.value.code is ErrorCode.LOG_UNAVAILABLE


def test_a_migration_that_finds_the_database_locked_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It once said that the database was damaged."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 50)
    path = tmp_path / "log.db"
    path.touch()
    with _another_writer(path), pytest.raises(TunledgerError, match="another process holds the database locked") as no:
        migrate(path, now=lambda: NOW)
    assert (no.value.code, no.value.retry) == (ErrorCode.LOG_UNAVAILABLE, True)
    migrate(path, now=lambda: NOW)
    database.require_current(path)


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (errno.ENOSPC, ErrorCode.LOG_FULL, "no space left on the disk; free some, writes then go on"),
        (errno.EDQUOT, ErrorCode.LOG_FULL, "the disk quota is used up; free some, writes then go on"),
        (errno.EROFS, ErrorCode.LOG_UNAVAILABLE, "the file system is read-only"),
    ],
)
@pytest.mark.parametrize("name", ["SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE", "SQLITE_CANTOPEN"])
def test_a_write_whose_errno_sqlite_keeps_to_itself_is_asked_about(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, code: ErrorCode, words: str
) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = name
    monkeypatch.setattr(reserve, "refusal", lambda _path: OSError(number, os.strerror(number)))
    fault = database.refused(path, error)
    assert fault is not None
    assert (fault.code, fault.retry) == (code, True)
    assert words in fault.message


@pytest.mark.parametrize("name", ["SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"])
def test_a_write_that_failed_though_the_disk_takes_more_is_a_failure(path: Path, name: str) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = name
    fault = database.refused(path, error)
    assert fault is not None
    assert (fault.code, fault.retry) == (ErrorCode.LOG_UNAVAILABLE, False)
    assert list(path.parent.glob("*.probe")) == []


def test_a_failed_sync_is_never_taken_for_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
    monkeypatch.setattr(reserve, "refusal", lambda _path: OSError(errno.ENOSPC, "full"))
    fault = database.refused(path, error)
    assert fault is not None
    assert (fault.code, fault.retry) == (ErrorCode.LOG_UNAVAILABLE, False)


def test_a_commit_whose_sync_failed_is_unknown_and_the_end(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its frames may be in the -wal all the same: the next start may find it, so it must not be called refused."""
    commit = sqlite3.OperationalError("disk I/O error")
    commit.sqlite_errorname = "SQLITE_IOERR_FSYNC"
    begin = log.writer._connection.begin  # type: ignore[union-attr]

    @contextmanager
    def failing() -> Iterator[None]:
        with begin() as transaction:
            yield
            transaction.rollback()
            raise commit

    monkeypatch.setattr(log.writer._connection, "begin", failing)
    for expected in (ErrorCode.OUTCOME_UNKNOWN, ErrorCode.LOG_UNAVAILABLE):
        with pytest.raises(TunledgerError, match="SQLITE_IOERR_FSYNC") as refused:
            log.append(draft(note()))
        assert refused.value.code is expected, "what came later was not tried at all"
    assert len(log.broken) == 1
