"""A migrated database for each test, and writers that are always closed."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.store.migrate import migrate
from service.store.reader import LogReader
from tests.store.log import NOW, Log

OpenLog = Callable[[], Log]


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as `tunledger migrate` leaves it; copied, never written to."""
    path = tmp_path_factory.mktemp("migrated") / "log.db"
    migrate(path, now=lambda: NOW)
    assert [entry.name for entry in path.parent.iterdir()] == ["log.db"], "a closed database is one file"
    return path


@pytest.fixture
def path(tmp_path: Path, migrated: Path) -> Path:
    """An empty log of this test's own."""
    return Path(shutil.copy(migrated, tmp_path / "log.db"))


@pytest.fixture
def open_log(path: Path) -> Iterator[OpenLog]:
    """Starts writers on `path`."""
    opened: list[Log] = []

    def open_one() -> Log:
        opened.append(Log(path))
        return opened[-1]

    yield open_one
    for log in opened:
        log.close()


@pytest.fixture
def log(open_log: OpenLog) -> Log:
    """A log that is being written."""
    return open_log()


@pytest.fixture
def reader(path: Path) -> Iterator[LogReader]:
    """A reader of `path`."""
    one = LogReader(path)
    yield one
    one.close()
