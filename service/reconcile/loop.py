"""The loop that keeps the host agreed with the log: look now and then, and when something says that it changed.

Level-triggered: what woke it is never believed, what may have changed is looked at again. Everything is looked at
every interval all the same, should the monitor have missed what it cannot see.
"""

import asyncio
import time

import structlog

from service import failpoints
from service.domain.errors import TunledgerError
from service.reconcile.engine import Engine

LEAST_S = 0.005  # between two turns, whatever is due: a mistake must cost no processor

REFUSED_MAX_S = 30.0  # between turns that the log or the host refuses
STUMBLED_S = 5.0  # after a mistake of ours

log = structlog.get_logger("tunledger.loop")


async def keep_reconciled(engine: Engine, interval_s: float) -> None:
    """Mend when woken, when a failed repair or an unconfirmed change is due, and look at all every `interval_s`.

    Runs until cancelled.
    """
    everything_at, refused = time.monotonic() + interval_s, 0
    while True:
        due = [everything_at - time.monotonic(), engine.next_retry_s(), engine.next_deadline_s()]
        await asyncio.sleep(LEAST_S)
        await _wait(engine.wake, max(0.0, min(seconds for seconds in due if seconds is not None) - LEAST_S))
        engine.wake.clear()
        failpoints.reach("loop.woken")
        everything = time.monotonic() >= everything_at
        if everything:
            everything_at = time.monotonic() + interval_s
        try:
            await engine.work(everything=everything)
        except TunledgerError as error:
            log.warning("could not reconcile; it is tried again", error=error.message)
            await asyncio.sleep(min(2.0**refused, REFUSED_MAX_S, interval_s))
            refused += 1
            engine.look_again()
        except Exception as error:
            # Repairs must not end by a mistake of ours: it is told, and everything is looked at again, not too often.
            log.exception("a mistake while reconciling; it is tried again")
            engine.stumbled = f"the last look at the host ended by a mistake: {error!r}"
            await asyncio.sleep(min(STUMBLED_S, interval_s))
            engine.look_again()
        else:
            engine.stumbled, refused = None, 0


async def keep_counted(engine: Engine, interval_s: float) -> None:
    """Store a sample of all counters every `interval_s`. Runs until cancelled."""
    while True:
        await asyncio.sleep(interval_s)
        failpoints.reach("loop.counting")
        try:
            await engine.sample()
        except TunledgerError as error:
            log.warning("counters could not be stored; the next sample has them", error=error.message)
        except Exception as error:
            log.exception("a mistake while counting; it goes on with the next sample")
            engine.miscounted = f"counters are not stored, by a mistake: {error!r}"
        else:
            engine.miscounted = None


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
