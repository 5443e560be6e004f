"""The engine: takes commands, keeps desired state, and brings the host to it, each step in the log.

Theory of operation. The engine lives on the event loop and never blocks it: the disk belongs to the log's writer,
the host to the applier, each a thread that answers through futures and does what waits together as one. Here is what
the other rooms call, and who is let in; what is then done has modules of its own:

    submit      survey the host -> decide -> append the intent -> converge -> append the outcome -> answer   finishing
    reconcile   look at everything -> record what drifted -> converge -> append what came of it     reconciling, mending
    confirm     a change that awaits confirmation stays, or is taken back when its time is over               deadlines

    journal     the log and the desired state    locks     one for each name    orphans   links that nothing declares
    applying    the applier's thread             wakeups   what to look at

A command that was cut off by its client goes on to its outcome all the same. HTTP does not live here, nor do pragmas or
netlink.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, assert_never

import msgspec
import structlog

from service import failpoints
from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.counters import Book, Reading
from service.domain.decide import decide, refuse_unknown_processors
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import Host, ObservedLink, link_key
from service.domain.plan import Difference, Sight, differences, plan
from service.domain.spec import InterfaceSpec
from service.domain.state import Interface, State
from service.domain.steps import Step
from service.domain.token import Token
from service.domain.values import CommandId, InterfaceId, InterfaceName, NodeId, parse_netns
from service.reconcile.answer import Answer, Clock, Preview, Renderer
from service.reconcile.applier import Applier
from service.reconcile.applying import Applying, Remover
from service.reconcile.converge import converge, look
from service.reconcile.counting import Counting
from service.reconcile.crossing import Crossing
from service.reconcile.deadlines import Deadlines
from service.reconcile.finishing import Finishing
from service.reconcile.hands import Hands
from service.reconcile.journal import SYSTEM, Journal
from service.reconcile.keys import Keys, is_settled
from service.reconcile.mending import Mending
from service.reconcile.orphans import Orphans
from service.reconcile.reconciling import Reconciling
from service.reconcile.rejections import Allowance
from service.reconcile.summary import Summary, few
from service.reconcile.troubles import Troubles
from service.reconcile.wakeups import Wakeups
from service.store import answers
from service.store.answers import Kept, Reply
from service.store.counters import CounterKeeper
from service.store.writer import LogWriter

IN_FLIGHT_MAX = 256  # commands, confirmations and orders to reconcile that are not done; more are refused

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
        remover: removes single interfaces; without one, the applier does.
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
        processors: Collection[str] = (),
        remover: Remover | None = None,
    ) -> None:
        self.node, self.state = node, state
        self._writer, self._hands = writer, hands
        self._clock, self._render, self._publish = clock, render, publish
        self._obstacle = obstacle
        self._processors = frozenset(processors)  # of other packages
        self._crossing = Crossing()
        self._journal = Journal(
            node=node, state=state, writer=writer, clock=clock, crossing=self._crossing, frozen=frozen
        )
        self._applying = Applying(node=node, applier=applier, hands=hands, crossing=self._crossing, remover=remover)
        self._keys = Keys(recall, self._spawn)
        self._counting = Counting(
            node=node,
            boot_id=boot_id,
            book=book,
            keeper=keeper if keeper is not None else CounterKeeper(),
            hands=hands,
            writer=writer,
            clock=clock,
            apply=self._applying.run_alone,
        )
        self.troubles = Troubles()
        self._wakeups = Wakeups(journal=self._journal, applying=self._applying, troubles=self.troubles)
        self.wake, self._locks = self._wakeups.wake, self._wakeups.locks
        self._finishing = Finishing(
            journal=self._journal,
            applying=self._applying,
            counting=self._counting,
            troubles=self.troubles,
            render=render,
            look_again=self.look_again,
            deadline_set=self._deadline_set,
        )
        self._deadlines = Deadlines(journal=self._journal, locks=self._locks, finishing=self._finishing, render=render)
        self._orphans = Orphans(journal=self._journal, applying=self._applying, knows=knows)
        self._reconciling = Reconciling(
            journal=self._journal,
            locks=self._locks,
            applying=self._applying,
            finishing=self._finishing,
            orphans=self._orphans,
            mending=Mending(
                journal=self._journal, applying=self._applying, counting=self._counting, troubles=self.troubles
            ),
            troubles=self.troubles,
            boot_id=boot_id,
        )
        self._complaints: list[str] = []
        self.miscounted: str | None = None  # why the last sample came to nothing, if by a mistake of ours
        self.stumbled: str | None = None  # the same of the last turn of the loop
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._rejections = Allowance()
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- events

    def record(self, events: list[ev.Recorded]) -> None:
        """The writer's callback, in the writer's thread: have the loop take the events in, in order."""
        self._crossing.call(lambda: self._recorded(events))

    def _recorded(self, events: list[ev.Recorded]) -> None:
        self._journal.recorded(events)
        self._publish(events)

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
        self._refuse_if_too_many()
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
        async with self._locks.hold([cmd.target(command) for command in submission.commands]):
            # What is under way on these interfaces is waited for, as the command itself would.
            intents = await self._decide(submission)
        wanted = [self._finishing.wanted_by(intent) for intent in intents]

        def look_and_plan() -> list[tuple[InterfaceName, tuple[Difference, ...], tuple[Step, ...], str | None]]:
            seen, _ = look(self._hands, wanted)
            closed = self._closed([each.key for each in wanted if each.spec is not None and each.netns is not None])
            plans = []
            for each in wanted:
                refusal = closed.get(each.netns or "") if each.spec is not None else None
                found = differences(each.token, each.name, each.spec, seen[each.id])
                steps = () if refusal is not None else plan(each.token, each.name, each.spec, seen[each.id])
                plans.append((each.name, found, steps, refusal.message if refusal is not None else None))
            return plans

        return Preview(tuple(intents), tuple(await self._applying.run(look_and_plan)))

    def _closed(self, keys: Sequence[str]) -> Mapping[str, TunledgerError]:
        """In the applier's thread: the network namespaces of these links that nothing can be done in, and why."""
        return self._hands.kernel.survey(keys, self.node, networks=False).closed if keys else {}

    async def _decide(self, submission: cmd.Submission) -> list[ev.Intent]:
        host = await self._survey(submission)
        intents = decide(self._journal.state, submission, host, self._journal.new_id, self.degraded)
        refuse_unknown_processors(self._journal.state, intents, self._processors)
        return intents

    def degraded(self, interface_id: InterfaceId) -> str | None:
        """Why an interface is not as desired, as far as that is known; None if it is."""
        trouble = self.troubles.get(interface_id)
        return trouble.message if trouble is not None else None

    async def confirm(self, submission: cmd.Submission) -> Reply:
        """Make a change stay that awaits confirmation: the one of command `submission.request.confirms`.

        Raises:
            TunledgerError: not_awaiting; overloaded.
        """
        self._refuse_if_closed()
        self._refuse_if_too_many()
        work = self._deadlines.confirm(submission)
        if submission.request.key:
            return await asyncio.shield(self._keys.once(submission.actor, submission.request, work))
        reply: Reply = await asyncio.shield(self._spawn(work))
        return reply

    def _deadline_set(self) -> None:
        self._deadlines.note()
        self.wake.set()

    async def take_back_overdue(self) -> None:
        """Undo every change that was not confirmed in time."""
        if not self._closing:
            await self._deadlines.take_back_overdue()

    def next_deadline_s(self) -> float | None:
        """Seconds until the next unconfirmed change is due to be taken back; None if there is none."""
        return self._deadlines.next_s()

    async def reject(
        self, refusal: TunledgerError, name: str, command: str, actor: str, command_id: CommandId, request: cmd.Request
    ) -> None:
        """Record that a command was refused before it was an intent. A flood is recorded as a number.

        Raises:
            TunledgerError: the refusal came with an Idempotency-Key, and could not be kept: it must not be heard, since
                a repetition might hear another.
        """
        if self._journal.frozen is not None or self._closing:
            return
        settled = request.key and is_settled(refusal)
        also = self._finishing.closed(actor, command_id, request, (), refusal) if settled else None
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
            draft = self._journal.draft(ev.name_stream(name), body, actor=actor, command_id=command_id)
            await self._journal.append([draft] if allowed else [], also)
            failpoints.reach("engine.reject.after")
        except TunledgerError as error:
            log.warning("a refusal could not be recorded", name=name, error=error.message)
            if settled:
                raise

    @property
    def frozen(self) -> str | None:
        """Why nothing may be changed, or None."""
        return self._journal.frozen.message if self._journal.frozen is not None else None

    def freeze(self, reason: str) -> None:
        """From now on nothing is changed: the log turned out not to be what it should."""
        self._journal.freeze(reason)

    def _refuse_if_closed(self) -> None:
        self._journal.refuse_if_frozen()
        if self._closing:
            raise TunledgerError(ErrorCode.SHUTTING_DOWN, "the service is stopping", retry=True)
        if not self._reconciling.trusted:
            raise TunledgerError(
                ErrorCode.LOG_UNAVAILABLE,
                "the service has not been able to look at the host yet; try again",
                retry=True,
            )

    def _refuse_if_too_many(self) -> None:
        if len(self._tasks) >= IN_FLIGHT_MAX:
            raise TunledgerError(
                ErrorCode.OVERLOADED, f"{IN_FLIGHT_MAX} commands are being carried out; try again", retry=True
            )

    async def _carry_out(self, submission: cmd.Submission, accepted: "asyncio.Future[None] | None") -> Answer:
        names = [cmd.target(command) for command in submission.commands]
        keys: list[str] = [*names]
        if submission.request.via == "classic" and isinstance(submission.commands[0], cmd.DeclareInterface):
            keys.append("/classic")  # no interface can have this name: at most one is made by that API at a time
        async with self._locks.hold(keys):
            try:
                intents = await self._decide(submission)
            except TunledgerError as refusal:
                kind = type(submission.commands[0]).__name__ if len(names) == 1 else "Batch"
                name = names[0] if len(names) == 1 else ""
                await self.reject(refusal, name, kind, submission.actor, submission.command_id, submission.request)
                raise
            return await self._finishing.intend_and_finish(submission, intents, accepted)

    async def _survey(self, submission: cmd.Submission) -> Host:
        """What the commands are judged against: who holds their names, and which networks others use; without a look
        at the host where neither is asked for.
        """
        networks = any(_may_overlap(command) for command in submission.commands)
        asked = [command for command in submission.commands if networks or self._is_new(command)]
        if not asked:
            return Host()
        keys = tuple(link_key(self._netns_of(command), cmd.target(command)) for command in asked)
        return await self._applying.survey((keys, networks))

    def _is_new(self, command: cmd.Command) -> bool:
        """Whether a command may make an interface, or have it in another network namespace."""
        return _may_declare(command) or (isinstance(command, cmd.PatchInterface) and "netns" in command.patch)

    def _netns_of(self, command: cmd.Command) -> str | None:
        """The network namespace in which a command will have its interface, as far as it makes sense."""
        interface = self.state.find(cmd.target(command))
        present = interface.netns if interface is not None else None
        match command:
            case cmd.DeclareInterface() | cmd.ReplaceInterface():
                return command.spec.netns
            case cmd.PatchInterface() if "netns" in command.patch:
                with contextlib.suppress(TunledgerError):  # which `decide` will say
                    return parse_netns(command.patch["netns"]) if command.patch["netns"] is not None else None
        return present

    # -- reconciling

    async def start_up(self, started: ev.ServiceStarted) -> Summary:
        """Record the start, then bring the host to what the log says, and record the summary."""
        self._loop = asyncio.get_running_loop()
        self._crossing.open()
        summary = await self._reconciling.start_up(started)
        self._wakeups.wake_for_news()
        return summary

    async def work(self, *, everything: bool) -> None:
        """Look at what may have changed and at what is due again, or at everything, and mend what differs.

        Raises:
            TunledgerError: as `reconcile`.
        """
        if not self._reconciling.trusted:
            return
        await self.take_back_overdue()
        causes = await self._wakeups.touched()
        if everything or causes is None:
            self._wakeups.everything_due = False
            await self.reconcile(causes=causes or {})
        elif causes:
            await self.reconcile(only=frozenset(causes), causes=causes)

    def look_again(self) -> None:
        """Have everything looked at soon."""
        self._wakeups.look_again()

    def heard(self) -> None:
        """From any thread: the monitor has news."""
        self._wakeups.heard()
        loop = self._loop
        if loop is not None and not self._closing:
            loop.call_soon_threadsafe(self.wake.set)

    async def reconcile(
        self,
        *,
        cause: str = "unknown",
        causes: Mapping[InterfaceId, str] | None = None,
        only: frozenset[InterfaceId] | None = None,
        asked: bool = False,
    ) -> Summary:
        """Look at all interfaces (or some), and mend what differs. See `Reconciling.reconcile`."""
        return await self._reconciling.reconcile(cause=cause, causes=causes, only=only, asked=asked)

    async def reconcile_now(self) -> Summary:
        """Reconcile because somebody asks: failed repairs are tried at once. Raises TunledgerError."""
        self._refuse_if_closed()
        self.troubles.hurry()
        return await self.reconcile(asked=True)

    async def reconcile_for(self, submission: cmd.Submission) -> Reply:
        """Reconcile because a client asks; with an Idempotency-Key once only. Raises TunledgerError."""
        self._refuse_if_closed()
        self._refuse_if_too_many()
        work = self._reconcile_for(submission)
        if submission.request.key:
            return await asyncio.shield(self._keys.once(submission.actor, submission.request, work))
        reply: Reply = await asyncio.shield(self._spawn(work))
        return reply

    async def _reconcile_for(self, submission: cmd.Submission) -> Reply:
        request, command_id = submission.request, submission.command_id
        self._journal.refuse_if_frozen()
        asked = self._journal.draft(
            ev.node_stream(self.node),
            ev.ReconcileRequested(request=request),
            actor=submission.actor,
            command_id=command_id,
        )
        await self._journal.append([asked])
        summary = await self.reconcile_now()
        reply = Reply(200, msgspec.json.encode({"dry_run": False, **summary.to_json()}))
        if request.key:
            job = answers.closed(
                submission.actor, request.key, request.fingerprint, command_id, self._clock.now(), reply
            )
            await self._crossing.result(self._writer.run(job))
        return reply

    def complain(self, what: str) -> None:
        """Have something that must not happen said by `health` from now on."""
        log.error(what)
        self._complaints.append(what)

    def next_retry_s(self) -> float | None:
        """Seconds until the next repair that failed is due again; None if there is none."""
        return self._wakeups.next_retry_s()

    def retry_in_s(self, interface_id: InterfaceId) -> float | None:
        """Seconds until a repair of this interface is tried again; None if none is to be."""
        trouble = self.troubles.get(interface_id)
        if trouble is None or trouble.next_try == float("inf"):
            return None
        return max(0.0, trouble.next_try - time.monotonic())

    # -- workers

    def worker_exited(
        self, worker: int, pid: int, status: str, last: Sequence[Reading], crash: ev.ProcessorCrashed | None = None
    ) -> None:
        """From any thread: a worker died, perhaps of a processor. Record it, keep what it had counted, give its devices
        to its successor.
        """
        loop = self._loop
        if loop is not None and not self._closing:
            loop.call_soon_threadsafe(
                lambda: (
                    self._spawn(self._replace_worker(worker, pid, status, last, crash)) if not self._closing else None
                )
            )

    async def _replace_worker(
        self, worker: int, pid: int, status: str, last: Sequence[Reading], crash: ev.ProcessorCrashed | None
    ) -> None:
        lost = frozenset(reading.interface_id for reading in last)
        names: list[str] = sorted(i.name for i in self.state.interfaces.values() if i.id in lost)
        failpoints.reach("engine.worker_exit.before")
        try:
            body = ev.WorkerExited(worker=worker, pid=pid, status=status, devices=names)
            counted = self._counting.job([self._counting.book.take(reading) for reading in last])
            drafts = [self._journal.of_node(body)]
            if crash is not None and crash.interface_id in self.state.interfaces:
                log.error("a processor crashed", name=crash.name, processor=crash.processor, error=crash.error)
                drafts.append(self._journal.draft(ev.interface_stream(crash.interface_id), crash))
            await self._journal.append(drafts, counted)
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
        if self._journal.frozen is None:
            await self._counting.sample(self._keys_of_links, at_most_every_s=at_most_every_s)

    def _keys_of_links(self) -> dict[InterfaceId, str]:
        return {i.id: link_key(i.netns, i.name) for i in self.state.interfaces.values()}

    def totals(self, interface_id: InterfaceId) -> dict[str, dict[str, int]]:
        """Lifetime totals by source, as of the last sample."""
        return self._counting.totals(interface_id)

    async def note(self, interface_id: InterfaceId, body: ev.Event, *, actor: str = SYSTEM) -> None:
        """Record something about an interface that changes nothing of what is desired; durable when it returns.

        Raises:
            TunledgerError: the log's refusal.
        """
        self._journal.refuse_if_frozen()
        await self._journal.append([self._journal.draft(ev.interface_stream(interface_id), body, actor=actor)])

    # -- looking

    async def observe_all(self, interfaces: Sequence[Interface]) -> dict[InterfaceId, Sight]:
        """What there is of these interfaces now."""
        return await self._applying.observe(interfaces)

    async def drift(self) -> list[tuple[Interface, tuple[Difference, ...], tuple[Step, ...], TunledgerError | None]]:
        """What differs now, interface by interface, with the steps that would mend it; nothing is changed."""
        interfaces = [i for i in self.state.interfaces.values() if i.pending is None and i.spec is not None]
        seen = await self.observe_all(interfaces)
        keys = [link_key(i.netns, i.name) for i in interfaces if i.netns is not None]
        closed = await self._applying.run(lambda: self._closed(keys))
        found = []
        for interface in interfaces:
            token, sight = Token(self.node, interface.id), seen[interface.id]
            left = differences(token, interface.name, interface.spec, sight)
            if not left:
                continue
            refusal, steps = closed.get(interface.netns or ""), tuple[Step, ...]()
            try:
                if refusal is None:
                    steps = plan(token, interface.name, interface.spec, sight)
            except TunledgerError as error:
                refusal = error
            found.append((interface, left, steps, refusal))
        return found

    async def observe(self, interface: Interface) -> tuple[ObservedLink | None, bool]:
        """The link of one interface as it is now, and whether a worker reads it."""
        sight = (await self.observe_all([interface]))[interface.id]
        return sight.link, sight.attached

    def health(self) -> list[str]:
        """What is wrong, in words; empty when commands can be taken."""
        found = []
        if self._journal.frozen is not None:
            found.append(f"read-only: {self._journal.frozen.message}")
        trouble = self._writer.trouble()
        if trouble is not None:
            found.append(f"the log cannot be written: {trouble}")
        found += [words for words in (self._obstacle(), self.stumbled, self.miscounted) if words is not None]
        found += self._complaints
        found += self._orphans.complaints()
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
        if self._journal.frozen is not None:
            return
        failpoints.reach("engine.stop.before")
        try:
            await self.sample()
        except TunledgerError as error:
            log.error("the last counters could not be stored", error=error.message)
        failpoints.reach("engine.stop.sampled")
        try:
            stopped = ev.ServiceStopped(pid=pid, reason=reason, interfaces=interfaces)
            await self._journal.append([self._journal.of_node(stopped)])
        except TunledgerError as error:
            # What the log cannot say must not be done: the interfaces stay.
            log.error("the stop could not be recorded; interfaces are kept", error=error.message)
            return
        failpoints.reach("engine.stop.recorded")
        settled = [i for i in self.state.interfaces.values() if i.pending is None and i.spec is not None]
        wanted = [self._applying.wanted(i.id, i.name, _at_rest(i.spec, interfaces), netns=i.netns) for i in settled]
        if not wanted:
            return
        try:
            results = await self._applying.run(lambda: converge(self._hands, wanted))
            await self._journal.append([], self._counting.job(self._counting.let_go(results)))
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


