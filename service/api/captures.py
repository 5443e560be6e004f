"""/api/v1/interfaces/{name}/processing, flows, packets, tail, captures and capture/stream: packets over HTTP.

And /api/v1/captures, where the captures of interfaces that are no more are found.

Packets are as sensitive as commands, and the same callers may have them. What is captured, and when that is told in the
log, is `service.reconcile.captures`' business; how packets look in words is `service.api.traffic`'s.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
from litestar import Controller, Request, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, RawBody
from litestar.response import Stream
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send

from service.api import bodies, traffic
from service.api.access import caller
from service.api.events import HEARTBEAT_S, STALL_S, _disconnected, _number, parameters
from service.api.orders import Orders, _reason
from service.api.problems import answer
from service.api.traffic import TOP_DEFAULT, TOP_MAX, Inspected, Traffic
from service.domain import chain as chains
from service.domain import commands as cmd
from service.domain.errors import ErrorCode, TunledgerError, invalid, unknown
from service.domain.state import Interface
from service.domain.values import parse_int, parse_name
from service.packet.pcapng import Captured, Reader, whole
from service.reconcile.captured import Asker, Capture, Live, Settings
from service.reconcile.captures import Captures

PCAPNG: Final = "application/x-pcapng"
PACKETS_MAX: Final = 10**15
SECONDS_MAX: Final = 366 * 24 * 3600
BYTES_MIN, BYTES_MAX = 4096, 1 << 40
PACKETS_DEFAULT, PACKETS_SHOWN_MAX = 64, chains.PACKETS_KEPT_MAX
TAIL_PPS_DEFAULT, TAIL_PPS_MAX = 100, 1000
TAIL_LIMIT_MAX = 1_000_000
TAIL_SNAPLEN: Final = 256  # every header that `packet.parse` reads of an honest packet
TAIL_PIPE_BYTES: Final = 1 << 16
PAUSE_S: Final = 0.03  # in which packets of a stream gather; they wait no longer than 0.1 s
LOOK_S: Final = 0.5  # how often a silent stream looks whether the service stops
READ_BYTES: Final = 1 << 18
CHUNK_BYTES: Final = 1 << 18

log = structlog.get_logger("tunledger.api")

# What a capture that was asked for may be limited by, besides the options of the processor.
LIMITS: Final[Mapping[str, Callable[[Any, str], int | None]]] = {
    "max_packets": lambda value, field: None if value is None else parse_int(value, field, 1, PACKETS_MAX),
    "max_bytes": lambda value, field: None if value is None else parse_int(value, field, BYTES_MIN, BYTES_MAX),
    "max_seconds": lambda value, field: None if value is None else parse_int(value, field, 1, SECONDS_MAX),
}


class CapturesController(Controller):
    """/api/v1/interfaces/{name}/..."""

    path = "/api/v1/interfaces/{name:str}"

    @get("/processing")
    async def processing(
        self,
        request: Request[Any, Any, Any],
        orders: NamedDependency[Orders],
        traffic_of: NamedDependency[Traffic],
        name: FromPath[str],
    ) -> Response[bytes]:
        """How the interface's chain is doing, stage by stage."""
        parameters(request)
        interface = _existing(orders, name)
        device = interface.id
        applied, stages, drops = await asyncio.to_thread(
            lambda: (traffic_of.applied(device), traffic_of.stages(device), traffic_of.drops(device))
        )
        return answer(traffic.processing_json(name, applied, stages, drops, _unread(orders, interface)))

    @get("/flows")
    async def flows(
        self,
        request: Request[Any, Any, Any],
        orders: NamedDependency[Orders],
        traffic_of: NamedDependency[Traffic],
        name: FromPath[str],
    ) -> Response[bytes]:
        """The flows with the most bytes, and totals by protocol."""
        given = parameters(request, "top")
        top = _number(given, "top", 1, TOP_MAX, TOP_DEFAULT)
        found = await _inspected(orders, traffic_of, name)
        return answer(await asyncio.to_thread(traffic.flows_json, name, found, top))

    @get("/packets")
    async def packets(
        self,
        request: Request[Any, Any, Any],
        orders: NamedDependency[Orders],
        traffic_of: NamedDependency[Traffic],
        name: FromPath[str],
    ) -> Response[bytes]:
        """The latest packets, decoded, the newest last."""
        given = parameters(request, "limit")
        limit = _number(given, "limit", 1, PACKETS_SHOWN_MAX, PACKETS_DEFAULT)
        mode = _mode(_existing(orders, name))
        found = await _inspected(orders, traffic_of, name)

        def decoded() -> list[dict[str, Any]]:
            return [
                traffic.packet_json(
                    mode, time_ns=each.time_ns, inbound=each.inbound, length=each.length, packet=each.packet
                )
                for each in found.latest[-limit:]
            ]

        return answer({"name": name, "packets": await asyncio.to_thread(decoded)})

    @get("/tail")
    async def tail(
        self,
        request: Request[Any, Any, Any],
        orders: NamedDependency[Orders],
        captures: NamedDependency[Captures],
        name: FromPath[str],
    ) -> "Response[bytes]":
        """Packets in words as they come, as server-sent events."""
        given = parameters(request, "limit", "rate_pps")
        limit = _number(given, "limit", 1, TAIL_LIMIT_MAX, 0) if "limit" in given else None
        rate = _number(given, "rate_pps", 1, TAIL_PPS_MAX, TAIL_PPS_DEFAULT)
        interface = _existing(orders, name)
        settings = Settings(snaplen=TAIL_SNAPLEN)
        with _said_why(orders, interface):
            live = await captures.listen(
                interface.id, interface.name, settings, _asker(request, "tail"), pipe_bytes=TAIL_PIPE_BYTES
            )
        return Flowing(_Tail(captures, live, _mode(interface), rate, limit), "text/event-stream; charset=utf-8")

    @get("/capture/stream")
    async def stream(
        self,
        request: Request[Any, Any, Any],
        orders: NamedDependency[Orders],
        captures: NamedDependency[Captures],
        name: FromPath[str],
    ) -> "Response[bytes]":
        """Packets as a pcapng stream, until one side ends it."""
        given = parameters(request, "snaplen")
        snaplen = _number(given, "snaplen", 16, chains.SNAPLEN_MAX, chains.SNAPLEN_MAX)
        interface = _existing(orders, name)
        settings = Settings(snaplen=snaplen)
        with _said_why(orders, interface):
            live = await captures.listen(interface.id, interface.name, settings, _asker(request, "stream"))
        return Flowing(_Pcapng(captures, live), PCAPNG)

    @get("/captures")
    async def list_captures(
        self,
        request: Request[Any, Any, Any],
        orders: NamedDependency[Orders],
        captures: NamedDependency[Captures],
        name: FromPath[str],
    ) -> Response[bytes]:
        """The captures of the interface, the latest last."""
        parameters(request)
        found = captures.all(_existing(orders, name).id)
        await captures.look_at(found)
        return answer({"captures": [await _told(each) for each in found]})

    @post("/captures")
    async def start_capture(
        self,
        request: Request[Any, Any, Any],
        orders: NamedDependency[Orders],
        captures: NamedDependency[Captures],
        name: FromPath[str],
        body: RawBody,
    ) -> Response[bytes]:
        """Begin to write the interface's packets into files."""
        parameters(request)
        settings = settings_of(bodies.document(body, nulls=True))
        interface = _existing(orders, name)
        with _said_why(orders, interface):
            capture = await captures.start(interface.id, interface.name, settings, _asker(request, "capture"))
        where = f"/api/v1/interfaces/{name}/captures/{capture.id}"
        return answer(await _told(capture), 201, {"Location": where})

    @get("/captures/{capture_id:str}")
    async def read_capture(
        self,
        request: Request[Any, Any, Any],
        orders: NamedDependency[Orders],
        captures: NamedDependency[Captures],
        name: FromPath[str],
        capture_id: FromPath[str],
    ) -> Response[bytes]:
        """One capture."""
        parameters(request)
        capture = captures.find(capture_id, _existing(orders, name).id)
        await captures.look_at([capture])
        return answer(await _told(capture))

    @post("/captures/{capture_id:str}/stop", status_code=200)
    async def stop_capture(
        self,
        request: Request[Any, Any, Any],
        orders: NamedDependency[Orders],
        captures: NamedDependency[Captures],
        name: FromPath[str],
        capture_id: FromPath[str],
        body: RawBody,
    ) -> Response[bytes]:
        """End a capture; its files stay."""
        parameters(request)
        bodies.nothing(bodies.document(body))
        capture = captures.find(capture_id, _existing(orders, name).id)
        await captures.stop(capture)
        return answer(await _told(capture))

    @delete("/captures/{capture_id:str}", status_code=200)
    async def delete_capture(
        self,
        request: Request[Any, Any, Any],
        orders: NamedDependency[Orders],
        captures: NamedDependency[Captures],
        name: FromPath[str],
        capture_id: FromPath[str],
    ) -> Response[bytes]:
        """End a capture, and delete its files."""
        parameters(request)
        capture = captures.find(capture_id, _existing(orders, name).id)
        await captures.remove(capture)
        return answer({"id": capture.id, "deleted": True})

    @get("/captures/{capture_id:str}/files/{number:str}")
    async def capture_file(
        self,
        request: Request[Any, Any, Any],
        orders: NamedDependency[Orders],
        captures: NamedDependency[Captures],
        name: FromPath[str],
        capture_id: FromPath[str],
        number: FromPath[str],
    ) -> Stream:
        """One file of a capture, as far as it is written."""
        parameters(request)
        return await _file(captures.find(capture_id, _existing(orders, name).id), number)


