"""Captures as the service sees them: who asked, which files there are, and when each began and ended, in the log.

Packets are written by the workers (the processor `capture`), into descriptors that come from here: files of a directory
of ours, or a pipe that somebody reads live. Neither HTTP nor the capture's format belongs in here, nor does a worker.

Theory of operation. A capture is one of three:

- one that was asked for: a tap, in front of the chain for what the host sends and behind it for what it gets;
- a live one: the same into a pipe, which ends with its reader;
- a stage of an interface's chain: the data plane asks for its files (`files_for`) each time it sets the stage up.
  Whether the set-up then comes off is not told: what is at work is looked up (`_look_at_stages`).

Each is told in the log before its first packet (`CaptureStarted` is durable before a descriptor is handed out) and when
it is over. Those that a crash left open are told as stopped at the next start (`recover`). Files are named
`<interface>-<capture id>-<number>.pcapng`, belong to us alone (0600 in a directory of 0700), and stay when their
capture ends, until somebody removes it. The latest `files` of a capture are kept.

`Captures` lives on the event loop; what blocks goes to a thread. `files_for`, `poked` and `ended` come from threads.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.values import InterfaceId, InterfaceName
from service.store.reader import LogReader, Selection

CAPTURES_MAX: Final = 16
"""Under way at once, live ones among them; each costs a worker a write for every batch."""

INTERFACE_MAX: Final = 8
"""Under way at once on one interface; as many taps as a device can have."""

KEPT_MAX: Final = 256
"""Captures whose files are kept; then somebody has to remove some. Stages of chains have a bound of their own."""

STOP_S: Final = 5.0
"""For how long a tap is tried to be taken away that the data plane has no time for."""

STOP_RETRY_S: Final = 0.1

FILES_S: Final = 1.5
"""In which a stage has its file; less than the 2 s that the data plane gives the whole set-up."""

PENDING_S: Final = 5.0
"""After which a set-up (2 s at most, and the end of a worker that does not answer) has come off or not."""

LOOK_S: Final = 1.0
"""Between two looks at captures that nothing was heard of."""

PIPE_BYTES: Final = 1 << 20  # fs.pipe-max-size, what anybody may have
SYSTEM: Final = "system"
PAGE: Final = 500  # events read at once when the log is searched

FIGURES: Final = ("packets", "bytes", "dropped")
_FILE: Final = re.compile(r"(?P<name>.+)-(?P<id>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-(?P<n>[0-9]+)\.pcapng")

log = structlog.get_logger("tunledger.captures")


_OVER: Final = (ErrorCode.NOT_RUNNING, ErrorCode.NOT_FOUND)
"""The device is not attached, or has no such tap; whatever else is said of a tap, it may be there still."""


class Stages(Protocol):
    """A stage of a chain as the data plane tells of it."""

    @property
    def processor(self) -> str: ...
    @property
    def bypassed(self) -> bool: ...
    @property
    def figures(self) -> Mapping[str, int]: ...


class Applied(Protocol):
    """What a device's worker was told to do."""

    @property
    def chain(self) -> Sequence[Mapping[str, Any]]: ...


class Taps(Protocol):
    """What captures need of the data plane. Descriptors given to it stay the caller's. Devices are interface ids.

    Every method blocks for a bounded time and raises TunledgerError.
    """

    def attached(self) -> Collection[str]:
        """The devices that workers hold now."""
        ...

    def tap(self, device: str, stage: Mapping[str, Any], files: Sequence[int]) -> int:
        """Put a processor at the device's wire side; its id."""
        ...

    def untap(self, device: str, tap_id: int) -> Mapping[str, int]:
        """Take it away again; its last figures. not_running and not_found: it is not there (any more)."""
        ...

    def feed(self, device: str, place: int, fd: int) -> None:
        """Hand one more file to a tap (its id), or to the stage n of the chain (-1 - n)."""
        ...

    def tap_figures(self, device: str, tap_id: int) -> Mapping[str, int]:
        """A tap's figures as they are."""
        ...

    def stages(self, device: str) -> Sequence[Stages]:
        """The chain's stages; none if the device is not attached."""
        ...

    def applied(self, device: str) -> Applied | None:
        """Its chain, stage for stage as in `stages`; None if the device is not attached."""
        ...


