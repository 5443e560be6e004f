"""The engine: takes commands, keeps desired state, and brings the host to it, each step in the log.

Theory of operation. The engine lives on the event loop and never blocks it: the disk belongs to the log's writer,
the host to the applier, each a thread that answers through futures and does what waits together as one. Desired state
changes in one place, `_recorded`, when the writer has made events durable, in their order. One lock for each interface
name: commands on one interface follow each other, commands on different ones do not wait.

    submit      survey the host -> decide -> append the intent -> converge -> append the outcome -> answer
    reconcile   look at everything -> record what drifted -> converge -> append what came of it

Start-up and every wake-up are `reconcile`; an intent that a crash left pending is finished by it too. A command that
was cut off by its client goes on to its outcome all the same. HTTP does not live here, nor do pragmas or netlink.
"""

import asyncio
import copy
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, assert_never

import msgspec
import structlog

from service import failpoints
from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.counters import Book, Reading
from service.domain.decide import confirm, decide, intended, take_back
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import Host, Observed, ObservedLink
from service.domain.plan import Difference, Sight, differences, leave_be, plan
from service.domain.spec import Drift, InterfaceSpec, Processing
from service.domain.state import Interface, State, Unconfirmed, evolve
from service.domain.steps import StartProcessing, Step
from service.domain.token import Token
from service.domain.values import CommandId, InterfaceId, InterfaceName, NodeId
from service.reconcile.answer import Answer, Clock, Finished, Preview, Renderer
from service.reconcile.applier import Applier
from service.reconcile.converge import (
    Result,
    Wanted,
    compare,
    converge,
    converge_each,
    inspect,
    look,
    remove_orphans,
    sights,
)
from service.reconcile.counting import Counting
from service.reconcile.crossing import Crossing
from service.reconcile.hands import Hands, News
from service.reconcile.keys import Keys, is_settled
from service.reconcile.rejections import Allowance
from service.reconcile.summary import SHOWN_MAX, Summary, few
from service.reconcile.troubles import BACK_OFF_FIRST_S, BACK_OFF_MAX_S, CONTEST_WITHIN_S, Troubles
from service.store import answers
from service.store.answers import Kept, Reply
from service.store.counters import CounterKeeper
from service.store.writer import Job, LogWriter

IN_FLIGHT_MAX = 256  # commands between their arrival and their outcome; more are refused as overloaded
LINE_MAX = 2000  # characters of a log line that tells of many interfaces
SYSTEM = "system"  # the actor of what nobody asked for
Survey = tuple[tuple[InterfaceName, ...], bool]  # names, and whether the networks in use are wanted too

log = structlog.get_logger("tunledger.engine")


