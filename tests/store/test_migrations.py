"""Making a database, and refusing one of another release."""

from pathlib import Path
from typing import Any

import alembic.op
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import sqlite

from service import __version__
from service.cli import local
from service.domain.errors import ErrorCode, TunledgerError
from service.store import schema
from service.store.database import is_migrated, open_reader, open_writer, path_of, require_current, revision
from service.store.migrate import migrate, scripts
from service.store.reader import LogReader
from tests.store.log import NOW, Log, draft, dump, note, rows, tamper

REPOSITORY = Path(__file__).parents[2]


def _migrate(path: Path) -> tuple[str | None, str]:
    return migrate(path, now=lambda: NOW)


def test_a_fresh_database_has_the_newest_schema_and_a_node(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "log.db"
    assert _migrate(path) == (None, schema.REVISIONS[-1])
    require_current(path)
    ((node, created_at),) = rows(path, "SELECT id, created_at FROM node")
    assert isinstance(node, str)
    assert len(bytes.fromhex(node)) == 6
    assert created_at == NOW


def test_a_fresh_database_is_for_its_owner_only(tmp_path: Path) -> None:
    _migrate(tmp_path / "log.db")
    assert (tmp_path / "log.db").stat().st_mode & 0o777 == 0o600


def test_every_database_has_a_node_id_of_its_own(tmp_path: Path) -> None:
    for name in ("a.db", "b.db"):
        _migrate(tmp_path / name)
    assert rows(tmp_path / "a.db", "SELECT id FROM node") != rows(tmp_path / "b.db", "SELECT id FROM node")


def test_migrating_twice_changes_nothing(path: Path, log: Log) -> None:
    log.append(draft(note()))
    log.close()
    before = dump(path)
    assert _migrate(path) == (schema.REVISIONS[-1], schema.REVISIONS[-1])
    assert dump(path) == before


@pytest.mark.parametrize("name", ["with blank.db", "100%.db", "what?.db", "#1.db", "caf\u00e9.db", "a%20b.db"])
def test_any_file_name_will_do(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    _migrate(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert revision(path) == schema.REVISIONS[-1]


def test_an_empty_file_is_a_new_database(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    path.touch()
    assert revision(path) is None
    assert _migrate(path)[0] is None
    require_current(path)


def test_revisions_are_those_of_the_migration_files_oldest_first() -> None:
    config = Config()
    config.set_main_option("script_location", str(scripts()))
    found = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert tuple(reversed(found)) == schema.REVISIONS


def test_the_alembic_command_makes_the_same_schema(
    tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "by-alembic.db"
    monkeypatch.setenv("TUNLEDGER_DATABASE__URL", f"sqlite:///{path}")
    monkeypatch.chdir(REPOSITORY)
    command.upgrade(Config("alembic.ini"), "head")
    query = "SELECT type, name, sql FROM sqlite_master ORDER BY name"
    assert rows(path, query) == rows(migrated, query)


def test_a_log_has_no_way_back(path: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(scripts()))
    before = dump(path)
    with open_writer(path).connect() as connection:
        config.attributes["connection"] = connection
        with pytest.raises(RuntimeError, match="restore a copy"):
            command.downgrade(config, "base")
    assert dump(path) == before


def test_a_database_of_a_newer_release_is_refused_by_name_and_left_alone(path: Path) -> None:
    tamper(path, ("UPDATE alembic_version SET version_num = '0999'", ()))
    before = path.read_bytes()
    for refusing in (require_current, _migrate, local.migrate):
        with pytest.raises(TunledgerError) as refusal:
            refusing(path)
        assert refusal.value.code is ErrorCode.SCHEMA_MISMATCH
        assert "0999" in refusal.value.message
        assert f"newer than tunledger {__version__}" in refusal.value.message
    assert path.read_bytes() == before


def test_a_database_of_an_older_release_is_told_to_migrate(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "REVISIONS", (*schema.REVISIONS, "0999"))
    with pytest.raises(
        TunledgerError, match=r"at schema \d+, this release needs 0999: run tunledger migrate"
    ) as refusal:
        require_current(path)
    assert refusal.value.code is ErrorCode.SCHEMA_MISMATCH


@pytest.mark.parametrize("make", [lambda _: None, Path.touch, dump], ids=["none", "empty", "bare"])
def test_a_database_without_a_log_is_told_to_migrate(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "log.db"
    make(path)
    with pytest.raises(TunledgerError, match="has no log yet: run tunledger migrate") as refusal:
        require_current(path)
    assert refusal.value.code is ErrorCode.SCHEMA_MISMATCH


class _StoppedError(Exception):
    """What ends a migration in the middle."""


def test_a_migration_that_fails_leaves_nothing_behind_wherever_it_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute, stop_at = alembic.op.execute, 0
    done: list[str] = []
    whole: dict[str | None, list[tuple[object, ...]]] = {None: []}

    def until(statement: str) -> None:
        if len(done) == stop_at:
            raise _StoppedError(statement)
        done.append(statement)
        execute(statement)

    monkeypatch.setattr(alembic.op, "execute", until)
    while True:
        path = tmp_path / f"{stop_at}.db"
        done.clear()
        try:
            _migrate(path)
        except _StoppedError:
            left = rows(path, "SELECT name FROM sqlite_master WHERE tbl_name <> 'alembic_version' ORDER BY name")
            # The first to stop within a migration stops before it did anything.
            assert left == whole.setdefault(revision(path), left), f"after {stop_at} statements"
            stop_at += 1
            continue
        break
    assert tuple(whole) == (None, *schema.REVISIONS[:-1])
    monkeypatch.undo()
    for stopped_at in (5, stop_at - 1):
        _migrate(tmp_path / f"{stopped_at}.db")
        require_current(tmp_path / f"{stopped_at}.db")


def test_a_migration_killed_before_it_named_the_node_is_finished_by_the_next(path: Path) -> None:
    tamper(path, ("DELETE FROM node", ()))
    assert not is_migrated(path)
    local.migrate(path)
    assert is_migrated(path)
    reader = LogReader(path)
    try:
        assert len(reader.node()) == 12
    finally:
        reader.close()


def test_all_our_tables_are_strict(path: Path) -> None:
    found = {name: strict for _, name, _, _, _, strict in rows(path, "PRAGMA main.table_list")}
    assert {name: found[name] for name in schema.metadata.tables} == dict.fromkeys(schema.metadata.tables, 1)


def test_all_our_tables_are_in_the_schema_module(path: Path) -> None:
    found = rows(path, "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    assert {name for (name,) in found} == {*schema.metadata.tables, "alembic_version"}


@pytest.mark.parametrize("table", schema.metadata.sorted_tables, ids=lambda table: str(table.name))
def test_columns_are_those_of_the_schema_module(path: Path, table: Any) -> None:
    found = [
        (name, kind, bool(not_null) or bool(key), bool(key))
        for _, name, kind, not_null, _, key in rows(path, f"PRAGMA table_info({table.name})")
    ]
    dialect = sqlite.dialect()
    assert found == [(c.name, c.type.compile(dialect=dialect), not c.nullable, c.primary_key) for c in table.columns]


def test_event_ids_and_stream_versions_are_unique(path: Path) -> None:
    unique = set()
    for _, name, is_unique, *_rest in rows(path, "PRAGMA index_list(events)"):
        if is_unique:
            unique.add(tuple(column for _, _, column in rows(path, f"PRAGMA index_info({name})")))
    assert unique == {("event_id",), ("stream", "version")}


@pytest.mark.parametrize(
    "url", ["postgresql://localhost/x", "sqlite://", "sqlite:///:memory:", "mysql+pymysql://root@localhost/x"]
)
def test_only_a_file_of_sqlite_will_do(url: str) -> None:
    with pytest.raises(TunledgerError, match=r"database\.url: .* is not a SQLite file") as refusal:
        path_of(url)
    assert refusal.value.code is ErrorCode.LOG_UNAVAILABLE


def test_a_reader_cannot_write(path: Path) -> None:
    engine = open_reader(path)
    with engine.connect() as connection, pytest.raises(sa.exc.OperationalError, match="readonly"):
        connection.exec_driver_sql("INSERT INTO node VALUES ('x', 'y')")
    engine.dispose()
    assert len(rows(path, "SELECT * FROM node")) == 1