class Record(Protocol):
    """Adds an event about an interface to the log; durable when it returns. Raises TunledgerError."""

    async def __call__(self, interface_id: InterfaceId, body: ev.Event, *, actor: str = SYSTEM) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is captured and how much of it. None: no limit.

    Attributes:
        snaplen: octets kept of each packet.
        size_bytes, interval_s: when the next file is begun.
        files: how many are kept.
        max_packets, max_bytes, max_seconds: when the capture ends by itself.
    """

    snaplen: int
    size_bytes: int | None = None
    interval_s: int | None = None
    files: int = 1
    max_packets: int | None = None
    max_bytes: int | None = None
    max_seconds: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As the API and the log have them."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asked, for the log."""

    actor: str
    request: cmd.Request


@dataclass(slots=True, kw_only=True)
class Capture:
    """One capture. `place` is its tap, or -1 - n of stage n; `reason` is why it is over, None while it is not.

    Attributes:
        given: files handed over that were wanted.
        stopping: somebody is ending it.
        ending: held by who ends it.
        due: why it is to end, if that failed once; each look tries again.
        lost: its tap went while somebody was ending it.
        tapped: `place` is its tap's.
        spec: a stage's JSON.
        handed_s: when a stage's first file was handed over.
        at_work: a stage was seen in the chain, and is there still, as far as is known.
    """

    id: str
    interface_id: InterfaceId
    name: InterfaceName
    settings: Settings
    kind: str  # tap, live or stage
    started_at: str
    place: int = 0
    stopped_at: str | None = None
    reason: str | None = None
    files: dict[int, Path] = field(default_factory=dict)
    next_file: int = 0
    figures: dict[str, int] = field(default_factory=dict)
    given: int = 0
    stopping: bool = False
    ending: asyncio.Lock = field(default_factory=asyncio.Lock)
    due: str | None = None
    lost: bool = False
    tapped: bool = False
    spec: dict[str, Any] = field(default_factory=dict)
    handed_s: float = 0.0
    at_work: bool = False

    @property
    def running(self) -> bool:
        """Whether packets may still come."""
        return self.reason is None


