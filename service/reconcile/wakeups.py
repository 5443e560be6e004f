"""What the engine has been told to look at, and by when: the monitor's news, retries, and what was busy the last time.

A wake-up is never believed: it only says which interfaces may have changed. Looking at them does not belong in here.
"""

import asyncio
import time

import structlog

from service.domain.errors import TunledgerError
from service.domain.values import InterfaceId
from service.reconcile.applying import Applying
from service.reconcile.hands import News
from service.reconcile.journal import Journal
from service.reconcile.locks import Locks
from service.reconcile.troubles import Troubles

log = structlog.get_logger("tunledger.engine")


class Wakeups:
    """For the event loop's thread.

    Attributes:
        wake: something is due; `touched` knows what.
        everything_due: any interface may have changed.
    """

    def __init__(self, *, journal: Journal, applying: Applying, troubles: Troubles) -> None:
        self._journal, self._applying, self._troubles = journal, applying, troubles
        self.wake = asyncio.Event()
        self.everything_due = False
        self.locks = Locks(self._freed)
        self._later: set[InterfaceId] = set()  # heard of while a command was under way on them
        self._news = False  # the monitor has heard of something

    def look_again(self) -> None:
        """Have everything looked at soon."""
        self.everything_due = True
        self.wake.set()

    def heard(self) -> None:
        """From any thread, if `wake` is set afterwards: the monitor has news."""
        self._news = True

    def wake_for_news(self) -> None:
        """Wake for what was heard while nobody could be woken."""
        if self._news:
            self.wake.set()

    def _freed(self) -> None:
        if self._later:
            self.wake.set()  # somebody changed what was under way

    async def touched(self) -> dict[InterfaceId, str] | None:
        """Interfaces to look at, with the cause where one is known; None if it may be any."""
        known = self._journal.state.interfaces
        causes: dict[InterfaceId, str] = {}
        if self._news:
            self._news = False
            try:
                news: News = await self._applying.run(
                    self._applying.hands.monitor.take
                )  # there, where its own doing is settled by now
            except TunledgerError:
                self._news = True  # it tells again only once this was taken
                raise
            if news.lost:
                log.warning("messages of the kernel were lost: everything is looked at")
                self.everything_due = True
            for place, token in (*news.changed.items(), *news.gone.items()):
                if token.node == self._journal.node and token.interface_id in known:
                    causes[token.interface_id] = news.moved.get(place, "outside")
            for name in news.names:
                interface = self._journal.state.find(name)
                if interface is not None:
                    causes.setdefault(interface.id, "outside")
            if news.namespaces:
                inside = {i.id: i.netns for i in known.values() if i.netns in news.namespaces}
                causes |= {each: news.namespaces[netns] for each, netns in inside.items() if netns is not None}
                self._troubles.hurry(inside)  # what failed for want of it has no reason to wait
        for each in (*self._later, *self._troubles.due(time.monotonic())):
            causes.setdefault(each, "outside")
        self._later = {each for each in causes if self._is_busy(each)}
        if self.everything_due:
            return None
        return {each: cause for each, cause in causes.items() if each in known and each not in self._later}

    def _is_busy(self, interface_id: InterfaceId) -> bool:
        interface = self._journal.state.interfaces.get(interface_id)
        return interface is not None and self.locks.busy(interface.name)

    def next_retry_s(self) -> float | None:
        """Seconds until the next repair that failed is due again; None if there is none."""
        due = self._troubles.next_try() if self._journal.frozen is None else None
        return max(0.0, due - time.monotonic()) if due is not None else None
