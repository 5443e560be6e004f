"""Brings the host to what the log says: at the start, and at every wake-up, by the same road.

    reconcile   look at everything -> remove orphans -> finish what is pending -> mend what differs
    start_up    the same, with the start itself and a summary of it in the log

An intent that a crash left pending is finished here too. When to reconcile is the loop's to say, and what a command
does is `finishing`'s.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import structlog

from service import failpoints
from service.domain import events as ev
from service.domain.errors import TunledgerError
from service.domain.observed import Observed
from service.domain.state import Interface
from service.domain.values import CommandId, InterfaceId
from service.reconcile.applying import Applying
from service.reconcile.converge import Result
from service.reconcile.finishing import Finishing
from service.reconcile.journal import Journal
from service.reconcile.locks import Locks
from service.reconcile.mending import Mending
from service.reconcile.orphans import Orphans
from service.reconcile.summary import Summary
from service.reconcile.troubles import Troubles

log = structlog.get_logger("tunledger.engine")


class Reconciling:
    """For the event loop's thread.

    Attributes:
        trusted: start-up has looked, and found no link that the log should know and does not.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        locks: Locks,
        applying: Applying,
        finishing: Finishing,
        orphans: Orphans,
        mending: Mending,
        troubles: Troubles,
        boot_id: str,
    ) -> None:
        self._journal, self._locks, self._applying, self._troubles = journal, locks, applying, troubles
        self._finishing, self._orphans, self._mending = finishing, orphans, mending
        self._boot_id = boot_id
        self._previous_boot, self._previous_stop = journal.state.boot_id, journal.state.stopped
        self.trusted = False

    async def start_up(self, started: ev.ServiceStarted) -> Summary:
        """Record the start, then bring the host to what the log says, and record the summary.

        Raises:
            TunledgerError: if the host could not be looked at, or the log not be written. It may be tried again.
        """
        if self._journal.frozen is not None:
            return Summary()
        begun = time.monotonic_ns()
        failpoints.reach("engine.start_up.before")
        settled = [i for i in self._journal.state.interfaces.values() if i.pending is None]
        looked = await self._applying.look_at_all(settled)
        _orphans, unheard = await self._orphans.undeclared(looked[0])
        if unheard:
            named = ", ".join(f"{link.key} (ifindex {link.ifindex})" for link in unheard)
            self._journal.freeze(
                f"the log has never heard of {named}, which carry this node's token: it has lost its end, or is an "
                "older copy. Nothing is changed. Restore the whole log; or, if this one is to count, remove them "
                "(ip link delete) and restart"
            )
            return Summary()
        again, self.trusted = self.trusted, True
        await self._journal.append([self._journal.of_node(started)])
        failpoints.reach("engine.start_up.recorded")
        if self._previous_boot is not None and self._previous_boot != self._boot_id:
            cause = "reboot"
        elif self._previous_stop is not None:
            cause = "shutdown"
        else:
            cause = "unknown"
        # On another try commands are taken already: then it is looked again, with their names' locks held.
        summary = await self.reconcile(cause=cause, starting=True, looked=None if again else looked)
        failpoints.reach("engine.start_up.reconciled")
        body = ev.StartupReconciled(
            took_us=(time.monotonic_ns() - begun) // 1000,
            recreated=summary.recreated,
            repaired=summary.repaired,
            adopted=summary.adopted,
            orphans_removed=summary.orphans_removed,
            finished=summary.finished,
            processing_resumed=summary.processing_resumed,
            failed=summary.failed,
        )
        await self._journal.append([self._journal.of_node(body)])
        failpoints.reach("engine.start_up.after")
        return summary

    async def reconcile(
        self,
        *,
        cause: str = "unknown",
        causes: Mapping[InterfaceId, str] | None = None,
        only: frozenset[InterfaceId] | None = None,
        starting: bool = False,
        looked: "tuple[Observed, list[Result]] | None" = None,
        asked: bool = False,
    ) -> Summary:
        """Look at all interfaces (or some), and mend what differs. Those with a command under way are left to it.

        Args:
            cause: of what is found, where `causes` does not say.
            starting: what is missing is made even where drift is only to be reported: a reboot is nobody's choice.
            looked: a look at everything from just now, while nobody else could do anything.
            asked: somebody wants it: drift that is only to be reported is mended too.

        Raises:
            TunledgerError: if the host could not be looked at, or what was found could not be recorded: then
                nothing was changed either.
        """
        summary = Summary()
        self._troubles.keep_only(i.id for i in self._journal.state.interfaces.values() if i.pending is None)
        if self._journal.frozen is not None:
            return summary
        chosen = [i for i in self._journal.state.interfaces.values() if only is None or i.id in only]
        # Who asks waits for what is under way; it may be a look of our own that would not mend this.
        free = chosen if asked else [i for i in chosen if not self._locks.busy(i.name)]
        async with self._locks.hold([i.name for i in free]):
            # What was free may have changed while the locks were taken.
            present = [self._journal.state.interfaces[i.id] for i in free if i.id in self._journal.state.interfaces]
            settled = [i for i in present if i.pending is None]
            if only is not None:
                wanted = [self._applying.wanted(i.id, i.name, i.spec) for i in settled]
                found: list[Result] = []
                if wanted:
                    found = await self._applying.inspect(wanted)
            else:
                pending = self._whole([i for i in present if i.pending is not None])
                observed, found = looked if looked is not None else await self._applying.look_at_all(settled)
                if await self._orphans.remove(observed, summary) or pending:
                    await self._recover(pending, summary)
                    _, found = await self._applying.look_at_all(settled)
            await self._mending.mend(found, cause, causes or {}, summary, starting=starting, asked=asked)
        return summary

    def _whole(self, pending: Sequence[Interface]) -> list[Interface]:
        """Those whose commands are here with all of their interfaces: the others have to wait, and share one fate."""
        known = Counter(_command_of(i) for i in self._journal.state.interfaces.values() if i.pending is not None)
        here = Counter(_command_of(i) for i in pending)
        return [i for i in pending if here[_command_of(i)] == known[_command_of(i)]]

    async def _recover(self, interfaces: Sequence[Interface], summary: Summary) -> None:
        """Finish intents that have no outcome yet; those of one command together."""
        commands: dict[CommandId, list[Interface]] = {}
        for interface in interfaces:
            assert interface.pending is not None
            commands.setdefault(interface.pending.command_id, []).append(interface)
        for command_id, group in commands.items():
            pending = group[0].pending
            assert pending is not None
            wanted = [
                self._applying.wanted(
                    i.id, i.name, i.wanted, netns=i.netns, before=i.spec.netns if i.spec is not None else ...
                )
                for i in group
            ]
            names = [i.name for i in group]
            failpoints.reach("engine.recover.before")
            try:
                await self._finishing.finish(
                    command_id, pending.actor, pending.request, wanted, "recovery", time.monotonic_ns()
                )
                failpoints.reach("engine.recover.after")
                summary.finished += names
            except TunledgerError as error:
                log.error("a pending command failed", command_id=command_id, names=names, error=error.message)
                summary.failed += names


def _command_of(interface: Interface) -> CommandId | None:
    return interface.pending.command_id if interface.pending is not None else None