class Engine:
    """One per service. All methods are for the event loop's thread unless they say otherwise.

    Args:
        state, book: as folded and loaded from the database, at the same moment.
        render, recall: make and look up replies to requests with an Idempotency-Key.
        publish: gets recorded events, in order, on the event loop.
        knows: which of these interface ids the log has ever declared. May block; it is called in a thread.
        frozen: why nothing may be changed (an unreadable or unverifiable log), or None.
        obstacle: what keeps this process from changing the host now, in words, or None.
        keeper: stores counters; by default one with the default intervals.
    """

    def __init__(
        self,
        *,
        node: NodeId,
        state: State,
        book: Book,
        writer: LogWriter,
        applier: Applier,
        hands: Hands,
        clock: Clock,
        boot_id: str,
        render: Renderer,
        recall: Callable[[str, str], Kept | None],
        knows: Callable[[Collection[InterfaceId]], set[InterfaceId]],
        publish: Callable[[list[ev.Recorded]], None] = lambda _events: None,
        frozen: TunledgerError | None = None,
        obstacle: Callable[[], str | None] = lambda: None,
        keeper: CounterKeeper | None = None,
    ) -> None:
        self.node, self.state = node, state
        self._writer, self._applier, self._hands = writer, applier, hands
        self._clock, self._boot_id = clock, boot_id
        self._render, self._publish, self._knows = render, publish, knows
        self._frozen = frozen
        self._keys = Keys(recall, self._spawn)
        self._counting = Counting(
            node=node,
            boot_id=boot_id,
            book=book,
            keeper=keeper if keeper is not None else CounterKeeper(),
            hands=hands,
            writer=writer,
            clock=clock,
            apply=self._apply,
        )
        self._take_backs: dict[CommandId, tuple[int, float]] = {}  # that failed: how often, and when to try again
        self._locks: dict[str, asyncio.Lock] = {}
        self._obstacle = obstacle
        self._complaints: list[str] = []
        self.miscounted: str | None = None  # the same of the last sample
        self.stumbled: str | None = None  # why the last turn of the loop came to nothing, if by a mistake of ours
        self._unheard: dict[str, str] = {}  # links with our token that the log knows nothing of, and what to say
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._rejections = Allowance()
        self._previous_boot, self._previous_stop = state.boot_id, state.stopped
        self.troubles = Troubles()
        self.wake = asyncio.Event()  # something is due: `work` knows what
        self._everything_due = False
        self._later: set[InterfaceId] = set()  # heard of while a command was under way on them
        self._loop: asyncio.AbstractEventLoop | None = None
        self._crossing = Crossing()
        self._news = False  # the monitor has heard of something
        self._trusted = False  # start-up has looked, and found no link that the log should know and does not

    # -- events

    def record(self, events: list[ev.Recorded]) -> None:
        """The writer's callback, in the writer's thread: have the loop take the events in, in order."""
        self._crossing.call(lambda: self._recorded(events))

    def _recorded(self, events: list[ev.Recorded]) -> None:
        try:
            for event in events:
                evolve(self.state, event)
        except TunledgerError as error:  # what is in the log must make sense, or nothing may rest on it any more
            self.freeze(error.message)
        self._publish(events)

    async def _append(self, drafts: Sequence[ev.Draft], also: Job | None = None) -> None:
        if drafts:
            await self._crossing.result(self._writer.append(drafts, also))
        elif also is not None:
            await self._crossing.result(self._writer.run(also))

    def _draft(
        self,
        stream: str,
        body: ev.Event,
        *,
        actor: str = SYSTEM,
        command_id: CommandId | None = None,
        expected_version: int | None = None,
    ) -> ev.Draft:
        return ev.Draft(
            event_id=self._clock.new_id(),
            stream=stream,
            body=body,
            actor=actor,
            command_id=command_id,
            expected_version=expected_version,
        )

    # -- commands

    async def submit(self, submission: cmd.Submission, *, wait: bool = True) -> Answer:
        """Carry out a command to its outcome, also when the caller stops waiting.

        Args:
            wait: False to return as soon as the command is in the log, without an outcome.

        Raises:
            TunledgerError: why it was refused, before anything was done; or why it failed, after all was undone.
                With an Idempotency-Key only what a repetition may change; everything else is in the reply.
        """
        self._refuse_if_closed()
        if len(self._tasks) >= IN_FLIGHT_MAX:
            raise TunledgerError(
                ErrorCode.OVERLOADED, f"{IN_FLIGHT_MAX} commands are being carried out; try again", retry=True
            )
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if submission.request.key:
            work = self._reply_to(submission, accepted)
            task = self._keys.once(submission.actor, submission.request, work)
            if wait or await self._first_is(task, accepted):
                return Answer(submission.command_id, reply=await asyncio.shield(task))
            task.add_done_callback(_heard)
            return Answer(submission.command_id)
        order = self._spawn(self._carry_out(submission, accepted))
        if wait or await self._first_is(order, accepted):
            answer: Answer = await asyncio.shield(order)
            return answer
        order.add_done_callback(_heard)
        return Answer(submission.command_id)

    async def _first_is(self, task: "asyncio.Task[Any]", accepted: "asyncio.Future[None]") -> bool:
        """Whether a task ended before its command was in the log."""
        await asyncio.wait({task, accepted}, return_when=asyncio.FIRST_COMPLETED)
        return not accepted.done()

    async def _reply_to(self, submission: cmd.Submission, accepted: "asyncio.Future[None]") -> Reply:
        try:
            answer = await self._carry_out(submission, accepted)
        except TunledgerError as error:
            if not is_settled(error):
                raise
            return self._render(submission.request, submission.command_id, (), error)
        assert answer.reply is not None
        return answer.reply

    async def preview(self, submission: cmd.Submission) -> Preview:
        """What a command would do, and nothing else: nothing is recorded, counted or changed.

        Raises:
            TunledgerError: the refusal that would come.
        """
        intents = decide(self.state, submission, await self._survey(submission), self._clock.new_id)
        wanted = [self._wanted_by(intent) for intent in intents]

        def look_and_plan() -> list[tuple[InterfaceName, tuple[Difference, ...], tuple[Step, ...]]]:
            seen, _ = look(self._hands, wanted)
            return [
                (
                    each.name,
                    differences(each.token, each.name, each.spec, seen[each.id]),
                    plan(each.token, each.name, each.spec, seen[each.id]),
                )
                for each in wanted
            ]

        return Preview(tuple(intents), tuple(await self._apply(look_and_plan)))

    async def confirm(self, submission: cmd.Submission) -> Reply:
        """Make a change stay that awaits confirmation: the one of command `submission.request.confirms`.

        Raises:
            TunledgerError: not_awaiting.
        """
        self._refuse_if_closed()
        work = self._confirm(submission)
        if submission.request.key:
            return await asyncio.shield(self._keys.once(submission.actor, submission.request, work))
        reply: Reply = await asyncio.shield(self._spawn(work))
        return reply

    async def _confirm(self, submission: cmd.Submission) -> Reply:
        request, command_id = submission.request, submission.command_id
        names = [u.name for u in self.state.unconfirmed.values() if u.command_id == request.confirms]
        async with self._locked(names):
            try:
                confirmed = confirm(self.state, request.confirms, request)
            except TunledgerError as refusal:
                if request.key:  # heard now as by every repetition
                    await self._append([], self._closed(submission.actor, command_id, request, (), refusal))
                    return self._render(request, command_id, (), refusal)
                raise
            drafts = [
                self._draft(ev.interface_stream(body.interface_id), body, actor=submission.actor, command_id=command_id)
                for body in confirmed
            ]
            also = self._closed(submission.actor, command_id, request, (), None) if request.key else None
            failpoints.reach("engine.confirm.before")
            await self._append(drafts, also)
            failpoints.reach("engine.confirm.after")
        return self._render(request, command_id, (), None)

    def _has_pending(self, name: str) -> bool:
        interface = self.state.find(name)
        return interface is not None and interface.pending is not None

    async def take_back_overdue(self) -> None:
        """Undo every change that was not confirmed in time."""
        if self._frozen is not None or self._closing:
            return
        now = self._clock.now()
        overdue: dict[CommandId, list[Unconfirmed]] = {}
        for awaiting in self.state.unconfirmed.values():
            if awaiting.confirm_by <= now and self._take_back_in_s(awaiting) <= 0:
                overdue.setdefault(awaiting.command_id, []).append(awaiting)
        for command_id, changes in overdue.items():
            log.warning("not confirmed in time: taking back", command_id=command_id, names=[c.name for c in changes])
            request = cmd.Request(
                via="system", call="take_back", reverts=command_id, reason=f"not confirmed by {changes[0].confirm_by}"
            )
            async with self._locked([c.name for c in changes]):
                present = [c for c in changes if self.state.unconfirmed.get(c.name) is c]
                intents = take_back(self.state, present, request, self._clock.new_id)
                if not intents or self._frozen is not None:
                    continue
                submission = cmd.Submission((), CommandId(self._clock.new_id()), SYSTEM, request)
                failpoints.reach("engine.take_back.before")
                try:
                    await self._intend_and_finish(submission, intents, None)
                    failpoints.reach("engine.take_back.after")
                    self._take_backs.pop(command_id, None)
                except TunledgerError as error:
                    log.error("could not take back; it is tried again", command_id=command_id, error=error.message)
                    failed, _ = self._take_backs.get(command_id, (0, 0.0))
                    delay_s = min(BACK_OFF_MAX_S, 5 * BACK_OFF_FIRST_S * 2.0 ** min(failed, 16))
                    self._take_backs[command_id] = failed + 1, time.monotonic() + delay_s
        waited_for = {awaiting.command_id for awaiting in self.state.unconfirmed.values()}
        self._take_backs = {each: at for each, at in self._take_backs.items() if each in waited_for}

    def _take_back_in_s(self, awaiting: Unconfirmed) -> float:
        """How long until a take-back that failed is tried again; not over 0 where none did."""
        return self._take_backs.get(awaiting.command_id, (0, 0.0))[1] - time.monotonic()

    def next_deadline_s(self) -> float | None:
        """Seconds until the next unconfirmed change is due to be taken back; None if there is none."""
        if self._frozen is not None:
            return None
        awaited = [u for u in self.state.unconfirmed.values() if not self._has_pending(u.name)]
        due = [max(self._clock.seconds_until(u.confirm_by), self._take_back_in_s(u), 0.0) for u in awaited]
        return min(due, default=None)

    async def reject(
        self, refusal: TunledgerError, name: str, command: str, actor: str, command_id: CommandId, request: cmd.Request
    ) -> None:
        """Record that a command was refused before it was an intent. A flood is recorded as a number.

        Raises:
            TunledgerError: the refusal came with an Idempotency-Key, and could not be kept: it must not be heard, since
                a repetition might hear another.
        """
        if self._frozen is not None or self._closing:
            return
        settled = request.key and is_settled(refusal)
        also = self._closed(actor, command_id, request, (), refusal) if settled else None
        allowed, suppressed = self._rejections.take(time.monotonic())
        body = ev.CommandRejected(
            name=name,
            command=command,
            code=refusal.code.value,
            message=refusal.message,
            field=refusal.field,
            request=request,
            suppressed=suppressed,
        )
        failpoints.reach("engine.reject.before")
        try:
            # A flood is a number in the log, but a key has its answer.
            draft = self._draft(ev.name_stream(name), body, actor=actor, command_id=command_id)
            await self._append([draft] if allowed else [], also)
            failpoints.reach("engine.reject.after")
        except TunledgerError as error:
            log.warning("a refusal could not be recorded", name=name, error=error.message)
            if settled:
                raise

    @property
    def frozen(self) -> str | None:
        """Why nothing may be changed, or None."""
        return self._frozen.message if self._frozen is not None else None

    def freeze(self, reason: str) -> None:
        """From now on nothing is changed: the log turned out not to be what it should."""
        log.error("read-only from now on", reason=reason)
        self._frozen = TunledgerError(ErrorCode.LOG_CORRUPT, reason)

    def _refuse_if_closed(self) -> None:
        if self._frozen is not None:
            frozen = self._frozen
            raise TunledgerError(frozen.code, f"read-only: {frozen.message}", retry=frozen.retry)
        if self._closing:
            raise TunledgerError(ErrorCode.SHUTTING_DOWN, "the service is stopping", retry=True)
        if not self._trusted:
            raise TunledgerError(
                ErrorCode.LOG_UNAVAILABLE,
                "the service has not been able to look at the host yet; try again",
                retry=True,
            )

    async def _carry_out(self, submission: cmd.Submission, accepted: "asyncio.Future[None] | None") -> Answer:
        names = [cmd.target(command) for command in submission.commands]
        keys: list[str] = [*names]
        if submission.request.via == "classic" and isinstance(submission.commands[0], cmd.DeclareInterface):
            keys.append("/classic")  # no interface can have this name: at most one is made by that API at a time
        async with self._locked(keys):
            try:
                intents = decide(self.state, submission, await self._survey(submission), self._clock.new_id)
            except TunledgerError as refusal:
                kind = type(submission.commands[0]).__name__ if len(names) == 1 else "Batch"
                name = names[0] if len(names) == 1 else ""
                await self.reject(refusal, name, kind, submission.actor, submission.command_id, submission.request)
                raise
            return await self._intend_and_finish(submission, intents, accepted)

    async def _intend_and_finish(
        self, submission: cmd.Submission, intents: Sequence[ev.Intent], accepted: "asyncio.Future[None] | None"
    ) -> Answer:
        """Append the intents, in one transaction, and bring them to their outcome. The names' locks are held."""
        wanted = [self._wanted_by(intent) for intent in intents]
        drafts = []
        for intent in intents:
            before = self.state.interfaces.get(intent.interface_id)
            drafts.append(
                self._draft(
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
                submission.actor, request.key, request.fingerprint, submission.command_id, self._clock.now()
            )
        failpoints.reach("engine.intent.before")
        await self._append(drafts, also)
        failpoints.reach("engine.intent.after")
        if accepted is not None and not accepted.done():
            accepted.set_result(None)
        return await self._finish(
            submission.command_id, submission.actor, request, wanted, "command", time.monotonic_ns()
        )

    async def _survey(self, submission: cmd.Submission) -> Host:
        """What the commands are judged against: who holds their names, and which networks others use; without a look
        at the host where neither is asked for.
        """
        names = tuple(cmd.target(command) for command in submission.commands if _may_declare(command))
        networks = any(_may_overlap(command) for command in submission.commands)
        if not names and not networks:
            return Host()
        return await self._crossing.result(self._applier.join(self._survey_each, (names, networks)))

    def _survey_each(self, surveys: Sequence[Survey]) -> list[Host]:
        """In the applier's thread: one look for all that wait."""
        names = {name for names, _networks in surveys for name in names}
        host = self._hands.kernel.survey(names, self.node, networks=any(networks for _names, networks in surveys))
        return [Host(host.occupants, host.networks if networks else ()) for _names, networks in surveys]

    async def _finish(
        self,
        command_id: CommandId,
        actor: str,
        request: cmd.Request,
        wanted: Sequence[Wanted],
        by: ev.FinishedBy,
        started: int,
    ) -> Answer:
        """Bring the pending intents of one command to their outcome: all applied and verified, or all undone."""
        created = {w.id: self.state.interfaces[w.id].spec is None for w in wanted}
        results = await self._converge(wanted)
        counted = self._counting.job(self._counting.let_go(results))  # at once: a later sample comes after these
        failed = next((result for result in results if result.error is not None), None)
        error = failed.error if failed is not None else None
        undone = await self._undo(wanted) if error is not None else True
        took_us = (time.monotonic_ns() - started) // 1000
        drafts = [
            self._draft(
                ev.interface_stream(result.wanted.id),
                _outcome(result, failed, by, took_us, undone=undone),
                actor=actor,
                command_id=command_id,
            )
            for result in results
        ]
        links = {result.wanted.id: result.link for result in results}

        def finished() -> tuple[Finished, ...]:
            return tuple(
                Finished(w.name, w.id, created[w.id], self._after(w, error), links[w.id] if w.spec else None)
                for w in wanted
            )

        told = finished()
        jobs = [counted] if counted is not None else []
        if request.key:
            jobs.append(self._closed(actor, command_id, request, told, error))
        failpoints.reach("engine.outcome.before")
        try:
            await self._append(drafts, _together(jobs))
        except TunledgerError as trouble:
            asyncio.get_running_loop().call_later(BACK_OFF_FIRST_S, self.look_again)
            raise TunledgerError(
                ErrorCode.OUTCOME_UNKNOWN,
                f"command {command_id} was carried out, but its outcome could not be recorded yet: {trouble.message}; "
                "it is finished as soon as the log can be written",
                retry=True,
            ) from trouble
        failpoints.reach("engine.outcome.after")
        names = [w.name for w in wanted]
        if error is not None:
            self.troubles.keep_only(self.state.interfaces)
            if not undone:  # what is left is an orphan, or drift
                asyncio.get_running_loop().call_later(BACK_OFF_FIRST_S, self.look_again)
            log.warning("command failed", command_id=command_id, names=names, error=error.message)
            if request.key:
                return Answer(command_id, told, self._render(request, command_id, told, error))
            raise error
        for each in wanted:
            self.troubles.forget(each.id)
            if each.spec is None:
                self._counting.book.forget(each.id)
        if request.confirm_by:
            self.wake.set()  # there is a deadline to watch
        log.info("command applied", command_id=command_id, names=names, by=by, took_us=took_us)
        reply = self._render(request, command_id, told, None) if request.key else None
        return Answer(command_id, told, reply)

    def _after(self, wanted: Wanted, error: TunledgerError | None) -> Interface | None:
        """The interface as the outcome that is about to be recorded leaves it."""
        interface = self.state.interfaces[wanted.id]
        if error is not None:
            return msgspec.structs.replace(interface, pending=None) if interface.spec is not None else None
        if wanted.spec is None:
            return None
        generation = interface.generation + (wanted.spec != interface.spec)
        return msgspec.structs.replace(interface, spec=wanted.spec, pending=None, generation=generation)

    def _closed(
        self,
        actor: str,
        command_id: CommandId,
        request: cmd.Request,
        finished: Sequence[Finished],
        error: TunledgerError | None,
    ) -> Job:
        reply = self._render(request, command_id, finished, error)
        return answers.closed(actor, request.key, request.fingerprint, command_id, self._clock.now(), reply)

    async def _undo(self, wanted: Sequence[Wanted]) -> bool:
        """Bring the host back to what it was before pending intents; whether that worked."""
        failpoints.reach("engine.undo.before")
        previous = [self._wanted(w.id, w.name, self.state.interfaces[w.id].spec) for w in wanted]
        results = await self._converge(previous)
        failpoints.reach("engine.undo.after")
        for result in results:
            if result.error is not None:
                log.error("could not undo", name=result.wanted.name, error=result.error.message)
                self._note_trouble(result.wanted.id, result.error)
        return all(result.error is None for result in results)

    async def _converge(self, wanted: Sequence[Wanted]) -> list[Result]:
        try:
            return await self._crossing.result(self._applier.join(self._converge_each, wanted))
        except TunledgerError as error:
            return [Result(each, error=error) for each in wanted]

    def _converge_each(self, orders: Sequence[Sequence[Wanted]]) -> list[list[Result]]:
        """In the applier's thread: all that wait as one batch."""
        return converge_each(self._hands, orders)

    def _wanted_by(self, intent: ev.Intent) -> Wanted:
        before = self.state.interfaces.get(intent.interface_id)
        return self._wanted(intent.interface_id, intent.name, intended(intent, before), fresh=before is None)

    async def _apply(self, job: Callable[[], Any]) -> Any:
        return await self._crossing.result(self._applier.run(job))

    def _wanted(
        self, interface_id: InterfaceId, name: InterfaceName, spec: InterfaceSpec | None, *, fresh: bool = False
    ) -> Wanted:
        return Wanted(Token(self.node, interface_id), name, spec, fresh)

    # -- reconciling

    async def start_up(self, started: ev.ServiceStarted) -> Summary:
        """Record the start, then bring the host to what the log says, and record the summary."""
        self._loop = asyncio.get_running_loop()
        self._crossing.open()
        if self._frozen is not None:
            return Summary()
        begun = time.monotonic_ns()
        failpoints.reach("engine.start_up.before")
        settled = [i for i in self.state.interfaces.values() if i.pending is None]
        looked = await self._look_at_all(settled)
        _orphans, unheard = await self._undeclared(looked[0])
        if unheard:
            named = ", ".join(f"{link.name} (ifindex {link.ifindex})" for link in unheard)
            self.freeze(
                f"the log has never heard of {named}, which carry this node's token: it has lost its end, or is an "
                "older copy. Nothing is changed. Restore the whole log; or, if this one is to count, remove them "
                "(ip link delete) and restart"
            )
            return Summary()
        again, self._trusted = self._trusted, True
        await self._append([self._draft(ev.node_stream(self.node), started)])
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
        await self._append([self._draft(ev.node_stream(self.node), body)])
        failpoints.reach("engine.start_up.after")
        if self._news:
            self.wake.set()
        return summary

    async def work(self, *, everything: bool) -> None:
        """Look at what may have changed and at what is due again, or at everything, and mend what differs.

        Raises:
            TunledgerError: as `reconcile`.
        """
        if not self._trusted:
            return
        await self.take_back_overdue()
        causes = await self._touched()
        if everything or causes is None:
            self._everything_due = False
            await self.reconcile(causes=causes or {})
        elif causes:
            await self.reconcile(only=frozenset(causes), causes=causes)

    def look_again(self) -> None:
        """Have everything looked at soon."""
        self._everything_due = True
        self.wake.set()

    def heard(self) -> None:
        """From any thread: the monitor has news."""
        self._news = True
        loop = self._loop
        if loop is not None and not self._closing:
            loop.call_soon_threadsafe(self.wake.set)

    async def _touched(self) -> dict[InterfaceId, str] | None:
        """Interfaces to look at, with the cause where one is known; None if it may be any."""
        known = self.state.interfaces
        causes: dict[InterfaceId, str] = {}
        if self._news:
            self._news = False
            try:
                news: News = await self._apply(self._hands.monitor.take)  # there, where its own doing is settled by now
            except TunledgerError:
                self._news = True  # it tells again only once this was taken
                raise
            if news.lost:
                log.warning("messages of the kernel were lost: everything is looked at")
                self._everything_due = True
            for ifindex, token in (*news.changed.items(), *news.gone.items()):
                if token.node == self.node and token.interface_id in known:
                    causes[token.interface_id] = news.moved.get(ifindex, "outside")
            for name in news.names:
                interface = self.state.find(name)
                if interface is not None:
                    causes.setdefault(interface.id, "outside")
        for each in (*self._later, *self.troubles.due(time.monotonic())):
            causes.setdefault(each, "outside")
        self._later = {each for each in causes if self._is_busy(each)}
        if self._everything_due:
            return None
        return {each: cause for each, cause in causes.items() if each in known and each not in self._later}

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
        self.troubles.keep_only(i.id for i in self.state.interfaces.values() if i.pending is None)
        if self._frozen is not None:
            return summary
        chosen = [i for i in self.state.interfaces.values() if only is None or i.id in only]
        # Who asks waits for what is under way; it may be a look of our own that would not mend this.
        free = chosen if asked else [i for i in chosen if not self._busy(i.name)]
        async with self._locked([i.name for i in free]):
            # What was free may have changed while the locks were taken.
            present = [self.state.interfaces[i.id] for i in free if i.id in self.state.interfaces]
            settled = [i for i in present if i.pending is None]
            if only is not None:
                wanted = [self._wanted(i.id, i.name, i.spec) for i in settled]
                found: list[Result] = []
                if wanted:
                    found, _ = await self._apply(lambda: inspect(self._hands, wanted))
            else:
                pending = self._whole([i for i in present if i.pending is not None])
                observed, found = looked if looked is not None else await self._look_at_all(settled)
                if await self._remove_orphans(observed, summary) or pending:
                    await self._recover(pending, summary)
                    _, found = await self._look_at_all(settled)
            await self._mend(found, cause, causes or {}, summary, starting=starting, asked=asked)
        return summary

    def _whole(self, pending: Sequence[Interface]) -> list[Interface]:
        """Those whose commands are here with all of their interfaces: the others have to wait, and share one fate."""
        known = Counter(_command_of(i) for i in self.state.interfaces.values() if i.pending is not None)
        here = Counter(_command_of(i) for i in pending)
        return [i for i in pending if here[_command_of(i)] == known[_command_of(i)]]

    async def _look_at_all(self, interfaces: Sequence[Interface]) -> tuple[Observed, list[Result]]:
        wanted = [self._wanted(i.id, i.name, i.spec) for i in interfaces]

        def look_at_all() -> tuple[Observed, list[Result]]:
            mark = self._hands.monitor.drain()
            observed = self._hands.kernel.observe()
            seen = sights(wanted, observed, self._hands.dataplane.attached(), self._hands.monitor)
            return observed, compare(self._hands, mark, wanted, seen)

        observed, results = await self._apply(look_at_all)
        return observed, results

    async def reconcile_now(self) -> Summary:
        """Reconcile because somebody asks: failed repairs are tried at once. Raises TunledgerError."""
        self._refuse_if_closed()
        self.troubles.hurry()
        return await self.reconcile(asked=True)

    async def reconcile_for(self, submission: cmd.Submission) -> Reply:
        """Reconcile because a client asks; with an Idempotency-Key once only. Raises TunledgerError."""
        self._refuse_if_closed()
        work = self._reconcile_for(submission)
        if submission.request.key:
            return await asyncio.shield(self._keys.once(submission.actor, submission.request, work))
        reply: Reply = await asyncio.shield(self._spawn(work))
        return reply

    async def _reconcile_for(self, submission: cmd.Submission) -> Reply:
        summary = await self.reconcile_now()
        request, command_id = submission.request, submission.command_id
        reply = Reply(200, msgspec.json.encode({"dry_run": False, **summary.to_json()}))
        if request.key:
            job = answers.closed(
                submission.actor, request.key, request.fingerprint, command_id, self._clock.now(), reply
            )
            await self._crossing.result(self._writer.run(job))
        return reply

    async def _recover(self, interfaces: Sequence[Interface], summary: Summary) -> None:
        """Finish intents that have no outcome yet; those of one command together."""
        commands: dict[CommandId, list[Interface]] = {}
        for interface in interfaces:
            assert interface.pending is not None
            commands.setdefault(interface.pending.command_id, []).append(interface)
        for command_id, group in commands.items():
            pending = group[0].pending
            assert pending is not None
            wanted = [self._wanted(i.id, i.name, i.wanted) for i in group]
            names = [i.name for i in group]
            failpoints.reach("engine.recover.before")
            try:
                await self._finish(command_id, pending.actor, pending.request, wanted, "recovery", time.monotonic_ns())
                failpoints.reach("engine.recover.after")
                summary.finished += names
            except TunledgerError as error:
                log.error("a pending command failed", command_id=command_id, names=names, error=error.message)
                summary.failed += names

    async def _mend(
        self,
        results: Sequence[Result],
        cause: str,
        causes: Mapping[InterfaceId, str],
        summary: Summary,
        *,
        starting: bool,
        asked: bool,
    ) -> None:
        """Record what differs, mend what is due, and record what came of it. The names' locks are held."""
        now, stamp = time.monotonic(), self._clock.now()
        before = copy.deepcopy(self.troubles)
        due: list[Result] = []
        drafts: list[ev.Draft] = []
        drifted: list[str] = []
        for result in results:
            wanted = result.wanted
            if not result.found:
                summary.adopted.append(wanted.name)
                drafts += self._agreed(wanted, now)
                continue
            own = _own_part(result, starting=starting, asked=asked)
            if own is None:
                told = self.troubles.reported(wanted.id, result.found, stamp)
            elif not self.troubles.is_due(wanted.id, now):
                self.troubles.waits(wanted.id)
                continue
            else:
                due.append(own)
                told = not self.troubles.is_failing(wanted.id)
            if told:
                drafts.append(self._drift(result, causes.get(wanted.id, cause)))
                drifted.append(wanted.name)
        if drifted:
            found = "; ".join(str(d) for result in results if result.found for d in result.found[:SHOWN_MAX])
            log.warning("drift", names=few(drifted), cause=cause, found=found[:LINE_MAX])
        failpoints.reach("engine.drift.before")
        try:
            await self._append(drafts)
        except TunledgerError:
            self.troubles = before  # what could not be told is news still
            raise
        failpoints.reach("engine.drift.after")
        if not due:
            return
        begun = time.monotonic_ns()
        chosen = [result.wanted for result in due]
        # What was just looked at is not looked at again: each change is checked at its last moment, and verified.
        seen = {result.wanted.id: result.sight for result in due}
        mended: list[Result] = await self._apply(lambda: converge(self._hands, chosen, seen))
        took_us = (time.monotonic_ns() - begun) // 1000
        drafts = []
        for found_first, result in zip(due, mended, strict=True):
            drafts += self._mended(found_first, result, took_us, summary)
        done = [result.wanted.name for result in mended if result.error is None]
        if done:
            steps = "; ".join(str(step) for result in mended for step in result.steps[:SHOWN_MAX])
            log.info("repaired", names=few(done), steps=steps[:LINE_MAX])
        failpoints.reach("engine.mended.before")
        await self._append(drafts, self._counting.job(self._counting.let_go(mended)))
        failpoints.reach("engine.mended.after")

    def _agreed(self, wanted: Wanted, now: float) -> list[ev.Draft]:
        """What to record of an interface that is as wanted: that a trouble is over."""
        if wanted.id not in self.troubles:
            return []
        over, quiet_s = self.troubles.agreed(wanted.id, now)
        stream, drafts = ev.interface_stream(wanted.id), list[ev.Draft]()
        if over:
            drafts.append(self._draft(stream, ev.DriftEnded(interface_id=wanted.id, name=wanted.name)))
        if quiet_s:
            log.info("contested no more", name=wanted.name, quiet_s=quiet_s)
            ended = ev.ContestEnded(interface_id=wanted.id, name=wanted.name, quiet_s=quiet_s)
            drafts.append(self._draft(stream, ended))
        return drafts

    def _drift(self, result: Result, cause: str) -> ev.Draft:
        body = ev.DriftDetected(
            interface_id=result.wanted.id,
            name=result.wanted.name,
            cause=cause,
            differences=[difference.to_json() for difference in result.found],
        )
        return self._draft(ev.interface_stream(result.wanted.id), body)

    def _mended(self, found: Result, result: Result, took_us: int, summary: Summary) -> list[ev.Draft]:
        """What to record of one repair: it worked, or it failed in a way not recorded yet."""
        wanted, stream = result.wanted, ev.interface_stream(result.wanted.id)
        body: ev.Event
        if result.error is None:
            steps = [str(step) for step in result.steps]
            (summary.recreated if found.link is None else summary.repaired).append(wanted.name)
            if wanted.spec is not None and wanted.spec.processing.running and _starts(result):
                summary.processing_resumed.append(wanted.name)
            body = ev.DriftRepaired(interface_id=wanted.id, name=wanted.name, steps=steps, took_us=took_us)
            drafts = [self._draft(stream, body)]
            others = tuple(d for d in found.found if not d.path.endswith(".processing.running"))
            repairs = self.troubles.repaired(wanted.id, others, time.monotonic(), self._clock.now())
            if repairs:
                log.warning("contested: repairs slow down", name=wanted.name, found="; ".join(map(str, others)))
                contested = ev.InterfaceContested(
                    interface_id=wanted.id,
                    name=wanted.name,
                    repairs=repairs,
                    within_s=round(CONTEST_WITHIN_S),
                    differences=[difference.to_json() for difference in others],
                )
                drafts.append(self._draft(stream, contested))
            return drafts
        summary.failed.append(wanted.name)
        if not self._note_trouble(wanted.id, result.error):
            return []
        log.error("repair failed", name=wanted.name, error=result.error.message)
        body = ev.RepairFailed(
            interface_id=wanted.id,
            name=wanted.name,
            code=result.error.code.value,
            message=result.error.message,
            errno=result.error.errno_name,
        )
        return [self._draft(stream, body)]

    def complain(self, what: str) -> None:
        """Have something that must not happen said by `health` from now on."""
        log.error(what)
        self._complaints.append(what)

    def _note_trouble(self, interface_id: InterfaceId, error: TunledgerError) -> bool:
        """Remember a failure and when to try again; whether it is another one than last time."""
        return self.troubles.failed(interface_id, error, time.monotonic(), self._clock.now())

    async def _remove_orphans(self, observed: Observed, summary: Summary) -> bool:
        """Remove links that carry our token and that nothing declares: what a crash or an older state left behind.

        Returns:
            Whether there were any.
        """
        orphans, unheard = await self._undeclared(observed)
        said = {link.name: f"{link.name} carries our token, but the log has never heard of it" for link in unheard}
        for name in said.keys() - self._unheard.keys():
            log.warning("a link carries our token, and the log has never heard of it: left alone", name=name)
        self._unheard = said
        if not orphans:
            return False
        failpoints.reach("engine.orphans.before")
        removed: list[ObservedLink] = []
        for link, error in await self._apply(lambda: remove_orphans(self._hands, orphans)):
            if error is not None:
                log.error("an orphan could not be removed", name=link.name, error=error.message)
                summary.failed.append(link.name)
            else:
                removed.append(link)
        names: list[str] = [link.name for link in removed]
        log.info("orphans removed", names=few(names))
        summary.orphans_removed += names
        failpoints.reach("engine.orphans.removed")
        drafts = []
        for link in removed:
            assert link.token is not None
            body = ev.OrphanRemoved(interface_id=link.token.interface_id, name=link.name, ifindex=link.ifindex)
            drafts.append(self._draft(ev.interface_stream(link.token.interface_id), body))
        await self._append(drafts)
        failpoints.reach("engine.orphans.after")
        return True

    async def _undeclared(self, observed: Observed) -> tuple[list[ObservedLink], list[ObservedLink]]:
        """Links with our token that nothing declares now: orphans, which the log once declared, and those that it has
        never heard of. A create is in the log before the kernel acts: the latter say that the log lost its end, or that
        somebody wrote our mark on a link of his own. They are not ours to remove.
        """
        bearers = observed.by_interface(self.node)
        suspects = {each: link for each, link in bearers.items() if each not in self.state.interfaces}
        if not suspects:
            return [], []
        known = await asyncio.to_thread(self._knows, list(suspects))  # after the look: a new one is in the log by now
        orphans = [link for each, link in suspects.items() if each in known and each not in self.state.interfaces]
        return orphans, [link for each, link in suspects.items() if each not in known]

    def next_retry_s(self) -> float | None:
        """Seconds until the next repair that failed is due again; None if there is none."""
        due = self.troubles.next_try() if self._frozen is None else None
        return max(0.0, due - time.monotonic()) if due is not None else None

    def retry_in_s(self, interface_id: InterfaceId) -> float | None:
        """Seconds until a repair of this interface is tried again; None if none is to be."""
        trouble = self.troubles.get(interface_id)
        if trouble is None or trouble.next_try == float("inf"):
            return None
        return max(0.0, trouble.next_try - time.monotonic())

    # -- workers

    def worker_exited(self, worker: int, pid: int, status: str, last: Sequence[Reading]) -> None:
        """From any thread: a worker died. Record it, keep what it had counted, give its devices to its successor."""
        loop = self._loop
        if loop is not None and not self._closing:
            loop.call_soon_threadsafe(
                lambda: self._spawn(self._replace_worker(worker, pid, status, last)) if not self._closing else None
            )

    async def _replace_worker(self, worker: int, pid: int, status: str, last: Sequence[Reading]) -> None:
        lost = frozenset(reading.interface_id for reading in last)
        names: list[str] = sorted(i.name for i in self.state.interfaces.values() if i.id in lost)
        log.error("a packet worker died", worker=worker, pid=pid, status=status, devices=names)
        failpoints.reach("engine.worker_exit.before")
        try:
            body = ev.WorkerExited(worker=worker, pid=pid, status=status, devices=names)
            counted = self._counting.job([self._counting.book.take(reading) for reading in last])
            await self._append([self._draft(ev.node_stream(self.node), body)], counted)
            failpoints.reach("engine.worker_exit.recorded")
            await self.reconcile(cause="worker_exit", only=lost)
            failpoints.reach("engine.worker_exit.after")
        except TunledgerError as error:
            log.error("could not recover from a worker's death yet", error=error.message)
        finally:
            self.look_again()

    # -- counters

    async def sample(self, *, at_most_every_s: float = 0.0) -> None:
        """Read all counters and store them; durable when it returns.

        Args:
            at_most_every_s: do nothing if the last sample is younger than this.

        Raises:
            TunledgerError: the kernel's or the log's refusal.
        """
        if self._frozen is None:
            await self._counting.sample(self._names, at_most_every_s=at_most_every_s)

    def _names(self) -> dict[InterfaceId, str]:
        return {i.id: i.name for i in self.state.interfaces.values()}

    def totals(self, interface_id: InterfaceId) -> dict[str, dict[str, int]]:
        """Lifetime totals by source, as of the last sample."""
        return self._counting.totals(interface_id)

    # -- looking

    async def observe_all(self, interfaces: Sequence[Interface]) -> dict[InterfaceId, Sight]:
        """What there is of these interfaces now."""
        wanted = [self._wanted(i.id, i.name, i.wanted) for i in interfaces]
        seen, _ = await self._apply(lambda: look(self._hands, wanted))
        found: dict[InterfaceId, Sight] = seen
        return found

    async def drift(self) -> list[tuple[Interface, tuple[Difference, ...], tuple[Step, ...], TunledgerError | None]]:
        """What differs now, interface by interface, with the steps that would mend it; nothing is changed."""
        interfaces = [i for i in self.state.interfaces.values() if i.pending is None and i.spec is not None]
        seen = await self.observe_all(interfaces)
        found = []
        for interface in interfaces:
            token, sight = Token(self.node, interface.id), seen[interface.id]
            left = differences(token, interface.name, interface.spec, sight)
            if not left:
                continue
            try:
                steps, refusal = plan(token, interface.name, interface.spec, sight), None
            except TunledgerError as error:
                steps, refusal = (), error
            found.append((interface, left, steps, refusal))
        return found

    async def observe(self, interface: Interface) -> tuple[ObservedLink | None, bool]:
        """The link of one interface as it is now, and whether a worker reads it."""
        sight = (await self.observe_all([interface]))[interface.id]
        return sight.link, sight.attached

    def health(self) -> list[str]:
        """What is wrong, in words; empty when commands can be taken."""
        found = []
        if self._frozen is not None:
            found.append(f"read-only: {self._frozen.message}")
        trouble = self._writer.trouble()
        if trouble is not None:
            found.append(f"the log cannot be written: {trouble}")
        found += [words for words in (self._obstacle(), self.stumbled, self.miscounted) if words is not None]
        found += self._complaints
        found += self._unheard.values()
        deaf = self._hands.monitor.trouble()
        if deaf is not None:
            found.append(deaf)
        found += self._hands.dataplane.healthy()
        if self._closing:
            found.append("the service is stopping")
        return found

    # -- stopping

    async def stop(self, *, pid: int, reason: str, interfaces: str) -> None:
        """Take no more commands, finish those under way, stop the workers' reading, save counters, and remove the
        interfaces or keep them. The log's desired state stays; the next start restores it.
        """
        self._closing = True
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._frozen is not None:
            return
        failpoints.reach("engine.stop.before")
        try:
            await self.sample()
        except TunledgerError as error:
            log.error("the last counters could not be stored", error=error.message)
        failpoints.reach("engine.stop.sampled")
        try:
            stopped = ev.ServiceStopped(pid=pid, reason=reason, interfaces=interfaces)
            await self._append([self._draft(ev.node_stream(self.node), stopped)])
        except TunledgerError as error:
            # What the log cannot say must not be done: the interfaces stay.
            log.error("the stop could not be recorded; interfaces are kept", error=error.message)
            return
        failpoints.reach("engine.stop.recorded")
        settled = [i for i in self.state.interfaces.values() if i.pending is None and i.spec is not None]
        wanted = [self._wanted(i.id, i.name, _at_rest(i.spec, interfaces)) for i in settled]
        if not wanted:
            return
        try:
            results: list[Result] = await self._apply(lambda: converge(self._hands, wanted))
            await self._append([], self._counting.job(self._counting.let_go(results)))
        except TunledgerError as error:
            log.error("could not clean up", error=error.message)
            return
        for result in results:
            if result.error is not None:
                log.error("could not clean up", name=result.wanted.name, error=result.error.message)
        failpoints.reach("engine.stop.after")
        log.info("stopped", reason=reason, interfaces=interfaces, names=few([w.name for w in wanted]))

    # -- housekeeping

    def _spawn(self, work: Any) -> "asyncio.Task[Any]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _busy(self, name: str) -> bool:
        lock = self._locks.get(name)
        return lock is not None and lock.locked()

    def _is_busy(self, interface_id: InterfaceId) -> bool:
        interface = self.state.interfaces.get(interface_id)
        return interface is not None and self._busy(interface.name)

    @asynccontextmanager
    async def _locked(self, keys: Sequence[str]) -> AsyncIterator[None]:
        """Hold the locks of these names, taken in order so that nobody waits in a circle."""
        held: list[tuple[str, asyncio.Lock]] = []
        try:
            for key in sorted(set(keys)):
                lock = self._locks.setdefault(key, asyncio.Lock())
                await lock.acquire()
                held.append((key, lock))
            yield
        finally:
            for key, lock in held:
                lock.release()
                if not lock.locked() and not _awaited(lock):
                    self._locks.pop(key, None)
            if held and self._later:
                self.wake.set()  # somebody changed what was under way


def _command_of(interface: Interface) -> CommandId | None:
    return interface.pending.command_id if interface.pending is not None else None


def _heard(task: "asyncio.Task[Any]") -> None:
    """Nobody waits for what becomes of it: it is in the log."""
    if not task.cancelled():
        task.exception()


def _awaited(lock: asyncio.Lock) -> bool:
    return bool(getattr(lock, "_waiters", None))


def _at_rest(spec: InterfaceSpec | None, interfaces: str) -> InterfaceSpec | None:
    """What an interface is to be while the service is away: gone, or there with nobody reading it."""
    if interfaces == "remove" or spec is None:
        return None
    return msgspec.structs.replace(spec, processing=Processing(running=False))


def _own_part(result: Result, *, starting: bool, asked: bool) -> Result | None:
    """What of the drift is to be mended: all of it; or, where drift is only to be reported, what our own workers are
    to do, if that is all; else None.
    """
    wanted, link = result.wanted, result.link
    if wanted.spec is None or wanted.spec.drift is not Drift.REPORT or asked or (starting and link is None):
        return result
    if link is None:
        return None
    left = replace(wanted, spec=leave_be(wanted.spec, link))
    found = differences(wanted.token, wanted.name, left.spec, result.sight)
    ours = tuple(d for d in found if d.path == f"{wanted.name}.processing.running")
    return replace(result, wanted=left, found=found) if found and ours == found else None


def _starts(result: Result) -> bool:
    return any(isinstance(step, StartProcessing) for step in result.steps)


def _outcome(result: Result, failed: Result | None, by: ev.FinishedBy, took_us: int, *, undone: bool) -> ev.Outcome:
    """The outcome for one interface of a command; where one fails, all fail with its reason."""
    wanted = result.wanted
    if failed is None:
        return ev.CommandApplied(
            interface_id=wanted.id,
            name=wanted.name,
            by=by,
            took_us=took_us,
            steps=[str(step) for step in result.steps],
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
    """Several jobs as one."""
    if not jobs:
        return None

    def write(connection: Any) -> None:
        for job in jobs:
            job(connection)

    return write


def _may_declare(command: cmd.Command) -> bool:
    """Whether a command can take a name that somebody else's link may have."""
    return isinstance(command, cmd.DeclareInterface | cmd.ReplaceInterface)


def _may_overlap(command: cmd.Command) -> bool:
    """Whether a command can bring an address that has to be compared with the host's networks."""
    match command:
        case cmd.DeclareInterface() | cmd.ReplaceInterface():
            return not command.allow_overlap and bool(command.spec.addresses)
        case cmd.PatchInterface():
            return not command.allow_overlap and "addresses" in command.patch
        case cmd.ConfigureInterface():
            return not command.allow_overlap and (command.ip is not None or command.netmask is not None)
        case cmd.EnableProcessing() | cmd.DisableProcessing() | cmd.RetireInterface():
            return False
        case _:
            assert_never(command)