@dataclass(slots=True)
class Live:
    """A live capture and where it is read: a pipe that does not block, closed by `Captures.hang_up`."""

    capture: Capture
    fd: int


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
        self._taps, self._record, self._directory = taps, record, directory
        self._now, self._new_id, self._trim = now, new_id, trim
        self._captures_max = captures_max
        self._captures: dict[str, Capture] = {}
        self._starting: list[InterfaceId] = []
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._looking = asyncio.Lock()
        self._look_due = False  # a poke's look is on its way
        self._tasks: set[asyncio.Task[Any]] = set()
        self._opening = threading.Lock()

    # -- asking

    def all(self, interface_id: InterfaceId) -> list[Capture]:
        """The captures of an interface, the latest last; live ones only while they run."""
        return [each for each in self._captures.values() if each.interface_id == interface_id]

    def find(self, interface_id: InterfaceId, capture_id: str) -> Capture:
        """One of them. Raises TunledgerError: not_found."""
        found = self._captures.get(capture_id)
        if found is None or found.interface_id != interface_id:
            raise TunledgerError(ErrorCode.NOT_FOUND, f"there is no capture {capture_id} of this interface")
        return found

    async def look_at(self, captures: Sequence[Capture]) -> None:
        """Bring the figures of captures under way up to date."""
        if any(capture.running for capture in captures):
            await self._look()

    async def start(self, interface_id: InterfaceId, name: InterfaceName, settings: Settings, asker: Asker) -> Capture:
        """Begin a capture into files.

        Raises:
            TunledgerError: not_running, too_many_captures, capture_failed, the log's.
        """
        with self._room(interface_id):
            capture = self._made(interface_id, name, settings, "tap")
            fd = await asyncio.to_thread(self._open_next, capture)
            try:
                await self._begin(capture, asker)
            except BaseException:
                os.close(fd)
                self._unlink(capture)
                raise
            await self._attach(capture, fd, {})
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
        with self._room(interface_id):
            capture = self._made(interface_id, name, settings, "live")
            reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                _widen(writing, pipe_bytes)
                await self._begin(capture, asker)
            except BaseException:
                os.close(reading)
                os.close(writing)
                raise
            try:
                await self._attach(capture, writing, {"live": True})
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
        again at each look. One that is a stage of a chain is ended by changing the chain.
        """
        if not capture.running:
            return
        if capture.kind == "stage" and reason == "asked":
            raise TunledgerError(
                ErrorCode.INVALID_FIELD,
                f"{capture.id} is a stage of {capture.name}'s chain; take it out of processing.chain to end it",
            )
        async with capture.ending:
            if capture.reason is not None:
                return
            capture.stopping = True
            try:
                await self._untap(capture, patience_s)
            except BaseException as error:
                capture.stopping = False
                if reason != "asked" or not isinstance(error, TunledgerError):
                    capture.due = reason
                raise
            await self._end(capture, reason)

    async def remove(self, capture: Capture) -> None:
        """End a capture, if it is not over, and delete its files. Raises TunledgerError."""
        await self.stop(capture)
        await asyncio.to_thread(self._unlink, capture)
        self._captures.pop(capture.id, None)

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
        files = await asyncio.to_thread(self._found)
        for event, started, told, told_at in await asyncio.to_thread(_history, reader, tuple(files)):
            if started.capture_id in self._captures:  # begun since
                continue
            stopped, stopped_at = told or _stopped(started, "crash", {}), told_at or self._now()
            if told is None:
                await self._record(started.interface_id, stopped)
            if started.capture_id in files:
                own = files[started.capture_id]
                self._captures[started.capture_id] = Capture(
                    id=started.capture_id,
                    interface_id=started.interface_id,
                    name=started.name,
                    settings=_settings(started.settings),
                    kind="stage" if started.request.via == "system" else "tap",
                    started_at=event.recorded_at,
                    stopped_at=stopped_at,
                    reason=stopped.reason,
                    files=own,
                    next_file=max(own) + 1,
                    figures={figure: getattr(stopped, figure) for figure in FIGURES},
                )

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
        for capture in [each for each in self._captures.values() if each.running]:
            try:
                if capture.kind == "stage":
                    await self._look_at_stages(capture.interface_id)
                else:
                    try:
                        await self.stop(capture, "shutdown", patience_s=0.0)
                    except TunledgerError as error:
                        log.warning("a tap goes with its worker", capture_id=capture.id, error=error.message)
                if capture.running:
                    await self._end(capture, "shutdown")
            except TunledgerError as error:
                log.error("the end of a capture could not be recorded", capture_id=capture.id, error=error.message)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- the data plane's calls, from any thread

    def files_for(self, device: str, name: str, stage: int, options: Mapping[str, Any]) -> Sequence[int]:
        """The first file of a capture that is the stage at this place of a chain; the caller's from then on.

        Blocking; not for the event loop.

        Raises:
            TunledgerError: capture_failed, also if it takes longer than FILES_S, or that the log does not take its
                start.
        """
        assert self._loop is not None
        handed: Future[int] = Future()
        asyncio.run_coroutine_threadsafe(self._files_for(device, name, stage, dict(options), handed), self._loop)
        try:
            return [handed.result(timeout=FILES_S)]
        except TimeoutError:
            if not handed.cancel():  # it came this very moment
                return [handed.result()]
            message = f"{name}: the file of its capture was not there within {FILES_S:g} s"
            raise TunledgerError(ErrorCode.CAPTURE_FAILED, message, retry=True) from None

    def poked(self) -> None:
        """A stage wants to be looked at."""
        if self._loop is not None and not self._look_due:
            self._look_due = True
            self._soon(self._look)

    def ended(self, device: str, tap_id: int, figures: Mapping[str, int], reason: str) -> None:
        """A tap is gone, because its device was let go of or its worker died."""
        self._soon(lambda: self._tap_ended(device, tap_id, dict(figures), reason))

    # -- inside

    @contextlib.contextmanager
    def _room(self, interface_id: InterfaceId) -> Iterator[None]:
        """Room for one more capture. Raises TunledgerError: too_many_captures, shutting_down."""
        if self._closing:
            raise TunledgerError(ErrorCode.SHUTTING_DOWN, "the service is stopping", retry=True)
        running = [each.interface_id for each in self._captures.values() if each.running and each.kind != "stage"]
        kept = sum(each.kind != "stage" for each in self._captures.values())
        running += self._starting
        if len(running) >= self._captures_max or running.count(interface_id) >= INTERFACE_MAX:
            raise TunledgerError(
                ErrorCode.TOO_MANY_CAPTURES,
                f"{len(running)} captures are under way, {running.count(interface_id)} of them on this interface; "
                f"at most {self._captures_max} and {INTERFACE_MAX}: stop one, or try again",
                retry=True,
            )
        if kept >= KEPT_MAX:
            raise TunledgerError(
                ErrorCode.TOO_MANY_CAPTURES,
                f"the files of {KEPT_MAX} captures are kept; delete some of them",
                retry=True,
            )
        self._starting.append(interface_id)
        try:
            yield
        finally:
            self._starting.remove(interface_id)

    def _made(self, interface_id: InterfaceId, name: InterfaceName, settings: Settings, kind: str) -> Capture:
        if kind != "stage" and interface_id not in self._taps.attached():
            raise TunledgerError(
                ErrorCode.NOT_RUNNING,
                f"{name}: nobody reads its packets; start its processing first, then they can be captured",
            )
        capture_id = self._new_id()
        return Capture(
            id=capture_id, interface_id=interface_id, name=name, settings=settings, kind=kind, started_at=self._now()
        )

    async def _begin(self, capture: Capture, asker: Asker) -> None:
        settings = capture.settings.to_json()
        await self._record(
            capture.interface_id,
            ev.CaptureStarted(
                interface_id=capture.interface_id,
                name=capture.name,
                capture_id=capture.id,
                live=capture.kind == "live",
                settings=settings,
                request=asker.request,
            ),
            actor=asker.actor,
        )
        self._captures[capture.id] = capture

    async def _attach(self, capture: Capture, fd: int, more: Mapping[str, Any]) -> None:
        """Hand a descriptor to the data plane. If it does not take it, the capture is over."""
        limits = {"max_packets": capture.settings.max_packets, "max_bytes": capture.settings.max_bytes}
        stage = {
            "processor": "capture",
            "on_crash": "bypass",
            "snaplen": capture.settings.snaplen,
            "size_bytes": capture.settings.size_bytes,
            "interval_s": capture.settings.interval_s,
            "files": capture.settings.files,
            "capture_id": capture.id,
            **limits,
            **more,
        }
        try:
            try:
                capture.place = await asyncio.to_thread(self._taps.tap, capture.interface_id, stage, (fd,))
                capture.tapped = True
            finally:
                os.close(fd)
        except BaseException:
            await self._end(capture, "interface_gone")
            await asyncio.to_thread(self._unlink, capture)
            self._captures.pop(capture.id, None)
            raise

    async def _untap(self, capture: Capture, patience_s: float) -> None:
        """Take a tap away, if it is there still. Raises TunledgerError: it may be."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience_s
        while True:
            try:
                found = await asyncio.to_thread(self._taps.untap, capture.interface_id, capture.place)
            except TunledgerError as error:
                if error.code in _OVER or capture.lost:  # its device was let go of meanwhile
                    log.info("a capture was over already", capture_id=capture.id, error=error.message)
                    return
                if not error.retry or loop.time() >= deadline:
                    raise
            else:
                capture.figures.update(found)
                return
            await asyncio.sleep(STOP_RETRY_S)

    async def _files_for(
        self, device: str, name: str, stage: int, options: dict[str, Any], handed: "Future[int]"
    ) -> None:
        """Begin a stage's capture. `handed` gets its file, or why there is none; once cancelled, nothing is left."""
        try:
            capture, fd = await self._begin_stage(InterfaceId(device), InterfaceName(name), stage, options, handed)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the data plane's thread waits for it
            if handed.set_running_or_notify_cancel():
                handed.set_exception(error)
            return
        try:
            if handed.set_running_or_notify_cancel():
                handed.set_result(fd)
                await self._make_room(capture)
            else:
                os.close(fd)
                await self._end(capture, "interface_gone")
                await self._forget(capture)
        except (TunledgerError, OSError) as error:
            log.warning("what a capture leaves is not removed", capture_id=capture.id, error=str(error))

    async def _begin_stage(
        self, interface_id: InterfaceId, name: InterfaceName, stage: int, options: dict[str, Any], handed: "Future[int]"
    ) -> tuple[Capture, int]:
        place = -1 - stage
        if interface_id not in self._taps.attached():
            # It is being attached: whatever was at work before is gone, and what is not known to have been at work may
            # be another stage of the same set-up.
            for each in self.all(interface_id):
                if each.kind == "stage" and (each.at_work or (each.running and each.place == place)):
                    each.at_work = False
                    if each.running:
                        await self._end(each, "worker_exit")
        settings = Settings(
            snaplen=options["snaplen"],
            size_bytes=options["size_bytes"],
            interval_s=options["interval_s"],
            files=options["files"],
        )
        capture = self._made(interface_id, name, settings, "stage")
        capture.place, capture.spec = place, options
        capture.handed_s = asyncio.get_running_loop().time()
        fd = await asyncio.to_thread(self._open_next, capture)
        try:
            if handed.cancelled():
                raise TunledgerError(ErrorCode.CAPTURE_FAILED, f"{name}: nobody waits for its capture any more")
            await self._begin(capture, Asker(SYSTEM, cmd.Request(via="system", call="capture")))
        except BaseException:
            os.close(fd)
            self._unlink(capture)
            raise
        return capture, fd

    async def _make_room(self, begun: Capture) -> None:
        """Remove the oldest captures of this interface's stages that are over: together they keep `files` files.

        Each new set-up, as after a worker's death, is a capture of its own, and nobody is there to remove them. Of
        several stages the one with the most files decides.
        """
        stages = [each for each in self.all(begun.interface_id) if each.kind == "stage"]
        files_max = max(each.settings.files for each in stages)
        over = [each for each in stages if not each.running and not each.at_work]
        files = 0
        for each in sorted(over, key=lambda capture: capture.started_at)[::-1]:
            files += len(each.files)
            if files > files_max or not each.files:
                await self._forget(each)

    async def _forget(self, capture: Capture) -> None:
        await asyncio.to_thread(self._unlink, capture)
        self._captures.pop(capture.id, None)

    async def _look(self) -> None:
        """Read the figures of all captures under way, hand over files that are wanted, end those that are over."""
        async with self._looking:
            self._look_due = False
            attached = self._taps.attached()
            for interface_id in {each.interface_id for each in self._captures.values() if each.kind == "stage"}:
                try:
                    await self._look_at_stages(interface_id)
                except TunledgerError as error:
                    log.warning("stages could not be looked at", interface_id=interface_id, error=error.message)
            for capture in [each for each in self._captures.values() if each.running and not each.stopping]:
                try:
                    if capture.kind != "stage" and capture.interface_id in attached:
                        await self._look_at_tap(capture)
                    await self._act_on(capture)
                except TunledgerError as error:
                    log.warning("a capture could not be looked at", capture_id=capture.id, error=error.message)

    async def _look_at_tap(self, capture: Capture) -> None:
        tapped = capture.tapped
        try:
            capture.figures.update(await asyncio.to_thread(self._taps.tap_figures, capture.interface_id, capture.place))
        except TunledgerError as error:
            if error.code is not ErrorCode.NOT_FOUND or not tapped:
                raise
            if capture.running and not capture.stopping:  # taken away by somebody who did not wait to hear of it
                await self._end(capture, capture.due or "interface_gone")

    async def _look_at_stages(self, interface_id: InterfaceId) -> None:
        """Find each stage's capture again in the chain, and end those whose stage is gone.

        A record is tied to a stage by the stage's JSON, which a stage that stays keeps, and by figures that never go
        back. Of stages with the same JSON those that stay come first, in their order (`work.unchanged`), then new ones
        at their places. A stage that was not seen yet has PENDING_S to come: its set-up is under way, or was refused.

        Limits: a stage that came and went between two looks is told as over PENDING_S late, without figures. Of stages
        with the same JSON, of which one was removed while others came, records may be exchanged if figures allow.
        """
        records = [each for each in self.all(interface_id) if each.kind == "stage" and (each.running or each.at_work)]
        if not records:
            return
        found = await asyncio.to_thread(self._stages_at_work, interface_id)
        if found is None:
            return
        now_s = asyncio.get_running_loop().time()
        pairs = _paired([each for each in records if each.running or each.at_work], found)
        for place, capture in pairs.items():
            capture.place, capture.at_work = -1 - place, True
            if capture.running:
                capture.figures.update(found[place].figures)
        there = {capture.id for capture in pairs.values()}
        for capture in [each for each in records if each.id not in there]:
            known = capture.at_work
            capture.at_work = False
            if not capture.running or capture.stopping or (not known and now_s - capture.handed_s < PENDING_S):
                continue
            await self._end(capture, "asked" if interface_id in self._taps.attached() else "interface_gone")
            if not known and await asyncio.to_thread(_all_empty, tuple(capture.files.values())):
                await self._forget(capture)  # its set-up came to nothing

    def _stages_at_work(self, device: str) -> dict[int, "_AtWork"] | None:
        """Stages that capture, by place; None while the chain is being changed. Blocking."""
        before = self._taps.applied(device)
        stages = self._taps.stages(device)
        after = self._taps.applied(device)
        chain, same = [() if each is None else tuple(each.chain) for each in (before, after)]
        if chain != same or len(chain) != len(stages):
            return None
        return {
            place: _AtWork(spec, stage.figures)
            for place, (spec, stage) in enumerate(zip(chain, stages, strict=True))
            if stage.processor == "capture" and not stage.bypassed
        }

    async def _act_on(self, capture: Capture) -> None:
        if not capture.running or capture.stopping:
            return
        figures = capture.figures
        if capture.due is not None:
            await self.stop(capture, capture.due, patience_s=0.0)
        elif figures.get("finished"):
            await self.stop(capture, "finished", patience_s=0.0)
        elif figures.get("stopped"):
            full = figures["stopped"] in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            if capture.kind != "stage":
                reason = "disk_full" if full else "client_gone" if capture.kind == "live" else "write_failed"
                await self.stop(capture, reason, patience_s=0.0)
            else:
                await self._end(capture, "disk_full" if full else "write_failed")
            if full and capture.files:
                await asyncio.to_thread(self._trim, capture.files[max(capture.files)])
        elif figures.get("files_wanted", 0) > capture.given:
            await asyncio.to_thread(self._give_next, capture)

    def _give_next(self, capture: Capture) -> None:
        """Hand the next file over. Blocking. Raises TunledgerError: the old one goes on, to be tried again."""
        number = capture.next_file
        fd = self._open_next(capture)
        try:
            self._taps.feed(capture.interface_id, capture.place, fd)
        except BaseException:
            capture.files.pop(number).unlink(missing_ok=True)
            capture.next_file = number
            raise
        finally:
            os.close(fd)
        capture.given += 1
        while len(capture.files) > capture.settings.files:
            capture.files.pop(min(capture.files)).unlink(missing_ok=True)

    async def _tap_ended(self, device: str, tap_id: int, figures: dict[str, int], reason: str) -> None:
        for capture in self.all(InterfaceId(device)):
            if capture.kind == "stage" or capture.place != tap_id or not capture.running:
                continue
            capture.figures.update(figures)
            capture.lost = True
            if not capture.stopping:
                capture.stopping = True
                await self._end(capture, reason if reason == "worker_exit" else "interface_gone")

    def _time_over(self, capture: Capture) -> None:
        if capture.running and not self._closing:
            self._spawn(self.stop(capture, "finished"))

    async def _end(self, capture: Capture, reason: str) -> None:
        capture.stopping = True
        capture.reason, capture.stopped_at = reason, self._now()
        if capture.kind == "live":
            self._captures.pop(capture.id, None)
        await self._record(capture.interface_id, _stopped(capture, reason, capture.figures))

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

    # -- files

    def _open_next(self, capture: Capture) -> int:
        """Make a capture's next file. Blocking, for any thread. Raises TunledgerError: capture_failed."""
        path = self._directory / f"{capture.name}-{capture.id}-{capture.next_file}.pcapng"
        try:
            with self._opening:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise TunledgerError(
                ErrorCode.CAPTURE_FAILED,
                f"{path} cannot be made: {os.strerror(error.errno or 0)}",
                errno_name=errno.errorcode.get(error.errno or 0),
            ) from error
        capture.files[capture.next_file] = path
        capture.next_file += 1
        return fd

    @staticmethod
    def _unlink(capture: Capture) -> None:
        for path in capture.files.values():
            path.unlink(missing_ok=True)
        capture.files.clear()

    def _found(self) -> dict[str, dict[int, Path]]:
        """Files of captures before this start, by id."""
        found: dict[str, dict[int, Path]] = {}
        try:
            for path in sorted(self._directory.iterdir()):
                parts = _FILE.fullmatch(path.name)
                if parts is not None and parts["id"] not in self._captures:
                    found.setdefault(parts["id"], {})[int(parts["n"])] = path
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("the captures of earlier runs cannot be listed", error=str(error))
        return found


