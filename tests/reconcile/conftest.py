"""Coroutines as tests, by the plugin that anyio brings."""

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """asyncio only: it is what the service runs on."""
    return "asyncio"
