"""Named points at which a test can kill the process, so that a crash between any two steps can be shown, not argued.

Unarmed, which is always but under test, reaching a point is one comparison. Armed by TUNLEDGER_TEST_FAILPOINTS:

    trace:/path     append the name of every point reached to a file
    kill:7          SIGKILL at the seventh point reached, whichever it is

What happens at a point is decided here; where the points are, is decided where the steps are.
"""

import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "TUNLEDGER_TEST_FAILPOINTS"


class _Armed:
    def __init__(self, order: str) -> None:
        self._action, _, argument = order.partition(":")
        if self._action not in {"trace", "kill"} or not argument:
            raise ValueError(f"{VARIABLE}: {order!r} is not trace:PATH or kill:N")
        self._path = Path(argument) if self._action == "trace" else None
        self._at = int(argument) if self._action == "kill" else 0
        self._reached = 0
        self._lock = threading.Lock()

    def reach(self, point: str) -> None:
        with self._lock:
            self._reached += 1
            if self._path is not None:
                with self._path.open("a") as trace:
                    trace.write(point + "\n")
            elif self._reached == self._at:
                os.kill(os.getpid(), signal.SIGKILL)


_armed: _Armed | None = None


def arm(environ: Mapping[str, str]) -> None:
    """Do as the environment says; called once by the composition root.

    Raises ValueError for an order it cannot read.
    """
    global _armed
    order = environ.get(VARIABLE)
    _armed = _Armed(order) if order else None


def reach(point: str) -> None:
    """A step was just done, or is about to be. `point` is its name, such as "kernel.persist.after"."""
    if _armed is not None:
        _armed.reach(point)