class KeptController(Controller):
    """/api/v1/captures...: captures by their ids, also of interfaces that are no more."""

    path = "/api/v1/captures"

    @get("")
    async def list_all(self, request: Request[Any, Any, Any], captures: NamedDependency[Captures]) -> Response[bytes]:
        """The captures of all interfaces, the latest last."""
        given = parameters(request, "name")
        name = parse_name(given["name"][0], "name") if "name" in given else None
        found = [each for each in captures.all() if name is None or each.name == name]
        await captures.look_at(found)
        return answer({"captures": [await _told(each) for each in found]})

    @get("/{capture_id:str}")
    async def read(
        self, request: Request[Any, Any, Any], captures: NamedDependency[Captures], capture_id: FromPath[str]
    ) -> Response[bytes]:
        """One capture."""
        parameters(request)
        capture = captures.find(capture_id)
        await captures.look_at([capture])
        return answer(await _told(capture))

    @delete("/{capture_id:str}", status_code=200)
    async def remove(
        self, request: Request[Any, Any, Any], captures: NamedDependency[Captures], capture_id: FromPath[str]
    ) -> Response[bytes]:
        """End a capture, and delete its files."""
        parameters(request)
        capture = captures.find(capture_id)
        await captures.remove(capture)
        return answer({"id": capture.id, "deleted": True})

    @get("/{capture_id:str}/files/{number:str}")
    async def file(
        self,
        request: Request[Any, Any, Any],
        captures: NamedDependency[Captures],
        capture_id: FromPath[str],
        number: FromPath[str],
    ) -> Stream:
        """One file of a capture, as far as it is written."""
        parameters(request)
        return await _file(captures.find(capture_id), number)