@dataclass(frozen=True, slots=True)
class _AtWork:
    """A stage that captures, as the data plane has it."""

    spec: Mapping[str, Any]
    figures: Mapping[str, int]

    def may_be(self, capture: Capture) -> bool:
        """Whether nothing speaks against it: see `Captures._look_at_stages`."""
        grown = (self.figures.get(name, 0) >= value for name, value in capture.figures.items())
        return capture.spec == self.spec and all(grown)


def _paired(captures: Sequence[Capture], found: Mapping[int, _AtWork]) -> dict[int, Capture]:
    """Which capture each stage is, by place: see `Captures._look_at_stages`."""
    pairs: dict[int, Capture] = {}

    def pair(capture: Capture, places: Sequence[int]) -> bool:
        place = next((at for at in places if at not in pairs and at in found and found[at].may_be(capture)), None)
        if place is not None:
            pairs[place] = capture
        return place is not None

    for capture in sorted((each for each in captures if each.at_work), key=lambda each: -1 - each.place):
        pair(capture, sorted(found))
    new = [each for each in captures if not each.at_work][::-1]  # of two set-ups of a place, the later one
    elsewhere = [each for each in new if not pair(each, (-1 - each.place,))]
    for capture in elsewhere:  # moved before it was seen
        pair(capture, sorted(found))
    return pairs


