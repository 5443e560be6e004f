"""The composition root: the only module that knows every room. Opens everything in order, and closes it backwards.

workers ---------------------------------v
lock -> database -> fold -> writer, applier -> start-up reconciliation -> HTTP
"""

import asyncio
import contextlib
import datetime
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import structlog
import uuid_utils

from service import __version__, failpoints
from service.api import bodies
from service.config import Config
from service.dataplane.attachment import Ended
from service.dataplane.errors import DataplaneError
from service.dataplane.supervisor import Supervisor
from service.dataplane.telling import WorkerExit
from service.dataplane.work import Work
from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.counters import Book, worker_reading
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.spec import Offloads, Processing
from service.domain.steps import COUNT_ONLY
from service.domain.values import CommandId, InterfaceId, InterfaceName, NodeId
from service.kernel import tundev
from service.kernel.errnos import no_device_node
from service.kernel.monitor import Monitor
from service.kernel.namespaces import host_kernel
from service.kernel.peer import Asker
from service.plane import Plane, trim
from service.reconcile.answer import Finished
from service.reconcile.applier import Applier
from service.reconcile.applying import Remover
from service.reconcile.captures import Captures
from service.reconcile.engine import Engine
from service.reconcile.feed import Feed
from service.reconcile.hands import Hands
from service.reconcile.loop import keep_counted, keep_reconciled
from service.store import counters as counter_store
from service.store import headfile
from service.store.answers import Answers, Reply
from service.store.counters import CounterKeeper, CounterReader
from service.store.database import InstanceLock, obstacle, on_read_only_files, require_current
from service.store.reader import LogReader, Verification
from service.store.reserve import Reserve
from service.store.snapshots import Auditor, Opened, Past, open_log
from service.store.writer import LogWriter
from service.workforce import Workforce

if TYPE_CHECKING:
    from service.serving import Server

EX_IOERR = 74  # sysexits.h
CAP_NET_ADMIN = 12  # include/uapi/linux/capability.h
START_UP_RETRY_S = 2.0  # a disk that is full may have room again, and one that is read-only be writable
FORCED = 128  # plus the number of the signal, as shells count

log = structlog.get_logger("tunledger")


class SystemClock:
    """The host's clock and fresh UUIDv7s."""

    def now(self) -> str:
        """UTC, ISO 8601 with microseconds and a Z."""
        return _stamp(datetime.datetime.now(datetime.UTC))

    def before(self, seconds: float) -> str:
        """The UTC time this long ago, in the same form."""
        return _stamp(datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds))

    def seconds_until(self, stamp: str) -> float:
        """How long until a UTC time in that form; negative if it is past."""
        moment = datetime.datetime.fromisoformat(stamp)
        return (moment - datetime.datetime.now(datetime.UTC)).total_seconds()

    def elapsed_s(self) -> float:
        """CLOCK_BOOTTIME (clock_gettime(2)): nobody sets it, and it goes on while the host sleeps."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def new_id(self) -> str:
        """A new UUIDv7."""
        return str(uuid_utils.uuid7())


def _stamp(moment: datetime.datetime) -> str:
    return moment.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"  # strftime takes twice as long


def serve(config: Config, workforce: Workforce) -> int:
    """Run the service, with workers that have begun, until a signal ends it; the process's exit status.

    Raises:
        TunledgerError: why it could not start: schema_mismatch, already_serving, invalid_field, log_unavailable.
    """
    with contextlib.closing(workforce):
        return _serve(config, workforce)


def _serve(config: Config, workforce: Workforce) -> int:
    _check_defaults(config)
    path = config.database.path
    if not os.path.isdir(path.parent):  # noqa: PTH112  # else migrate says why it may not be looked at
        raise TunledgerError(ErrorCode.SCHEMA_MISMATCH, f"{path} has no log yet: run tunledger migrate")
    where = f"{config.server.host}:{config.server.port}"
    who = {"pid": os.getpid(), "since": SystemClock().now(), "what": f"tunledger serve on {where}"}
    with InstanceLock(path, who) as lock, _listen(config.server.host, config.server.port) as listening:
        failpoints.reach("app.listening")
        address = "{}:{}".format(*listening.getsockname()[:2])
        while (status := asyncio.run(_Service(config, path, listening, address, workforce).run())) is None:
            lock.renew()
            workforce = Workforce(config).begin()
        return status


def _check_defaults(config: Config) -> None:
    """The configured `interface` must make a valid interface."""
    try:
        bodies.create({}, _defaults(config))
    except TunledgerError as error:
        raise TunledgerError(error.code, f"configuration: interface.{error.message}", field=error.field) from error


def _defaults(config: Config) -> bodies.Defaults:
    section = config.interface
    return bodies.Defaults(section.name, section.address, section.netmask, section.mtu)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only where it is; without, each answer waits 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise TunledgerError(
            ErrorCode.ALREADY_SERVING,
            f"server.port: cannot listen on {host} port {port}: {error.strerror}; "
            "is another service there? Choose another with --port",
        ) from error
    return listening


def _passes(frozen: TunledgerError | None) -> bool:
    """Whether what keeps the log from being written may pass by itself."""
    return frozen is not None and frozen.retry


def boot_id() -> str:
    """The kernel's id of this boot (random(4)): tells a reboot from a restart."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True, slots=True)