def settings_of(given: Mapping[str, Any]) -> Settings:
    """What a capture is to be, from its JSON; what is not given has the processor's defaults. Raises TunledgerError."""
    options = chains.BUILT_IN["capture"]
    for key in given:
        if key not in options and key not in LIMITS:
            raise unknown("", key, [*options, *LIMITS])
    found = {key: parse(given[key], key) if key in given else default for key, (parse, default) in options.items()}
    found |= {key: parse(given[key], key) for key, parse in LIMITS.items() if key in given}
    if found["files"] > 1 and found["size_bytes"] is None and found["interval_s"] is None:
        raise invalid("files", found["files"], "files need size_bytes or interval_s to begin a new one at")
    return Settings(**found)


def _existing(orders: Orders, name: str) -> Interface:
    interface = orders.engine.state.find(name)
    if interface is None:
        raise TunledgerError(ErrorCode.NO_INTERFACE, f"there is no interface {name}")
    return interface


def _mode(interface: Interface) -> Any:
    spec = interface.spec or interface.wanted
    return spec.mode.value if spec is not None else "tun"


def _asker(request: Request[Any, Any, Any], call: str) -> Asker:
    who = caller(request)
    reason = _reason(request.headers.get("tunledger-reason", ""))
    return Asker(who.actor, cmd.Request(via="v1", call=call, peer=who.peer, user=who.user, reason=reason))


async def _inspected(orders: Orders, traffic_of: Traffic, name: str) -> Inspected:
    """Raises TunledgerError: no_interface, not_running, not_inspected."""
    interface = _existing(orders, name)
    found = await asyncio.to_thread(traffic_of.inspected, interface.id)
    if found is not None:
        return found
    if await asyncio.to_thread(traffic_of.applied, interface.id) is None:
        with _said_why(orders, interface):
            raise TunledgerError(ErrorCode.NOT_RUNNING, f"{name}: nobody reads its packets; start its processing first")
    raise TunledgerError(
        ErrorCode.NOT_INSPECTED,
        f'{name}: nothing in its chain keeps flows and packets; put {{"processor": "inspect"}} into processing.chain',
    )


