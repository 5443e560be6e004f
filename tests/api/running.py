"""The whole API over a real log, a real engine and a host in memory, on an event loop of its own."""

import asyncio
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import httpx
import uvicorn
from litestar.types import Receive, Scope, Send

from service.api.access import OwnerOf
from service.api.application import application
from service.api.bodies import Defaults
from service.api.connection import Connection
from service.api.events import EventLog
from service.api.orders import Orders
from service.api.read import LogView
from service.api.render import render
from service.api.traffic import Applied, Inspected
from service.dataplane.attachment import StageStatus
from service.domain import events as ev
from service.domain.errors import TunledgerError
from service.domain.spec import Processing
from service.domain.steps import COUNT_ONLY
from service.domain.values import NodeId
from service.kernel.fake import FakeKernel
from service.reconcile.applier import Applier
from service.reconcile.captures import Captures
from service.reconcile.engine import Engine
from service.reconcile.feed import Feed
from service.reconcile.hands import Hands
from service.store import counters
from service.store.answers import Answers
from service.store.counters import CounterReader
from service.store.reader import LogReader
from service.store.writer import LogWriter

DEADLINE_S = 20.0
NOW = "2026-01-02T03:04:05.000006Z"
DEFAULTS = Defaults(name="tun0", address="10.0.0.1", netmask="255.255.255.0", mtu=1500)
PORT = 8080
CLIENT = ("127.0.0.1", 40112)

T = TypeVar("T")
Body = bytes | Mapping[str, Any] | list[Any] | None


class Clock:
    """Time stands still; ids count, over restarts too."""

    _ids = itertools.count(1)

    def now(self) -> str:
        """Always the same."""
        return NOW

    def before(self, seconds: float) -> str:
        """Long ago, so that nothing is thinned."""
        return f"2000-01-01T00:00:00.{int(seconds) % 1_000_000:06}Z"

    def seconds_until(self, stamp: str) -> float:
        """Nothing is due before it is asked for."""
        return 0.0 if stamp <= NOW else 3600.0

    def elapsed_s(self) -> float:
        """It stands still as well."""
        return 0.0

    def new_id(self) -> str:
        """In the form of a UUID, since tokens want one."""
        return f"00000000-0000-7000-8000-{next(self._ids):012x}"


@dataclass(frozen=True, slots=True)
class Counted:
    """What a worker would have counted."""

    session: str
    from_kernel: Mapping[str, tuple[int, int]]
    to_kernel: Mapping[str, tuple[int, int]]


@dataclass
class Readers:
    """A data plane without workers: it takes descriptors and counts nothing."""

    devices: dict[str, str] = field(default_factory=dict)
    applied: dict[str, Processing] = field(default_factory=dict)
    unwell: list[str] = field(default_factory=list)
    sessions: "itertools.count[int]" = field(default_factory=itertools.count)

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
        """Take the descriptor, as a worker would."""
        assert mode in {"tun", "tap"}
        assert name != ""
        socket.socket(fileno=fd).close()
        assert mtu > 0
        self.devices[device] = f"session-{next(self.sessions)}"
        self.applied[device] = processing
        return self.devices[device]

    def configure(self, device: str, processing: Processing, mtu: int) -> None:
        """Do something else."""
        assert mtu > 0
        self.applied[device] = processing

    def detach(self, device: str) -> Counted | None:
        """Let go."""
        session = self.devices.pop(device, None)
        return None if session is None else Counted(session, {"ipv4.icmp": (3, 252)}, {})

    def attached(self) -> Mapping[str, Processing]:
        """All that were attached and not detached."""
        return {device: self.applied[device] for device in self.devices}

    def counters(self) -> Mapping[str, Counted]:
        """The same for each."""
        return {device: Counted(session, {"ipv4.icmp": (2, 168)}, {}) for device, session in self.devices.items()}

    def healthy(self) -> list[str]:
        """What the test says."""
        return self.unwell


@dataclass
class Watched:
    """What captures and the API ask a data plane without workers; a test says what it answers and writes packets.

    Taps hold copies of their descriptors until they are taken away.
    """

    readers: Readers
    taps: dict[int, tuple[dict[str, Any], list[int]]] = field(default_factory=dict)
    ids: "itertools.count[int]" = field(default_factory=itertools.count)
    figures: dict[str, int] = field(default_factory=dict)
    chain: tuple[dict[str, Any], ...] = ()
    seen: Inspected | None = None

    def attached(self) -> Collection[str]:
        """As the data plane."""
        return self.readers.attached()

    def tap(self, _: str, stage: Mapping[str, Any], files: Sequence[int]) -> int:
        """Keep the descriptors."""
        tap_id = next(self.ids)
        self.taps[tap_id] = (dict(stage), [os.dup(fd) for fd in files])
        return tap_id

    def untap(self, _: str, tap_id: int) -> Mapping[str, int]:
        """Close them."""
        _stage, files = self.taps.pop(tap_id)
        for fd in files:
            os.close(fd)
        return self.figures

    def feed(self, _: str, place: int, fd: int) -> None:
        """One more."""
        self.taps[place][1].append(os.dup(fd))

    def tap_figures(self, _: str, tap_id: int) -> Mapping[str, int]:
        """The same for all."""
        assert tap_id in self.taps
        return self.figures

    def stages(self, device: str) -> Sequence[StageStatus]:
        """One for each of the chain, which let all through."""
        if device not in self.readers.devices:
            return []
        return [StageStatus(each["processor"], False, 5, 5, {}) for each in self.chain]

    def applied(self, device: str) -> Applied | None:
        """What the test says."""
        return Applied(self.chain, "auto", True) if device in self.readers.devices else None

    def drops(self, device: str) -> Mapping[str, int]:
        """What a chain drops that only looks."""
        return {"end_of_chain": 5} if device in self.readers.devices else {}

    def inspected(self, device: str) -> Inspected | None:
        """What the test says."""
        return self.seen if device in self.readers.devices else None


