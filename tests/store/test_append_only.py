"""The database itself refuses to change the log, whoever asks: these statements go past all our code."""

# ruff: noqa: S608 -- the SQL is put together from this file's own words

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.store.log import Log, draft, note, rows

COLUMNS = "event_id, stream, version, type, schema_version, payload, actor, command_id, node, recorded_at"
COPY = "SELECT position + {shift}, event_id || 'x', stream, version + 10, type, schema_version, payload, actor, \
command_id, node, recorded_at, previous_hash, hash FROM events WHERE position = 3"


@pytest.fixture
def three(path: Path, log: Log) -> Path:
    """A log of three events."""
    log.append(*(draft(note(number)) for number in range(3)))
    log.close()
    return path


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET actor = 'nobody' WHERE position = 2",
        "UPDATE events SET actor = actor",
        "UPDATE events SET position = position + 1 WHERE position = 3",
        "UPDATE OR REPLACE events SET position = 1 WHERE position = 2",
        "UPDATE OR IGNORE events SET payload = '{}'",
        "DELETE FROM events WHERE position = 3",
        "DELETE FROM events",
        f"INSERT OR REPLACE INTO events SELECT position, {COLUMNS}, previous_hash, hash FROM events WHERE position = 2",
        f"REPLACE INTO events SELECT position, {COLUMNS}, previous_hash, hash FROM events WHERE position = 3",
        f"INSERT INTO events {COPY.format(shift=0)} ON CONFLICT (position) DO UPDATE SET actor = 'nobody'",
        f"INSERT INTO events {COPY.format(shift=2)}",
        f"INSERT INTO events {COPY.format(shift=-3)}",
        f"INSERT INTO events {COPY.format(shift=-4)}",
        f"INSERT INTO events {COPY.format(shift=0)}",
        f"INSERT INTO events {COPY.format(shift='NULL')}",
    ],
)
def test_the_log_refuses_to_be_changed(three: Path, statement: str) -> None:
    before = rows(three, "SELECT * FROM events")
    with closing(sqlite3.connect(three, isolation_level=None)) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute(statement)
    assert rows(three, "SELECT * FROM events") == before


def test_the_next_position_is_taken(three: Path) -> None:
    """The refusals above are refusals of what they say, not of every INSERT."""
    with closing(sqlite3.connect(three, isolation_level=None)) as connection:
        connection.execute(f"INSERT INTO events {COPY.format(shift=1)}")
    assert rows(three, "SELECT max(position) FROM events") == [(4,)]


@pytest.mark.parametrize("replaced", ["event_id", "stream, version"])
def test_an_event_cannot_be_replaced_through_its_other_keys(three: Path, replaced: str) -> None:
    """INSERT OR REPLACE at the next position, with the unique key of an old event, would delete the old one."""
    changed = {
        "event_id": "event_id || 'x'",
        "version": "version + 10",
    }
    for kept in replaced.split(", "):
        changed.pop(kept, None)
    values = ", ".join(changed.get(name, name) for name in COLUMNS.split(", "))
    statement = f"INSERT OR REPLACE INTO events SELECT 4, {values}, previous_hash, hash FROM events WHERE position = 2"
    before = rows(three, "SELECT * FROM events ORDER BY position")
    with closing(sqlite3.connect(three, isolation_level=None)) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute(statement)
    assert rows(three, "SELECT * FROM events ORDER BY position") == before


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("position", "'one'"),
        ("payload", "x'00'"),
        ("version", "1.5"),
        ("version", "0"),
        ("schema_version", "0"),
        ("actor", "NULL"),
        ("previous_hash", "'short'"),
        ("hash", "''"),
    ],
)
def test_a_value_that_has_no_place_is_refused(three: Path, column: str, value: str) -> None:
    names = ["position", *COLUMNS.split(", "), "previous_hash", "hash"]
    fresh = {"position": "4", "event_id": "'fresh'", "version": "99", column: value}
    values = ", ".join(fresh.get(name, name) for name in names)
    with closing(sqlite3.connect(three, isolation_level=None)) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute(f"INSERT INTO events SELECT {values} FROM events WHERE position = 3")
    assert rows(three, "SELECT count(*) FROM events") == [(3,)]
