"""The loop that keeps the host agreed with the log: look now and then, and when something says that it changed.

Level-triggered: what woke it is never believed, everything is looked at again.
"""

import asyncio

import structlog

from service.domain.errors import TunledgerError
from service.reconcile.engine import Engine

log = structlog.get_logger("tunledger.loop")


async def keep_reconciled(engine: Engine, interval_s: float) -> None:
    """Reconcile when woken, when a failed repair is due, and every `interval_s`. Runs until cancelled."""
    while True:
        retry_s = engine.next_retry_s()
        await _wait(engine.wake, interval_s if retry_s is None else min(interval_s, retry_s))
        engine.wake.clear()
        try:
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
