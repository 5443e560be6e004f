"""Events in pages, as an export and as a stream; the state at any moment, and what differs between two."""

import asyncio
import http.client
import json
import random
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

import pytest

from service.api import events as subject
from service.api.application import application
from service.api.events import EventLog, selection
from service.api.read import LogView
from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.spec import spec_to_json
from service.reconcile.feed import End, Feed, Subscription
from service.store import codec
from service.store.reader import LogReader
from service.store.snapshots import Past
from tests.api.running import CLIENT, DEADLINE_S, Running, until
from tests.store import lives
from tests.store.lives import moment
from tests.store.log import draft, note, tamper

LENGTH: Final = 900


class Streaming(Running):
    """The API with its log, and the engine telling the feed.

    Args:
        feed: by default one with the default bounds.
    """

    def __init__(self, path: Path, *, feed: Feed | None = None, heartbeat_s: float = 60.0, **more: Any) -> None:
        super().__init__(path, **more)
        self.feed = feed or Feed()
        self._heartbeat_s = heartbeat_s

    def __enter__(self) -> Self:
        super().__enter__()
        self.engine._publish = self.feed.publish
        self.log = EventLog(self.reader, self.feed, heartbeat_s=self._heartbeat_s, stall_s=5.0)
        self.app = application(
            self.orders,
            LogView(self.reader),
            self.log,
            self.counters,
            captures=self.captures,
            traffic=self.traffic,
            owner_of=self._owner_of,
            own_uid=self._own_uid,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self.feed.close)
        super().__exit__(*_)

    def get(self, path: str, **headers: str) -> Any:
        """A call that must succeed, decoded."""
        answer = self.call("GET", path, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, path: str, **headers: str) -> Mapping[str, Any]:
        """The problem details of a call that must not."""
        answer = self.call("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        assert answer.headers["content-type"] == "application/problem+json", answer.text
        found: dict[str, Any] = answer.json()
        assert found["status"] == answer.status_code >= 400
        return found

    def append(self, *bodies: ev.Event) -> list[ev.Recorded]:
        """Have the writer append events that mean nothing."""
        return self.writer.append([draft(body) for body in bodies or (note(),)]).result(DEADLINE_S)

    def lines(self, path: str) -> list[Any]:
        """An export, line by line."""
        answer = self.call("GET", path)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("application/x-ndjson")
        return [json.loads(line) for line in answer.text.splitlines()]

    def pages(self, path: str) -> list[Any]:
        """All pages, one after the other."""
        found, cursor = [], ""
        while True:
            page = self.get(f"{path}{cursor}")
            found += page["events"]
            if page["next"] is None:
                return found
            cursor = f"&cursor={page['next']}"


@pytest.fixture(scope="module")
def lived(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of some lives. Its interfaces are not on the host, so nothing reconciles it."""
    path = Path(shutil.copy(migrated, tmp_path_factory.mktemp("lived") / "log.db"))
    lives.fill(path, LENGTH, 7)
    return path


@pytest.fixture(scope="module")
def past(lived: Path) -> Iterator[Streaming]:
    """The API over it, read-only."""
    with Streaming(lived, frozen="for reading") as running:
        yield running


@pytest.fixture(scope="module")
def recorded(lived: Path) -> list[ev.Recorded]:
    """All of its events."""
    reader = LogReader(lived)
    try:
        return list(reader.events())
    finally:
        reader.close()


@pytest.fixture
def live(path: Path) -> Iterator[Streaming]:
    """The API over a log that is being written."""
    with Streaming(path) as running:
        yield running


# -- pages


def test_an_event_is_shown_with_all_that_it_has(past: Streaming, recorded: list[ev.Recorded]) -> None:
    (shown,) = past.get("/api/v1/events?after=1&before=3")["events"]
    event = recorded[1]
    assert shown == {
        "position": 2,
        "event_id": event.event_id,
        "stream": event.stream,
        "version": 1,
        "type": "InterfaceDeclared",
        "schema_version": 3,
        "actor": event.actor,
        "command_id": event.command_id,
        "node": lives.NODE,
        "recorded_at": moment(2),
        "hash": event.hash,
        "payload": json.loads(codec.encode(event.body)[2]),
    }


FILTERS: Final = [
    "",
    "type=DriftDetected",
    "type=DriftDetected,DriftRepaired&type=RepairFailed",
    "actor=uid:1000",
    "actor=system&type=WorkerExited",
    "actor=nobody",
    "after=100&before=300",
    f"from={moment(200)}&to={moment(400)}",
    f"from={moment(200)}&type=CommandApplied",
    f"to={moment(400)}&actor=uid:0",
    f"stream={quote('node/' + lives.NODE)}",
    f"stream={quote('name/tun3')}&after=50",
]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_have_every_event_that_the_filter_matches_once_and_in_order(
    past: Streaming, recorded: list[ev.Recorded], filters: str, order: str
) -> None:
    given: dict[str, list[str]] = {}
    for name, value in (part.split("=") for part in filters.split("&") if part):
        given.setdefault(name, []).append(value.replace("%2F", "/"))
    wanted = selection(given)
    expected = [event.position for event in recorded if wanted.matches(event)]
    found = past.pages(f"/api/v1/events?limit=23&order={order}&{filters}")
    assert [event["position"] for event in found] == (expected if order == "asc" else expected[::-1])


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_an_export_has_what_the_pages_have(
    past: Streaming, filters: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "EXPORT_PAGE", 50)
    query = f"order={order}&{filters}"
    assert past.lines(f"/api/v1/events?format=ndjson&{query}") == past.pages(f"/api/v1/events?limit=400&{query}")


def test_an_export_can_be_asked_for_by_accept(past: Streaming) -> None:
    answer = past.call("GET", "/api/v1/events?before=4", headers={"Accept": "application/x-ndjson"})
    assert [json.loads(line)["position"] for line in answer.text.splitlines()] == [1, 2, 3]
    answer = past.call("GET", "/api/v1/events?format=json&before=4", headers={"Accept": "application/x-ndjson"})
    assert len(answer.json()["events"]) == 3


def test_an_export_ends_where_the_log_was_when_it_began(live: Streaming, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "EXPORT_PAGE", 2)
    live.append(*[note()] * 10)
    head = live.get("/api/v1/log/head")["position"]
    page, reader = LogReader.page, live.reader

    def growing(self: LogReader, *args: Any, **more: Any) -> Any:
        if self is reader:
            live.append()
        return page(self, *args, **more)

    monkeypatch.setattr(LogReader, "page", growing)
    assert [line["position"] for line in live.lines("/api/v1/events?format=ndjson")] == list(range(1, head + 1))


def test_an_export_reads_a_page_at_a_time(past: Streaming, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    page = LogReader.page

    def seen(self: LogReader, *args: Any, **more: Any) -> Any:
        sizes.append(more["limit"])
        return page(self, *args, **more)

    monkeypatch.setattr(LogReader, "page", seen)
    assert len(past.lines("/api/v1/events?format=ndjson")) == LENGTH
    assert sizes == [subject.EXPORT_PAGE] * (LENGTH // subject.EXPORT_PAGE + 1)


def test_a_pages_etag_is_the_head_and_nothing_behind_it_is_on_the_page(
    live: Streaming, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = LogReader.head

    def then_more(self: LogReader) -> tuple[int, str]:
        found = head(self)
        live.append()
        return found

    monkeypatch.setattr(LogReader, "head", then_more)
    answer = live.call("GET", "/api/v1/events")
    last = answer.json()["events"][-1]["position"]
    assert answer.headers["etag"] == f'"{last}"'


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ("after=-1", "/after"),
        ("after=x", "/after"),
        ("after=", "/after"),
        ("after=9223372036854775808", "/after"),
        ("before=1.5", "/before"),
        ("before=%D9%A3", "/before"),  # a digit, but not ours
        ("after=" + "9" * 5000, "/after"),
        ("type=Nothing", "/type"),
        ("type=", "/type"),
        ("type=DriftDetected,", "/type"),
        ("actor=", "/actor"),
        ("stream=", "/stream"),
        ("from=yesterday", "/from"),
        ("from=0001-01-01T00:00:00%2B14:00", "/from"),
        ("to=2026-13-01", "/to"),
        ("to=2026-01-01T00:00:00+02:00", "/to"),
        ("order=up", "/order"),
        ("format=xml", "/format"),
        ("limit=0", "/limit"),
        ("limit=1001", "/limit"),
        ("limit=ten", "/limit"),
        ("cursor=x", "/cursor"),
        ("cursor=1-2-3", "/cursor"),
        ("cursor=9999999999999999999", "/cursor"),
        ("format=ndjson&limit=5", "/limit"),
        ("format=ndjson&cursor=5", "/cursor"),
        ("actr=uid:0", "/actr"),
        ("actor=uid:0&actor=uid:1", "/actor"),
        ("after=1&after=2", "/after"),
    ],
)
def test_a_bad_parameter_is_pointed_at(past: Streaming, query: str, pointer: str) -> None:
    found = past.refused(f"/api/v1/events?{query}")
    assert (found["status"], found["code"], found["pointer"]) == (400, "invalid_field", pointer)
    assert found["detail"].removeprefix('"').startswith(pointer[1:])


@pytest.mark.parametrize(
    ("path", "pointer"),
    [
        ("/api/v1/state?at=x", "/at"),
        ("/api/v1/state?at=", "/at"),
        (f"/api/v1/state?at={LENGTH + 1}", "/at"),
        ("/api/v1/state?at=1&at=2", "/at"),
        ("/api/v1/state?on=1", "/on"),
        ("/api/v1/diff", "/from"),
        ("/api/v1/diff?to=1", "/from"),
        ("/api/v1/diff?from=1&to=x", "/to"),
        (f"/api/v1/diff?from={LENGTH + 1}", "/from"),
        ("/api/v1/log/verify?head=1", "/head"),
        ("/api/v1/log/verify?head=1:abc", "/head"),
        ("/api/v1/events/stream?limit=5", "/limit"),
        ("/api/v1/events/stream?type=Nothing", "/type"),
        (f"/api/v1/events/stream?after={LENGTH + 1}", "/after"),
    ],
)
def test_a_bad_parameter_of_another_call_is_pointed_at(past: Streaming, path: str, pointer: str) -> None:
    found = past.refused(path)
    assert (found["status"], found["code"], found["pointer"]) == (400, "invalid_field", pointer)


def test_a_log_that_does_not_read_is_said_so(past: Streaming, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Iterator[Any]:
        raise TunledgerError(ErrorCode.LOG_CORRUPT, "does not read")

    monkeypatch.setattr(LogReader, "_batches", broken)
    for path in ("/api/v1/events", "/api/v1/events?format=ndjson", "/api/v1/state?at=3", "/api/v1/diff?from=1"):
        assert past.refused(path)["code"] == "log_corrupt"
    answer = past.call("GET", "/api/v1/state")
    assert answer.status_code == 200, "what the service knows, it shows"
    assert "etag" not in answer.headers
    assert all(each["status"]["state"] == "unknown" for each in answer.json()["interfaces"].values())


# -- state


def _expected(recorded: list[ev.Recorded], position: int) -> Past:
    then = Past()
    for event in recorded[:position]:
        then.take(event)
    return then


def test_the_state_at_a_position_is_the_fold_up_to_there(past: Streaming, recorded: list[ev.Recorded]) -> None:
    chance = random.Random(1)
    for position in (0, 1, 2, LENGTH, *(chance.randrange(LENGTH) for _ in range(12))):
        answer = past.call("GET", f"/api/v1/state?at={position}")
        found, then = answer.json(), _expected(recorded, position)
        assert answer.headers["etag"] == f'"{position}"'
        assert found["position"] == position
        assert found["hash"] == (recorded[position - 1].hash if position else codec.GENESIS)
        assert found["recorded_at"] == (moment(position) if position else None)
        assert list(found["interfaces"]) == [i.name for i in then.state.interfaces.values()]
        for interface in then.state.interfaces.values():
            shown = found["interfaces"][interface.name]
            assert shown["id"] == interface.id
            assert shown["generation"] == interface.generation
            assert shown["spec"] == (spec_to_json(interface.spec) if interface.spec else None)
            assert shown["pending"] == (interface.pending.command_id if interface.pending else None)
            assert shown["status"] == then.status(interface) | {"awaiting_confirmation": None}


def test_every_status_occurs_in_that_log(past: Streaming) -> None:
    seen = {
        interface["status"]["state"]
        for position in range(0, LENGTH, 10)
        for interface in past.get(f"/api/v1/state?at={position}")["interfaces"].values()
    }
    assert seen == {"pending", "applied", "degraded"}


def test_a_time_is_the_last_position_recorded_by_then(past: Streaming) -> None:
    there = "2026-01-01T02:00:03.500+02:00"  # 500 times 7 ms after midnight
    for time, position in ((moment(500), 500), (quote(there), 500), ("2026-01-01", 0), ("2999-01-01T00:00Z", LENGTH)):
        assert past.get(f"/api/v1/state?at={time}")["position"] == position


def test_the_present_state_is_the_engines_and_as_the_log_has_it(past: Streaming) -> None:
    answer = past.call("GET", "/api/v1/state")
    assert answer.json() == past.get(f"/api/v1/state?at={LENGTH}")
    assert answer.headers["etag"] == f'"{LENGTH}"'


def test_the_present_state_follows_what_is_done(live: Streaming) -> None:
    assert live.call("POST", "/api/interface/create", {"name": "tun7"}).status_code == 200
    found = live.get("/api/v1/state")
    assert list(found["interfaces"]) == ["tun7"]
    assert found["interfaces"]["tun7"]["status"]["state"] == "applied"
    head = live.get("/api/v1/log/head")
    assert (found["position"], found["hash"]) == (head["position"], head["hash"])


# -- diff


def test_a_diff_tells_what_was_added_removed_and_changed(live: Streaming) -> None:
    live.call("POST", "/api/interface/create", {"name": "tun1", "mtu": 1500})
    before = live.get("/api/v1/log/head")["position"]
    live.call("POST", "/api/interface/configure", {"mtu": 1400})
    changed = live.get("/api/v1/log/head")["position"]
    first = live.get("/api/v1/state")["interfaces"]["tun1"]["id"]
    (found,) = live.get(f"/api/v1/diff?from={before}&to={changed}")["interfaces"]
    assert found == {
        "name": "tun1",
        "id": first,
        "change": "changed",
        "changes": [{"path": "mtu", "old": 1500, "new": 1400}],
    }
    live.call("DELETE", "/api/interface/delete")
    live.call("POST", "/api/interface/create", {"name": "tun1", "mtu": 1300})
    answer = live.call("GET", f"/api/v1/diff?from={changed}")
    removed, added = answer.json()["interfaces"]
    assert (removed["name"], removed["id"], removed["change"]) == ("tun1", first, "removed")
    assert {"path": "mtu", "old": 1400, "new": None} in removed["changes"]
    assert (added["name"], added["change"]) == ("tun1", "added")
    assert {"path": "mtu", "old": None, "new": 1300} in added["changes"]
    head = live.get("/api/v1/log/head")["position"]
    assert answer.headers["etag"] == f'"{changed}-{head}"'
    back = live.get(f"/api/v1/diff?from={head}&to={changed}")["interfaces"]
    assert [(each["id"], each["change"]) for each in back] == [(added["id"], "removed"), (first, "added")]
    assert live.get(f"/api/v1/diff?from={head}&to={head}")["interfaces"] == []


def test_a_diff_between_times_is_one_between_their_positions(past: Streaming) -> None:
    found = past.get(f"/api/v1/diff?from={moment(300)}&to={moment(800)}")
    assert found == past.get("/api/v1/diff?from=300&to=800")
    assert (found["from"]["position"], found["to"]["recorded_at"]) == (300, moment(800))


@pytest.mark.parametrize("seed", range(4))
def test_a_diff_applied_to_the_old_state_gives_the_new_one(past: Streaming, seed: int) -> None:
    chance = random.Random(seed)
    begin, end = (chance.randrange(LENGTH) for _ in range(2))

    def specs(position: int) -> dict[str, Any]:
        found = past.get(f"/api/v1/state?at={position}")["interfaces"].values()
        return {each["id"]: each["spec"] for each in found if each["spec"] is not None}

    then = specs(begin)
    for each in past.get(f"/api/v1/diff?from={begin}&to={end}")["interfaces"]:
        if each["change"] == "removed":
            del then[each["id"]]
            continue
        spec = then.setdefault(each["id"], {})
        for change in each["changes"]:
            *path, last = change["path"].split(".")
            inner = spec
            for key in path:
                inner = inner.setdefault(key, {})
            inner[last] = change["new"]
    for interface_id, spec in specs(end).items():
        found = then.pop(interface_id)
        assert {key: value for key, value in found.items() if value not in (None, {})} == {
            key: value for key, value in spec.items() if value not in (None, {})
        }
    assert then == {}


# -- head and verification


def test_the_head_is_the_last_events_position_and_hash(past: Streaming, recorded: list[ev.Recorded]) -> None:
    answer = past.call("GET", "/api/v1/log/head")
    assert (answer.json()["position"], answer.json()["hash"]) == (LENGTH, recorded[-1].hash)
    assert answer.headers["etag"] == f'"{LENGTH}"'


def test_the_log_is_verified_on_demand(past: Streaming, recorded: list[ev.Recorded]) -> None:
    found = past.get(f"/api/v1/log/verify?head=500:{recorded[499].hash}")
    assert found["took_us"] > 0
    assert found == {
        "sound": True,
        "events": LENGTH,
        "interfaces": len(_expected(recorded, LENGTH).state.interfaces),
        "position": LENGTH,
        "hash": recorded[-1].hash,
        "problems": [],
        "took_us": found["took_us"],
    }


def test_verification_tells_what_is_wrong(path: Path) -> None:
    with Streaming(path) as live:
        live.append(*[note()] * 5)
        tamper(path, ("UPDATE events SET actor = 'nobody' WHERE position = 4", ()))
        found = live.get(f"/api/v1/log/verify?head=2:{'f' * 64}")
    assert found["sound"] is False
    assert [problem.split(":")[0] for problem in found["problems"]] == ["position 4", "position 2"]


def test_one_verification_at_a_time(past: Streaming, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, release = threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> Any:
        begun.set()
        assert release.wait(DEADLINE_S)
        raise TunledgerError(ErrorCode.INTERNAL, "done")

    with monkeypatch.context() as patch:
        patch.setattr(LogReader, "verify", slow)
        under_way = threading.Thread(target=past.call, args=("GET", "/api/v1/log/verify"))
        under_way.start()
        assert begun.wait(DEADLINE_S)
        answer = past.call("GET", "/api/v1/log/verify")
        assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
        assert answer.headers["retry-after"] == "1"
        release.set()
        under_way.join(DEADLINE_S)
    assert past.get("/api/v1/log/verify")["sound"] is True


def test_a_verification_ends_when_the_service_stops(path: Path) -> None:
    with Streaming(path) as live:
        live.append(*[note()] * 5)
        live.feed.closed = True
        assert live.refused("/api/v1/log/verify")["code"] == "shutting_down"


# -- streams


@dataclass
class Reader:
    """One client of a stream, past the network: it takes what is sent as fast as it is let."""

    api: Streaming
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 0
    text: bytes = b""
    done: bool = False

    def __post_init__(self) -> None:
        self.may_take = asyncio.Event()
        self.may_take.set()
        self.gone = asyncio.Event()
        self.sending = 0

    async def run(self) -> None:
        url, _, query = self.path.partition("?")
        host = {"host": "127.0.0.1", **self.headers}
        scope: Any = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": url,
            "raw_path": url.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in host.items()],
            "client": CLIENT,
            "server": ("127.0.0.1", 8080),
            "state": {},
            "extensions": {},
        }
        first = True

        async def receive() -> Any:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": b"", "more_body": False}
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            self.sending += 1
            await self.may_take.wait()
            if message["type"] == "http.response.start":
                self.status = message["status"]
            else:
                self.text += message.get("body", b"")
                self.done = not message.get("more_body", False)

        await self.api.app(scope, receive, send)

    @property
    def frames(self) -> list[dict[str, str]]:
        """What was sent so far, frame by frame, as the specification of server-sent events has them."""
        found = []
        for block in self.text.decode().split("\n\n")[:-1]:
            lines = [line.partition(": ") for line in block.splitlines() if not line.startswith(":")]
            found.append({name: value for name, _, value in lines})
        return found

    @property
    def positions(self) -> list[int]:
        """The positions of the events that came."""
        return [int(frame["id"]) for frame in self.frames if "data" in frame and "id" in frame]


@asynccontextmanager
async def _reading(reader: Reader) -> AsyncIterator[Reader]:
    task = asyncio.ensure_future(reader.run())
    try:
        yield reader
    finally:
        reader.may_take.set()
        reader.gone.set()
        await asyncio.wait_for(task, DEADLINE_S)


@contextmanager
def reading(api: Streaming, query: str = "", **headers: str) -> Iterator[Reader]:
    """Read a stream meanwhile."""

    async def begin() -> tuple[Any, Reader]:
        one = Reader(api, f"/api/v1/events/stream{query}", {k.replace("_", "-"): v for k, v in headers.items()})
        context = _reading(one)
        return context, await context.__aenter__()

    context, reader = api.run(begin())
    try:
        yield reader
    finally:
        api.run(context.__aexit__(None, None, None))


@pytest.fixture(autouse=True)
def _takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember of each subscription whether it takes from the feed already, and no longer from the database."""
    take = Subscription.take

    async def seen(self: Subscription, within_s: float) -> list[ev.Recorded]:
        vars(self)["takes"] = True
        return await take(self, within_s)

    monkeypatch.setattr(Subscription, "take", seen)


def until_live(api: Streaming, count: int) -> None:
    """Wait until so many streams have caught up."""
    until(lambda: on_loop(api, lambda: sum("takes" in vars(each) for each in api.feed._subscriptions)) == count)


def on_loop(api: Streaming, work: Callable[[], Any]) -> Any:
    """Do something on the service's own loop."""

    async def do() -> Any:
        return work()

    return api.run(do())


def test_a_stream_begins_now_and_tells_what_is_recorded(live: Streaming) -> None:
    head = live.get("/api/v1/log/head")["position"]
    with reading(live) as reader:
        until(lambda: reader.frames)
        live.call("POST", "/api/interface/create", {"name": "tun7"})
        until(lambda: len(reader.positions) == 2)
    assert reader.status == 200
    assert reader.frames[0] == {"retry": "1000", "id": str(head)}, "what to come back with, before anything happens"
    declared, applied = reader.frames[1:]
    assert (declared["id"], declared["event"]) == (str(head + 1), "InterfaceDeclared")
    assert (applied["id"], applied["event"]) == (str(head + 2), "CommandApplied")
    assert [json.loads(declared["data"]), json.loads(applied["data"])] == live.get(f"/api/v1/events?after={head}")[
        "events"
    ], "an event looks the same, live and read from the disk"


@pytest.mark.parametrize(
    ("query", "last"), [("?after=100", ""), ("?after=5", "100"), ("", "100")], ids=["after", "both", "header"]
)
def test_a_stream_catches_up_from_a_position(
    past: Streaming, recorded: list[ev.Recorded], query: str, last: str
) -> None:
    with reading(past, query, **({"Last_Event_ID": last} if last else {})) as reader:
        until(lambda: len(reader.positions) == LENGTH - 100)
    assert reader.positions == list(range(101, LENGTH + 1))
    assert [frame["event"] for frame in reader.frames[1:]] == [type(e.body).__name__ for e in recorded[100:]]


@pytest.mark.parametrize("given", ["x", "-1", "1.0", str(LENGTH + 1), "9" * 30])
def test_a_last_event_id_that_cannot_be_is_refused(past: Streaming, given: str) -> None:
    found = past.refused("/api/v1/events/stream", Last_Event_ID=given)
    assert (found["code"], found["pointer"]) == ("invalid_field", "/Last-Event-ID")


@pytest.mark.parametrize("filters", [each for each in FILTERS if "after" not in each])
def test_a_stream_has_the_filters_that_pages_have(past: Streaming, filters: str) -> None:
    expected = [event["position"] for event in past.pages(f"/api/v1/events?limit=1000&after=10&{filters}")]
    with reading(past, f"?after=10&{filters}") as reader:
        until(lambda: len(reader.positions) >= len(expected))
    assert reader.positions == expected


def test_a_live_stream_is_filtered_too(live: Streaming) -> None:
    with reading(live, "?type=CommandRejected,CommandApplied&actor=uid:0") as reader:
        until(lambda: reader.frames)
        live.call("POST", "/api/interface/create", {"name": "tun7"})
        live.call("POST", "/api/interface/stop")
        live.rejections(1)
        until(lambda: len(reader.positions) == 2)
    assert [frame["event"] for frame in reader.frames[1:]] == ["CommandApplied", "CommandRejected"]


@pytest.mark.parametrize("seed", range(3))
def test_streams_taken_up_again_have_no_gap_and_no_repeat_while_events_come_in(
    path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader goes away at any moment and comes back with its last id, again and again."""
    monkeypatch.setattr(subject, "CATCH_UP_EVENTS", 7)
    monkeypatch.setattr(subject, "CHUNK_EVENTS", 3)
    chance, count = random.Random(seed), 1500
    with Streaming(path) as live:
        head = live.get("/api/v1/log/head")["position"]
        writing = threading.Thread(target=lambda: [live.append(*[note()] * chance.randrange(1, 9)) for _ in range(300)])
        writing.start()
        seen: list[int] = []
        last, times = str(head), 0
        while len(seen) < count and times < 10_000:
            times += 1
            with reading(live, Last_Event_ID=last) as reader:
                enough = chance.randrange(0, 120)
                until(
                    lambda reader=reader, enough=enough: (  # type: ignore[misc]
                        len(reader.positions) >= enough or (not writing.is_alive() and reader.frames)
                    )
                )
            seen += reader.positions
            last = reader.frames[-1]["id"] if reader.frames else last
            if not writing.is_alive() and int(last) == on_loop(live, lambda: live.engine.state.position):
                break
        writing.join(DEADLINE_S)
        end = live.get("/api/v1/log/head")["position"]
        with reading(live, Last_Event_ID=last) as final:
            until(lambda: (final.positions or [int(last)])[-1] == end)
            seen += final.positions
    assert seen == list(range(head + 1, end + 1))
    assert times > 3


def test_a_stream_reads_the_database_again_where_the_feed_has_a_hole(live: Streaming) -> None:
    with reading(live) as reader:
        until_live(live, 1)
        live.engine._publish = lambda _events: None  # what is recorded now, the feed is not told
        live.append(*[note()] * 5)
        live.engine._publish = live.feed.publish
        last = live.append()[-1].position
        until(lambda: reader.positions and reader.positions[-1] == last)
    assert reader.positions == list(range(last - 5, last + 1))


def test_an_event_that_is_told_twice_is_sent_once(live: Streaming) -> None:
    with reading(live) as reader:
        until_live(live, 1)
        first = live.append()
        on_loop(live, lambda: live.feed.publish(first))
        last = live.append()[-1].position
        until(lambda: reader.positions and reader.positions[-1] == last)
    assert reader.positions == [last - 1, last]


def test_heartbeats_are_comments(path: Path) -> None:
    with Streaming(path, heartbeat_s=0.01) as live, reading(live) as reader:
        until(lambda: reader.text.count(b": heartbeat\n\n") >= 3)
        position = live.append()[0].position
        until(lambda: reader.positions)
        assert reader.positions == [position]


def test_the_usual_heartbeat_keeps_proxies_waiting() -> None:
    assert subject.HEARTBEAT_S == 15.0


def test_what_is_recorded_just_before_a_stream_listens_is_not_left_for_the_next_event(
    live: Streaming, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not in the feed: reading the database once more, after listening, is what finds it."""
    listen, last = Subscription.listen, []

    def late(self: Subscription) -> None:
        live.engine._publish = lambda _events: None
        last.append(live.append()[0].position)  # durable, though this loop has not heard of it yet
        listen(self)

    monkeypatch.setattr(Subscription, "listen", late)
    with reading(live) as reader:
        until(lambda: reader.positions)
    assert reader.positions == last


def test_a_reader_that_takes_nothing_is_dropped_with_a_reason_and_nobody_else_notices(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "CHUNK_EVENTS", 1)
    with Streaming(path, feed=Feed(buffer_events=50)) as live, reading(live) as slow, reading(live) as quick:
        until_live(live, 2)
        head = live.get("/api/v1/log/head")["position"]
        on_loop(live, slow.may_take.clear)
        sent = slow.sending
        live.append(*[note()] * 5)
        until(lambda: slow.sending > sent)  # and waits there, with four more of these in hand
        for _ in range(150):
            live.append()
        until(lambda: len(quick.positions) == 155)
        assert not slow.done
        on_loop(live, slow.may_take.set)
        until(lambda: slow.done)
        assert quick.positions == list(range(head + 1, head + 156))
        assert not quick.done
    dropped = slow.frames[-1]
    assert dropped["event"] == "dropped"
    assert "id" not in dropped, "the last id stays that of the last event"
    told = json.loads(dropped["data"])
    assert told["code"] == "slow_reader"
    assert "more than 50 events were waiting" in told["reason"]
    assert f"Last-Event-ID: {slow.positions[-1]}" in told["reason"]
    assert slow.positions == [head + 1], "what it was sent, it was sent in order; the rest is in the log"


def test_a_burst_beyond_the_buffer_ends_nobody_who_takes_what_comes(path: Path) -> None:
    """What does not fit is read from the database: a thousand interfaces made at once are one transaction."""
    with Streaming(path, feed=Feed(buffer_events=50)) as live, reading(live) as reader:
        until_live(live, 1)
        head = live.get("/api/v1/log/head")["position"]
        live.append(*[note()] * 200)
        live.append(*[note()] * 20)
        until(lambda: len(reader.positions) == 220)
        assert reader.positions == list(range(head + 1, head + 221))
        assert not reader.done


def test_a_reader_that_stalls_for_good_is_given_up(path: Path) -> None:
    with Streaming(path) as live:
        live.log.stall_s = 0.05
        with reading(live) as stuck:
            until_live(live, 1)
            on_loop(live, stuck.may_take.clear)
            live.append()
            until(lambda: on_loop(live, lambda: len(live.feed._subscriptions)) == 0)
        assert not stuck.done


def test_a_slow_reader_that_catches_up_from_the_disk_is_not_dropped(past: Streaming) -> None:
    """It holds up nobody: what it has not taken is not in memory."""
    with reading(past, "?after=0") as reader:
        on_loop(past, reader.may_take.clear)
        on_loop(past, reader.may_take.set)
        until(lambda: len(reader.positions) == LENGTH)
    assert reader.positions == list(range(1, LENGTH + 1))


def test_streams_beyond_the_bound_are_refused_until_one_ends(path: Path) -> None:
    with Streaming(path, feed=Feed(subscriptions_max=2)) as live:
        with reading(live) as first, reading(live) as second:
            until(lambda: first.frames and second.frames)
            answer = live.call("GET", "/api/v1/events/stream")
            assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
            assert answer.headers["retry-after"] == "1"
        with reading(live) as third:
            until(lambda: third.frames)


def test_streams_end_when_the_service_stops(live: Streaming) -> None:
    with reading(live) as reader:
        until(lambda: reader.frames)
        on_loop(live, live.feed.close)
        until(lambda: reader.done)
    assert reader.text.endswith(b": the service is stopping; come back with the last id\n\n")
    assert live.refused("/api/v1/events/stream")["code"] == "shutting_down"


def test_a_reader_that_went_away_leaves_nothing_behind(live: Streaming) -> None:
    with reading(live) as reader:
        until(lambda: reader.frames)
        assert on_loop(live, lambda: len(live.feed._subscriptions)) == 1
    assert on_loop(live, lambda: len(live.feed._subscriptions)) == 0


def test_what_is_encoded_for_one_stream_is_kept_for_the_others_and_not_for_ever(
    live: Streaming, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "FRAMES_KEPT", 3)
    encoded: list[int] = []
    sse = subject.sse

    def counted(event: ev.Recorded) -> bytes:
        encoded.append(event.position)
        return sse(event)

    monkeypatch.setattr(subject, "sse", counted)
    with reading(live) as one, reading(live) as other:
        until_live(live, 2)
        events = live.append(*[note()] * 3)
        until(lambda: len(one.positions) == len(other.positions) == 3)
        assert encoded == [event.position for event in events]
        live.append(*[note()] * 10)
        until(lambda: len(one.positions) == len(other.positions) == 13)
        assert len(live.log._frames) <= 3


def test_a_stream_over_the_network(live: Streaming) -> None:
    host, port = live.listen()
    connection = http.client.HTTPConnection(host, port, timeout=DEADLINE_S)
    connection.request("GET", "/api/v1/events/stream?after=0", headers={"Accept": "text/event-stream"})
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    ids: list[int] = []

    def read(upto: int) -> None:
        while not ids or ids[-1] < upto:
            line = response.readline()
            assert line
            if line.startswith(b"id: "):
                ids.append(int(line[4:]))

    read(2)
    last = live.append()[-1].position
    read(last)
    assert ids == list(range(last + 1))
    until(lambda: on_loop(live, lambda: len(live.feed._subscriptions)) == 1)
    connection.close()
    until(lambda: on_loop(live, lambda: len(live.feed._subscriptions)) == 0)


# -- the feed by itself


def test_a_subscription_has_nothing_from_before_it_listened() -> None:
    async def use() -> None:
        feed = Feed(buffer_events=3)
        one = feed.subscribe()
        feed.publish([_event(1)])
        one.listen()
        feed.publish([_event(2), _event(3)])
        assert [event.position for event in await one.take(1)] == [2, 3]
        assert await one.take(0.001) == []
        one.close()
        one.close()
        feed.publish([_event(4)])
        assert await one.take(0.001) == []

    asyncio.run(use())


def test_a_subscription_wakes_for_an_event() -> None:
    async def use() -> None:
        feed = Feed()
        one = feed.subscribe()
        one.listen()
        taking = asyncio.ensure_future(one.take(DEADLINE_S))
        await asyncio.sleep(0)
        feed.publish([_event(1)])
        assert [event.position for event in await taking] == [1]

    asyncio.run(use())


@pytest.mark.parametrize("at_once", [1, 4, 7])
def test_a_buffer_that_runs_over_ends_that_subscription_alone(at_once: int) -> None:
    async def use() -> None:
        feed = Feed(buffer_events=3)
        slow, quick = feed.subscribe(), feed.subscribe()
        slow.listen()
        for first in range(0, 8, at_once):
            feed.publish([_event(first + each) for each in range(at_once)])
        quick.listen()
        feed.publish([_event(100)])
        assert slow.ended is End.SLOW
        assert await slow.take(DEADLINE_S) == []
        assert quick.ended is None
        assert [event.position for event in await quick.take(1)] == [100]

    asyncio.run(use())


def test_a_full_buffer_has_not_run_over() -> None:
    async def use() -> None:
        feed = Feed(buffer_events=3)
        one = feed.subscribe()
        one.listen()
        feed.publish([_event(each) for each in range(3)])
        assert one.ended is None
        assert len(await one.take(1)) == 3

    asyncio.run(use())


def _event(position: int) -> ev.Recorded:
    return ev.Recorded(
        position=position,
        event_id=f"e{position}",
        stream="node/x",
        version=position,
        actor="system",
        command_id=None,
        node=lives.NODE,
        recorded_at=moment(position),
        hash="h",
        body=note(),
    )
