"""The disk is full, the disk fails, somebody else holds the lock: refused in words, and nothing half done."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.domain.errors import ErrorCode, TunledgerError
from service.store import database
from service.store.reader import LogReader
from tests.store.conftest import OpenLog
from tests.store.log import DEADLINE_S, Log, draft, note

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