def _all_empty(paths: Sequence[Path]) -> bool:
    try:
        return not any(path.stat().st_size for path in paths)
    except OSError:
        return False


def _history(
    reader: LogReader, wanted: Collection[str]
) -> list[tuple[ev.Recorded, ev.CaptureStarted, ev.CaptureStopped | None, str | None]]:
    """Captures of earlier runs that matter still: those that were not told as stopped, and those that have files.

    An orderly stop ends all captures before it is recorded: beyond it only the wanted ones are looked for.
    """
    kinds = (ev.CaptureStarted.__name__, ev.CaptureStopped.__name__, ev.ServiceStopped.__name__)
    stopped: dict[str, tuple[ev.CaptureStopped, str]] = {}
    found = []
    left, orderly, before = set(wanted), False, None
    while left or not orderly:
        page = reader.page(Selection(types=kinds, before=before), limit=PAGE, newest_first=True)
        for event in page:
            match event.body:
                case ev.ServiceStopped():
                    orderly = True
                case ev.CaptureStopped(capture_id=capture_id):
                    stopped[capture_id] = (event.body, event.recorded_at)
                case ev.CaptureStarted(capture_id=capture_id):
                    end, ended_at = stopped.pop(capture_id, (None, None))
                    if capture_id in left or (end is None and not orderly):
                        found.append((event, event.body, end, ended_at))
                    left.discard(capture_id)
        if len(page) < PAGE:
            break
        before = page[-1].position
    return found[::-1]


def _settings(found: Mapping[str, Any]) -> Settings:
    return Settings(**{name: found[name] for name in Settings.__slots__ if name in found})


def _stopped(of: "Capture | ev.CaptureStarted", reason: str, figures: Mapping[str, int]) -> ev.CaptureStopped:
    return ev.CaptureStopped(
        interface_id=of.interface_id,
        name=of.name,
        capture_id=of.id if isinstance(of, Capture) else of.capture_id,
        reason=reason,
        packets=figures.get("packets", 0),
        bytes=figures.get("bytes", 0),
        dropped=figures.get("dropped", 0),
    )


def _widen(pipe: int, octets: int) -> None:
    """Let a pipe hold so much, if we may (fcntl(2), F_SETPIPE_SZ)."""
    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, octets)
    except OSError as error:
        log.info("a live capture has the pipe that everybody has", error=str(error))
