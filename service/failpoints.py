"""Named points at which a test can kill, fail or hold up the process, so that a crash between any two steps is shown.

Unarmed, which is always but under test, reaching a point is one comparison. TUNLEDGER_TEST_FAILPOINTS arms them, with
any number of orders, separated by ";":

    trace:/path                 append the name of every point reached to a file
    kill:7                      SIGKILL at the seventh point reached, whichever it is
    kill@NAME, kill@NAME#3      SIGKILL at this point, the first or third time that it is reached
    fail@NAME=ENOSPC            raise OSError with this errno there; once, also with #3 for the third time
    wait@NAME=0.5               hold up the thread that reaches it for so many seconds; once, also with #3

Where a failure makes sense, the point says `fails=True`: it then stands where a real failure of that step would be
raised, and an OSError there comes to what the real one would. Every other point refuses a `fail` order.

What happens at a point is decided here; where the points are, is decided where the steps are.
"""

import errno
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "TUNLEDGER_TEST_FAILPOINTS"
EX_USAGE = 64  # sysexits.h

_ORDER = re.compile(r"(kill|fail|wait)@([A-Za-z0-9_.]+)(?:#([1-9][0-9]*))?(?:=([A-Z0-9.]+))?")


@dataclass(frozen=True, slots=True)
class _Order:
    """What to do when a point is reached for the `time`-th time."""

    action: str
    point: str
    time: int = 1
    number: int = 0
    seconds: float = 0.0


class _Armed:
    def __init__(self, orders: str) -> None:
        self._trace: Path | None = None
        self._kill_at = 0
        self._orders: list[_Order] = []
        for order in orders.split(";"):
            if order:
                self._take(order)
        self._reached: Counter[str] = Counter()
        self._lock = threading.Lock()

    def _take(self, order: str) -> None:
        action, _, argument = order.partition(":")
        if action == "trace" and argument:
            self._trace = Path(argument)
            return
        if action == "kill" and argument.isdecimal() and int(argument) > 0:
            self._kill_at = int(argument)
            return
        found = _ORDER.fullmatch(order)
        try:
            if found is None:
                raise ValueError(order)
            what, point, times, argument = found[1], found[2], int(found[3] or 1), found[4] or ""
            if (what == "kill") == bool(argument):
                raise ValueError(order)
            number = int(getattr(errno, argument)) if what == "fail" else 0
            seconds = float(argument) if what == "wait" else 0.0
        except (ValueError, AttributeError):
            known = "trace:PATH, kill:N, kill@NAME#K, fail@NAME#K=ERRNO or wait@NAME#K=SECONDS"
            raise ValueError(f"{VARIABLE}: {order!r} is not {known}") from None
        self._orders.append(_Order(what, point, times, number, seconds))

    def reach(self, point: str, *, fails: bool) -> None:
        with self._lock:
            self._reached[point] += 1
            if self._trace is not None:
                with self._trace.open("a") as trace:
                    trace.write(point + "\n")
            if self._kill_at and self._reached.total() == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            time_now = self._reached[point]
            due = [order for order in self._orders if (order.point, order.time) == (point, time_now)]
            if any(order.action == "kill" for order in due):
                os.kill(os.getpid(), signal.SIGKILL)
        for order in due:
            if order.action == "wait":
                time.sleep(order.seconds)
        for order in due:
            if order.action == "fail":
                if not fails:
                    sys.stderr.write(f"{VARIABLE}: nothing can fail at {point}\n")
                    sys.stderr.flush()
                    os._exit(EX_USAGE)
                raise OSError(order.number, os.strerror(order.number), point)


_armed: _Armed | None = None


def arm(environ: Mapping[str, str]) -> None:
    """Do as the environment says; called once by the composition root, and by a migration.

    Raises ValueError for an order it cannot read.
    """
    global _armed
    orders = environ.get(VARIABLE)
    _armed = _Armed(orders) if orders else None


def reach(point: str, *, fails: bool = False) -> None:
    """A step was just done, or is about to be. `point` is its name, such as "kernel.create.persistent".

    Args:
        fails: the point stands where the step's own failure would be raised, so that one can be ordered here.

    Raises:
        OSError: if one was ordered, and the point is one that fails.
    """
    if _armed is not None:
        _armed.reach(point, fails=fails)