class _OpenedLog:
    """The database as start-up found it.

    Attributes:
        frozen: why it may not be written, or None. With `retry` that is the file system's doing, and not the log's:
            then it is opened anew when it may be.
    """

    reader: LogReader
    answers: Answers
    counters: CounterReader
    log: Opened
    node: NodeId
    book: Book
    frozen: TunledgerError | None

    def close(self) -> None:
        """Close all that reads."""
        for each in (self.reader, self.answers, self.counters):
            each.close()


class Workers:
    """The supervisor as reconciling sees it: in the domain's words (`reconcile.hands.DataPlane`)."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self.detach = supervisor.detach
        self.counters = supervisor.counters
        self.healthy = supervisor.healthy

    def attach(
        self,
        device: str,
        fd: int,
        *,
        mode: Literal["tun", "tap"],
        name: str | None = None,
        processing: Processing = COUNT_ONLY,
        mtu: int = 1500,
    ) -> str:
        """Hand a descriptor to a worker. Raises DataplaneError."""
        return self._supervisor.attach(device, fd, mode=mode, name=name, work=_work(processing, mtu))

    def configure(self, device: str, processing: Processing, mtu: int) -> None:
        """Have a device's worker do something else. Raises DataplaneError."""
        self._supervisor.configure(device, _work(processing, mtu))

    def attached(self) -> Mapping[str, Processing]:
        """The devices that live workers hold now, and what they were told to do."""
        return {
            device: Processing(running=True, chain=work.chain, offloads=Offloads(work.offloads))
            for device, work in self._supervisor.attached().items()
        }


def _work(processing: Processing, mtu: int) -> Work:
    offloads = processing.offloads
    return Work(processing.chain, mtu=mtu, vnet_hdr=offloads is Offloads.AUTO, offloads=offloads.value)


def _crashed(death: WorkerExit) -> ev.ProcessorCrashed | None:
    """What to record of the processor that a worker died of; None if it died of none, or of a tap of ours."""
    crash = death.crash
    if crash is None:
        return None
    return ev.ProcessorCrashed(
        interface_id=InterfaceId(crash.device),
        name=InterfaceName(crash.name),
        worker=death.worker,
        pid=death.pid,
        stage=crash.stage,
        processor=crash.processor,
        status=death.status,
        error=crash.error,
        packet=crash.packet.hex(),
        packet_bytes=crash.packet_bytes,
        then=crash.then,
    )


class _Told:
    """What workers have to tell, for those that keep the log and the captures (`workforce.Listener`)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: Engine, captures: Captures) -> None:
        self._loop, self._engine = loop, engine
        self.files_for = captures.files_for
        self.poked = captures.poked
        self._captures = captures

    def exited(self, death: WorkerExit) -> None:
        """A worker died: record it, with the last figures of its devices."""
        last = [
            worker_reading(InterfaceId(device), figures.session, figures.from_kernel, figures.to_kernel)
            for device, figures in death.counters.items()
        ]
        self._engine.worker_exited(death.worker, death.pid, death.status, last, _crashed(death))

    def device_lost(self, _device: str, _reason: str) -> None:
        """A worker let go of a device: it may be gone."""
        self._loop.call_soon_threadsafe(self._engine.look_again)

    def stage_ended(self, ended: Ended) -> None:
        """A stage's files are complete."""
        self._captures.ended(ended.device, ended.stage, ended.figures, ended.reason)


