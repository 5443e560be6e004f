"""Everything in this folder talks to the real kernel; its figures are printed at the end of a run."""

import pytest

from tests.faults.cases import Traces
from tests.faults.counts import counts


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """The dry runs of all scenarios."""
    return Traces(tmp_path_factory.mktemp("dry"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them."""
    for item in items:
        if "tests/faults" in str(item.path):
            item.add_marker(pytest.mark.kernel)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much was tried."""
    if counts():
        told = ", ".join(f"{number} {what}" for what, number in counts().items())
        terminalreporter.write_line(f"faults: {told}")
