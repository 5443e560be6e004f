"""Captures as the service sees them: begun, looked after while packets come, and ended, each told in the log.

Packets are written by the workers (the processor `capture`), into descriptors that come from here: files of a directory
of ours, or a pipe that somebody reads live. Neither HTTP nor the capture's format belongs in here, nor does a worker;
what a capture is lives in `captured`, its files in `capture_files`, what there are in `capture_register`, what the data
plane does for them in `capture_taps`, and those that chains have in `capture_stages`.

Theory of operation. A capture is one of three:

- one that was asked for: a tap, in front of the chain for what the host sends and behind it for what it gets;
- a live one: the same into a pipe, which ends with its reader;
- a stage of an interface's chain (`ChainCaptures`).

Each is told in the log before its first packet (`CaptureStarted` is durable before a descriptor is handed out) and when
it is over, with the figures that its worker left. Those that a crash left open are told as stopped at the next start
(`recover`). Files stay when their capture ends, and when its interface goes, until somebody removes them.

`Captures` lives on the event loop; what blocks goes to a thread. `files_for`, `poked` and `ended` come from threads.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog

from service.domain.errors import ErrorCode, TunledgerError
from service.domain.values import InterfaceId, InterfaceName
from service.reconcile.capture_files import CaptureFiles
from service.reconcile.capture_register import CAPTURES_MAX, Record, Register
from service.reconcile.capture_stages import ChainCaptures
from service.reconcile.capture_taps import Taps, WireCaptures, goes_on, to_the_end
from service.reconcile.captured import REASONS, Asker, Capture, Kind, Live, Settings, own_end
from service.store.reader import LogReader

STOP_S: Final = 5.0
"""For how long a tap is tried to be taken away that the data plane has no time for."""

LOOK_S: Final = 1.0
"""Between two looks at captures that nothing was heard of."""

PIPE_BYTES: Final = 1 << 20  # fs.pipe-max-size, what anybody may have

log = structlog.get_logger("tunledger.captures")


class Captures:
    """All captures of the service. For the event loop's thread unless a method says otherwise.

    Args:
        directory: where files go; made when the first one is.
        trim: cut an unfinished block off the end of a file whose writer ran out of disk. Blocking.
        clock: now() as the log stamps, new_id().
    """

    def __init__(
        self,
        taps: Taps,
        record: Record,
        directory: Path,
        *,
        now: Callable[[], str],
        new_id: Callable[[], str],
        trim: Callable[[Path], None] = lambda _path: None,
        captures_max: int = CAPTURES_MAX,
    ) -> None:
        self._taps, self._now, self._new_id, self._trim = taps, now, new_id, trim
        self._register = Register(record, now=now, captures_max=captures_max)
        self._files = CaptureFiles(directory)
        self._wire = WireCaptures(self._register, self._files, taps)
        self._chains = ChainCaptures(self._register, self._files, new_capture=self._made_stage, stages=taps.stages)
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._looking = asyncio.Lock()
        self._look_due = False  # a poke's look is on its way
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- asking

    def all(self, interface_id: InterfaceId | None = None) -> list[Capture]:
        """The captures of an interface, or of all that there ever were; the latest last, live ones while they run."""
        return self._register.all() if interface_id is None else self._register.of(interface_id)

    def find(self, capture_id: str, interface_id: InterfaceId | None = None) -> Capture:
        """One of them. Raises TunledgerError: not_found."""
        found = self._register.find(capture_id)
        if interface_id is not None and found.interface_id != interface_id:
            raise TunledgerError(ErrorCode.NOT_FOUND, f"there is no capture {capture_id} of this interface")
        return found

    async def look_at(self, captures: Sequence[Capture]) -> None:
        """Bring the figures of captures under way up to date."""
        if any(capture.running for capture in captures):
            await self._look()

    async def start(self, interface_id: InterfaceId, name: InterfaceName, settings: Settings, asker: Asker) -> Capture:
        """Begin a capture into files.

        Raises:
            TunledgerError: not_running, too_many_captures, capture_failed, shutting_down, the log's.
        """
        with self._room(interface_id, name):
            capture = self._made(interface_id, name, settings, "tap")
            fd = await asyncio.to_thread(self._files.open_next, capture)
            try:
                await self._register.begin(capture, asker)
            except BaseException:
                os.close(fd)
                self._files.unlink(capture)
                raise
            await self._attach(capture, fd)
        if settings.max_seconds is not None:
            asyncio.get_running_loop().call_later(settings.max_seconds, self._time_over, capture)
        return capture

    async def listen(
        self,
        interface_id: InterfaceId,
        name: InterfaceName,
        settings: Settings,
        asker: Asker,
        *,
        pipe_bytes: int = PIPE_BYTES,
    ) -> Live:
        """Begin a live capture. `hang_up` ends it. Raises TunledgerError, as `start`.

        `pipe_bytes` is how much may wait for its reader; what is more is dropped and counted.
        """
        with self._room(interface_id, name):
            capture = self._made(interface_id, name, settings, "live")
            reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                _widen(writing, pipe_bytes)
                await self._register.begin(capture, asker)
            except BaseException:
                os.close(reading)
                os.close(writing)
                raise
            try:
                await self._attach(capture, writing)
            except BaseException:
                os.close(reading)
                raise
        return Live(capture, reading)

    async def hang_up(self, live: Live, reason: str = "client_gone") -> None:
        """End a live capture, told in the log. Its descriptor is closed first, so that nothing more is written."""
        if live.fd >= 0:
            os.close(live.fd)
            live.fd = -1
        try:
            await self.stop(live.capture, reason)
        except TunledgerError as error:
            if live.capture.due is None:  # it is the log that failed
                raise
            log.warning("a live capture will be ended later", capture_id=live.capture.id, error=error.message)

    async def stop(self, capture: Capture, reason: str = "asked", *, patience_s: float = STOP_S) -> None:
        """End a capture, and have it told in the log; nothing if it is over. Raises TunledgerError.

        After an error of the data plane it goes on; if nobody asked for its end, who could ask again, it is tried
        again at each look. One that is a stage of a chain is ended by changing the chain: part_of_chain.
        """
        if not capture.running:
            return
        if capture.kind == "stage" and reason == "asked":
            raise TunledgerError(
                ErrorCode.PART_OF_CHAIN,
                f"{capture.id} is a stage of {capture.name}'s chain; take it out of processing.chain, and it ends",
            )
        async with capture.ending:
            if capture.reason is not None:
                return
            capture.stopping = True
            try:
                await self._wire.untap(capture, patience_s)
            except BaseException as error:
                capture.stopping = False
                if reason != "asked" or not isinstance(error, TunledgerError):
                    capture.due = reason
                raise
            await self._register.end(capture, reason)

    async def remove(self, capture: Capture) -> None:
        """End a capture, if it is not over, and delete its files. Raises TunledgerError."""
        await self.stop(capture)
        await self._forget(capture)

    # -- life

    async def run(self, reader: LogReader | None) -> None:
        """Tell what became of captures of earlier runs, then look at the present ones now and then, until cancelled.

        `reader` is None where the log cannot be written.
        """
        if reader is not None:
            try:
                await self.recover(reader)
            except TunledgerError as error:
                log.error("captures of earlier runs are not told about", error=error.message)
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look()

    def bind(self) -> None:
        """Take the running loop as the one to work on; before the data plane may ask for files."""
        self._loop = asyncio.get_running_loop()

    async def recover(self, reader: LogReader) -> None:
        """Tell of captures that a crash left open, and take up those of earlier runs that there are files of."""
        files = await asyncio.to_thread(self._files.found)
        unheard_of = await self._register.recover(reader, files)
        await asyncio.to_thread(self._files.drop_unheard_of, {each: files[each] for each in unheard_of})

    @property
    def closing(self) -> bool:
        """Whether the service is stopping: streams are to end."""
        return self._closing

    def refuse(self) -> None:
        """Begin no capture any more, and have live ones end soon."""
        self._closing = True

    async def close(self) -> None:
        """End all captures, told in the log; nothing is begun any more."""
        self._closing = True
        for capture in self._register.running():
            try:
                if capture.kind == "stage":
                    await self._chains.look(capture.interface_id)
                else:
                    try:
                        await self.stop(capture, "shutdown", patience_s=0.0)
                    except TunledgerError as error:
                        log.warning("a tap goes with its worker", capture_id=capture.id, error=error.message)
                if capture.running:
                    await self._register.end(capture, "shutdown")
            except TunledgerError as error:
                log.error("the end of a capture could not be recorded", capture_id=capture.id, error=error.message)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- the data plane's calls, from any thread

    def files_for(self, device: str, name: str, stage_id: int, options: Mapping[str, Any]) -> Sequence[int]:
        """See `ChainCaptures.files_for`."""
        assert self._loop is not None
        return self._chains.files_for(self._loop, device, name, stage_id, options)

    def poked(self) -> None:
        """A stage wants to be looked at."""
        if self._loop is not None and not self._look_due:
            self._look_due = True
            self._soon(self._look)

    def ended(self, device: str, stage_id: int, figures: Mapping[str, int], reason: str) -> None:
        """A tap or stage is over, for one of `REASONS`, and its worker done with its files."""
        self._soon(lambda: self._stage_ended(InterfaceId(device), stage_id, dict(figures), REASONS[reason]))

    # -- inside

    @contextlib.contextmanager
    def _room(self, interface_id: InterfaceId, name: InterfaceName) -> Iterator[None]:
        """Room for one more capture. Raises TunledgerError: too_many_captures, shutting_down."""
        if self._closing:
            raise TunledgerError(ErrorCode.SHUTTING_DOWN, "the service is stopping", retry=True)
        try:
            with self._register.room(interface_id, name):
                yield
        finally:
            self._wire.settled()

    def _made(self, interface_id: InterfaceId, name: InterfaceName, settings: Settings, kind: Kind) -> Capture:
        if kind != "stage" and interface_id not in self._taps.attached():
            raise TunledgerError(
                ErrorCode.NOT_RUNNING,
                f"{name}: nobody reads its packets; start its processing first, then they can be captured",
            )
        return Capture(
            id=self._new_id(),
            interface_id=interface_id,
            name=name,
            settings=settings,
            kind=kind,
            started_at=self._now(),
        )

    def _made_stage(self, interface_id: InterfaceId, name: InterfaceName, settings: Settings) -> Capture:
        return self._made(interface_id, name, settings, "stage")

    async def _attach(self, capture: Capture, fd: int) -> None:
        end = await self._wire.attach(capture, fd, live=capture.kind == "live")
        if end is not None and capture.worker_id is not None:
            await self._stage_ended(capture.interface_id, capture.worker_id, *end)

    async def _forget(self, capture: Capture) -> None:
        async with capture.ending:
            await asyncio.to_thread(self._files.unlink, capture)
            self._register.forget(capture)

    async def _look(self) -> None:
        """Read the figures of all captures under way, hand over files that are wanted, end those that are over."""
        async with self._looking:
            self._look_due = False
            attached = self._taps.attached()
            running = self._register.running()
            for interface_id in {each.interface_id for each in running if each.kind == "stage"}:
                try:
                    await self._chains.look(interface_id)
                except (TunledgerError, OSError) as error:
                    log.warning("stages could not be looked at", interface_id=interface_id, error=str(error))
            for capture in running:
                try:
                    if capture.kind != "stage" and capture.interface_id in attached:
                        await self._wire.look(capture)
                    await self._act_on(capture)
                except (TunledgerError, OSError) as error:
                    log.warning("a capture could not be looked at", capture_id=capture.id, error=str(error))

    async def _act_on(self, capture: Capture) -> None:
        if not goes_on(capture):
            return
        over = capture.due or own_end(capture.kind, capture.figures)
        if over is not None:
            if capture.kind == "stage":
                await self._register.end(capture, over)
            else:
                await self.stop(capture, over, patience_s=0.0)
            await self._trim_full(capture, over)
        elif capture.figures.get("files_wanted", 0) > capture.given:
            async with capture.ending:
                if goes_on(capture):
                    await to_the_end(lambda: self._wire.give_next(capture))

    async def _trim_full(self, capture: Capture, reason: str) -> None:
        if reason != "disk_full":
            return
        async with capture.ending:
            if capture.files:
                with contextlib.suppress(FileNotFoundError):  # removed by hand
                    await asyncio.to_thread(self._trim, capture.files[max(capture.files)])

    async def _stage_ended(
        self, interface_id: InterfaceId, stage_id: int, figures: Mapping[str, int], reason: str
    ) -> None:
        present = [each for each in self._register.of(interface_id) if each.worker_id == stage_id]
        if not present:
            self._wire.heard(stage_id, figures, reason)
        for capture in present:
            if not capture.running:
                continue
            capture.figures.update(figures)
            capture.lost = True
            if capture.stopping:
                continue  # who is stopping it tells
            why = own_end(capture.kind, figures) or reason
            await self._register.end(capture, why)
            if capture.kind == "stage" and reason == "refused":
                await self._chains.drop_refused(capture)
            else:
                await self._trim_full(capture, why)

    def _time_over(self, capture: Capture) -> None:
        if capture.running and not self._closing:
            self._spawn(self.stop(capture, "finished"))

    def _soon(self, work: Callable[[], Any]) -> None:
        loop = self._loop
        if loop is not None and not self._closing:
            loop.call_soon_threadsafe(lambda: self._spawn(work()))

    def _spawn(self, work: Any) -> None:
        assert self._loop is not None
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._heard)

    def _heard(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a capture's end or next file came to nothing", error=str(task.exception()))


def _widen(pipe: int, octets: int) -> None:
    """Let a pipe hold so much, if we may (fcntl(2), F_SETPIPE_SZ)."""
    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, octets)
    except OSError as error:
        log.info("a live capture has the pipe that everybody has", error=str(error))
