"""/api/v1/events, state, diff and log: the log as it was written, as it is being written, and what it makes.

Whatever reads the disk does so in a thread. A position is a resource that never changes again, so that answers about
one have it as their ETag. What an event means for an interface is `service.domain.state`'s to say, how history reads
is `service.api.read`'s.

    pages, export    the database, a page at a time
    stream           the database until its end is reached, then the feed; back to the database if the feed has a hole
"""

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import msgspec
import structlog
from litestar import Controller, Request, Response, get
from litestar.di import NamedDependency
from litestar.response import Stream
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send

from service.api.orders import Orders
from service.api.problems import answer
from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError, invalid, unknown
from service.domain.spec import changes, spec_to_json
from service.domain.state import Interface, Unconfirmed
from service.reconcile.feed import End, Feed, Subscription
from service.store import codec, snapshots
from service.store.reader import LogReader, Selection, stamp
from service.store.snapshots import Past

PAGE_DEFAULT, PAGE_MAX = 100, 1000
POSITION_MAX = 2**63 - 1  # SQLite holds no larger integer
EXPORT_PAGE = 500  # events read and sent at once: half a megabyte
HEARTBEAT_S = 15.0  # proxies and clients give up on a connection that is silent for 30 to 60 s
STALL_S = 30.0  # how long a single write may wait for a reader that takes nothing
CHUNK_EVENTS = 64  # in one write of what is live
CATCH_UP_EVENTS = 256  # in one write of what was missed
RETRY_MS = 1000  # what an EventSource waits before it connects again
FRAMES_KEPT = 2048  # events encoded for one stream and kept for the others

FILTERS: Final = ("stream", "type", "actor", "command_id", "after", "before", "from", "to")
FORMATS: Final = ("json", "ndjson")
ORDERS: Final = ("asc", "desc")
NDJSON = "application/x-ndjson"
LAST_EVENT_ID = "Last-Event-ID"

_CURSOR: Final = re.compile(r"([0-9]{1,19})(?:-([0-9]{1,19}))?")
_HEAD: Final = re.compile(r"([0-9]{1,19}):([0-9a-f]{64})")

log = structlog.get_logger("tunledger.api")


class _StoppingError(Exception):
    """The service stops while something long is under way."""


class EventLog:
    """What the routes below work with.

    Args:
        feed: where the engine tells what was recorded.
        heartbeat_s, stall_s: see the constants of these names.
    """

    def __init__(
        self, reader: LogReader, feed: Feed, *, heartbeat_s: float = HEARTBEAT_S, stall_s: float = STALL_S
    ) -> None:
        self.reader, self.feed = reader, feed
        self.heartbeat_s, self.stall_s = heartbeat_s, stall_s
        self._verifying = threading.Lock()
        self._frames: dict[int, bytes] = {}

    def verify(self, head: tuple[int, str] | None) -> dict[str, Any]:
        """Read and check all of the log, once at a time. Blocking, for seconds.

        Raises:
            TunledgerError: overloaded, if it is being done already; shutting_down.
        """
        if not self._verifying.acquire(blocking=False):
            raise TunledgerError(
                ErrorCode.OVERLOADED, "the log is being verified already; one at a time, try again", retry=True
            )
        try:
            begun = time.monotonic_ns()
            found = self.reader.verify(head=head, pause=self._breathe)
            return {
                "sound": not found.problems,
                "events": found.events,
                "interfaces": len(found.state.interfaces),
                "position": found.head_position,
                "hash": found.head_hash,
                "problems": found.problems,
                "took_us": (time.monotonic_ns() - begun) // 1000,
            }
        except _StoppingError:
            raise TunledgerError(ErrorCode.SHUTTING_DOWN, "the service is stopping", retry=True) from None
        finally:
            self._verifying.release()

    def _breathe(self) -> None:
        """Let the event loop have the interpreter; and stop when the service does."""
        if self.feed.closed:
            raise _StoppingError
        time.sleep(0.001)

    def frame(self, event: ev.Recorded) -> bytes:
        """An event as streams send it; encoded once for all of them. For the event loop's thread."""
        known = self._frames.get(event.position)
        if known is None:
            known = self._frames[event.position] = sse(event)
            if len(self._frames) > FRAMES_KEPT:
                del self._frames[next(iter(self._frames))]
        return known


