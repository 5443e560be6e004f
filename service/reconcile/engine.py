"""The engine: takes commands, keeps desired state, and brings the host to it, each step in the log.

Theory of operation. The engine lives on the event loop and never blocks it: the disk belongs to the log's writer,
the host to the applier, each a thread that answers through futures. Desired state changes in one place, `_recorded`,
when the writer has made events durable, in their order. One lock for each interface name: commands on one interface
follow each other, commands on different ones do not wait.

    submit      survey the host -> decide -> append the intent -> converge -> append the outcome -> answer
    reconcile   look at everything -> record what drifted -> converge -> append what came of it

Start-up and every wake-up are `reconcile`; an intent that a crash left pending is finished by it too. A command that
was cut off by its client goes on to its outcome all the same. HTTP does not live here, nor do pragmas or netlink.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, assert_never

import msgspec
import structlog

from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.counters import Book, Reading, Source, kernel_reading, worker_reading
from service.domain.decide import confirm, decide, intended, take_back
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import Host, ObservedLink, one_each
from service.domain.plan import Difference, Sight, differences, plan
from service.domain.spec import InterfaceSpec, Processing
from service.domain.state import Interface, State, Unconfirmed, evolve
from service.domain.steps import StartProcessing, Step
from service.domain.token import Token
from service.domain.values import CommandId, InterfaceId, InterfaceName, NodeId
from service.reconcile.applier import Applier
from service.reconcile.converge import Result, Wanted, converge, inspect, look, remove_orphans, sights
from service.reconcile.hands import Hands
from service.reconcile.rejections import Allowance
from service.store import answers
from service.store.answers import Kept, Reply
from service.store.counters import CounterKeeper
from service.store.writer import Job, LogWriter

IN_FLIGHT_MAX = 256  # commands between their arrival and their outcome; more are refused as overloaded
BACK_OFF_FIRST_S, BACK_OFF_MAX_S = 1.0, 60.0
SYSTEM = "system"  # the actor of what nobody asked for

log = structlog.get_logger("tunledger.engine")


class Clock(Protocol):
    """Time and ids, passed in so that tests can say what they are."""

    def now(self) -> str:
        """UTC, ISO 8601 with microseconds and a Z."""
        ...

    def before(self, seconds: float) -> str:
        """The UTC time this long ago, in the same form."""
        ...

    def seconds_until(self, stamp: str) -> float:
        """How long until a UTC time in that form; negative if it is past."""
        ...

    def new_id(self) -> str:
        """A new UUIDv7."""
        ...


@dataclass(frozen=True, slots=True)
class Finished:
    """One interface of a command: as it is desired now (None once it is gone), and the link as it was seen."""

    name: InterfaceName
    interface_id: InterfaceId
    created: bool
    interface: Interface | None
    link: ObservedLink | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command came to. `reply` is what a request with an Idempotency-Key hears, now and ever after."""

    command_id: CommandId
    finished: tuple[Finished, ...] = ()
    reply: Reply | None = None


class Renderer(Protocol):
    """Makes the reply of a command that came with an Idempotency-Key; also for one that recovery finished."""

    def __call__(
        self,
        request: cmd.Request,
        command_id: CommandId,
        finished: Sequence[Finished],
        error: TunledgerError | None,
    ) -> Reply:
        """The reply, from what the log and the kernel say, and nothing else."""
        ...


@dataclass(frozen=True, slots=True)
class Preview:
    """What a command would do: the events, and for each interface the differences and the steps."""

    intents: tuple[ev.Intent, ...]
    plans: tuple[tuple[InterfaceName, tuple[Difference, ...], tuple[Step, ...]], ...]


