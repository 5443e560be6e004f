"""The loop that keeps the host agreed with the log: look now and then, and when something says that it changed.

Level-triggered: what woke it is never believed, everything is looked at again.
"""

import asyncio

import structlog

from service.domain.errors import TunledgerError
from service.reconcile.engine import Engine

LEAST_S = 0.05  # between two turns, whatever is due: a mistake must cost no processor

log = structlog.get_logger("tunledger.loop")


async def keep_reconciled(engine: Engine, interval_s: float) -> None:
    """Reconcile when woken, when a failed repair or an unconfirmed change is due, and every `interval_s`.

    Runs until cancelled.
    """
    while True:
        due = [interval_s, engine.next_retry_s(), engine.next_deadline_s()]
        await _wait(engine.wake, max(LEAST_S, min(seconds for seconds in due if seconds is not None)))
        engine.wake.clear()
        try:
            await engine.take_back_overdue()
            await engine.reconcile()
        except TunledgerError as error:
            log.warning("could not reconcile; it is tried again", error=error.message)
            await asyncio.sleep(min(1.0, interval_s))
            engine.wake.set()


async def keep_counted(engine: Engine, interval_s: float) -> None:
    """Store a sample of all counters every `interval_s`. Runs until cancelled."""
    while True:
        await asyncio.sleep(interval_s)
        try:
            await engine.sample()
        except TunledgerError as error:
            log.warning("counters could not be stored; the next sample has them", error=error.message)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