class EventsController(Controller):
    """/api/v1/events, /api/v1/state, /api/v1/diff, /api/v1/log/..."""

    path = "/api/v1"

    @get("/events")
    async def events(self, request: Request[Any, Any, Any], event_log: NamedDependency[EventLog]) -> Response[Any]:
        """Events by filter, in order of position or newest first: a page of them, or all as lines of JSON."""
        given = parameters(request, *FILTERS, "order", "limit", "cursor", "format")
        wanted = selection(given)
        newest_first = _one_of(given, "order", ORDERS, "asc") == "desc"
        asked = "ndjson" if NDJSON in request.headers.get("accept", "") else "json"
        if _one_of(given, "format", FORMATS, asked) == "ndjson":
            for name in ("limit", "cursor"):
                if name in given:
                    raise invalid(name, given[name][0], "does not go with ndjson, which has all events there are")
            return await _export(event_log, wanted, newest_first)
        limit = _number(given, "limit", 1, PAGE_MAX, PAGE_DEFAULT)
        wanted = _continued(wanted, given, newest_first)
        page = partial(_page, event_log.reader, wanted, limit, newest_first)
        found, following, head = await asyncio.to_thread(page)
        return answer({"events": found, "next": following}, headers={"ETag": f'"{head}"'})

    @get("/events/stream")
    async def stream(self, request: Request[Any, Any, Any], event_log: NamedDependency[EventLog]) -> "Live":
        """Events as they are recorded, as server-sent events; from a position on, or from now."""
        given = parameters(request, *FILTERS)
        wanted = selection(given)
        resumed = request.headers.get(LAST_EVENT_ID)
        head, _ = await asyncio.to_thread(event_log.reader.head)
        if resumed is not None and resumed.strip():  # a browser that reconnects sends its first query again
            after = position(LAST_EVENT_ID, resumed.strip())
        else:
            after = wanted.after if "after" in given else head
        if after > head:
            raise invalid(
                LAST_EVENT_ID if resumed else "after", after, f"is beyond the log, which ends at {head}: is it another?"
            )
        return Live(event_log, replace(wanted, after=0), after)

    @get("/state")
    async def state(
        self, request: Request[Any, Any, Any], orders: NamedDependency[Orders], event_log: NamedDependency[EventLog]
    ) -> Response[bytes]:
        """All interfaces as they were desired at a position or time, and how they were as far as the log tells.

        Without either: as the service has them at this moment.
        """
        given = parameters(request, "at")
        reader = event_log.reader
        if "at" in given:
            at = given["at"][0]
            found = await asyncio.to_thread(lambda: state_json(reader, snapshots.past(reader, _at(reader, "at", at))))
        else:
            # What is compared with the log must not come from it: desired state is the engine's own.
            present = orders.engine.state
            interfaces = {str(i.name): desired_json(i) for i in present.interfaces.values()}
            unconfirmed = {str(name): _awaiting(each) for name, each in present.unconfirmed.items()}
            then = {"position": present.position, "hash": present.head}
            found = await asyncio.to_thread(_with_status, reader, then, interfaces, unconfirmed)
        etag = {"ETag": f'"{found["position"]}"'} if found["recorded_at"] or found["position"] == 0 else {}
        return answer(found, headers=etag)

    @get("/diff")
    async def diff(self, request: Request[Any, Any, Any], event_log: NamedDependency[EventLog]) -> Response[bytes]:
        """What was desired otherwise at another position or time, interface by interface."""
        given = parameters(request, "from", "to")
        reader = event_log.reader

        def compare() -> dict[str, Any]:
            if "from" not in given:
                raise TunledgerError(
                    ErrorCode.INVALID_FIELD, "from: missing; expected a position or a time", field="from"
                )
            begin = _at(reader, "from", given["from"][0])
            end = _at(reader, "to", given["to"][0]) if "to" in given else reader.head()[0]
            old, new = snapshots.past(reader, begin), snapshots.past(reader, end)
            return {
                "from": _place(reader, begin),
                "to": _place(reader, end),
                "interfaces": differences(old, new),
            }

        found = await asyncio.to_thread(compare)
        return answer(found, headers={"ETag": f'"{found["from"]["position"]}-{found["to"]["position"]}"'})

    @get("/log/head")
    async def head(self, orders: NamedDependency[Orders]) -> Response[bytes]:
        """Position and hash of the last event: what to keep elsewhere, to check a later log against."""
        engine = orders.engine
        now = engine.state
        return answer(
            {"node": engine.node, "position": now.position, "hash": now.head or codec.GENESIS},
            headers={"ETag": f'"{now.position}"'},
        )

    @get("/log/verify")
    async def verify(self, request: Request[Any, Any, Any], event_log: NamedDependency[EventLog]) -> Response[bytes]:
        """Read the whole log, check its chain, and that a head known from before is still in it."""
        given = parameters(request, "head")
        known: tuple[int, str] | None = None
        if "head" in given:
            found = _HEAD.fullmatch(given["head"][0])
            if found is None:
                raise invalid("head", given["head"][0], "is not POSITION:HASH, with 64 hex digits of hash")
            known = (position("head", found[1]), found[2])
        return answer(await asyncio.to_thread(event_log.verify, known))