@dataclass(frozen=True, slots=True)
class _UnderWay:
    fingerprint: str
    task: "asyncio.Task[Reply]"


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why an interface is not as wanted, since when it is tried again, and how often it was."""

    message: str
    code: str
    since: str
    attempts: int
    next_try: float  # on the monotonic clock


@dataclass(slots=True)
class Summary:
    """What one reconciliation did, by interface name."""

    recreated: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    orphans_removed: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    processing_resumed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, list[str]]:
        """The names by what was done."""
        return {each.name: list(getattr(self, each.name)) for each in fields(self)}

    def __str__(self) -> str:
        parts = (
            ("recreated", self.recreated),
            ("repaired", self.repaired),
            ("adopted", self.adopted),
            ("orphans removed", self.orphans_removed),
            ("commands finished", self.finished),
            ("processing resumed", self.processing_resumed),
            ("FAILED", self.failed),
        )
        return "; ".join(f"{label}: {_few(names)}" for label, names in parts if names) or "nothing to do"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 10 else f"{', '.join(names[:10])} and {len(names) - 10} more"


class Engine:
    """One per service. All methods are for the event loop's thread unless they say otherwise.

    Args:
        state, book: as folded and loaded from the database, at the same moment.
        render, recall: make and look up replies to requests with an Idempotency-Key.
        publish: gets recorded events, in order, on the event loop.
        frozen: why nothing may be changed (an unreadable or unverifiable log), or None.
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
        publish: Callable[[list[ev.Recorded]], None] = lambda _events: None,
        frozen: str | None = None,
        keeper: CounterKeeper | None = None,
    ) -> None:
        self.node, self.state, self.book = node, state, book
        self._keeper = keeper if keeper is not None else CounterKeeper()
        self._writer, self._applier, self._hands = writer, applier, hands
        self._clock, self._boot_id = clock, boot_id
        self._render, self._recall, self._publish = render, recall, publish
        self._frozen = frozen
        self._under_way: dict[tuple[str, str], _UnderWay] = {}
        self._take_back_after, self._take_backs_failed = 0.0, 0
        self._locks: dict[str, asyncio.Lock] = {}
        self._complaints: list[str] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._rejections = Allowance()
        self._previous_boot, self._previous_stop = state.boot_id, state.stopped
        self.troubles: dict[InterfaceId, Trouble] = {}
        self.wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sampling = asyncio.Lock()
        self._sampled = 0.0

    # -- events

    def record(self, events: list[ev.Recorded]) -> None:
        """The writer's callback, in the writer's thread: have the loop take the events in, in order."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._recorded, events)

    def _recorded(self, events: list[ev.Recorded]) -> None:
        try:
            for event in events:
                evolve(self.state, event)
        except TunledgerError as error:  # what is in the log must make sense, or nothing may rest on it any more
            self.freeze(error.message)
        self._publish(events)

    async def _append(self, drafts: Sequence[ev.Draft]) -> list[ev.Recorded]:
        return await asyncio.wrap_future(self._writer.append(drafts)) if drafts else []

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
            task = self._once(submission.actor, submission.request, work)
            if wait or await self._first_is(task, accepted):
                return Answer(submission.command_id, reply=await asyncio.shield(task))
            return Answer(submission.command_id)
        order = self._spawn(self._carry_out(submission, accepted))
        if wait or await self._first_is(order, accepted):
            answer: Answer = await asyncio.shield(order)
            return answer
        return Answer(submission.command_id)

    async def _first_is(self, task: "asyncio.Task[Any]", accepted: "asyncio.Future[None]") -> bool:
        """Whether a task ended before its command was in the log."""
        await asyncio.wait({task, accepted}, return_when=asyncio.FIRST_COMPLETED)
        return not accepted.done()

    def _once(self, actor: str, request: cmd.Request, work: Coroutine[Any, Any, Reply]) -> "asyncio.Task[Reply]":
        """One effect and one reply for each key of a caller, however often and whenever it is sent.

        Raises:
            TunledgerError: key_reused.
        """
        slot = (actor, request.key)
        known = self._under_way.get(slot)
        if known is None:
            known = _UnderWay(request.fingerprint, self._spawn(self._recalled(actor, request, work)))
            self._under_way[slot] = known
            known.task.add_done_callback(lambda _task: self._under_way.pop(slot, None))
            return known.task
        work.close()
        if known.fingerprint != request.fingerprint:
            raise _key_reused(request.key)
        return known.task

    async def _recalled(self, actor: str, request: cmd.Request, work: Coroutine[Any, Any, Reply]) -> Reply:
        try:
            kept = await asyncio.to_thread(self._recall, actor, request.key)
            if kept is None:
                return await work
        finally:
            work.close()
        if kept.fingerprint != request.fingerprint:
            raise _key_reused(request.key)
        if kept.reply is None:
            raise TunledgerError(
                ErrorCode.OUTCOME_UNKNOWN, f"command {kept.command_id} has no outcome yet; ask again", retry=True
            )
        return kept.reply

    async def _reply_to(self, submission: cmd.Submission, accepted: "asyncio.Future[None]") -> Reply:
        try:
            answer = await self._carry_out(submission, accepted)
        except TunledgerError as error:
            if error.retry and error.code in _NOT_SETTLED:
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
            return await asyncio.shield(self._once(submission.actor, submission.request, work))
        reply: Reply = await asyncio.shield(self._spawn(work))
        return reply

    async def _confirm(self, submission: cmd.Submission) -> Reply:
        request, command_id = submission.request, submission.command_id
        names = [u.name for u in self.state.unconfirmed.values() if u.command_id == request.confirms]
        async with self._locked(names):
            try:
                confirmed = confirm(self.state, request.confirms, request)
            except TunledgerError as refusal:
                if request.key:
                    job = self._closed(submission.actor, command_id, request, (), refusal)
                    await asyncio.wrap_future(self._writer.run(job))
                raise
            drafts = [
                self._draft(ev.interface_stream(body.interface_id), body, actor=submission.actor, command_id=command_id)
                for body in confirmed
            ]
            also = self._closed(submission.actor, command_id, request, (), None) if request.key else None
            await asyncio.wrap_future(self._writer.append(drafts, also))
        return self._render(request, command_id, (), None)

    def _has_pending(self, name: str) -> bool:
        interface = self.state.find(name)
        return interface is not None and interface.pending is not None

    async def take_back_overdue(self) -> None:
        """Undo every change that was not confirmed in time."""
        if self._frozen is not None or self._closing or time.monotonic() < self._take_back_after:
            return
        now = self._clock.now()
        overdue: dict[CommandId, list[Unconfirmed]] = {}
        for awaiting in self.state.unconfirmed.values():
            if awaiting.confirm_by <= now:
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
                try:
                    await self._intend_and_finish(submission, intents, None)
                    self._take_backs_failed = 0
                except TunledgerError as error:
                    log.error("could not take back; it is tried again", command_id=command_id, error=error.message)
                    delay_s = min(BACK_OFF_MAX_S, 5 * BACK_OFF_FIRST_S * 2**self._take_backs_failed)
                    self._take_backs_failed += 1
                    self._take_back_after = time.monotonic() + delay_s

    def next_deadline_s(self) -> float | None:
        """Seconds until the next unconfirmed change is due to be taken back; None if there is none."""
        awaited = [u.confirm_by for u in self.state.unconfirmed.values() if not self._has_pending(u.name)]
        if not awaited or self._frozen is not None:
            return None
        first = min(awaited)
        return max(self._clock.seconds_until(first), self._take_back_after - time.monotonic(), 0.0)

    async def reject(
        self, refusal: TunledgerError, name: str, command: str, actor: str, command_id: CommandId, request: cmd.Request
    ) -> None:
        """Record that a command was refused before it was an intent. A flood is recorded as a number."""
        if self._frozen is not None or self._closing:
            return
        settled = request.key and not (refusal.retry and refusal.code in _NOT_SETTLED)
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
        try:
            if allowed:
                draft = self._draft(ev.name_stream(name), body, actor=actor, command_id=command_id)
                await asyncio.wrap_future(self._writer.append([draft], also))
            elif also is not None:  # the flood is a number in the log, but a key has its answer
                await asyncio.wrap_future(self._writer.run(also))
        except TunledgerError as error:
            log.warning("a refusal could not be recorded", name=name, error=error.message)

    @property
    def frozen(self) -> str | None:
        """Why nothing may be changed, or None."""
        return self._frozen

    def freeze(self, reason: str) -> None:
        """From now on nothing is changed: the log turned out not to be what it should."""
        log.error("read-only from now on", reason=reason)
        self._frozen = reason

    def _refuse_if_closed(self) -> None:
        if self._frozen is not None:
            raise TunledgerError(ErrorCode.LOG_CORRUPT, f"read-only: {self._frozen}")
        if self._closing:
            raise TunledgerError(ErrorCode.SHUTTING_DOWN, "the service is stopping", retry=True)

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
        await asyncio.wrap_future(self._writer.append(drafts, also))
        if accepted is not None and not accepted.done():
            accepted.set_result(None)
        return await self._finish(
            submission.command_id, submission.actor, request, wanted, "command", time.monotonic_ns()
        )

    async def _survey(self, submission: cmd.Submission) -> Host:
        """What the commands are judged against: who holds their names, and which networks others use."""
        names = [cmd.target(command) for command in submission.commands]
        networks = any(_may_overlap(command) for command in submission.commands)

        def survey() -> Host:
            kernel = self._hands.kernel
            first, *rest = [
                kernel.survey(name, self.node, networks=networks and not number) for number, name in enumerate(names)
            ]
            occupants = dict(first.occupants)
            for host in rest:
                occupants.update(host.occupants)
            return Host(occupants, first.networks)

        host: Host = await self._apply(survey)
        return host

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
        counted = self._job_of(self._last_readings(results))  # at once: a later sample must come after these figures
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
        try:
            await asyncio.wrap_future(self._writer.append(drafts, _together(jobs)))
        except TunledgerError as trouble:
            asyncio.get_running_loop().call_later(BACK_OFF_FIRST_S, self.wake.set)
            raise TunledgerError(
                ErrorCode.OUTCOME_UNKNOWN,
                f"command {command_id} was carried out, but its outcome could not be recorded yet: {trouble.message}; "
                "it is finished as soon as the log can be written",
                retry=True,
            ) from trouble
        names = [w.name for w in wanted]
        if error is not None:
            self._forget_troubles()
            if not undone:  # what is left is an orphan, or drift
                asyncio.get_running_loop().call_later(BACK_OFF_FIRST_S, self.wake.set)
            log.warning("command failed", command_id=command_id, names=names, error=error.message)
            if request.key:
                return Answer(command_id, told, self._render(request, command_id, told, error))
            raise error
        for each in wanted:
            self.troubles.pop(each.id, None)
            if each.spec is None:
                self.book.forget(each.id)
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
        previous = [self._wanted(w.id, w.name, self.state.interfaces[w.id].spec) for w in wanted]
        results = await self._converge(previous)
        for result in results:
            if result.error is not None:
                log.error("could not undo", name=result.wanted.name, error=result.error.message)
                self._note_trouble(result.wanted.id, result.error)
        return all(result.error is None for result in results)

    async def _converge(self, wanted: Sequence[Wanted]) -> list[Result]:
        try:
            results: list[Result] = await self._apply(lambda: converge(self._hands, wanted))
        except TunledgerError as error:
            return [Result(each, error=error) for each in wanted]
        return results

    def _wanted_by(self, intent: ev.Intent) -> Wanted:
        before = self.state.interfaces.get(intent.interface_id)
        return self._wanted(intent.interface_id, intent.name, intended(intent, before), fresh=before is None)

    async def _apply(self, job: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self._applier.run(job))

    def _wanted(
        self, interface_id: InterfaceId, name: InterfaceName, spec: InterfaceSpec | None, *, fresh: bool = False
    ) -> Wanted:
        return Wanted(Token(self.node, interface_id), name, spec, fresh)

    # -- reconciling

    async def start_up(self, started: ev.ServiceStarted) -> Summary:
        """Record the start, then bring the host to what the log says, and record the summary."""
        self._loop = asyncio.get_running_loop()
        if self._frozen is not None:
            return Summary()
        begun = time.monotonic_ns()
        await self._append([self._draft(ev.node_stream(self.node), started)])
        if self._previous_boot is not None and self._previous_boot != self._boot_id:
            cause = "reboot"
        elif self._previous_stop is not None:
            cause = "shutdown"
        else:
            cause = "unknown"
        summary = await self.reconcile(cause=cause)
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
        return summary

    async def reconcile(self, *, cause: str = "unknown", only: frozenset[InterfaceId] | None = None) -> Summary:
        """Look at all interfaces (or some), and mend what differs. Those with a command under way are left to it.

        Raises:
            TunledgerError: if the host could not be looked at, or what was found could not be recorded: then
                nothing was changed either.
        """
        summary = Summary()
        self._forget_troubles()
        if self._frozen is not None:
            return summary
        chosen = [i for i in self.state.interfaces.values() if only is None or i.id in only]
        free = [i for i in chosen if not self._busy(i.name)]
        async with self._locked([i.name for i in free]):
            if only is None:
                await self._remove_orphans(summary)
            # What was free may have changed while the locks were taken.
            present = [self.state.interfaces[i.id] for i in free if i.id in self.state.interfaces]
            if only is None:
                await self._recover([i for i in present if i.pending is not None], summary)
            await self._mend([i for i in present if i.pending is None], cause, summary)
        return summary

    async def reconcile_now(self) -> Summary:
        """Reconcile because somebody asks: failed repairs are tried at once. Raises TunledgerError."""
        self._refuse_if_closed()
        for interface_id, trouble in list(self.troubles.items()):
            self.troubles[interface_id] = replace(trouble, next_try=0.0)
        return await self.reconcile()

    async def reconcile_for(self, submission: cmd.Submission) -> Reply:
        """Reconcile because a client asks; with an Idempotency-Key once only. Raises TunledgerError."""
        self._refuse_if_closed()
        work = self._reconcile_for(submission)
        if submission.request.key:
            return await asyncio.shield(self._once(submission.actor, submission.request, work))
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
            await asyncio.wrap_future(self._writer.run(job))
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
            try:
                await self._finish(command_id, pending.actor, pending.request, wanted, "recovery", time.monotonic_ns())
                summary.finished += names
            except TunledgerError as error:
                log.error("a pending command failed", command_id=command_id, names=names, error=error.message)
                summary.failed += names

    async def _mend(self, interfaces: Sequence[Interface], cause: str, summary: Summary) -> None:
        wanted = [self._wanted(i.id, i.name, i.spec) for i in interfaces]
        if not wanted:
            return
        results, _ = await self._apply(lambda: inspect(self._hands, wanted))
        drifted: list[Result] = []
        for result in results:
            if result.found:
                drifted.append(result)
            else:
                summary.adopted.append(result.wanted.name)
                self.troubles.pop(result.wanted.id, None)
        now = time.monotonic()
        due = [r for r in drifted if (t := self.troubles.get(r.wanted.id)) is None or t.next_try <= now]
        await self._append([self._drift(r, cause) for r in due if r.wanted.id not in self.troubles])
        begun = time.monotonic_ns()
        chosen = [result.wanted for result in due]
        mended: list[Result] = await self._apply(lambda: converge(self._hands, chosen)) if chosen else []
        took_us = (time.monotonic_ns() - begun) // 1000
        drafts: list[ev.Draft] = []
        for found, result in zip(due, mended, strict=True):
            drafts += self._mended(found, result, took_us, summary)
        stored = self._store(mended)
        await self._append(drafts)
        await stored

    def _drift(self, result: Result, cause: str) -> ev.Draft:
        log.warning("drift", name=result.wanted.name, cause=cause, found="; ".join(map(str, result.found)))
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
            self.troubles.pop(wanted.id, None)
            steps = [str(step) for step in result.steps]
            (summary.recreated if found.link is None else summary.repaired).append(wanted.name)
            if wanted.spec is not None and wanted.spec.processing.running and _starts(result):
                summary.processing_resumed.append(wanted.name)
            log.info("repaired", name=wanted.name, steps="; ".join(steps))
            body = ev.DriftRepaired(interface_id=wanted.id, name=wanted.name, steps=steps, took_us=took_us)
            return [self._draft(stream, body)]
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

    def _forget_troubles(self) -> None:
        """Nobody waits for the repair of what is not declared any more."""
        for interface_id in [i for i in self.troubles if i not in self.state.interfaces]:
            del self.troubles[interface_id]

    def complain(self, what: str) -> None:
        """Have something that must not happen said by `health` from now on."""
        log.error(what)
        self._complaints.append(what)

    def _note_trouble(self, interface_id: InterfaceId, error: TunledgerError) -> bool:
        """Remember a failure and when to try again; whether it is another one than last time."""
        known = self.troubles.get(interface_id)
        attempts = known.attempts + 1 if known is not None else 1
        delay_s = min(BACK_OFF_MAX_S, BACK_OFF_FIRST_S * 2 ** (attempts - 1))
        since = known.since if known is not None else self._clock.now()
        self.troubles[interface_id] = Trouble(
            error.message, error.code.value, since, attempts, time.monotonic() + delay_s
        )
        return known is None or known.message != error.message

    async def _remove_orphans(self, summary: Summary) -> None:
        """Links that carry our token and that nothing declares: what a crash or an older state left behind."""
        observed = await self._apply(self._hands.kernel.observe)
        orphans = [
            link for interface_id, link in observed.by_interface(self.node).items() if not self._declared(interface_id)
        ]
        if not orphans:
            return
        drafts = []
        for link, error in await self._apply(lambda: remove_orphans(self._hands, orphans)):
            if error is not None:
                log.error("an orphan could not be removed", name=link.name, error=error.message)
                summary.failed.append(link.name)
                continue
            log.info("orphan removed", name=link.name, ifindex=link.ifindex)
            summary.orphans_removed.append(link.name)
            assert link.token is not None
            body = ev.OrphanRemoved(interface_id=link.token.interface_id, name=link.name, ifindex=link.ifindex)
            drafts.append(self._draft(ev.interface_stream(link.token.interface_id), body))
        await self._append(drafts)

    def _declared(self, interface_id: InterfaceId) -> bool:
        return interface_id in self.state.interfaces

    def next_retry_s(self) -> float | None:
        """Seconds until the next repair that failed is due again; None if there is none."""
        if self._frozen is not None:
            return None
        due = [trouble.next_try for trouble in self.troubles.values()]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def retry_in_s(self, interface_id: InterfaceId) -> float | None:
        """Seconds until a failed repair of this interface is tried again; None if none failed."""
        trouble = self.troubles.get(interface_id)
        return max(0.0, trouble.next_try - time.monotonic()) if trouble is not None else None

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
        try:
            body = ev.WorkerExited(worker=worker, pid=pid, status=status, devices=names)
            stored = self._keep([self.book.take(reading) for reading in last])
            await self._append([self._draft(ev.node_stream(self.node), body)])
            await stored
            await self.reconcile(cause="worker_exit", only=lost)
        except TunledgerError as error:
            log.error("could not recover from a worker's death yet", error=error.message)
        self.wake.set()

    # -- counters

    async def sample(self, *, at_most_every_s: float = 0.0) -> None:
        """Read all counters and store them; durable when it returns.

        Args:
            at_most_every_s: do nothing if the last sample is younger than this.

        Raises:
            TunledgerError: the kernel's or the log's refusal.
        """
        async with self._sampling:
            if self._frozen is not None or time.monotonic() - self._sampled < at_most_every_s:
                return
            links: list[ObservedLink] = await self._apply(self._hands.kernel.sample)
            names = {i.id: i.name for i in self.state.interfaces.values()}
            readings = [
                self.book.take(kernel_reading(link.token.interface_id, self._boot_id, link.ifindex, link.counters))
                for link in one_each(links, self.node, names)
                if link.token is not None
            ]
            for device, figures in self._hands.dataplane.counters().items():
                reading = worker_reading(InterfaceId(device), figures.session, figures.from_kernel, figures.to_kernel)
                if self._declared(reading.interface_id):
                    readings.append(self.book.take(reading))
            await self._keep(readings)
            old = self._clock.before(answers.KEPT.total_seconds())
            # One after the other, so that a command that comes meanwhile waits for one bite at most.
            for bite in (*self._keeper.tend(self._clock.now()), answers.thin(old)):
                await asyncio.wrap_future(self._writer.run(bite))
            self._sampled = time.monotonic()

    def totals(self, interface_id: InterfaceId) -> dict[str, dict[str, int]]:
        """Lifetime totals by source, as of the last sample."""
        return {source.value: self.book.totals(interface_id, source) for source in Source}

    def _store(self, results: Sequence[Result]) -> "asyncio.Future[None]":
        """Keep the last figures of links and devices that converging let go of."""
        return self._keep(self._last_readings(results))

    def _last_readings(self, results: Sequence[Result]) -> list[Reading]:
        readings: list[Reading] = []
        for result in results:
            if result.last_link is not None:
                link = result.last_link
                readings.append(kernel_reading(result.wanted.id, self._boot_id, link.ifindex, link.counters))
            if result.last_figures is not None:
                last = result.last_figures
                readings.append(worker_reading(result.wanted.id, last.session, last.from_kernel, last.to_kernel))
        return [self.book.take(reading) for reading in readings]

    def _job_of(self, readings: Sequence[Reading]) -> Job | None:
        if not readings:
            return None
        totals = {interface_id: self.totals(interface_id) for interface_id in {r.interface_id for r in readings}}
        return self._keeper.store(readings, totals, self._clock.now())

    def _keep(self, readings: Sequence[Reading]) -> "asyncio.Future[None]":
        job = self._job_of(readings)
        if job is None:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done
        return asyncio.wrap_future(self._writer.run(job))

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
        wanted = self._wanted(interface.id, interface.name, interface.wanted)
        observed = await self._apply(lambda: self._hands.kernel.observe([interface.name]))
        sight = sights([wanted], observed, self._hands.dataplane.attached())[interface.id]
        return sight.link, sight.attached

    def health(self) -> list[str]:
        """What is wrong, in words; empty when commands can be taken."""
        found = []
        if self._frozen is not None:
            found.append(f"read-only: {self._frozen}")
        trouble = self._writer.trouble()
        if trouble is not None:
            found.append(f"the log cannot be written: {trouble}")
        found += self._complaints
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
        try:
            await self.sample()
            stopped = ev.ServiceStopped(pid=pid, reason=reason, interfaces=interfaces)
            await self._append([self._draft(ev.node_stream(self.node), stopped)])
        except TunledgerError as error:
            # What the log cannot say must not be done: the interfaces stay.
            log.error("the stop could not be recorded; interfaces are kept", error=error.message)
            return
        settled = [i for i in self.state.interfaces.values() if i.pending is None and i.spec is not None]
        wanted = [self._wanted(i.id, i.name, _at_rest(i.spec, interfaces)) for i in settled]
        if not wanted:
            return
        try:
            results: list[Result] = await self._apply(lambda: converge(self._hands, wanted))
            await self._store(results)
        except TunledgerError as error:
            log.error("could not clean up", error=error.message)
            return
        for result in results:
            if result.error is not None:
                log.error("could not clean up", name=result.wanted.name, error=result.error.message)
        log.info("stopped", reason=reason, interfaces=interfaces, names=[w.name for w in wanted])

    # -- housekeeping

    def _spawn(self, work: Any) -> "asyncio.Task[Any]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _busy(self, name: str) -> bool:
        lock = self._locks.get(name)
        return lock is not None and lock.locked()

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


def _awaited(lock: asyncio.Lock) -> bool:
    return bool(getattr(lock, "_waiters", None))


def _at_rest(spec: InterfaceSpec | None, interfaces: str) -> InterfaceSpec | None:
    """What an interface is to be while the service is away: gone, or there with nobody reading it."""
    if interfaces == "remove" or spec is None:
        return None
    return msgspec.structs.replace(spec, processing=Processing(running=False))


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


def _key_reused(key: str) -> TunledgerError:
    return TunledgerError(
        ErrorCode.KEY_REUSED, f"Idempotency-Key: {key} came with another request before; a key is for one request"
    )


# Refusals that say nothing of the request itself: a repetition under the same key is a new attempt.
_NOT_SETTLED = {
    ErrorCode.OVERLOADED,
    ErrorCode.SHUTTING_DOWN,
    ErrorCode.LOG_FULL,
    ErrorCode.LOG_UNAVAILABLE,
    ErrorCode.OUTCOME_UNKNOWN,
    ErrorCode.VERSION_CONFLICT,
}
