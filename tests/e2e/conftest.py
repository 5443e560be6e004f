"""A fresh namespace and a service for each test; or for a module whose tests clean up behind themselves."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Service
from tests.namespace import fresh_namespace


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A service that is not started yet, in a namespace of its own."""
    with fresh_namespace():
        one = Service(tmp_path)
        yield one
        one.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One running service for all tests of a module: starting one costs a second."""
    with fresh_namespace():
        one = Service(tmp_path_factory.mktemp("shared")).start()
        yield one
        one.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder talks to the real kernel."""
    for item in items:
        if "tests/e2e" in str(item.path):
            item.add_marker(pytest.mark.kernel)