# -- parameters


Given = Mapping[str, Sequence[str]]


def parameters(request: Request[Any, Any, Any], *known: str, repeated: str = "type") -> Given:
    """The query, each parameter known and, but for `repeated`, given once. Raises TunledgerError: invalid_field."""
    given: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise unknown("", name, known, "parameter")
        if name in given and name != repeated:
            raise TunledgerError(ErrorCode.INVALID_FIELD, f"{name}: given twice; give it once", field=name)
        given.setdefault(name, []).append(value)
    return given


def selection(given: Given) -> Selection:
    """The filters of a query. Raises TunledgerError: invalid_field."""
    types = tuple(dict.fromkeys(kind for value in given.get("type", ()) for kind in value.split(",")))
    for kind in types:
        if kind not in codec.TYPES:
            raise invalid("type", kind, f"is no type of event; known are: {', '.join(codec.TYPES)}")
    return Selection(
        stream=_text(given, "stream"),
        types=types,
        actor=_text(given, "actor"),
        command_id=_text(given, "command_id"),
        after=position("after", given["after"][0]) if "after" in given else 0,
        before=position("before", given["before"][0]) if "before" in given else None,
        since=_moment("from", given["from"][0]) if "from" in given else None,
        until=_moment("to", given["to"][0]) if "to" in given else None,
    )


def _text(given: Given, name: str) -> str | None:
    if name not in given:
        return None
    (value,) = given[name]
    if not value:
        raise invalid(name, value, "is empty; leave it out to have all")
    return value


def position(field: str, text: str) -> int:
    """A position in the log. Raises TunledgerError: invalid_field."""
    if not (text.isascii() and text.isdigit() and len(text) <= 19 and int(text) <= POSITION_MAX):
        raise invalid(field, text, f"is not a position: expected 0 to {POSITION_MAX}")
    return int(text)


def _number(given: Given, name: str, low: int, high: int, default: int) -> int:
    if name not in given:
        return default
    (value,) = given[name]
    if not (value.isascii() and value.isdigit() and len(value) <= 19 and low <= int(value) <= high):
        raise invalid(name, value, f"is not a number from {low} to {high}")
    return int(value)


def _one_of(given: Given, name: str, known: Sequence[str], default: str) -> str:
    value = given[name][0] if name in given else default
    if value not in known:
        raise invalid(name, value, f"is not one of: {', '.join(known)}")
    return value


