"""A migrated database, and the API over it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.store.migrate import migrate
from tests.api.running import NOW, Running


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as `tunledger migrate` leaves it; copied, never written to."""
    path = tmp_path_factory.mktemp("migrated") / "log.db"
    migrate(path, now=lambda: NOW)
    return path


@pytest.fixture
def path(tmp_path: Path, migrated: Path) -> Path:
    """An empty log of this test's own."""
    return Path(shutil.copy(migrated, tmp_path / "log.db"))


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[Running]:
    """The API for requests that are all refused, with nothing in its log at the end either."""
    path = Path(shutil.copy(migrated, tmp_path_factory.mktemp("idle") / "log.db"))
    with Running(path) as running:
        yield running
        assert running.intents() == []


@pytest.fixture
def api(path: Path) -> Iterator[Running]:
    """The API, with no interface yet."""
    with Running(path) as running:
        yield running
        assert running.broken == []
