"""Changes that await confirmation: confirmed in time they stay, else they are taken back.

A take-back is an intent like any other, and comes to its outcome as all do (`finishing`). Which change awaits what is
desired state, folded from the log; which of them may be confirmed is `decide`'s.

The log has a deadline as wall time, which is what counts after a restart. A process that has seen it once goes by a
clock that nobody sets: who sets the host's time neither delays a take-back nor brings it on.
"""

import time

import structlog

from service import failpoints
from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.decide import confirm, take_back
from service.domain.errors import TunledgerError
from service.domain.state import Unconfirmed
from service.domain.values import CommandId
from service.reconcile.answer import Renderer
from service.reconcile.finishing import Finishing
from service.reconcile.journal import SYSTEM, Journal
from service.reconcile.locks import Locks
from service.reconcile.troubles import BACK_OFF_FIRST_S, BACK_OFF_MAX_S
from service.store.answers import Reply

log = structlog.get_logger("tunledger.engine")


class Deadlines:
    """For the event loop's thread."""

    def __init__(self, *, journal: Journal, locks: Locks, finishing: Finishing, render: Renderer) -> None:
        self._journal, self._locks, self._finishing, self._render = journal, locks, finishing, render
        self._take_backs: dict[CommandId, tuple[int, float]] = {}  # that failed: how often, and when to try again
        self._due: dict[CommandId, float] = {}  # on the clock of `elapsed_s`

    def note(self) -> None:
        """From now on those deadlines that are known now are kept, whatever the host's time is set to."""
        waiting = {awaiting.command_id: awaiting for awaiting in self._journal.state.unconfirmed.values()}
        self._due = {each: at for each, at in self._due.items() if each in waiting}
        for each, awaiting in waiting.items():
            if each not in self._due:
                # The wall's clock first: what passes between the two looks makes it late, never early.
                left_s = self._journal.seconds_until(awaiting.confirm_by)
                self._due[each] = self._journal.elapsed_s() + left_s

    def _left_s(self, awaiting: Unconfirmed) -> float:
        """How long it may still be confirmed; not over 0 once it is to be taken back."""
        return self._due[awaiting.command_id] - self._journal.elapsed_s()

    async def confirm(self, submission: cmd.Submission) -> Reply:
        """Make a change stay. Raises TunledgerError: not_awaiting."""
        request, command_id = submission.request, submission.command_id
        names = [u.name for u in self._journal.state.unconfirmed.values() if u.command_id == request.confirms]
        async with self._locks.hold(names):
            try:
                confirmed = confirm(self._journal.state, request.confirms, request)
            except TunledgerError as refusal:
                if request.key:  # heard now as by every repetition
                    await self._journal.append(
                        [], self._finishing.closed(submission.actor, command_id, request, (), refusal)
                    )
                    return self._render(request, command_id, (), refusal)
                raise
            drafts = [
                self._journal.draft(
                    ev.interface_stream(body.interface_id), body, actor=submission.actor, command_id=command_id
                )
                for body in confirmed
            ]
            also = self._finishing.closed(submission.actor, command_id, request, (), None) if request.key else None
            failpoints.reach("engine.confirm.before")
            await self._journal.append(drafts, also)
            failpoints.reach("engine.confirm.after")
        return self._render(request, command_id, (), None)

    async def take_back_overdue(self) -> None:
        """Undo every change that was not confirmed in time."""
        if self._journal.frozen is not None:
            return
        self.note()
        overdue: dict[CommandId, list[Unconfirmed]] = {}
        for awaiting in self._journal.state.unconfirmed.values():
            if self._left_s(awaiting) <= 0 and self._take_back_in_s(awaiting) <= 0:
                overdue.setdefault(awaiting.command_id, []).append(awaiting)
        for command_id, changes in overdue.items():
            log.warning("not confirmed in time: taking back", command_id=command_id, names=[c.name for c in changes])
            request = cmd.Request(
                via="system", call="take_back", reverts=command_id, reason=f"not confirmed by {changes[0].confirm_by}"
            )
            async with self._locks.hold([c.name for c in changes]):
                present = [c for c in changes if self._journal.state.unconfirmed.get(c.name) is c]
                intents = take_back(self._journal.state, present, request, self._journal.new_id)
                if not intents or self._journal.frozen is not None:
                    continue
                submission = cmd.Submission((), CommandId(self._journal.new_id()), SYSTEM, request)
                failpoints.reach("engine.take_back.before")
                try:
                    await self._finishing.intend_and_finish(submission, intents, None)
                    failpoints.reach("engine.take_back.after")
                    self._take_backs.pop(command_id, None)
                except TunledgerError as error:
                    log.error("could not take back; it is tried again", command_id=command_id, error=error.message)
                    failed, _ = self._take_backs.get(command_id, (0, 0.0))
                    delay_s = min(BACK_OFF_MAX_S, 5 * BACK_OFF_FIRST_S * 2.0 ** min(failed, 16))
                    self._take_backs[command_id] = failed + 1, time.monotonic() + delay_s
        waited_for = {awaiting.command_id for awaiting in self._journal.state.unconfirmed.values()}
        self._take_backs = {each: at for each, at in self._take_backs.items() if each in waited_for}

    def _take_back_in_s(self, awaiting: Unconfirmed) -> float:
        """How long until a take-back that failed is tried again; not over 0 where none did."""
        return self._take_backs.get(awaiting.command_id, (0, 0.0))[1] - time.monotonic()

    def next_s(self) -> float | None:
        """Seconds until the next unconfirmed change is due to be taken back; None if there is none."""
        if self._journal.frozen is not None:
            return None
        self.note()
        awaited = [u for u in self._journal.state.unconfirmed.values() if not self._has_pending(u.name)]
        due = [max(self._left_s(u), self._take_back_in_s(u), 0.0) for u in awaited]
        return min(due, default=None)

    def _has_pending(self, name: str) -> bool:
        interface = self._journal.state.find(name)
        return interface is not None and interface.pending is not None
