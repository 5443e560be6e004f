"""What the engine has done on the host: in the applier's thread or the remover's, and awaited here.

Commands that wait at the same time are surveyed for in one look and converged in one batch, those that remove one
interface in another. How that is done is `converge`'s; what is to be done, and what of it is recorded, does not belong
in here either.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import EllipsisType
from typing import TypeVar

from service.domain.errors import TunledgerError
from service.domain.observed import Host, Observed
from service.domain.plan import Sight
from service.domain.spec import InterfaceSpec
from service.domain.state import Interface
from service.domain.token import Token
from service.domain.values import InterfaceId, InterfaceName, NodeId
from service.reconcile.applier import Applier
from service.reconcile.converge import Result, Wanted, compare, converge_each, inspect, look, sights
from service.reconcile.crossing import Crossing
from service.reconcile.hands import Hands

REMOVED_MAX = 64  # interfaces in one removal; a look at everything, and all behind it, wait for no more

Survey = tuple[tuple[str, ...], bool]  # keys of links, and whether the networks in use are wanted too
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Remover:
    """A second applier, with hands of its own, for interfaces that are to go: the kernel lets a link go only when no
    processor can be using it any more (synchronize_net in net/core/dev.c, some 20 ms), and others need not wait for it.

    What is removed has its name's lock held, so nobody else has anything to do with it meanwhile.
    """

    applier: Applier
    hands: Hands


class Applying:
    """For the event loop's thread. What goes wrong is a TunledgerError."""

    def __init__(
        self, *, node: NodeId, applier: Applier, hands: Hands, crossing: Crossing, remover: "Remover | None" = None
    ) -> None:
        self.hands = hands
        self._remover = remover
        self._turn, self._removing = threading.Lock(), threading.Lock()
        self._node, self._applier, self._crossing = node, applier, crossing
        self._formerly: dict[InterfaceId, frozenset[str | None]] = {}

    async def run(self, job: Callable[[], T]) -> T:
        """Do something in the applier's thread."""
        return await self._crossing.result(self._applier.run(job))

    async def run_alone(self, job: Callable[[], T]) -> T:
        """The same for a look at everything: not beside a removal.

        What a removal came to could be known before what was seen ahead of it: a link seen with a token that nothing
        declares any more would be an orphan, and counters that are behind its last ones those of another life.
        """

        done: Future[T] = Future()

        def alone() -> None:
            if not done.set_running_or_notify_cancel():
                return
            with self._apart():
                try:
                    result = job()
                except BaseException as error:  # noqa: BLE001  # it belongs to whoever waits for the job
                    done.set_exception(error)
                else:
                    done.set_result(result)  # on its way to the loop before a removal begins

        self._applier.run(alone)
        return await self._crossing.result(done)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Looks at everything and removals, one at a time and in turn: who waits is next, whoever has it now."""
        with self._turn:
            self._removing.acquire()
        try:
            yield
        finally:
            self._removing.release()

    def wanted(
        self,
        interface_id: InterfaceId,
        name: InterfaceName,
        spec: InterfaceSpec | None,
        *,
        fresh: bool = False,
        netns: str | None = None,
        before: str | EllipsisType | None = ...,
    ) -> Wanted:
        """One interface as it shall be; see `Wanted`.

        Args:
            netns: where to look for one that shall be gone.
            before: the network namespace that it is in until now, if it is in any.
        """
        netns = netns if spec is None else spec.netns
        formerly = self.formerly(interface_id) if self._formerly else frozenset()
        if before is not ...:
            formerly |= {before}
        left = formerly - {netns} if formerly else formerly
        return Wanted(Token(self._node, interface_id), name, spec, fresh, netns, left)

    def formerly(self, interface_id: InterfaceId) -> frozenset[str | None]:
        """The network namespaces that an interface was to be in, where it was changed since the service began."""
        return self._formerly.get(interface_id, frozenset())

    async def survey(self, survey: Survey) -> Host:
        """Who holds some names, and which networks others use."""
        return await self._crossing.result(self._applier.join(self._survey_each, survey))

    def _survey_each(self, surveys: Sequence[Survey]) -> list[Host]:
        """In the applier's thread: one look for all that wait."""
        keys = {key for keys, _networks in surveys for key in keys}
        host = self.hands.kernel.survey(keys, self._node, networks=any(networks for _keys, networks in surveys))
        return [Host(host.occupants, host.networks if networks else (), host.closed) for _keys, networks in surveys]

    async def converge(self, wanted: Sequence[Wanted]) -> list[Result]:
        """Bring interfaces to what is wanted of them, in one batch with all that waits; errors are in the results."""
        for each in wanted:
            if each.formerly:  # from now on it may have left something there
                self._formerly[each.id] = self.formerly(each.id) | each.formerly | {each.netns}
        try:
            if self._remover is not None and len(wanted) == 1 and wanted[0].spec is None:
                return await self._crossing.result(self._remover.applier.join(self._remove_each, wanted))
            return await self._crossing.result(self._applier.join(self._converge_each, wanted))
        except TunledgerError as error:
            return [Result(each, error=error) for each in wanted]

    def _converge_each(self, orders: Sequence[Sequence[Wanted]]) -> list[list[Result]]:
        """In the applier's thread: all that wait as one batch."""
        return converge_each(self.hands, orders)

    def _remove_each(self, orders: Sequence[Sequence[Wanted]]) -> list[list[Result]]:
        """In the remover's thread: all that wait as one batch."""
        assert self._remover is not None
        results: list[list[Result]] = []
        for first in range(0, len(orders), REMOVED_MAX):
            with self._apart():
                results += converge_each(self._remover.hands, orders[first : first + REMOVED_MAX])
        return results

    async def inspect(self, wanted: Sequence[Wanted]) -> list[Result]:
        """What differs of these interfaces now."""
        found, _ = await self.run(lambda: inspect(self.hands, wanted))
        return found

    async def look_at_all(self, interfaces: Sequence[Interface]) -> tuple[Observed, list[Result]]:
        """All that there is on the host, and what differs of these interfaces."""
        wanted = [self.wanted(i.id, i.name, i.spec) for i in interfaces]

        def look_at_all() -> tuple[Observed, list[Result]]:
            mark = self.hands.monitor.drain()
            observed = self.hands.kernel.observe()
            seen = sights(wanted, observed, self.hands.dataplane.attached(), self.hands.monitor)
            return observed, compare(self.hands, mark, wanted, seen)

        return await self.run_alone(look_at_all)

    async def observe(self, interfaces: Sequence[Interface]) -> dict[InterfaceId, Sight]:
        """What there is of these interfaces now."""
        wanted = [self.wanted(i.id, i.name, i.wanted, netns=i.netns) for i in interfaces]
        seen, _ = await self.run(lambda: look(self.hands, wanted))
        return seen