class Running:
    """Start it with `with`.

    Args:
        path: a migrated database.
        frozen: why it serves read-only, or None.
        owner_of: whose a connection is; by default root's.
    """

    def __init__(
        self,
        path: Path,
        *,
        frozen: TunledgerError | None = None,
        owner_of: OwnerOf = lambda _client, _server: 0,
        own_uid: int = 0,
    ) -> None:
        self.path = path
        self.kernel, self.readers, self.clock = FakeKernel(), Readers(), Clock()
        self.broken: list[str] = []
        self._frozen, self._owner_of, self._own_uid = frozen, owner_of, own_uid
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="api", daemon=True)
        self._server: uvicorn.Server | None = None
        self._serving: Any = None

    def __enter__(self) -> Self:
        self._thread.start()
        self.reader = LogReader(self.path)
        node = self.reader.node() if self._frozen is None else NodeId("unknown")
        self.writer = LogWriter(
            self.path,
            node,
            now=self.clock.now,
            on_recorded=self._on_recorded,
            on_broken=self.broken.append,
        )
        self.applier = Applier()
        self.answers = Answers(self.path)
        self.engine = Engine(
            node=node,
            state=self.reader.verify().state,
            book=counters.load(self.path),
            writer=self.writer,
            applier=self.applier,
            hands=Hands(self.kernel, self.readers),
            clock=self.clock,
            boot_id="boot",
            render=render,
            recall=self.answers.find,
            knows=self.reader.declared,
            frozen=self._frozen,
        )
        if self._frozen is None:
            self.writer.start()
        self.applier.start()
        self.orders = Orders(self.engine, self.clock, DEFAULTS)
        self.counters = CounterReader(self.path)
        self.traffic = Watched(self.readers)
        self.captures = Captures(
            self.traffic,
            self.engine.note,
            self.path.parent / "captures",
            now=self.clock.now,
            new_id=self.clock.new_id,
        )
        self._loop.call_soon_threadsafe(self.captures.bind)
        self.app = application(
            self.orders,
            LogView(self.reader),
            EventLog(self.reader, Feed()),
            self.counters,
            captures=self.captures,
            traffic=self.traffic,
            owner_of=self._owner_of,
            own_uid=self._own_uid,
        )
        started = ev.ServiceStarted(pid=1, version="test", boot_id="boot", uid=0, address=f"127.0.0.1:{PORT}")
        self.run(self.engine.start_up(started))
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.should_exit = True
            self._serving.result(DEADLINE_S)
        self.run(self._settle())
        self.writer.close()
        self.applier.close()
        self.kernel.close()
        self.reader.close()
        self.answers.close()
        self.counters.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()

    def _on_recorded(self, events: list[ev.Recorded]) -> None:
        self.engine.record(events)

    async def _settle(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_default_executor()

    def run(self, work: "Coroutine[Any, Any, T]") -> T:
        """Have the service's own loop do something."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)

    def call(
        self,
        method: str,
        path: str,
        body: Body = None,
        *,
        headers: Mapping[str, str] | None = None,
        client: tuple[str, int] = CLIENT,
    ) -> httpx.Response:
        """One request, past the network and uvicorn."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = {}  # uvicorn gives one
            await self.app(scope, receive, send)

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app, client=client)  # type: ignore[arg-type]  # litestar's own ASGI types
            async with httpx.AsyncClient(transport=transport, base_url=f"http://127.0.0.1:{PORT}") as http:
                return await http.request(method, path, content=content, headers=headers)

        return self.run(send())

    def listen(self) -> tuple[str, int]:
        """Serve on a real socket too, with uvicorn as `service.app` sets it up; where it listens."""
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        config = uvicorn.Config(
            self.app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
        )
        self._server = uvicorn.Server(config)
        serving = self._server._serve([listening])  # without its signal handlers, which are for main threads
        self._serving = asyncio.run_coroutine_threadsafe(serving, self._loop)
        until(lambda: self._server is not None and self._server.started)
        host, port = listening.getsockname()
        return str(host), int(port)

    def history(self, name: str | None = None) -> list[dict[str, Any]]:
        """What the history endpoint shows."""
        path = "/api/v1/history" if name is None else f"/api/v1/interfaces/{name}/history"
        found: list[dict[str, Any]] = self.call("GET", path).json()["history"]
        return found

    def intents(self) -> list[ev.Recorded]:
        """The commands that the log took as intents, by now."""
        return [event for event in self.reader.events() if isinstance(event.body, ev.Intent)]

    def rejections(self, count: int) -> list[ev.CommandRejected]:
        """The refusals in the log, once there are so many: they are recorded behind the client's back."""

        def found() -> list[ev.CommandRejected]:
            return [event.body for event in self.reader.events() if isinstance(event.body, ev.CommandRejected)]

        until(lambda: len(found()) >= count)
        return found()


def until(condition: Callable[[], object], within_s: float = DEADLINE_S) -> None:
    """Return as soon as something is true; fail if it is not in time."""
    deadline = time.monotonic() + within_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        pause.wait(0.002)


def ours(kernel: FakeKernel) -> Collection[str]:
    """The names of the links that carry our token."""
    return [link.name for link in kernel.observe().links.values() if link.token is not None]