def _moment(field: str, text: str) -> str:
    """A time as the log writes it: ISO 8601, in UTC unless it says otherwise."""
    try:
        moment = datetime.fromisoformat(text)
        return stamp(moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC))
    except (ValueError, OverflowError):
        raise invalid(
            field, text, 'is not a time such as "2026-01-02T03:04:05Z" (in a URL, a "+" is written %2B)'
        ) from None


def _at(reader: LogReader, field: str, text: str) -> int:
    """The position that a position or a time stands for."""
    if not (text.isascii() and text.isdigit()):
        return reader.position_at(_moment(field, text))
    found, (head, _) = position(field, text), reader.head()
    if found > head:
        raise invalid(field, found, f"is beyond the log, which ends at {head}")
    return found


def _continued(wanted: Selection, given: Given, newest_first: bool) -> Selection:
    """The selection from a cursor on. In it: where the page before ended, and where the times asked for do."""
    if "cursor" not in given:
        return wanted
    found = _CURSOR.fullmatch(given["cursor"][0])
    if found is None:
        raise invalid("cursor", given["cursor"][0], "is not the `next` of a page before")
    last = position("cursor", found[1])
    end = position("cursor", found[2]) if found[2] is not None else None
    after, before = wanted.after, wanted.before
    if newest_first:
        before = last if before is None else min(before, last)
        after = max(after, end or 0)
    else:
        after = max(after, last)
        before = before if end is None else end if before is None else min(before, end)
    return replace(wanted, after=after, before=before, bounded=end is not None)


# -- events


class _Told(msgspec.Struct):
    """An event as clients see it; the payload as of today's version of its type."""

    position: int
    event_id: str
    stream: str
    version: int
    type: str
    schema_version: int
    actor: str
    command_id: str | None
    node: str
    recorded_at: str
    hash: str
    payload: msgspec.Raw


def _told(event: ev.Recorded) -> _Told:
    kind, schema_version, payload = codec.encode(event.body)
    return _Told(
        position=event.position,
        event_id=event.event_id,
        stream=event.stream,
        version=event.version,
        type=kind,
        schema_version=schema_version,
        actor=event.actor,
        command_id=event.command_id,
        node=event.node,
        recorded_at=event.recorded_at,
        hash=event.hash,
        payload=msgspec.Raw(payload.encode()),
    )


def sse(event: ev.Recorded) -> bytes:
    """An event as a server-sent one: its position as the id, its type as the event."""
    told = _told(event)
    return f"id: {told.position}\nevent: {told.type}\n".encode() + b"data: " + msgspec.json.encode(told) + b"\n\n"


def _page(reader: LogReader, wanted: Selection, limit: int, newest_first: bool) -> tuple[list[_Told], str | None, int]:
    head, _ = reader.head()
    timed = wanted.since is not None or wanted.until is not None
    # Nothing that is recorded from here on: the head is the page's ETag.
    wanted = reader.bounded(wanted)
    wanted = replace(wanted, before=head + 1 if wanted.before is None else min(wanted.before, head + 1))
    found = reader.page(wanted, limit=limit + 1, newest_first=newest_first)
    following = None
    if len(found) > limit:
        end = wanted.after if newest_first else wanted.before
        following = f"{found[limit - 1].position}-{end}" if timed else str(found[limit - 1].position)
    return [_told(event) for event in found[:limit]], following, head