async def _file(capture: Capture, number: str) -> Stream:
    known = {str(each): path for each, path in capture.files.items()}
    if number not in known:
        numbers = ", ".join(known) or "none"
        raise TunledgerError(ErrorCode.NOT_FOUND, f"{capture.id} has no file {number}; it has {numbers}")
    path = known[number]
    growing = capture.running and path == capture.files[max(capture.files)]
    try:
        await asyncio.to_thread(path.lstat)
    except FileNotFoundError:
        raise TunledgerError(ErrorCode.NOT_FOUND, f"{path.name} is not there any more") from None
    headers = {"Content-Disposition": f'attachment; filename="{_safe(path)}"'}
    return Stream(_octets(path, growing=growing), media_type=PCAPNG, headers=headers)


def _unread(orders: Orders, interface: Interface) -> str | None:
    """Why no worker may have an interface that one should; None where none should."""
    if interface.spec is None or not interface.spec.processing.running:
        return None
    return orders.engine.degraded(interface.id) or "no worker has it at the moment"


@contextlib.contextmanager
def _said_why(orders: Orders, interface: Interface) -> Iterator[None]:
    """Where a refusal would have somebody start processing that is on already, say what is wrong."""
    try:
        yield
    except TunledgerError as error:
        why = _unread(orders, interface) if error.code is ErrorCode.NOT_RUNNING else None
        if why is None:
            raise
        text = f"{interface.name}: nobody reads its packets, although its processing is on: {why}"
        raise TunledgerError(ErrorCode.NOT_RUNNING, text, retry=True) from error


async def _told(capture: Capture) -> dict[str, Any]:
    sizes = await asyncio.to_thread(_sizes, dict(capture.files))
    return {
        "id": capture.id,
        "name": capture.name,
        "state": "running" if capture.running else "stopped",
        "reason": capture.reason,
        "stage": capture.stage if capture.running else None,
        "started_at": capture.started_at,
        "stopped_at": capture.stopped_at,
        "settings": capture.settings.to_json(),
        "packets": capture.figures.get("packets", 0),
        "bytes": capture.figures.get("bytes", 0),
        "dropped": capture.figures.get("dropped", 0),
        "files": [{"number": number, "size_bytes": size} for number, size in sizes],
    }


def _sizes(files: Mapping[int, Path]) -> list[tuple[int, int]]:
    found = []
    for number, path in sorted(files.items()):
        with contextlib.suppress(FileNotFoundError):  # deleted by somebody
            found.append((number, path.stat().st_size))
    return found


def _safe(path: Path) -> str:
    return "".join(char if char.isalnum() or char in "._-" else "_" for char in path.name)


async def _octets(path: Path, *, growing: bool) -> AsyncIterator[bytes]:
    """A file up to its present end; of one that grows, whole blocks only.

    It is opened in here: one that is never begun, as its client went away, has nothing open. Raises OSError.
    """
    rest = b""
    # Not in a thread: cancelled meanwhile, nobody would have the descriptor. It is one open(2) of a file of ours.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        left = os.fstat(fd).st_size
        while left > 0 and (octets := await asyncio.to_thread(os.read, fd, min(CHUNK_BYTES, left))):
            left -= len(octets)
            if growing:
                octets = rest + octets
                end = await asyncio.to_thread(whole, octets)
                rest, octets = octets[end:], octets[:end]
            if octets:
                yield octets
    finally:
        os.close(fd)


# -- what goes on


class Flowing(Response[bytes]):
    """An answer that goes on: see `_Source`."""

    def __init__(self, source: "_Source", media_type: str) -> None:
        super().__init__(b"", media_type=media_type)
        self._running = _Running(source, media_type)

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIResponse:
        """What litestar calls with scope, receive and send."""
        return self._running  # type: ignore[return-value]  # all that it does with it is to call it


@dataclass(slots=True)
class _Source:
    """A live capture and what is made of its octets."""

    captures: Captures
    live: Live

    def greeting(self) -> bytes:
        """What is sent at once, so that the reader knows it is heard."""
        return b""

    def made(self, octets: bytes) -> bytes:
        """What to send for octets of the capture."""
        return octets

    def silence(self) -> bytes:
        """What to send after a while without packets."""
        return b""

    def farewell(self) -> bytes:
        """What is sent last, if the service or the capture ends."""
        return b""

    @property
    def enough(self) -> bool:
        """Whether the reader has all that was asked for."""
        return False

    @property
    def pause_s(self) -> float:
        """How long packets gather before they are read."""
        return PAUSE_S


