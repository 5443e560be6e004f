"""How many points, cases and so on a run of the suite had; printed at its end by conftest."""

import threading
from collections.abc import Mapping

_counts: dict[str, int] = {}
_lock = threading.Lock()


def count(what: str, number: int = 1) -> None:
    """Add to a figure."""
    with _lock:
        _counts[what] = _counts.get(what, 0) + number


def counts() -> Mapping[str, int]:
    """All figures, in the order in which they came."""
    return _counts
