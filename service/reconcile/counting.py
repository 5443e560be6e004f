"""Reads all counters and stores them: lifetime totals that go on over every incarnation of a link.

For the event loop's thread. The figures are the kernel's and the workers'; how they become totals is `domain.counters`,
how long samples are kept `store.counters`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from service import failpoints
from service.domain.counters import Book, Reading, Source, kernel_reading, worker_reading
from service.domain.observed import ObservedLink, one_each
from service.domain.values import InterfaceId, NodeId
from service.reconcile.answer import Clock
from service.reconcile.converge import Result
from service.reconcile.hands import Hands
from service.store import answers
from service.store.counters import CounterKeeper
from service.store.writer import Job, LogWriter


class Counting:
    """Args:
    book: the totals, as loaded from the database; changed in here and nowhere else.
    apply: runs a job in the applier's thread.
    """

    def __init__(
        self,
        *,
        node: NodeId,
        boot_id: str,
        book: Book,
        keeper: CounterKeeper,
        hands: Hands,
        writer: LogWriter,
        clock: Clock,
        apply: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        self._node, self._boot_id, self.book, self._keeper = node, boot_id, book, keeper
        self._hands, self._writer, self._clock, self._apply = hands, writer, clock, apply
        self._sampling = asyncio.Lock()
        self._sampled = 0.0

    async def sample(self, keys: Callable[[], Mapping[InterfaceId, str]], *, at_most_every_s: float = 0.0) -> None:
        """Read all counters and store them; durable when it returns.

        Args:
            keys: of the links of the declared interfaces, by id (`observed.link_key`), as they are when the counters
                have been read.
            at_most_every_s: do nothing if the last sample is younger than this.

        Raises:
            TunledgerError: the kernel's or the log's refusal.
        """
        async with self._sampling:
            if time.monotonic() - self._sampled < at_most_every_s:
                return
            failpoints.reach("counting.sample.before")
            links: list[ObservedLink] = await self._apply(self._hands.kernel.sample)
            declared = keys()
            readings = [
                self.book.take(
                    kernel_reading(link.token.interface_id, self._boot_id, link.ifindex, link.counters, link.netns)
                )
                for link in one_each(links, self._node, declared)
                if link.token is not None
            ]
            for device, figures in self._hands.dataplane.counters().items():
                reading = worker_reading(InterfaceId(device), figures.session, figures.from_kernel, figures.to_kernel)
                if reading.interface_id in declared:
                    readings.append(self.book.take(reading))
            failpoints.reach("counting.sample.read")
            await self.keep(readings)
            failpoints.reach("counting.sample.stored")
            old = self._clock.before(answers.KEPT.total_seconds())
            # One after the other, so that a command that comes meanwhile waits for one bite at most.
            for bite in (*self._keeper.tend(self._clock.now()), answers.thin(old)):
                await asyncio.wrap_future(self._writer.run(bite))
            failpoints.reach("counting.sample.after")
            self._sampled = time.monotonic()

    def totals(self, interface_id: InterfaceId) -> dict[str, dict[str, int]]:
        """Lifetime totals by source, as of the last sample."""
        return {source.value: self.book.totals(interface_id, source) for source in Source}

    def let_go(self, results: Sequence[Result]) -> list[Reading]:
        """The last figures of links and devices that converging let go of, taken into the totals."""
        readings: list[Reading] = []
        for result in results:
            if result.last_link is not None:
                link = result.last_link
                readings.append(
                    kernel_reading(result.wanted.id, self._boot_id, link.ifindex, link.counters, link.netns)
                )
            if result.last_figures is not None:
                last = result.last_figures
                readings.append(worker_reading(result.wanted.id, last.session, last.from_kernel, last.to_kernel))
        return [self.book.take_last(reading) for reading in readings]

    def job(self, readings: Sequence[Reading]) -> Job | None:
        """What stores these figures, for the writer; None if there are none."""
        if not readings:
            return None
        totals = {interface_id: self.totals(interface_id) for interface_id in {r.interface_id for r in readings}}
        return self._keeper.store(readings, totals, self._clock.now())

    async def keep(self, readings: Sequence[Reading]) -> None:
        """Store these figures; durable when it returns. Raises TunledgerError: the log's refusal."""
        job = self.job(readings)
        if job is not None:
            await asyncio.wrap_future(self._writer.run(job))
