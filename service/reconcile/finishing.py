"""From an intent to its outcome: append, converge, undo what failed, record what came of it, make the reply.

Commands, take-backs and the recovery of what a crash left pending all come through here. Whether an intent may be at
all was decided before; looking for drift does not belong in here.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import structlog

from service import failpoints
from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.decide import intended
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.state import Interface
from service.domain.steps import StopProcessing
from service.domain.values import CommandId
from service.reconcile.answer import Answer, Finished, Renderer
from service.reconcile.applying import Applying
from service.reconcile.converge import Result, Wanted
from service.reconcile.counting import Counting
from service.reconcile.journal import Journal
from service.reconcile.troubles import BACK_OFF_FIRST_S, Troubles
from service.store import answers
from service.store.writer import Job

log = structlog.get_logger("tunledger.engine")


class Finishing:
    """For the event loop's thread; the locks of the interfaces' names are held by the caller.

    Args:
        look_again: has everything looked at soon.
        deadline_set: there is one more deadline to watch.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        applying: Applying,
        counting: Counting,
        troubles: Troubles,
        render: Renderer,
        look_again: Callable[[], None],
        deadline_set: Callable[[], None],
    ) -> None:
        self._journal, self._applying, self._counting, self._troubles = journal, applying, counting, troubles
        self._render, self._look_again, self._deadline_set = render, look_again, deadline_set

    async def intend_and_finish(
        self, submission: cmd.Submission, intents: Sequence[ev.Intent], accepted: "asyncio.Future[None] | None"
    ) -> Answer:
        """Append the intents, in one transaction, and bring them to their outcome. Raises as `finish`."""
        wanted = [self.wanted_by(intent) for intent in intents]
        drafts = []
        for intent in intents:
            before = self._journal.state.interfaces.get(intent.interface_id)
            drafts.append(
                self._journal.draft(
                    ev.interface_stream(intent.interface_id),
                    intent,
                    actor=submission.actor,
                    command_id=submission.command_id,
                    expected_version=before.version if before is not None else 0,
                )
            )
        request, also = submission.request, None
        if request.key:
            also = answers.opened(
                submission.actor, request.key, request.fingerprint, submission.command_id, self._journal.now()
            )
        failpoints.reach("engine.intent.before")
        await self._journal.append(drafts, also)
        failpoints.reach("engine.intent.after")
        if accepted is not None and not accepted.done():
            accepted.set_result(None)
        return await self.finish(
            submission.command_id, submission.actor, request, wanted, "command", time.monotonic_ns()
        )

    async def finish(
        self,
        command_id: CommandId,
        actor: str,
        request: cmd.Request,
        wanted: Sequence[Wanted],
        by: ev.FinishedBy,
        started: int,
    ) -> Answer:
        """Bring the pending intents of one command to their outcome: all applied and verified, or all undone."""
        created = {w.id: self._journal.state.interfaces[w.id].spec is None for w in wanted}
        results = await self._applying.converge(wanted)
        counted = self._counting.job(self._counting.let_go(results))  # at once: a later sample comes after these
        waiting = {result.wanted.id: result.error for result in results if self._waits(result)}
        failed = next((r for r in results if r.error is not None and r.wanted.id not in waiting), None)
        error = failed.error if failed is not None else None
        undone = await self._undo(wanted) if error is not None else True
        took_us = (time.monotonic_ns() - started) // 1000
        drafts = [
            self._journal.draft(
                ev.interface_stream(result.wanted.id),
                _outcome(result, failed, by, took_us, undone=undone),
                actor=actor,
                command_id=command_id,
            )
            for result in results
        ]
        drafts += [] if error is not None else [self._waiting(result) for result in results if result.error is not None]
        links = {r.wanted.id: r.link if r.wanted.spec is not None and r.error is None else None for r in results}

        def finished() -> tuple[Finished, ...]:
            return tuple(
                Finished(
                    w.name,
                    w.id,
                    created[w.id],
                    self._after(w, error),
                    links[w.id],
                    str(waiting.get(w.id) or ""),
                )
                for w in wanted
            )

        told = finished()
        jobs = [counted] if counted is not None else []
        if request.key:
            jobs.append(self.closed(actor, command_id, request, told, error))
        failpoints.reach("engine.outcome.before")
        try:
            await self._journal.append(drafts, _together(jobs))
        except TunledgerError as trouble:
            asyncio.get_running_loop().call_later(BACK_OFF_FIRST_S, self._look_again)
            raise TunledgerError(
                ErrorCode.OUTCOME_UNKNOWN,
                f"command {command_id} was carried out, but its outcome could not be recorded yet: {trouble.message}; "
                "it is finished as soon as the log can be written",
                retry=True,
            ) from trouble
        failpoints.reach("engine.outcome.after")
        names = [w.name for w in wanted]
        if error is not None:
            self._troubles.keep_only(self._journal.state.interfaces)
            if not undone:  # what is left is an orphan, or drift
                asyncio.get_running_loop().call_later(BACK_OFF_FIRST_S, self._look_again)
            log.warning("command failed", command_id=command_id, names=names, error=error.message)
            if request.key:
                return Answer(command_id, told, self._render(request, command_id, told, error))
            raise error
        for each in wanted:
            self._troubles.forget(each.id)
            if (why := waiting.get(each.id)) is not None:
                self._troubles.failed(each.id, why, time.monotonic(), self._journal.now())
            if each.spec is None:
                self._counting.book.forget(each.id)
        if request.confirm_by:
            self._deadline_set()
        log.info("command applied", command_id=command_id, names=names, by=by, took_us=took_us)
        reply = self._render(request, command_id, told, None) if request.key else None
        return Answer(command_id, told, reply)

    def _waits(self, result: Result) -> bool:
        """Whether all that is left to do waits for a network namespace that has gone.

        An interface that was applied there before can be changed meanwhile: nothing of it is on the host that could
        differ, and it is made as it is desired then as soon as the namespace is back. Until then it is degraded.
        """
        wanted, before = result.wanted, self._journal.state.interfaces[result.wanted.id].spec
        if result.error is None or result.error.code is not ErrorCode.NETNS_MISSING:
            return False
        return before is not None and wanted.spec is not None and before.netns == wanted.spec.netns

    def _waiting(self, result: Result) -> ev.Draft:
        """That an interface is not as the command has it, and why."""
        wanted, error = result.wanted, result.error
        assert error is not None
        body = ev.RepairFailed(
            interface_id=wanted.id,
            name=wanted.name,
            code=error.code.value,
            message=error.message,
            errno=error.errno_name,
        )
        return self._journal.draft(ev.interface_stream(wanted.id), body)

    def _after(self, wanted: Wanted, error: TunledgerError | None) -> Interface | None:
        """The interface as the outcome that is about to be recorded leaves it."""
        interface = self._journal.state.interfaces[wanted.id]
        if error is not None:
            return msgspec.structs.replace(interface, pending=None) if interface.spec is not None else None
        if wanted.spec is None:
            return None
        generation = interface.generation + (wanted.spec != interface.spec)
        return msgspec.structs.replace(interface, spec=wanted.spec, pending=None, generation=generation)

    def closed(
        self,
        actor: str,
        command_id: CommandId,
        request: cmd.Request,
        finished: Sequence[Finished],
        error: TunledgerError | None,
    ) -> Job:
        """What keeps the reply to a request with an Idempotency-Key, for the writer."""
        reply = self._render(request, command_id, finished, error)
        return answers.closed(actor, request.key, request.fingerprint, command_id, self._journal.now(), reply)

    async def _undo(self, wanted: Sequence[Wanted]) -> bool:
        """Bring the host back to what it was before pending intents; whether that worked."""
        failpoints.reach("engine.undo.before")
        before = self._journal.state.interfaces
        previous = [
            self._applying.wanted(w.id, w.name, before[w.id].spec, netns=w.netns, before=w.netns) for w in wanted
        ]
        results = await self._applying.converge(previous)
        failpoints.reach("engine.undo.after")
        for result in results:
            if result.error is not None:
                log.error("could not undo", name=result.wanted.name, error=result.error.message)
                self._troubles.failed(result.wanted.id, result.error, time.monotonic(), self._journal.now())
        # Of what lived in a namespace that has gone, nothing is left that could be undone.
        return all(result.error is None or result.error.code is ErrorCode.NETNS_MISSING for result in results)

    def wanted_by(self, intent: ev.Intent) -> Wanted:
        """What an intent wants of its interface."""
        before = self._journal.state.interfaces.get(intent.interface_id)
        return self._applying.wanted(
            intent.interface_id,
            intent.name,
            intended(intent, before),
            fresh=before is None,
            netns=before.netns if before is not None else None,
            before=before.spec.netns if before is not None and before.spec is not None else ...,
        )


def _outcome(result: Result, failed: Result | None, by: ev.FinishedBy, took_us: int, *, undone: bool) -> ev.Outcome:
    """The outcome for one interface of a command; where one fails, all fail with its reason."""
    wanted = result.wanted
    if failed is None:
        return ev.CommandApplied(
            interface_id=wanted.id,
            name=wanted.name,
            by=by,
            took_us=took_us,
            # Of one that waits for its namespace only what the worker did was done.
            steps=[str(step) for step in result.steps if result.error is None or isinstance(step, StopProcessing)],
        )
    error = failed.error
    assert error is not None
    because = "" if failed is result else f"undone, because {failed.wanted.name} failed: "
    return ev.CommandFailed(
        interface_id=wanted.id,
        name=wanted.name,
        by=by,
        took_us=took_us,
        code=error.code.value,
        message=because + error.message,
        errno=error.errno_name,
        undone=undone,
    )


def _together(jobs: Sequence[Job]) -> Job | None:
    """Several jobs as one; a job alone stays what it is, and can be joined with those of others."""
    if len(jobs) < 2:
        return jobs[0] if jobs else None

    def write(connection: Any) -> None:
        for job in jobs:
            job(connection)

    return write