async def _export(event_log: EventLog, wanted: Selection, newest_first: bool) -> Stream:
    """All events up to now, one on a line. Read as fast as they are taken; no page waits in memory for another."""
    reader = event_log.reader
    head, _ = await asyncio.to_thread(reader.head)
    end = head + 1 if wanted.before is None else min(wanted.before, head + 1)
    first = await asyncio.to_thread(reader.bounded, replace(wanted, before=end))

    def lines(part: Selection) -> tuple[bytes, int | None]:
        found = reader.page(part, limit=EXPORT_PAGE, newest_first=newest_first)
        last = found[-1].position if len(found) == EXPORT_PAGE else None
        return b"".join(msgspec.json.encode(_told(event)) + b"\n" for event in found), last

    async def pages() -> AsyncIterator[bytes]:
        part = first
        while True:
            # A stop breaks the export off: what is not whole must not end as if it were.
            if event_log.feed.closed:
                raise _StoppingError
            text, last = await asyncio.to_thread(lines, part)
            if text:
                yield text
            if last is None:
                return
            part = replace(part, before=last) if newest_first else replace(part, after=last)

    return Stream(pages(), media_type=NDJSON, headers={"ETag": f'"{head}"'})


# -- the live stream


class Live(Response[bytes]):
    """The answer that goes on: see `_Live`."""

    def __init__(self, event_log: EventLog, wanted: Selection, after: int) -> None:
        super().__init__(b"", media_type="text/event-stream")
        self._live = _Live(event_log, wanted, after)

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIResponse:
        """What litestar calls with scope, receive and send."""
        return self._live  # type: ignore[return-value]  # all that it does with it is to call it


