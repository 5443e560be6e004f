"""From a request to a command under way: gives it an id, remembers who sent it, and records a refusal of it.

Shared by all APIs, so that a command is the same thing whichever way it came.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.api.access import Caller
from service.api.bodies import Defaults
from service.domain import commands as cmd
from service.domain.errors import TunledgerError
from service.domain.values import CommandId
from service.reconcile.engine import Answer, Clock, Engine


@dataclass(slots=True)
class Named:
    """The interface a request is about, as far as it is known when it is refused."""

    name: str


class Orders:
    """What the routes work with: the engine, the configured defaults, and ids."""

    def __init__(self, engine: Engine, clock: Clock, defaults: Defaults) -> None:
        self.engine, self.defaults = engine, defaults
        self._clock = clock
        self._recording: set[asyncio.Task[None]] = set()

    def begin(self, kind: str, via: str, who: Caller) -> "Order":
        """A new command of this kind, not yet parsed."""
        request = cmd.Request(via=via, peer=who.peer, user=who.user)
        return Order(self, kind, CommandId(self._clock.new_id()), who.actor, request)

    def record(self, order: "Order", name: str, refusal: TunledgerError) -> None:
        """Have a refusal recorded; the client need not wait for the disk to hear of it."""
        work = self.engine.reject(refusal, name, order.kind, order.actor, order.command_id, order.request)
        task = asyncio.get_running_loop().create_task(work)
        self._recording.add(task)
        task.add_done_callback(self._recording.discard)


@dataclass(frozen=True, slots=True)
class Order:
    """One command on its way in."""

    orders: Orders
    kind: str
    command_id: CommandId
    actor: str
    request: cmd.Request

    @contextmanager
    def recorded(self, name: str) -> Iterator[Named]:
        """Record what is refused inside: a body that does not parse, an interface that is not there."""
        named = Named(name)
        try:
            yield named
        except TunledgerError as refusal:
            self.orders.record(self, named.name, refusal)
            raise

    async def submit(self, command: cmd.Command) -> Answer:
        """Carry the command out. Raises TunledgerError."""
        return await self.orders.engine.submit(cmd.Submission(command, self.command_id, self.actor, self.request))
