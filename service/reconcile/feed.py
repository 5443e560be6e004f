"""Tells everybody who listens in this process what was recorded, as soon as it was.

One feed, many subscriptions, each with a buffer of its own that has a bound. What goes over it is left out, which shows
in the positions: the database has it. Whoever lets it run over again before taking anything is cut off and told why,
and nobody else notices. What an event is to a listener (which are wanted, how they look on a wire, what came
before) does not belong in here. Everything in here is for the event loop's thread.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from enum import StrEnum

from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError

SUBSCRIPTIONS_MAX = 64
BUFFER_EVENTS = 1024  # waiting for one subscriber, about a megabyte


class End(StrEnum):
    """Why a subscription ended."""

    SLOW = "slow_reader"
    CLOSED = "shutting_down"


class Subscription:
    """One listener's place. It holds a place from the beginning, and events only once `listen` was called.

    Attributes:
        ended: why nothing more will come, or None.
    """

    def __init__(self, feed: "Feed", buffer_events: int) -> None:
        self._feed, self._buffer_events = feed, buffer_events
        self._waiting: deque[ev.Recorded] = deque()
        self._woken = asyncio.Event()
        self._listening = False
        self._overrun = False  # since the last take
        self.ended: End | None = None

    def listen(self) -> None:
        """Have everything kept that is published from now on."""
        self._listening = True

    async def take(self, within_s: float) -> list[ev.Recorded]:
        """What was published since the last call, in order, with a hole in the positions if it was too much to keep;
        waits for something, but not longer than `within_s`.

        Empty if there was nothing in that time, or if the subscription has ended.
        """
        if not self._waiting and self.ended is None:
            self._woken.clear()
            try:
                async with asyncio.timeout(within_s):
                    await self._woken.wait()
            except TimeoutError:
                return []
        taken = list(self._waiting)
        self._waiting.clear()
        self._overrun = False
        return taken

    def close(self) -> None:
        """Give the place back. Closing twice is closing once."""
        self._feed._leave(self)

    def _offer(self, events: Sequence[ev.Recorded]) -> None:
        if not self._listening or self.ended is not None:
            return
        if len(self._waiting) + len(events) > self._buffer_events:
            if self._overrun:
                self._end(End.SLOW)
                return
            self._overrun = True
            self._waiting.clear()
            events = events[-1:]  # enough to show the hole
        self._waiting.extend(events)
        self._woken.set()

    def _end(self, why: End) -> None:
        if self.ended is None:
            self.ended = why
            self._waiting.clear()
            self._woken.set()


class Feed:
    """The one place where recorded events are told.

    Args:
        subscriptions_max: more are refused.
        buffer_events: what may wait for one subscriber.

    Attributes:
        closed: whether the service is stopping. May be read from any thread.
    """

    def __init__(self, *, subscriptions_max: int = SUBSCRIPTIONS_MAX, buffer_events: int = BUFFER_EVENTS) -> None:
        self._subscriptions: set[Subscription] = set()
        self.subscriptions_max, self.buffer_events = subscriptions_max, buffer_events
        self.closed = False

    def publish(self, events: Sequence[ev.Recorded]) -> None:
        """Tell everybody. Events come in order of position, durable ones only; never waits."""
        for subscription in self._subscriptions:
            subscription._offer(events)

    def subscribe(self) -> Subscription:
        """A place for one more listener; it has to be closed.

        Raises:
            TunledgerError: overloaded, if all places are taken; shutting_down.
        """
        if self.closed:
            raise TunledgerError(ErrorCode.SHUTTING_DOWN, "the service is stopping", retry=True)
        if len(self._subscriptions) >= self.subscriptions_max:
            raise TunledgerError(
                ErrorCode.OVERLOADED,
                f"{self.subscriptions_max} streams of events are open, which is the most; close one, or try again",
                retry=True,
            )
        subscription = Subscription(self, self.buffer_events)
        self._subscriptions.add(subscription)
        return subscription

    def close(self) -> None:
        """The service stops: every subscription ends, and no new one is given out."""
        self.closed = True
        for subscription in self._subscriptions:
            subscription._end(End.CLOSED)

    def _leave(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)