@dataclass(slots=True)
class _Live:
    """One stream: catches up from the database, then takes from the feed. No event is missed or sent twice.

    `after` is the position up to which the reader knows everything that it wants; it only grows. The feed is listened
    to before the database is read for the last time, so that what is recorded in between is in one of them, or both.
    """

    event_log: EventLog
    wanted: Selection
    after: int

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        subscription = self.event_log.feed.subscribe()  # here, where it is sure to be closed
        work = [
            asyncio.ensure_future(self._run(subscription, send)),
            asyncio.ensure_future(_disconnected(receive)),
        ]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            subscription.close()
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _run(self, subscription: Subscription, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # for nginx, which would keep events back
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            # The id alone is no event yet, but what a reader comes back with that has not seen one.
            await self._write(send, f"retry: {RETRY_MS}\nid: {self.after}\n\n".encode())
            await self._catch_up(send, subscription)
            subscription.listen()
            await self._catch_up(send, subscription)
            while subscription.ended is None:
                events = await subscription.take(self.event_log.heartbeat_s)
                if events and events[0].position > self.after + 1:
                    await self._catch_up(send, subscription)  # the feed had a hole
                    events = [event for event in events if event.position > self.after]
                if events:
                    await self._pass_on(send, subscription, events)
                elif subscription.ended is None:
                    await self._write(send, b": heartbeat\n\n")
            await self._write(send, self._last_words(subscription.ended), more=False)
        except TimeoutError:
            log.warning("a stream was given up: its reader takes nothing", after=self.after)

    async def _pass_on(self, send: Send, subscription: Subscription, events: Sequence[ev.Recorded]) -> None:
        for start in range(0, len(events), CHUNK_EVENTS):
            if subscription.ended is not None:  # cut off while the write before was waiting
                return
            chunk = [event for event in events[start : start + CHUNK_EVENTS] if event.position > self.after]
            frames = b"".join(self.event_log.frame(event) for event in chunk if self.wanted.matches(event))
            if frames:
                await self._write(send, frames)
            if chunk:
                self.after = chunk[-1].position

    async def _catch_up(self, send: Send, subscription: Subscription) -> None:
        """Send what the database has, until it has no more."""
        while subscription.ended is None:
            frames, reached, more = await asyncio.to_thread(self._stored)
            if frames:
                await self._write(send, frames)
            self.after = reached
            if not more:
                return

    def _stored(self) -> tuple[bytes, int, bool]:
        """The next wanted events in the database as frames, up to where that is known, and whether there are more."""
        reader = self.event_log.reader
        head, _ = reader.head()
        before = head + 1 if self.wanted.before is None else min(self.wanted.before, head + 1)
        found = reader.page(replace(self.wanted, after=self.after, before=before), limit=CATCH_UP_EVENTS)
        more = len(found) == CATCH_UP_EVENTS
        return b"".join(map(sse, found)), found[-1].position if more else max(head, self.after), more

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(self.event_log.stall_s):
            await send({"type": "http.response.body", "body": body, "more_body": more})

    def _last_words(self, why: End) -> bytes:
        if why is End.CLOSED:
            return b": the service is stopping; come back with the last id\n\n"
        reason = (
            f"more than {self.event_log.feed.buffer_events} events were waiting for this reader; "
            f"come back with Last-Event-ID: {self.after}, and take them faster"
        )
        return b"event: dropped\ndata: " + msgspec.json.encode({"code": why.value, "reason": reason}) + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# -- state


def desired_json(interface: Interface) -> dict[str, Any]:
    """The desired state of one interface and nothing that the log does not say."""
    return {
        "id": interface.id,
        "generation": interface.generation,
        "spec": spec_to_json(interface.spec) if interface.spec is not None else None,
        "pending": interface.pending.command_id if interface.pending is not None else None,
    }


def state_json(reader: LogReader, then: Past) -> dict[str, Any]:
    """All interfaces at a position of the log, by name."""
    return _place(reader, then.state.position) | {
        "interfaces": {
            i.name: desired_json(i)
            | {"status": then.status(i) | {"awaiting_confirmation": _awaiting(then.state.unconfirmed.get(i.name))}}
            for i in then.state.interfaces.values()
        }
    }


def _with_status(
    reader: LogReader,
    then: dict[str, Any],
    interfaces: dict[str, dict[str, Any]],
    unconfirmed: Mapping[str, dict[str, Any] | None],
) -> dict[str, Any]:
    """The engine's desired state, and beside it what the log tells of how the interfaces are.

    An engine that serves read-only may have come no further than the log can be read: then nothing more is known.
    """
    told: dict[str, dict[str, Any]] = {}
    place: dict[str, Any] = {"recorded_at": None}
    with contextlib.suppress(TunledgerError):
        past = snapshots.past(reader, then["position"])
        place = _place(reader, then["position"])
        told = {i.name: past.status(i) for i in past.state.interfaces.values()}
    unknown = {"state": "unknown", "reason": None, "since": None}
    for name, interface in interfaces.items():
        interface["status"] = told.get(name, unknown) | {"awaiting_confirmation": unconfirmed.get(name)}
    return place | then | {"interfaces": interfaces}


def _awaiting(unconfirmed: Unconfirmed | None) -> dict[str, Any] | None:
    if unconfirmed is None:
        return None
    return {"command_id": unconfirmed.command_id, "confirm_by": unconfirmed.confirm_by}


def _place(reader: LogReader, position: int) -> dict[str, Any]:
    mark = reader.mark(position)
    return {
        "position": position,
        "hash": mark[0] if mark is not None else None,
        "recorded_at": mark[1] if mark is not None else None,
    }


def differences(old: Past, new: Past) -> list[dict[str, Any]]:
    """What is desired in one state and not in the other, in order of names.

    Incarnations are told apart: one that was retired and declared again was removed, and another was added. An
    interface whose first command has no outcome yet is not there yet.
    """
    before = {i.id: i for i in old.state.interfaces.values() if i.spec is not None}
    after = {i.id: i for i in new.state.interfaces.values() if i.spec is not None}
    found = []
    for interface_id in [*before, *(each for each in after if each not in before)]:
        was, now = before.get(interface_id), after.get(interface_id)
        changed = changes(_spec_json(was), _spec_json(now))
        if was is None or now is None or changed:
            either = was or now
            assert either is not None
            kind = "added" if was is None else "removed" if now is None else "changed"
            found.append({"name": either.name, "id": interface_id, "change": kind, "changes": changed})
    order = {"removed": 0, "added": 1, "changed": 2}
    return sorted(found, key=lambda each: (each["name"], order[each["change"]]))


def _spec_json(interface: Interface | None) -> dict[str, Any] | None:
    return spec_to_json(interface.spec) if interface is not None and interface.spec is not None else None
