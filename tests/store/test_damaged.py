"""A file that is no log, or no longer one: always a TunledgerError in words, never another exception, never silence."""

# ruff: noqa: S608 -- the SQL is put together from this file's own words

import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from service.domain.errors import ErrorCode, TunledgerError
from service.store import counters, schema
from service.store.database import InstanceLock, require_current, revision
from service.store.migrate import migrate
from service.store.reader import LogReader
from tests.store.log import NOW, Log

NOBODY = 65534
READABLE = {ErrorCode.LOG_CORRUPT, ErrorCode.LOG_UNAVAILABLE}


@pytest.fixture(scope="module")
def long(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound log of a few hundred events in one file."""
    path = Path(shutil.copy(migrated, tmp_path_factory.mktemp("long") / "log.db"))
    log = Log(path)
    log.fill(300)
    log.close()
    assert path.stat().st_size > 100_000
    return path


def _problems(path: Path) -> list[str]:
    reader = LogReader(path)
    try:
        return reader.verify().problems
    finally:
        reader.close()


def _garbage(path: Path) -> None:
    path.write_bytes(b"\x00\xffgarbage" * 5000)


def _text(path: Path) -> None:
    path.write_text("dear diary\n")


def _folder(path: Path) -> None:
    path.mkdir()


def _only_a_header(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0")


@pytest.mark.parametrize("make", [_garbage, _text, _folder, _only_a_header])
def test_what_is_no_database_is_refused_by_everything_and_left_as_it_was(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "log.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    for use in (
        revision,
        require_current,
        counters.load,
        lambda p: migrate(p, now=lambda: NOW),
        lambda p: LogReader(p).head(),
        lambda p: LogReader(p).node(),
        lambda p: list(LogReader(p).events()),
    ):
        with pytest.raises(TunledgerError) as refusal:
            use(path)
        assert refusal.value.code is ErrorCode.LOG_CORRUPT
        assert str(path) in refusal.value.message
    assert len(_problems(path)) == 1
    with pytest.raises(TunledgerError) as refusal:
        Log(path)
    assert refusal.value.code in READABLE
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize("left", [1, 99, 100, 512, 4096, 5000, 40960, "half", "-4096"])
def test_a_database_that_was_cut_short_is_never_sound(long: Path, tmp_path: Path, left: int | str) -> None:
    path = Path(shutil.copy(long, tmp_path / "log.db"))
    size = path.stat().st_size
    keep = size // 2 if left == "half" else size + int(left) if str(left).startswith("-") else int(left)
    with path.open("r+b") as file:
        file.truncate(keep)
    problems = _problems(path)
    assert problems, f"{keep} of {size} bytes pass"


@pytest.mark.parametrize("page", range(1, 40, 3))
def test_a_page_of_noise_never_raises_anything_else(long: Path, tmp_path: Path, page: int) -> None:
    path = Path(shutil.copy(long, tmp_path / "log.db"))
    with path.open("r+b") as file:
        file.seek(page * 4096)
        file.write(random.Random(page).randbytes(4096))
    _problems(path)  # whatever it finds: pages of indexes are not read by it
    try:
        revision(path)
        counters.load(path)
    except TunledgerError as refusal:
        assert refusal.code is ErrorCode.LOG_CORRUPT  # noqa: PT017  # any page may or may not matter to these


def test_any_damage_at_all_is_told_and_never_raised(long: Path, tmp_path: Path) -> None:
    """Bytes that are no text in the schema, NULL where there is never one: they once came out as other exceptions,
    and start-up would have died of them instead of starting read-only.
    """
    path, chance, content = tmp_path / "log.db", random.Random(7), long.read_bytes()
    tables = range(100, 4096)
    hits = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 1, 2, 5])):
            where = chance.choice(tables) if chance.random() < 0.4 else chance.randrange(len(content))
            damaged[where] = chance.randrange(256)
        path.write_bytes(damaged)
        hits += bool(_problems(path))
        for use in (revision, counters.load):
            try:
                use(path)
            except TunledgerError as refusal:
                assert refusal.code is ErrorCode.LOG_CORRUPT  # noqa: PT017  # it need not refuse
    assert hits > 40


@pytest.mark.parametrize("column", [c.name for c in schema.events.columns if c.name != "position"])
@pytest.mark.parametrize("value", [None, 7, 1.5, b"\xff"])
def test_an_event_with_a_value_of_another_kind_is_found(
    migrated: Path, tmp_path: Path, column: str, value: object
) -> None:
    """STRICT refuses to write such values; a damaged page still holds them."""
    path = tmp_path / "log.db"
    shutil.copy(migrated, path)
    log = Log(path)
    log.fill(3)
    log.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        columns = ", ".join(c.name for c in schema.events.columns)
        kept = connection.execute("SELECT * FROM events ORDER BY position").fetchall()
        connection.executescript(
            f"DROP TABLE events; CREATE TABLE events (position INTEGER PRIMARY KEY, {columns[10:]})"
        )
        for row in kept:
            told = dict(zip(columns.split(", "), row, strict=True))
            if row[0] == 2:
                told[column] = value
            marks = ", ".join("?" * len(told))
            connection.execute(f"INSERT INTO events VALUES ({marks})", tuple(told.values()))
    assert any(problem.startswith("position 2: ") for problem in _problems(path)) or (column, value) == (
        "command_id",
        None,
    )
    reader = LogReader(path)
    try:
        list(reader.events())
    except TunledgerError as refusal:
        assert refusal.code is ErrorCode.LOG_CORRUPT  # noqa: PT017  # only some columns are read closely
    finally:
        reader.close()


def test_a_page_of_noise_among_the_events_is_found(long: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(long, tmp_path / "log.db"))
    content = path.read_bytes()
    page = content.index(b'{"interfaces":"keep","pid":150') // 4096
    with path.open("r+b") as file:
        file.seek(page * 4096)
        file.write(b"\xa5" * 4096)
    assert _problems(path)


def test_a_single_byte_of_an_event_is_found(long: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(long, tmp_path / "log.db"))
    content = path.read_bytes()
    at = content.index(b'{"interfaces":"keep","pid":150')
    path.write_bytes(content[: at + 27] + b"9" + content[at + 28 :])
    assert any(problem.startswith("position 151: ") for problem in _problems(path))


def test_bytes_that_are_no_text_are_found(long: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(long, tmp_path / "log.db"))
    content = path.read_bytes()
    at = content.index(b'{"interfaces":"keep","pid":150')
    path.write_bytes(content[: at + 27] + b"\xff" + content[at + 28 :])
    assert _problems(path)


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Without root's right to read everything; skips where there is no other user to be."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(NOBODY)
    except OSError as error:
        pytest.skip(f"missing: another user than root in this namespace ({error.strerror})")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Path:
    """A log that everybody could reach."""
    folder = tmp_path_factory.mktemp("public")
    path = Path(shutil.copy(migrated, folder / "log.db"))
    base = tmp_path_factory.getbasetemp()
    for parent in (folder, *folder.parents):
        if parent.is_relative_to(base) or parent.name.startswith("pytest-"):  # which are pytest's own
            parent.chmod(parent.stat().st_mode | 0o055)
    return path


def test_a_database_that_may_not_be_read_is_refused(public: Path) -> None:
    public.chmod(0o000)
    with _as_nobody():
        for use in (revision, require_current, counters.load):
            with pytest.raises(TunledgerError) as refusal:
                use(public)
            assert refusal.value.code in READABLE
            assert str(public) in refusal.value.message
        assert len(_problems(public)) == 1
        with pytest.raises(TunledgerError):
            Log(public)


def test_a_database_in_a_folder_that_may_not_be_entered_is_refused(public: Path) -> None:
    public.parent.chmod(0o700 if os.geteuid() == 0 else 0o000)
    try:
        with _as_nobody():
            for use in (
                revision,
                require_current,
                counters.load,
                Log,
                lambda path: InstanceLock(path, {}).__enter__(),
                lambda path: migrate(path, now=lambda: NOW),
            ):
                with pytest.raises(TunledgerError) as refusal:
                    use(public)
                assert refusal.value.code is ErrorCode.LOG_UNAVAILABLE
    finally:
        public.parent.chmod(0o700)


def test_a_database_in_a_folder_that_may_not_be_written_is_not_made(public: Path) -> None:
    with _as_nobody(), pytest.raises(TunledgerError, match="is the folder there and writable") as refusal:
        migrate(public.with_name("other.db"), now=lambda: NOW)
    assert refusal.value.code is ErrorCode.LOG_UNAVAILABLE


def test_a_database_that_may_not_be_written_is_not_opened_for_writing(public: Path) -> None:
    public.chmod(0o444)
    with _as_nobody(), pytest.raises(TunledgerError) as refusal:
        Log(public)
    assert refusal.value.code is ErrorCode.LOG_UNAVAILABLE
