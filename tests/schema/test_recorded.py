"""docs/api.md and the examples of the OpenAPI document are what the real service answers."""

import json

import pytest

from service.api.openapi import recorded_examples
from tests.e2e.harness import Service
from tests.schema.recording import DOCS, examples, masked, run

pytestmark = pytest.mark.kernel
ANEW = "python -m tests.schema.recording writes docs/api.md and the examples anew"


def test_the_service_answers_as_its_documentation_says(service: Service) -> None:
    page = DOCS.read_text()
    now, done = run(page, service.port)
    assert len(done) >= 50
    for exchange in done:
        before = masked(_read(exchange.written))
        after = masked(_read(exchange.shown))
        assert after == before, f"$ {exchange.command}\n{ANEW}"
    assert masked(examples(done)) == masked(recorded_examples()), ANEW
    assert "@" not in now.replace("@command_id", ""), "a placeholder was left in the page"


def _read(written: str) -> list[object]:
    """An answer of the page: (status line and headers, JSON or text)."""
    head, _, text = written.partition("\n\n") if written.startswith("HTTP/") else ("", "", written)
    try:
        return [head, json.loads(text)]
    except json.JSONDecodeError:
        return [head, text.rstrip("\n")]
