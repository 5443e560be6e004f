"""The engine's end of the log: what is desired as the log has it, and the one way to add to it.

Desired state changes in one place, `recorded`, when the writer has made events durable, in their order. Whether
anything may be changed at all is said here too. What an event is about, and when there is to be one, does not belong in
here.
"""

from collections.abc import Sequence

import structlog

from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.state import State, evolve
from service.domain.values import CommandId, NodeId
from service.reconcile.answer import Clock
from service.reconcile.crossing import Crossing
from service.store.writer import Job, LogWriter

SYSTEM = "system"  # the actor of what nobody asked for

log = structlog.get_logger("tunledger.engine")


class Journal:
    """For the event loop's thread.

    Attributes:
        state: as folded from all that was recorded.
        frozen: why nothing may be changed (an unreadable or unverifiable log), or None.
    """

    def __init__(
        self,
        *,
        node: NodeId,
        state: State,
        writer: LogWriter,
        clock: Clock,
        crossing: Crossing,
        frozen: TunledgerError | None,
    ) -> None:
        self.node, self.state, self.frozen = node, state, frozen
        self._writer, self._clock, self._crossing = writer, clock, crossing

    def recorded(self, events: Sequence[ev.Recorded]) -> None:
        """Take in what the writer has made durable."""
        try:
            for event in events:
                evolve(self.state, event)
        except TunledgerError as error:  # what is in the log must make sense, or nothing may rest on it any more
            self.freeze(error.message)

    def freeze(self, reason: str) -> None:
        """From now on nothing is changed: the log turned out not to be what it should."""
        log.error("read-only from now on", reason=reason)
        self.frozen = TunledgerError(ErrorCode.LOG_CORRUPT, reason)

    def refuse_if_frozen(self) -> None:
        """Raises TunledgerError: that nothing may be changed, and why."""
        if self.frozen is not None:
            raise TunledgerError(self.frozen.code, f"read-only: {self.frozen.message}", retry=self.frozen.retry)

    async def append(self, drafts: Sequence[ev.Draft], also: Job | None = None) -> None:
        """Add events, and do a job of the database's with them, in one transaction; durable when it returns.

        Raises:
            TunledgerError: the log's refusal.
        """
        if drafts:
            await self._crossing.result(self._writer.append(drafts, also))
        elif also is not None:
            await self._crossing.result(self._writer.run(also))

    def draft(
        self,
        stream: str,
        body: ev.Event,
        *,
        actor: str = SYSTEM,
        command_id: CommandId | None = None,
        expected_version: int | None = None,
    ) -> ev.Draft:
        """An event to append, with an id of its own."""
        return ev.Draft(
            event_id=self.new_id(),
            stream=stream,
            body=body,
            actor=actor,
            command_id=command_id,
            expected_version=expected_version,
        )

    def of_node(self, body: ev.Event) -> ev.Draft:
        """An event of the node itself."""
        return self.draft(ev.node_stream(self.node), body)

    def new_id(self) -> str:
        """A new UUIDv7."""
        return self._clock.new_id()

    def now(self) -> str:
        """UTC, as events are stamped."""
        return self._clock.now()

    def seconds_until(self, stamp: str) -> float:
        """How long until such a time; negative if it is past."""
        return self._clock.seconds_until(stamp)

    def elapsed_s(self) -> float:
        """Seconds on a clock that nobody sets."""
        return self._clock.elapsed_s()