class _Service:
    """Everything that runs, and the order in which it stops."""

    def __init__(
        self, config: Config, path: Path, listening: socket.socket, address: str, workforce: Workforce
    ) -> None:
        self._config, self._path, self._workforce = config, path, workforce
        self._listening, self._address = listening, address
        self._clock = SystemClock()
        self._signal: signal.Signals | None = None
        self._broken: str | None = None
        self._starting = True
        self._again = False
        self._server: Server | None = None
        self._auditor: Auditor | None = None
        self._feed = Feed()
        self._captures: Captures | None = None
        self._asker = Asker()

    async def run(self) -> int | None:
        """Start, serve, stop; the exit status, or None to begin again with a log that can be written now."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
            loop.add_signal_handler(number, self._on_signal, number)
        engine: Engine | None = None
        supervisor = self._workforce.supervisor
        plane = Plane(supervisor)
        try:
            opened = self._open_log()
        except BaseException:
            await asyncio.to_thread(self._workforce.close)
            raise
        failpoints.reach("app.log.read")

        def on_recorded(events: list[ev.Recorded]) -> None:
            assert engine is not None
            engine.record(events)

        def publish(events: list[ev.Recorded]) -> None:
            self._feed.publish(events)
            if self._auditor is not None:
                self._auditor.noticed(events[-1].position)

        def on_problem(reason: str) -> None:
            if engine is not None:
                loop.call_soon_threadsafe(engine.freeze, f"the log does not verify: {reason}")

        def on_broken(reason: str) -> None:
            loop.call_soon_threadsafe(self._on_broken, reason)

        def on_news() -> None:
            if engine is not None:
                engine.heard()

        def is_wanted(name: str) -> bool:
            return engine is not None and name in engine.state.by_name  # one look-up: safe in any thread

        writer = LogWriter(
            self._path,
            opened.node,
            now=self._clock.now,
            on_recorded=on_recorded,
            on_broken=on_broken,
        )
        applier = Applier()
        monitor = Monitor(on_news, cares=is_wanted)
        kernel = host_kernel(vouched=monitor.vouches, attend=monitor.attend)
        remover = Applier("kernel-remover")
        removing = host_kernel(vouched=monitor.vouches, attend=monitor.attend)
        engine = Engine(
            node=opened.node,
            state=opened.log.past.state,
            book=opened.book,
            writer=writer,
            applier=applier,
            hands=Hands(kernel, Workers(supervisor), monitor),
            clock=self._clock,
            boot_id=boot_id(),
            render=_render,
            recall=opened.answers.find,
            knows=opened.reader.declared,
            publish=publish,
            frozen=opened.frozen,
            obstacle=lambda: lacks_net_admin() or lacks_device_node(),
            processors=self._workforce.processors,
            remover=Remover(remover, Hands(removing, Workers(supervisor), monitor)),
            keeper=CounterKeeper(
                interval_s=self._config.counters.interval_s,
                raw_s=self._config.counters.raw_s,
                minutes_s=self._config.counters.minutes_s,
                hours_s=self._config.counters.hours_s,
            ),
        )
        directory = self._config.dataplane.capture_directory
        captures = self._captures = Captures(
            plane,
            engine.note,
            Path(directory) if directory else self._path.parent / "captures",
            now=self._clock.now,
            new_id=self._clock.new_id,
            trim=trim,
        )
        captures.bind()
        self._workforce.listener = _Told(loop, engine, captures)
        try:
            if opened.frozen is None:
                self._auditor = Auditor(self._path, opened.log, run=writer.run, on_problem=on_problem)
                writer.start()
                failpoints.reach("app.writer.started")
            monitor.start()
            applier.start()
            remover.start()
            remover.run(lambda: removing.observe(()))  # opens its socket, should descriptors run out later
            try:
                await asyncio.to_thread(self._workforce.wait)
            except (DataplaneError, OSError) as error:
                raise TunledgerError(ErrorCode.WORKER_FAILED, f"the packet workers cannot start: {error}") from error
            failpoints.reach("app.workers.started")
            await self._serve(engine, opened, captures, plane)
        finally:
            failpoints.reach("app.close.before")
            self._feed.close()
            await asyncio.to_thread(self._workforce.close)
            failpoints.reach("app.close.workers")
            await asyncio.to_thread(remover.close)
            await asyncio.to_thread(applier.close)
            await asyncio.to_thread(monitor.close)
            kernel.close()
            removing.close()
            self._asker.close()
            if self._auditor is not None:
                await asyncio.to_thread(self._auditor.close)
            await asyncio.to_thread(writer.close)
            failpoints.reach("app.close.writer")
            opened.close()
            failpoints.reach("app.close.after")
        if self._again and self._signal is None:
            return None
        return EX_IOERR if self._broken is not None else 0

    def _open_log(self) -> "_OpenedLog":
        """Read and verify the log. One that cannot be trusted is served read-only, and nothing is deleted."""
        reader = LogReader(self._path)
        answers, counters = Answers(self._path), CounterReader(self._path)
        found, node, book = Opened(Past(), Verification()), NodeId("unknown"), Book()
        frozen: TunledgerError | None = None
        try:
            self._require_readable()
            found = open_log(reader)
            node = reader.node()
            lost = headfile.problem(self._path, reader.mark, reader.head()[0])
            if lost is not None:
                found.found.problems.append(lost)
            if found.found.problems:
                problems = "; ".join(found.found.problems[:3])
                frozen = TunledgerError(ErrorCode.LOG_CORRUPT, f"the log does not verify: {problems}")
            else:
                book = counter_store.load(self._path)
                frozen = obstacle(self._path) if on_read_only_files(self._path) else None
        except TunledgerError as error:
            if error.code is ErrorCode.SCHEMA_MISMATCH:
                for each in (reader, answers, counters):
                    each.close()
                raise
            frozen = error
        if frozen is not None:
            log.error("read-only: nothing is changed or deleted", reason=frozen.message)
        return _OpenedLog(reader, answers, counters, found, node, book, frozen)

    def _require_readable(self) -> None:
        """As `require_current`. On a full disk SQLite needs a little room even for reading, which the reserve has."""
        refusal = obstacle(self._path)
        if refusal is not None and refusal.code is ErrorCode.LOG_FULL:
            Reserve(self._path).release()
        while True:
            try:
                require_current(self._path)
            except TunledgerError as error:
                if error.code is not ErrorCode.LOG_FULL or not Reserve(self._path).release():
                    raise
            else:
                return

    async def _await_log(self) -> None:
        """Begin again as soon as the file system lets the log be written."""
        while True:
            await asyncio.sleep(START_UP_RETRY_S)
            if await asyncio.to_thread(obstacle, self._path) is None:
                break
        log.info("the log can be written again: starting anew")
        self._again = True
        self._feed.close()
        assert self._server is not None
        self._server.should_exit = True

    async def _serve(self, engine: Engine, opened: "_OpenedLog", captures: Captures, plane: Plane) -> None:
        started = ev.ServiceStarted(
            pid=os.getpid(), version=__version__, boot_id=boot_id(), uid=os.geteuid(), address=self._address
        )
        log.info("starting", version=__version__, database=str(self._path), node=engine.node)
        failpoints.reach("app.start_up.before")
        starting = await self._start_up(engine, started)
        failpoints.reach("app.start_up.after")
        if self._auditor is not None:
            self._auditor.start()
        from service.serving import server  # not before all interfaces are back: litestar's import would delay them

        self._server = server(
            engine,
            self._clock,
            _defaults(self._config),
            opened.reader,
            self._feed,
            opened.counters,
            self._asker,
            captures=captures,
            traffic=plane,
            audit=self._auditor.progress if self._auditor is not None else None,
            shutdown_s=self._config.shutdown.timeout_s,
        )
        if self._signal is not None or self._broken is not None:
            self._server.should_exit = True
        tasks = [
            asyncio.create_task(keep_reconciled(engine, self._config.reconcile.interval_s)),
            asyncio.create_task(keep_counted(engine, self._config.counters.interval_s)),
            asyncio.create_task(captures.run(opened.reader if opened.frozen is None else None)),
            *([starting] if starting is not None else []),
            *([asyncio.create_task(self._await_log())] if _passes(opened.frozen) else []),
        ]
        for task in tasks:
            task.add_done_callback(lambda ended: _tell_of_end(engine, ended))
        if gc.isenabled():
            gc.collect()  # what served before this turn; a first start leaves 200 KiB, not worth looking for
        gc.freeze()  # what start-up made lives as long as the service: later collections need not look at it
        gc.enable()
        failpoints.reach("app.ready")
        log.info("ready", url=f"http://{self._address}")
        try:
            # uvicorn closes what it is given, and another turn needs the socket again.
            await self._server.serve(sockets=[self._listening.dup() if _passes(opened.frozen) else self._listening])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            again = "the log can be written again" if self._again else "unknown"
            reason = self._signal.name if self._signal is not None else self._broken or again
            log.info("stopping", reason=reason)
            failpoints.reach("app.stop.before")
            if self._broken is None:
                await captures.close()
                await self._stop(engine, reason)

    async def _start_up(self, engine: Engine, started: ev.ServiceStarted) -> "asyncio.Task[None] | None":
        """Start the engine up; where the log has no room for that now, go on trying while reads are served."""

        async def attempt() -> TunledgerError | None:
            summary = None
            try:
                summary = await engine.start_up(started)
            except TunledgerError as error:
                if error.retry:
                    return error
                if error.code is not ErrorCode.LOG_CORRUPT:
                    raise
                engine.freeze(error.message)  # damage that shows only in writing: an index, say
            if engine.frozen is not None:
                log.warning("not reconciled: read-only", reason=engine.frozen)
            else:
                log.info("reconciled", interfaces=len(engine.state.interfaces), summary=str(summary))
            return None

        async def again(error: TunledgerError | None) -> None:
            while error is not None:
                log.error("start-up waits", reason=error.message, retry_s=START_UP_RETRY_S)
                await asyncio.sleep(START_UP_RETRY_S)
                error = await attempt()

        error = await attempt()
        self._starting = False
        if self._broken is not None and engine.frozen is None:
            self._on_broken(self._broken)
        else:
            self._broken = None
        return asyncio.create_task(again(error)) if error is not None else None

    async def _stop(self, engine: Engine, reason: str) -> None:
        limit_s = self._config.shutdown.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await engine.stop(pid=os.getpid(), reason=reason, interfaces=self._config.shutdown.interfaces)
        except TimeoutError:
            log.error("stopping took too long; the next start finishes what is left", timeout_s=limit_s)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signal is not None:
            log.warning("second signal: exiting at once, the next start cleans up", signal=number.name)
            sys.stderr.flush()
            os._exit(FORCED + number)
        self._signal = number
        if self._captures is not None:
            self._captures.refuse()
        self._feed.close()  # an open stream would keep the server waiting
        if self._server is not None:
            self._server.should_exit = True

    def _on_broken(self, reason: str) -> None:
        """The log cannot be trusted any more in this process: stop as if killed, and recover from disk. Start-up finds
        out for itself, and may serve it read-only.
        """
        self._broken = reason
        if self._starting:
            return
        log.error("the log failed; stopping without touching the interfaces", reason=reason)
        if self._captures is not None:
            self._captures.refuse()
        self._feed.close()
        if self._server is not None:
            self._server.should_exit = True


def lacks_net_admin() -> str | None:
    """What to say if this process may not change links: CAP_NET_ADMIN in its effective set (capabilities(7))."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # no descriptor left: there is no telling
        return None
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff"))
    if effective >> CAP_NET_ADMIN & 1:
        return None
    return "no command can be carried out: CAP_NET_ADMIN is missing; run as root or grant it"


def lacks_device_node() -> str | None:
    """What to say if no interface can be made or read because /dev/net/tun is not there, or not for this process."""
    try:
        os.close(tundev.open_node())
    except OSError as error:
        refusal = no_device_node(tundev.TUN_PATH, error.errno or 0)
        if refusal.code in (ErrorCode.TUN_MISSING, ErrorCode.PERMISSION_DENIED):
            return f"no interface can be made: {refusal.message}"
    return None


def _tell_of_end(engine: Engine, task: "asyncio.Task[None]") -> None:
    """A loop runs until it is cancelled; if it ended by itself, repairs have stopped, and health has to say so."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        log.error("a loop of the service ended", exc_info=error)
        engine.complain(f"a loop of the service ended by a mistake: {error!r}; restart it")


def _render(
    request: cmd.Request, command_id: CommandId, finished: Sequence[Finished], error: TunledgerError | None
) -> Reply:
    """The reply to a command; the module is there by then, unless start-up finishes a command."""
    from service.api.render import render

    return render(request, command_id, finished, error)
