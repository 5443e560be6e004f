"""A fresh namespace and a service for each test: what runs here makes interfaces of any name and address."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Service
from tests.namespace import fresh_namespace


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A running service with a database of its own, in a namespace of its own."""
    with fresh_namespace():
        one = Service(tmp_path)
        try:
            yield one.start()
        finally:
            one.close()