@dataclass(slots=True)
class _Pcapng(_Source):
    """The capture as it is."""


@dataclass(slots=True)
class _Tail(_Source):
    """Packets in words, so many a second at most; what is left out is told as a number."""

    mode: Any
    rate_pps: int
    limit: int | None
    reader: Reader = field(default_factory=Reader)
    sent: int = 0
    skipped: int = 0
    dropped: int = 0  # by the worker, told already
    quiet_s: float = 0.0

    def greeting(self) -> bytes:
        return b": packets follow\n\n"

    def made(self, octets: bytes) -> bytes:
        parts: list[bytes] = []
        room = max(1, int(self.rate_pps * self.pause_s))
        for each in self.reader.feed(octets):
            if room and not self.enough:
                room -= 1
                self.sent += 1
                parts += (self._left_out(), _event("packet", self._packet(each)))
            else:
                self.skipped += 1
        self.quiet_s = 0.0
        return b"".join(parts)

    def silence(self) -> bytes:
        self.quiet_s += LOOK_S
        told = self._left_out()
        if not told and self.quiet_s >= HEARTBEAT_S:
            told = b": heartbeat\n\n"
        if told:
            self.quiet_s = 0.0
        return told

    def farewell(self) -> bytes:
        return self._left_out() + _event(
            "end", {"reason": "nothing more comes: processing ended, or the service stops"}
        )

    @property
    def enough(self) -> bool:
        return self.limit is not None and self.sent >= self.limit

    @property
    def pause_s(self) -> float:
        return 0.1

    def _packet(self, found: Captured) -> dict[str, Any]:
        return traffic.packet_json(
            self.mode, time_ns=found.time_ns, inbound=found.inbound, length=found.length, packet=found.packet
        )

    def _left_out(self) -> bytes:
        dropped = self.live.capture.figures.get("dropped", 0)
        count, self.skipped, self.dropped = self.skipped + dropped - self.dropped, 0, dropped
        return _event("left_out", {"packets": count}) if count else b""


def _event(kind: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {kind}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"


@dataclass(slots=True)
class _Running:
    """One stream under way. Whichever side ends it, the capture behind it ends at once and is told in the log."""

    source: _Source
    media_type: str

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        work = [asyncio.ensure_future(self._run(send)), asyncio.ensure_future(_disconnected(receive))]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            captures = self.source.captures
            reason = "shutdown" if captures.closing else "client_gone"
            await asyncio.shield(captures.hang_up(self.source.live, reason))

    async def _run(self, send: Send) -> None:
        headers = [
            (b"content-type", self.media_type.encode()),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        source = self.source
        try:
            await self._write(send, source.greeting())
            async for octets in self._octets():
                await self._write(send, source.made(octets) if octets else source.silence())
                if source.enough:
                    break
            last = b"" if source.enough else source.farewell()
            await send({"type": "http.response.body", "body": last, "more_body": False})
        except TimeoutError:
            log.warning("a stream of packets was given up: its reader takes nothing", name=source.live.capture.name)

    async def _octets(self) -> AsyncIterator[bytes]:
        """What the capture writes, until it ends; nothing (b"") now and then while it is silent.

        If the service stops, the capture is ended first, and its reader has all that it wrote until then.
        """
        loop, fd = asyncio.get_running_loop(), self.source.live.fd
        captures = self.source.captures
        while not captures.closing:
            try:
                octets = os.read(fd, READ_BYTES)
            except BlockingIOError:
                ready = loop.create_future()
                loop.add_reader(fd, _wake, ready)
                try:
                    await asyncio.wait((ready,), timeout=LOOK_S)
                finally:
                    loop.remove_reader(fd)
                if ready.done():
                    await asyncio.sleep(self.source.pause_s)
                    continue
                yield b""
                continue
            if not octets:
                return
            yield octets
            await asyncio.sleep(self.source.pause_s)
        with contextlib.suppress(TunledgerError):  # `hang_up` tells of it
            await captures.stop(self.source.live.capture, "shutdown", patience_s=0.0)
        left = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)  # no more: a tap that stays writes on
        while left > 0:
            try:
                octets = os.read(fd, READ_BYTES)
            except BlockingIOError:
                return
            if not octets:
                return
            left -= len(octets)
            yield octets

    @staticmethod
    async def _write(send: Send, body: bytes) -> None:
        if body:
            async with asyncio.timeout(STALL_S):
                await send({"type": "http.response.body", "body": body, "more_body": True})


def _wake(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)