def _heard(task: "asyncio.Task[Any]") -> None:
    """Nobody waits for what becomes of it: it is in the log."""
    if not task.cancelled():
        task.exception()


def _at_rest(spec: InterfaceSpec | None, interfaces: str) -> InterfaceSpec | None:
    """What an interface is to be while the service is away: gone, or there with nobody reading it."""
    if interfaces == "remove" or spec is None:
        return None
    return msgspec.structs.replace(spec, processing=msgspec.structs.replace(spec.processing, running=False))


def _may_declare(command: cmd.Command) -> bool:
    """Whether a command can take a name that somebody else's link may have."""
    return isinstance(command, cmd.DeclareInterface | cmd.ReplaceInterface)


def _may_overlap(command: cmd.Command) -> bool:
    """Whether a command can bring an address that has to be compared with the host's networks."""
    match command:
        case cmd.DeclareInterface() | cmd.ReplaceInterface():
            return not command.allow_overlap and bool(command.spec.addresses)
        case cmd.PatchInterface():
            return not command.allow_overlap and not {"addresses", "netns"}.isdisjoint(command.patch)
        case cmd.ConfigureInterface():
            return not command.allow_overlap and (command.ip is not None or command.netmask is not None)
        case cmd.EnableProcessing() | cmd.DisableProcessing() | cmd.RetireInterface():
            return False
        case _:
            assert_never(command)
