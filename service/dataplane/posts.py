"""A worker's place, which processes come and go in: when the next one is started after a death.

Times are given; nothing here starts or ends a process.
"""

from dataclasses import dataclass
from typing import Final

from service.dataplane.worker_process import WorkerProcess

RESPAWN_STEP_S: Final = 0.1
RESPAWN_MAX_S: Final = 5.0
STEADY_S: Final = 10.0
"""A worker that lived this long starts its deaths anew."""


@dataclass(slots=True, eq=False)
class Post:
    """A worker's place, which processes come and go in."""

    index: int
    live: WorkerProcess | None = None
    deaths: int = 0
    """In a row, each soon after its start."""
    due: float | None = 0.0
    """When to start the next process, on time.monotonic(); None while one lives."""
    reason: str = "not started"
    """Why there is none."""

    def vacate(self, reason: str, started: float, now: float, *, blamed: bool = False) -> None:
        """The process that was started at `started` is gone. `blamed`: by a stage, which has a back-off of its own."""
        self.live = None
        self.reason = reason
        self.deaths = 1 if blamed or now - started >= STEADY_S else self.deaths + 1
        self.due = now + respawn_delay_s(self.deaths)

    def waits(self, *, running: bool) -> float | None:
        """When the next process is due; None while one lives. Not `running` yet: one that failed is not tried again."""
        return self.due if running or not self.deaths else None


def respawn_delay_s(deaths: int) -> float:
    """Return how long to wait after the `deaths`-th death in a row: 0, then 0.1 s doubled each time, up to 5 s."""
    if deaths <= 1:
        return 0.0
    # The exponent has a bound, too: 0.1 x 2^6 is over the limit already.
    return min(RESPAWN_MAX_S, RESPAWN_STEP_S * 2.0 ** min(deaths - 2, 6))
