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
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import structlog

from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.counters import Book, Reading, Source, kernel_reading, worker_reading
from service.domain.decide import decide, intended
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import ObservedLink
from service.domain.spec import InterfaceSpec, Processing
from service.domain.state import Interface, State, evolve
from service.domain.steps import StartProcessing
from service.domain.token import Token
from service.domain.values import CommandId, InterfaceId, InterfaceName, NodeId
from service.reconcile.applier import Applier
from service.reconcile.converge import Result, Wanted, converge, inspect, remove_orphans, sights
from service.reconcile.hands import Hands
from service.reconcile.rejections import Allowance
from service.store import counters as counter_store
from service.store.writer import LogWriter

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

    def new_id(self) -> str:
        """A new UUIDv7."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command came to: the interface as it is now (None once it is gone) and the link that was seen."""

    command_id: CommandId
    interface: Interface | None
    link: ObservedLink | None
    took_us: int


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
        frozen: why nothing may be changed (an unreadable or unverifiable log), or None.
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
        frozen: str | None = None,
    ) -> None:
        self.node, self.state, self.book = node, state, book
        self._writer, self._applier, self._hands = writer, applier, hands
        self._clock, self._boot_id = clock, boot_id
        self._frozen = frozen
        self._locks: dict[str, asyncio.Lock] = {}
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
        for event in events:
            evolve(self.state, event)

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

    async def submit(self, submission: cmd.Submission) -> Answer:
        """Carry out a command to its outcome, also when the caller stops waiting.

        Raises:
            TunledgerError: why it was refused, before anything was done; or why it failed, after all was undone.
        """
        self._refuse_if_closed()
        if len(self._tasks) >= IN_FLIGHT_MAX:
            raise TunledgerError(
                ErrorCode.OVERLOADED, f"{IN_FLIGHT_MAX} commands are being carried out; try again", retry=True
            )
        return await asyncio.shield(self._spawn(self._carry_out(submission)))

    async def reject(
        self, refusal: TunledgerError, name: str, command: str, actor: str, command_id: CommandId, request: cmd.Request
    ) -> None:
        """Record that a command was refused before it was an intent. A flood is recorded as a number."""
        allowed, suppressed = self._rejections.take(time.monotonic())
        if not allowed or self._frozen is not None or self._closing:
            return
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
            await self._append([self._draft(ev.name_stream(name), body, actor=actor, command_id=command_id)])
        except TunledgerError as error:
            log.warning("a refusal could not be recorded", name=name, error=error.message)

    def _refuse_if_closed(self) -> None:
        if self._frozen is not None:
            raise TunledgerError(ErrorCode.LOG_CORRUPT, f"read-only: {self._frozen}")
        if self._closing:
            raise TunledgerError(ErrorCode.SHUTTING_DOWN, "the service is stopping", retry=True)

    async def _carry_out(self, submission: cmd.Submission) -> Answer:
        name = cmd.target(submission.command)
        keys: list[str] = [name]
        if isinstance(submission.command, cmd.DeclareInterface) and submission.request.via == "classic":
            keys.append("/classic")  # no interface can have this name: at most one is made by that API at a time
        async with self._locked(keys):
            try:
                intent = await self._decide(submission, name)
            except TunledgerError as refusal:
                await self.reject(
                    refusal,
                    name,
                    type(submission.command).__name__,
                    submission.actor,
                    submission.command_id,
                    submission.request,
                )
                raise
            before = self.state.interfaces.get(intent.interface_id)
            expected = before.version if before is not None else 0
            stream = ev.interface_stream(intent.interface_id)
            await self._append(
                [
                    self._draft(
                        stream,
                        intent,
                        actor=submission.actor,
                        command_id=submission.command_id,
                        expected_version=expected,
                    )
                ]
            )
            started = time.monotonic_ns()
            wanted = self._wanted(intent.interface_id, name, intended(intent, before), fresh=before is None)
            return await self._finish(submission.command_id, submission.actor, wanted, "command", started)

    async def _decide(self, submission: cmd.Submission, name: InterfaceName) -> ev.Intent:
        command = submission.command
        networks = (isinstance(command, cmd.DeclareInterface) and not command.allow_overlap) or (
            isinstance(command, cmd.ConfigureInterface)
            and not command.allow_overlap
            and (command.ip is not None or command.netmask is not None)
        )
        host = await self._apply(lambda: self._hands.kernel.survey(name, self.node, networks=networks))
        return decide(self.state, submission, host, InterfaceId(self._clock.new_id()))

    async def _finish(
        self, command_id: CommandId, actor: str, wanted: Wanted, by: ev.FinishedBy, started: int
    ) -> Answer:
        """Bring a pending intent to its outcome: applied and verified, or undone and failed."""
        result = await self._converge_one(wanted)
        stored = self._store([result])  # at once: a later sample must not come before these figures
        undone = True
        if result.error is not None:
            undone = await self._undo(wanted)
        took_us = (time.monotonic_ns() - started) // 1000
        outcome = _outcome(wanted, result, by, took_us, undone=undone)
        try:
            await self._append(
                [self._draft(ev.interface_stream(wanted.id), outcome, actor=actor, command_id=command_id)]
            )
            await stored
        except TunledgerError as error:
            asyncio.get_running_loop().call_later(BACK_OFF_FIRST_S, self.wake.set)
            raise TunledgerError(
                ErrorCode.OUTCOME_UNKNOWN,
                f"command {command_id} was carried out on {wanted.name}, but its outcome could not be recorded yet: "
                f"{error.message}; it is finished as soon as the log can be written",
                retry=True,
            ) from error
        self.troubles.pop(wanted.id, None)
        if wanted.spec is None and result.error is None:
            self.book.forget(wanted.id)
        if result.error is not None:
            log.warning("command failed", command_id=command_id, name=wanted.name, error=result.error.message)
            raise result.error
        log.info("command applied", command_id=command_id, name=wanted.name, by=by, took_us=took_us)
        return Answer(command_id, self.state.interfaces.get(wanted.id), result.link, took_us)

    async def _undo(self, wanted: Wanted) -> bool:
        """Bring the host back to what it was before a pending intent; whether that worked."""
        interface = self.state.interfaces.get(wanted.id)
        previous = interface.spec if interface is not None else None
        result = await self._converge_one(self._wanted(wanted.id, wanted.name, previous))
        if result.error is not None:
            log.error("could not undo", name=wanted.name, error=result.error.message)
            self._note_trouble(wanted.id, result.error)
        return result.error is None

    async def _converge_one(self, wanted: Wanted) -> Result:
        try:
            results: list[Result] = await self._apply(lambda: converge(self._hands, [wanted]))
            return results[0]
        except TunledgerError as error:
            return Result(wanted, error=error)

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
        if self._frozen is not None:
            return summary
        chosen = [i for i in self.state.interfaces.values() if only is None or i.id in only]
        free = [i for i in chosen if not self._busy(i.name)]
        async with self._locked([i.name for i in free]):
            if only is None:
                await self._remove_orphans(summary)
            # What was free may have changed while the locks were taken.
            present = [self.state.interfaces[i.id] for i in free if i.id in self.state.interfaces]
            pending = [i for i in present if i.pending is not None]
            settled = [i for i in present if i.pending is None]
            for interface in pending:
                await self._recover(interface, summary)
            await self._mend(settled, cause, summary)
        return summary

    async def _recover(self, interface: Interface, summary: Summary) -> None:
        """Finish an intent that has no outcome yet."""
        assert interface.pending is not None
        pending = interface.pending
        wanted = self._wanted(interface.id, interface.name, pending.spec)
        try:
            await self._finish(pending.command_id, SYSTEM, wanted, "recovery", time.monotonic_ns())
            summary.finished.append(interface.name)
        except TunledgerError as error:
            log.error("a pending command failed", name=interface.name, error=error.message)
            summary.failed.append(interface.name)

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
        due = [trouble.next_try for trouble in self.troubles.values()]
        return max(0.0, min(due) - time.monotonic()) if due else None

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
            readings = [
                self.book.take(kernel_reading(link.token.interface_id, self._boot_id, link.ifindex, link.counters))
                for link in links
                if link.token is not None and link.token.node == self.node and self._declared(link.token.interface_id)
            ]
            for device, figures in self._hands.dataplane.counters().items():
                reading = worker_reading(InterfaceId(device), figures.session, figures.from_kernel, figures.to_kernel)
                if self._declared(reading.interface_id):
                    readings.append(self.book.take(reading))
            await self._keep(readings)
            self._sampled = time.monotonic()

    def totals(self, interface_id: InterfaceId) -> dict[str, dict[str, int]]:
        """Lifetime totals by source, as of the last sample."""
        return {source.value: self.book.totals(interface_id, source) for source in Source}

    def _store(self, results: Sequence[Result]) -> "asyncio.Future[None]":
        """Keep the last figures of links and devices that converging let go of."""
        readings: list[Reading] = []
        for result in results:
            if result.last_link is not None:
                link = result.last_link
                readings.append(kernel_reading(result.wanted.id, self._boot_id, link.ifindex, link.counters))
            if result.last_figures is not None:
                last = result.last_figures
                readings.append(worker_reading(result.wanted.id, last.session, last.from_kernel, last.to_kernel))
        return self._keep([self.book.take(reading) for reading in readings])

    def _keep(self, readings: Sequence[Reading]) -> "asyncio.Future[None]":
        if not readings:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done
        totals = {
            interface_id: {
                f"{source}.{name}": value
                for source, figures in self.totals(interface_id).items()
                for name, value in figures.items()
            }
            for interface_id in {reading.interface_id for reading in readings}
        }
        job = counter_store.store(
            readings, totals, self._clock.now(), self._clock.before(counter_store.RAW_KEPT.total_seconds())
        )
        return asyncio.wrap_future(self._writer.run(job))

    # -- looking

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


def _outcome(wanted: Wanted, result: Result, by: ev.FinishedBy, took_us: int, *, undone: bool) -> ev.Outcome:
    if result.error is None:
        return ev.CommandApplied(
            interface_id=wanted.id,
            name=wanted.name,
            by=by,
            took_us=took_us,
            steps=[str(step) for step in result.steps],
        )
    return ev.CommandFailed(
        interface_id=wanted.id,
        name=wanted.name,
        by=by,
        took_us=took_us,
        code=result.error.code.value,
        message=result.error.message,
        errno=result.error.errno_name,
        undone=undone,
    )
