"""The OpenAPI 3.1 document, and the page to browse it: /schema/openapi.json and /schema.

The document is made by hand, from the constants that the code enforces and the table of error codes, so that it can
say what annotations cannot: which errors a call has, what a header does, what an answer looks like. A test walks the
routes and fails on one that is missing here. Shapes of bodies and answers are `service.api.schemas`'; examples are
recorded from the real service into examples.json (`tests.schema.recording`), never made up.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any, Final

from litestar import Controller, Response, get
from litestar.params import FromPath

from service import __version__
from service.api import render
from service.api.bodies import BATCH_MAX
from service.api.captures import (
    PACKETS_DEFAULT,
    PACKETS_SHOWN_MAX,
    PCAPNG,
    TAIL_LIMIT_MAX,
    TAIL_PPS_DEFAULT,
    TAIL_PPS_MAX,
)
from service.api.events import HEARTBEAT_S, LAST_EVENT_ID
from service.api.events import PAGE_DEFAULT as EVENTS_DEFAULT
from service.api.events import PAGE_MAX as EVENTS_MAX
from service.api.interfaces import HISTORY_MAX, PAGE_DEFAULT, PAGE_MAX, POSITION_MAX, STATES
from service.api.orders import CONFIRM_S_MAX, REASON_CHARS_MAX
from service.api.problems import BATCH_MAX_BYTES, BODY_MAX_BYTES, PROBLEM_TYPE, RETRY_AFTER_S, STATUS, status_v1
from service.api.schemas import EVENTS, ID, NAME, SCHEMAS, Schema, integer, ref, text
from service.api.traffic import TOP_DEFAULT, TOP_MAX
from service.domain.chain import SNAPLEN_MAX
from service.domain.errors import ErrorCode, TunledgerError

# No scripts, styles or data but our own: the page must work on a host without a network, and leak nothing.
PAGE_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
FILES: Final[Mapping[str, str]] = {
    "browser.css": "text/css",
    "browser.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_PLACE: Final = files("service.api") / "browser"


class SchemaController(Controller):
    """/schema..."""

    path = "/schema"

    @get("")
    async def page(self) -> Response[bytes]:
        """The page that shows the document and tries its calls."""
        return Response(_file("index.html"), media_type="text/html", headers=PAGE_HEADERS)

    @get("/openapi.json")
    async def openapi(self) -> Response[bytes]:
        """The OpenAPI document."""
        return Response(_encoded(), media_type="application/json", headers={"Cache-Control": "no-cache"})

    @get("/{name:str}")
    async def part(self, name: FromPath[str]) -> Response[bytes]:
        """What the page is made of."""
        if name not in FILES:
            raise TunledgerError(ErrorCode.NOT_FOUND, f"there is no /schema/{name} here")
        return Response(_file(name), media_type=FILES[name], headers=PAGE_HEADERS)


@cache
def _file(name: str) -> bytes:
    return (_PLACE / name).read_bytes()


@cache
def _encoded() -> bytes:
    return json.dumps(document(recorded_examples()), ensure_ascii=False).encode()


Example = dict[str, Any]  # {"summary", "status", "media_type", "answer"} and "body" where one was sent
Examples = Mapping[str, Sequence[Example]]  # by operation id


def recorded_examples() -> dict[str, list[Example]]:
    """Requests to the real service, and what it answered."""
    found: dict[str, list[Example]] = json.loads((files("service.api") / "examples.json").read_bytes())
    return found


# -- what every call has in common

_E = ErrorCode
_GATE: Final = (_E.UNAUTHORIZED, _E.FORBIDDEN_HOST, _E.INTERNAL)
_LOG_READ: Final = (_E.LOG_UNAVAILABLE, _E.LOG_CORRUPT)
_HOST_READ: Final = (_E.PERMISSION_DENIED, _E.KERNEL_REFUSED)
_WRITE: Final = (
    _E.INVALID_FIELD,
    _E.VERSION_CONFLICT,
    _E.PERMISSION_DENIED,
    _E.KERNEL_REFUSED,
    _E.VERIFY_FAILED,
    _E.TUN_MISSING,
    _E.DEVICE_GONE,
    _E.DEVICE_BUSY,
    _E.WORKER_FAILED,
    _E.LOG_UNAVAILABLE,
    _E.LOG_CORRUPT,
    _E.LOG_FULL,
    _E.OVERLOADED,
    _E.SHUTTING_DOWN,
    _E.OUTCOME_UNKNOWN,
)
_BODY: Final = (_E.INVALID_JSON, _E.BODY_TOO_LARGE)
_KEY: Final = (_E.KEY_REUSED,)
_V1_WRITE: Final = (*_WRITE, *_KEY, _E.PRECONDITION_FAILED, _E.AWAITING_CONFIRMATION)
# Not in any call's table: before a service answers at all, or whatever is asked where nothing is.
ELSEWHERE: Final = frozenset({_E.SCHEMA_MISMATCH, _E.ALREADY_SERVING, _E.METHOD_NOT_ALLOWED})

_SWITCH: Final[Schema] = {
    "description": "`1` and nothing at all stand for true, `0` for false",
    "anyOf": [{"type": "boolean"}, {"enum": ["1", "0", ""]}],
    "default": False,
}
PARAMETERS: Final[dict[str, Schema]] = {
    "Name": {"name": "name", "in": "path", "required": True, "description": "the interface's name", "schema": NAME},
    "AnyName": {
        "name": "name",
        "in": "path",
        "required": True,
        "description": "an interface's name, or one that was refused",
        "schema": text(minLength=1),
    },
    "CommandId": {
        "name": "command_id",
        "in": "path",
        "required": True,
        "description": f"as in the header {render.COMMAND_ID} of the answer to the command",
        "schema": ID,
    },
    "CaptureId": {
        "name": "capture_id",
        "in": "path",
        "required": True,
        "description": "of a capture",
        "schema": ID,
    },
    "DryRun": {
        "name": "dry_run",
        "in": "query",
        "description": "answer what would be done, written to the log, or refused; nothing changes anywhere",
        "schema": _SWITCH,
    },
    "AllowOverlap": {
        "name": "allow_overlap",
        "in": "query",
        "description": "let the interface's subnets cover ones that the host uses already, which could cut it off",
        "schema": _SWITCH,
    },
    "Recreate": {
        "name": "recreate",
        "in": "query",
        "description": "allow what only a new device can do (mode, multi_queue, no owner any more): the interface is "
        "removed and made again, with a new ifindex",
        "schema": _SWITCH,
    },
    "ConfirmWithinS": {
        "name": "confirm_within_s",
        "in": "query",
        "description": "take the change back unless it is confirmed within so many seconds; holds through a crash",
        "schema": integer("seconds", minimum=1, maximum=CONFIRM_S_MAX),
    },
    "IdempotencyKey": {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "the same key and request get the same answer and have one effect, for at least 24 hours and "
        "through a crash; another request under the same key is 422",
        "schema": text(pattern="^[!-~]{1,255}$"),
    },
    "IfMatch": {
        "name": "If-Match",
        "in": "header",
        "description": "only if the interface still has one of these ETags, or (`*`) exists",
        "schema": text(format="etags", examples=["*", '"0192f0c0-5c1b-7d2e-8f3a-4b5c6d7e8f90.3"']),
    },
    "IfNoneMatch": {
        "name": "If-None-Match",
        "in": "header",
        "description": "`*`: only if there is no such interface",
        "schema": text(enum=["*"]),
    },
    "Prefer": {
        "name": "Prefer",
        "in": "header",
        "description": "`respond-async`: answer 202 as soon as the command is in the log (RFC 7240)",
        "schema": text(examples=["respond-async"]),
    },
    "Reason": {
        "name": "Tunledger-Reason",
        "in": "header",
        "description": f"why; kept in the log and shown in history. A line of at most {REASON_CHARS_MAX} characters",
        "schema": text(pattern="^([!-~]([ -~]*[!-~])?)?$", maxLength=REASON_CHARS_MAX),
    },
}
_HEADERS_ALL: Final = ("IdempotencyKey", "Prefer", "Reason", "IfMatch")
_CLASSIC_HEADERS: Final = ("IdempotencyKey", "Reason")

HEADERS: Final[dict[str, Schema]] = {
    "CommandId": {"description": "ask what became of it at /api/v1/commands/{command_id}", "schema": ID},
    "ETag": {"description": "stands for one desired state only, ever", "schema": text(pattern='^".+"$')},
    "Location": {"description": "where it is", "schema": text(format="uri-reference")},
    "PreferenceApplied": {"description": "RFC 7240", "schema": text()},
    "RetryAfter": {
        "description": "seconds; only where the same request may succeed later",
        "schema": integer(minimum=RETRY_AFTER_S),
    },
}
_COMMAND_ID: Final = {render.COMMAND_ID: "CommandId"}
_ETAG: Final = {"ETag": "ETag"}
_RESOURCE: Final = {**_COMMAND_ID, **_ETAG, "Location": "Location"}

TAGS: Final[Mapping[str, str]] = {
    "interfaces": "What is desired of each interface, and what is known of it.",
    "commands": "Many at once, what became of one, and making a change stay.",
    "host": "Whether host and log agree, and making them.",
    "log": "Who changed what, when, why, and what came of it; and the state at any moment.",
    "packets": "What flows through an interface: its chain at work, flows, captures, packets in words.",
    "counters": "Lifetime totals and rates; they never go down, whatever happens to an interface.",
    "service": "The service itself, and this document.",
    "original": "The original API: one interface at a time, the one that its `create` made. It keeps its own form "
    'of errors, `{"error": text}`, and has 400 where /api/v1 has 404. Works beside /api/v1 on the same interfaces.',
}

_DESCRIPTION = f"""\
tunledger makes TUN and TAP interfaces, writes every command to an event log first, and can say at any time who asked
for what, when, why, and what came of it.

**Who may call.** Processes of root or of the service's own user, over loopback, with a loopback name in `Host`. The
kernel is asked whose the connection is; there is nothing to send. Everybody else hears 401 or 403.

**Errors** under /api/v1 are problem details (RFC 9457) with a stable `code`, the JSON pointer of the field, and the
errno's name where the kernel refused. Besides those listed with each call: 404 `not_found` for a path that is not
there, 405 `method_not_allowed` with `Allow`, and a plain 400 for what is no HTTP at all.

**Writes** take an `Idempotency-Key`, `If-Match`, a `Tunledger-Reason` and `dry_run=true`; they answer when the kernel
was seen to be as wanted, or, with `Prefer: respond-async`, as soon as the command is durable. A misspelt parameter or
field is refused, never passed over.

**Bounds.** A body has at most {BODY_MAX_BYTES // 1024} KiB, that of a batch {BATCH_MAX_BYTES // 1024} KiB and
{BATCH_MAX} commands, a page at most
{PAGE_MAX} entries.
"""


# -- operations


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer: its schema, and the headers of ours that come with it."""

    schema: Schema | None
    description: str
    headers: Mapping[str, str] = field(default_factory=dict)
    media_type: str = "application/json"
    also: Mapping[str, Schema] = field(default_factory=dict)  # other media types
    links: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method on one path. `codes` are the errors it has, besides those of all calls."""

    method: str
    path: str
    id: str
    tag: str
    summary: str
    answers: Mapping[int, Answer]
    codes: Iterable[ErrorCode]
    description: str = ""
    parameters: Sequence[str | Schema] = ()
    body: Schema | None = None
    body_required: bool = True
    body_types: Sequence[str] = ("application/json",)


def _query(name: str, description: str, schema: Schema, **more: Any) -> Schema:
    return {"name": name, "in": "query", "description": description, "schema": schema, **more}


def _link(operation: str, description: str, **parameters: str) -> Schema:
    return {"operationId": operation, "parameters": parameters, "description": description}


_NAME_OF: Final = "$response.body#/spec/name"
_THE_COMMAND: Final = f"$response.header.{render.COMMAND_ID}"
_TO_COMMAND: Final = {
    "command": _link("readCommand", "what became of it", command_id=_THE_COMMAND),
    "confirm": _link("confirmCommand", "with `confirm_within_s`: make it stay", command_id=_THE_COMMAND),
}
_TO_INTERFACE: Final = {
    "read": _link("readInterface", "read it", name=_NAME_OF),
    "change": _link("changeInterface", "change it", name=_NAME_OF),
    "replace": _link("replaceInterface", "declare it anew", name=_NAME_OF),
    "start": _link("startProcessing", "process its packets", name=_NAME_OF),
    "stop": _link("stopProcessing", "stop that", name=_NAME_OF),
    "history": _link("interfaceHistory", "what happened to it", name=_NAME_OF),
    "delete": _link("deleteInterface", "remove it", name=_NAME_OF),
    **_TO_COMMAND,
}
_ACCEPTED: Final = Answer(
    schema=ref("Accepted"),
    description="with `Prefer: respond-async`: the command is durable, its outcome follows",
    headers={**_COMMAND_ID, "Location": "Location", "Preference-Applied": "PreferenceApplied"},
    links=_TO_COMMAND,
)


def _changed(schema: Schema, description: str) -> Answer:
    """The 200 of a write, which a dry run has too."""
    return Answer(
        schema={"anyOf": [schema, ref("Preview")]},
        description=f"{description}; or, with `dry_run`, what would be done",
        headers=_RESOURCE,
    )


_CREATED: Final = Answer(schema=ref("Interface"), description="it was made", headers=_RESOURCE, links=_TO_INTERFACE)
_PREVIEW: Final = Answer(schema=ref("Preview"), description="with `dry_run`: what would be done")
_V1_QUERY: Final = ("DryRun", "ConfirmWithinS")
_SPEC_CODES: Final = (*_BODY, _E.SUBNET_OVERLAP, _E.NAME_TAKEN, _E.NETNS_MISSING)
_CHAIN_CODES: Final = (*_SPEC_CODES, _E.TARGET_MODE)
_HISTORY_PARAMETERS: Final = (
    _query("id", "only of this incarnation", text(format="uuid")),
    _query("before", "only entries before this position", integer(minimum=1, maximum=POSITION_MAX)),
    _query("limit", "how many", integer(minimum=1, maximum=HISTORY_MAX, default=100)),
)


def _operations() -> list[Operation]:
    v1 = "/api/v1"
    one = f"{v1}/interfaces/{{name}}"
    return [
        Operation(
            method="get",
            path=f"{v1}/interfaces",
            id="listInterfaces",
            tag="interfaces",
            summary="List interfaces",
            description="In the order of their names, a page at a time.",
            parameters=(
                _query("name", "a pattern, as a shell has it: `lab*`", text()),
                _query("mode", "only these", text(enum=["tun", "tap"])),
                _query("state", "only those in this state", text(enum=list(STATES))),
                _query(
                    "label",
                    "only with this label: `lab=north`, or a key alone; may be repeated",
                    {"type": "array", "items": text(pattern="^[^=]+(=.*)?$")},
                ),
                _query("cursor", "`next` of the page before", text(format="cursor")),
                _query("limit", "how many", integer(minimum=1, maximum=PAGE_MAX, default=PAGE_DEFAULT)),
            ),
            answers={200: Answer(schema=ref("InterfaceList"), description="a page", headers=_ETAG)},
            codes=(_E.INVALID_FIELD, *_HOST_READ),
        ),
        Operation(
            method="post",
            path=f"{v1}/interfaces",
            id="createInterface",
            tag="interfaces",
            summary="Make an interface",
            description="One that does not exist yet.",
            parameters=(*_V1_QUERY, "AllowOverlap", *_HEADERS_ALL, "IfNoneMatch"),
            body=ref("InterfaceSpec"),
            answers={200: _PREVIEW, 201: _CREATED, 202: _ACCEPTED},
            codes=(*_V1_WRITE, *_CHAIN_CODES, _E.INTERFACE_EXISTS),
        ),
        Operation(
            method="get",
            path=one,
            id="readInterface",
            tag="interfaces",
            summary="Read an interface",
            description="What is desired of it, and what is known of it.",
            parameters=("Name",),
            answers={
                200: Answer(schema=ref("Interface"), description="the interface", headers=_ETAG, links=_TO_INTERFACE)
            },
            codes=(_E.INVALID_FIELD, _E.NO_INTERFACE, *_HOST_READ),
        ),
        Operation(
            method="put",
            path=one,
            id="replaceInterface",
            tag="interfaces",
            summary="Declare an interface",
            description="Just so, whether or not it exists; fields that are not given go back to their defaults.",
            parameters=("Name", *_V1_QUERY, "AllowOverlap", "Recreate", *_HEADERS_ALL, "IfNoneMatch"),
            body=ref("InterfaceReplacement"),
            answers={200: _changed(ref("Interface"), "it was changed"), 201: _CREATED, 202: _ACCEPTED},
            codes=(*_V1_WRITE, *_CHAIN_CODES, _E.NEEDS_RECREATE, _E.NO_INTERFACE),
        ),
        Operation(
            method="patch",
            path=one,
            id="changeInterface",
            tag="interfaces",
            summary="Change an interface",
            description="A JSON merge patch (RFC 7396) on its spec, applied in place where the kernel can.",
            parameters=("Name", *_V1_QUERY, "AllowOverlap", "Recreate", *_HEADERS_ALL),
            body=ref("InterfacePatch"),
            body_types=("application/merge-patch+json", "application/json"),
            answers={200: _changed(ref("Interface"), "it was changed"), 202: _ACCEPTED},
            codes=(*_V1_WRITE, *_CHAIN_CODES, _E.NEEDS_RECREATE, _E.NO_INTERFACE),
        ),
        Operation(
            method="delete",
            path=one,
            id="deleteInterface",
            tag="interfaces",
            summary="Remove an interface",
            description="For good; its history stays.",
            parameters=("Name", *_V1_QUERY, *_HEADERS_ALL),
            answers={
                200: Answer(
                    schema={"anyOf": [ref("Deleted"), ref("Preview")]},
                    description="it is gone; or, with `dry_run`, what would be done",
                    headers=_COMMAND_ID,
                ),
                202: _ACCEPTED,
            },
            codes=(*_V1_WRITE, _E.NO_INTERFACE),
        ),
        *(
            Operation(
                method="post",
                path=f"{one}/{verb}",
                id=f"{verb}Processing",
                tag="interfaces",
                summary=summary,
                description=description,
                parameters=("Name", *_V1_QUERY, *_HEADERS_ALL),
                answers={200: _changed(ref("Interface"), "done"), 202: _ACCEPTED},
                codes=(*_V1_WRITE, *_BODY, refused, _E.NO_INTERFACE),
            )
            for verb, summary, description, refused in (
                ("start", "Start packet processing", "Let the workers read the device.", _E.ALREADY_RUNNING),
                ("stop", "Stop packet processing", "Take the device from the workers.", _E.NOT_RUNNING),
            )
        ),
        Operation(
            method="get",
            path=f"{one}/history",
            id="interfaceHistory",
            tag="log",
            summary="History of a name",
            description="Over all interfaces that ever had it, newest first.",
            parameters=("AnyName", *_HISTORY_PARAMETERS),
            answers={200: Answer(schema=ref("History"), description="a page")},
            codes=(_E.INVALID_FIELD, _E.NOT_FOUND, *_LOG_READ),
        ),
        Operation(
            method="get",
            path=f"{v1}/history",
            id="history",
            tag="log",
            summary="History of everything",
            description="Newest first: changes with their outcomes, refusals, drift and repairs, starts and stops.",
            parameters=_HISTORY_PARAMETERS,
            answers={200: Answer(schema=ref("History"), description="a page")},
            codes=(_E.INVALID_FIELD, _E.NOT_FOUND, *_LOG_READ),
        ),
        Operation(
            method="post",
            path=f"{v1}/batch",
            id="batch",
            tag="commands",
            summary="Several commands",
            description="All applied or none: one transaction in the log, one batch for the kernel.",
            parameters=(*_V1_QUERY, "AllowOverlap", "Recreate", *_HEADERS_ALL),
            body=ref("Batch"),
            answers={
                200: Answer(
                    schema={"anyOf": [ref("BatchAnswer"), ref("Preview")]},
                    description="all were applied; or, with `dry_run`, what would be done",
                    headers=_COMMAND_ID,
                ),
                202: _ACCEPTED,
            },
            codes=(
                *_V1_WRITE,
                *_CHAIN_CODES,
                _E.INTERFACE_EXISTS,
                _E.NEEDS_RECREATE,
                _E.NO_INTERFACE,
                _E.ALREADY_RUNNING,
                _E.NOT_RUNNING,
            ),
        ),
        Operation(
            method="get",
            path=f"{v1}/commands/{{command_id}}",
            id="readCommand",
            tag="commands",
            summary="What became of a command",
            parameters=("CommandId",),
            answers={200: Answer(schema=ref("Command"), description="the command", headers=_ETAG)},
            codes=(_E.INVALID_FIELD, _E.NOT_FOUND, *_LOG_READ),
        ),
        Operation(
            method="post",
            path=f"{v1}/commands/{{command_id}}/confirm",
            id="confirmCommand",
            tag="commands",
            summary="Make a change stay",
            description="One that was ordered with `confirm_within_s`, before its time is up.",
            parameters=("CommandId", "DryRun", "IdempotencyKey", "Reason"),
            answers={
                200: Answer(
                    schema={"anyOf": [ref("Confirmed"), ref("Preview")]},
                    description="it stays; or, with `dry_run`, what would be written",
                    headers=_COMMAND_ID,
                )
            },
            codes=(
                *_BODY,
                *_KEY,
                _E.INVALID_FIELD,
                _E.NOT_AWAITING,
                *_LOG_READ,
                _E.LOG_FULL,
                _E.OVERLOADED,
                _E.SHUTTING_DOWN,
            ),
        ),
        *_log(),
        *_counters(),
        Operation(
            method="post",
            path=f"{v1}/reconcile",
            id="reconcile",
            tag="host",
            summary="Make the host agree with the log",
            description="Now, and without waiting for the back-off of repairs that failed.",
            parameters=("DryRun", "IdempotencyKey"),
            answers={
                200: Answer(
                    schema={"anyOf": [ref("Reconciled"), ref("ReconcilePreview")]},
                    description="what was done; or, with `dry_run`, what would be",
                )
            },
            codes=(
                _E.INVALID_FIELD,
                _E.KEY_REUSED,
                *_HOST_READ,
                *_LOG_READ,
                _E.LOG_FULL,
                _E.OVERLOADED,
                _E.SHUTTING_DOWN,
            ),
        ),
        Operation(
            method="get",
            path=f"{v1}/drift",
            id="drift",
            tag="host",
            summary="What differs now",
            description="Between the log and the host, in dotted paths, and what would mend it.",
            answers={200: Answer(schema=ref("Drift"), description="what differs")},
            codes=(_E.INVALID_FIELD, *_HOST_READ),
        ),
        Operation(
            method="get",
            path="/health",
            id="health",
            tag="service",
            summary="Whether commands can be taken",
            answers={
                200: Answer(schema=ref("Health"), description="they can"),
                503: Answer(schema=ref("Health"), description="they cannot; `reasons` says why"),
            },
            codes=(),
        ),
        Operation(
            method="get",
            path="/schema/openapi.json",
            id="openapi",
            tag="service",
            summary="This document",
            answers={
                200: Answer(
                    schema={"type": "object", "required": ["openapi"], "properties": {"openapi": {"const": "3.1.0"}}},
                    description="the document",
                )
            },
            codes=(),
        ),
        Operation(
            method="get",
            path="/schema",
            id="browse",
            tag="service",
            summary="A page to browse this document",
            description="It needs nothing from the internet, and loads nothing from it.",
            answers={200: Answer(schema=text(), description="the page", media_type="text/html")},
            codes=(),
        ),
        Operation(
            method="get",
            path="/schema/{name}",
            id="browserPart",
            tag="service",
            summary="What that page is made of",
            parameters=(
                {
                    "name": "name",
                    "in": "path",
                    "required": True,
                    "description": "a file of the page",
                    "schema": text(enum=list(FILES)),
                },
            ),
            answers={200: Answer(schema=text(), description="the file", media_type="*/*")},
            codes=(_E.NOT_FOUND,),
        ),
        *_packets(),
        *_original(),
    ]


def _log() -> list[Operation]:
    v1 = "/api/v1"
    position = integer(minimum=0, maximum=POSITION_MAX)
    filters = (
        _query("stream", "`interface/ID`, `name/NAME` or `node/NODE`", text(minLength=1)),
        _query(
            "type",
            "of these types; may be repeated, or separated by commas",
            {"type": "array", "items": text(enum=list(EVENTS)), "minItems": 1},
        ),
        _query("actor", "ordered by them, such as `uid:0` or `system`", text(minLength=1)),
        _query("command_id", "of one command", text(minLength=1)),
        _query("after", "after this position", position),
        _query("before", "before this position", position),
        _query("from", "recorded at this time or later", text(format="moment")),
        _query("to", "recorded before this time", text(format="moment")),
    )
    ndjson = {"application/x-ndjson": text("an event on each line, of the schema Event")}
    return [
        Operation(
            method="get",
            path=f"{v1}/events",
            id="listEvents",
            tag="log",
            summary="Events, by filter",
            description="A page of them, or, as newline-delimited JSON (`format=ndjson`, or `Accept`), all of them.",
            parameters=(
                *filters,
                _query("order", "oldest first, or newest", text(enum=["asc", "desc"], default="asc")),
                _query("limit", "how many", integer(minimum=1, maximum=EVENTS_MAX, default=EVENTS_DEFAULT)),
                _query("cursor", "`next` of the page before", text(format="events-cursor")),
                _query("format", "a page, or all as lines", text(enum=["json", "ndjson"])),
            ),
            answers={200: Answer(schema=ref("EventPage"), description="a page, or all", headers=_ETAG, also=ndjson)},
            codes=(_E.INVALID_FIELD, *_LOG_READ),
        ),
        Operation(
            method="get",
            path=f"{v1}/events/stream",
            id="streamEvents",
            tag="log",
            summary="Events as they are recorded",
            description="Server-sent events: `id` is the position, `event` the type, `data` the event as JSON. A "
            "connection that was lost goes on after Last-Event-ID, without a gap or a repeat. A comment comes "
            f"every {HEARTBEAT_S:g} s where nothing else does; a reader who is too slow hears `dropped`, and why.",
            parameters=(
                *filters,
                {
                    "name": LAST_EVENT_ID,
                    "in": "header",
                    "description": "the position of the last event that was seen; goes before `after`",
                    "schema": position,
                },
            ),
            answers={
                200: Answer(
                    schema=text("server-sent events"),
                    description="goes on until one side ends it",
                    media_type="text/event-stream",
                )
            },
            codes=(_E.INVALID_FIELD, *_LOG_READ, _E.OVERLOADED, _E.SHUTTING_DOWN),
        ),
        Operation(
            method="get",
            path=f"{v1}/state",
            id="stateAt",
            tag="log",
            summary="The state at any moment",
            description="All interfaces as they were desired at a position or time, and how they were as far as the "
            "log tells; without either, as the service has them now.",
            parameters=(_query("at", "a position, or a time", text(format="place")),),
            answers={200: Answer(schema=ref("StateAt"), description="the state", headers=_ETAG)},
            codes=(_E.INVALID_FIELD, *_LOG_READ),
        ),
        Operation(
            method="get",
            path=f"{v1}/diff",
            id="diff",
            tag="log",
            summary="What was desired otherwise",
            description="Between two positions or times, interface by interface.",
            parameters=(
                _query("from", "a position, or a time", text(format="place"), required=True),
                _query("to", "a position, or a time; now without", text(format="place")),
            ),
            answers={200: Answer(schema=ref("Diff"), description="what differs", headers=_ETAG)},
            codes=(_E.INVALID_FIELD, *_LOG_READ),
        ),
        Operation(
            method="get",
            path=f"{v1}/log/head",
            id="logHead",
            tag="log",
            summary="Where the log ends",
            description="Position and hash of the last event: what to keep elsewhere, to check a later log against.",
            answers={200: Answer(schema=ref("LogHead"), description="the head", headers=_ETAG)},
            codes=(),
        ),
        Operation(
            method="get",
            path=f"{v1}/log/verify",
            id="verifyLog",
            tag="log",
            summary="Verify the log",
            description="Read all of it, check the chain of hashes, and that a head known from before is still in it.",
            parameters=(
                _query(
                    "head", "POSITION:HASH, as `log/head` gave them once", text(pattern="^[0-9]{1,18}:[0-9a-f]{64}$")
                ),
            ),
            answers={200: Answer(schema=ref("Verification"), description="sound or not, and why")},
            codes=(_E.INVALID_FIELD, *_LOG_READ, _E.OVERLOADED, _E.SHUTTING_DOWN),
        ),
    ]


def _counters() -> list[Operation]:
    v1 = "/api/v1"
    codes = (_E.INVALID_FIELD, *_HOST_READ, *_LOG_READ, _E.OVERLOADED, _E.SHUTTING_DOWN)
    return [
        Operation(
            method="get",
            path=f"{v1}/counters",
            id="allCounters",
            tag="counters",
            summary="Totals of all interfaces",
            description="From a sample that is stored before it is shown.",
            answers={200: Answer(schema=ref("AllCounters"), description="by name")},
            codes=codes,
        ),
        Operation(
            method="get",
            path=f"{v1}/interfaces/{{name}}/counters",
            id="interfaceCounters",
            tag="counters",
            summary="Counters of an interface",
            description="Totals and present rates; with `from`, `to` or `step` also points over time, of every "
            "sample or of whole steps. Exact across recreation, restart and reboot; gaps stay gaps.",
            parameters=(
                "AnyName",
                _query("id", "of this incarnation; also of one that is gone", text(format="uuid")),
                _query("from", "a time, or how long ago: `-1h`, `-90s`", text(format="counters-from")),
                _query("to", "the same; now without", text(format="counters-to")),
                _query("step", "seconds, or such as `1m`, `6h`, `1d`", text(format="counters-step")),
            ),
            answers={200: Answer(schema=ref("InterfaceCounters"), description="the counters")},
            codes=(*codes, _E.NOT_FOUND),
        ),
    ]


def _packets() -> list[Operation]:
    one = "/api/v1/interfaces/{name}"
    capture = f"{one}/captures/{{capture_id}}"
    kept = "/api/v1/captures/{capture_id}"
    number = {
        "name": "number",
        "in": "path",
        "required": True,
        "description": "as in `files` of the capture",
        "schema": integer(minimum=0, maximum=10**9),
    }
    read = (_E.INVALID_FIELD, _E.NO_INTERFACE)
    told = (*_LOG_READ, _E.LOG_FULL, _E.SHUTTING_DOWN, _E.OUTCOME_UNKNOWN)
    begun = (*read, _E.NOT_RUNNING, _E.TOO_MANY_CAPTURES, _E.WORKER_FAILED, *told)
    octets = Answer(schema=text("pcapng"), description="packets as pcapng", media_type=PCAPNG)
    events = Answer(
        schema=text("server-sent events"), description="goes on until one side ends it", media_type="text/event-stream"
    )
    seen = (*read, _E.NOT_RUNNING, _E.NOT_INSPECTED)
    to_capture = {
        verb: _link(operation, what, name="$response.body#/name", capture_id="$response.body#/id")
        for verb, operation, what in (
            ("read", "readCapture", "look at it"),
            ("stop", "stopCapture", "end it"),
            ("delete", "deleteCapture", "delete its files"),
        )
    }
    return [
        Operation(
            method="get",
            path=f"{one}/processing",
            id="readProcessing",
            tag="packets",
            summary="How the chain is doing",
            description="Stage by stage: packets in and out, the processors' own figures, and drops by reason.",
            parameters=("Name",),
            answers={200: Answer(schema=ref("Processing"), description="as the workers have it now")},
            codes=read,
        ),
        Operation(
            method="get",
            path=f"{one}/flows",
            id="listFlows",
            tag="packets",
            summary="Who talks to whom",
            description="The flows with the most bytes, and totals by protocol. Needs `inspect` in the chain.",
            parameters=("Name", _query("top", "how many", integer(minimum=1, maximum=TOP_MAX, default=TOP_DEFAULT))),
            answers={200: Answer(schema=ref("Flows"), description="the flows")},
            codes=seen,
        ),
        Operation(
            method="get",
            path=f"{one}/packets",
            id="latestPackets",
            tag="packets",
            summary="The latest packets",
            description="Decoded, the newest last. Needs `inspect` in the chain.",
            parameters=(
                "Name",
                _query("limit", "how many", integer(minimum=1, maximum=PACKETS_SHOWN_MAX, default=PACKETS_DEFAULT)),
            ),
            answers={200: Answer(schema=ref("Packets"), description="the packets")},
            codes=seen,
        ),
        Operation(
            method="get",
            path=f"{one}/tail",
            id="tailPackets",
            tag="packets",
            summary="Packets in words, as they come",
            description="Server-sent events: `packet` with a decoded packet, `left_out` with how many were not shown "
            "since the last one, `end` when nothing more comes. In the audit log, as a live capture.",
            parameters=(
                "Name",
                _query("limit", "end after so many", integer(minimum=1, maximum=TAIL_LIMIT_MAX)),
                _query(
                    "rate_pps",
                    "packets a second at most",
                    integer(minimum=1, maximum=TAIL_PPS_MAX, default=TAIL_PPS_DEFAULT),
                ),
                "Reason",
            ),
            answers={200: events},
            codes=begun,
        ),
        Operation(
            method="get",
            path=f"{one}/capture/stream",
            id="streamCapture",
            tag="packets",
            summary="Capture live",
            description="pcapng as the packets come, within 0.1 s: `curl -sN .../capture/stream | tcpdump -r - -n`. "
            "What the reader is too slow for is left out and counted. In the audit log from begin to end.",
            parameters=(
                "Name",
                _query(
                    "snaplen",
                    "octets kept of each packet",
                    integer(minimum=16, maximum=SNAPLEN_MAX, default=SNAPLEN_MAX),
                ),
                "Reason",
            ),
            answers={200: replace(octets, description="goes on until one side ends it")},
            codes=begun,
        ),
        Operation(
            method="get",
            path=f"{one}/captures",
            id="listCaptures",
            tag="packets",
            summary="Captures of an interface",
            description="Those under way, and those whose files are kept; the latest last.",
            parameters=("Name",),
            answers={200: Answer(schema=ref("CaptureList"), description="the captures")},
            codes=read,
        ),
        Operation(
            method="post",
            path=f"{one}/captures",
            id="startCapture",
            tag="packets",
            summary="Capture into files",
            description="Both directions, as tcpdump on the host would. In the audit log from begin to end.",
            parameters=("Name", "Reason"),
            body=ref("CaptureSettings"),
            body_required=False,
            answers={
                201: Answer(
                    schema=ref("Capture"),
                    description="packets are written from now on",
                    headers={"Location": "Location"},
                    links=to_capture,
                )
            },
            codes=(*begun, *_BODY, _E.CAPTURE_FAILED),
        ),
        Operation(
            method="get",
            path=capture,
            id="readCapture",
            tag="packets",
            summary="Read a capture",
            parameters=("Name", "CaptureId"),
            answers={200: Answer(schema=ref("Capture"), description="the capture", links=to_capture)},
            codes=(*read, _E.NOT_FOUND),
        ),
        Operation(
            method="post",
            path=f"{capture}/stop",
            id="stopCapture",
            tag="packets",
            summary="End a capture",
            description="Its files stay. One that is a stage of the chain ends with that.",
            parameters=("Name", "CaptureId"),
            answers={200: Answer(schema=ref("Capture"), description="it is over")},
            codes=(*read, *_BODY, _E.NOT_FOUND, _E.PART_OF_CHAIN, *told),
        ),
        Operation(
            method="delete",
            path=capture,
            id="deleteCapture",
            tag="packets",
            summary="Delete a capture",
            description="Ended first, if it is under way; then its files are deleted.",
            parameters=("Name", "CaptureId"),
            answers={200: Answer(schema=ref("CaptureDeleted"), description="it is gone")},
            codes=(*read, _E.NOT_FOUND, _E.PART_OF_CHAIN, *told),
        ),
        Operation(
            method="get",
            path=f"{capture}/files/{{number}}",
            id="readCaptureFile",
            tag="packets",
            summary="Fetch a file of a capture",
            description="As far as it is written: works while the capture goes on.",
            parameters=("Name", "CaptureId", number),
            answers={200: octets},
            codes=(*read, _E.NOT_FOUND),
        ),
        Operation(
            method="get",
            path="/api/v1/captures",
            id="listAllCaptures",
            tag="packets",
            summary="Captures of all interfaces",
            description="Also of interfaces that are no more: files stay until they are deleted. The latest last.",
            parameters=(_query("name", "of interfaces that have, or had, this name", NAME),),
            answers={200: Answer(schema=ref("CaptureList"), description="the captures")},
            codes=(_E.INVALID_FIELD,),
        ),
        Operation(
            method="get",
            path=kept,
            id="readKeptCapture",
            tag="packets",
            summary="Read a capture by its id",
            parameters=("CaptureId",),
            answers={200: Answer(schema=ref("Capture"), description="the capture")},
            codes=(_E.INVALID_FIELD, _E.NOT_FOUND),
        ),
        Operation(
            method="delete",
            path=kept,
            id="deleteKeptCapture",
            tag="packets",
            summary="Delete a capture by its id",
            description="Ended first, if it is under way; then its files are deleted.",
            parameters=("CaptureId",),
            answers={200: Answer(schema=ref("CaptureDeleted"), description="it is gone")},
            codes=(_E.INVALID_FIELD, _E.NOT_FOUND, _E.PART_OF_CHAIN, *told),
        ),
        Operation(
            method="get",
            path=f"{kept}/files/{{number}}",
            id="readKeptCaptureFile",
            tag="packets",
            summary="Fetch a file of a capture by its id",
            description="As far as it is written: works while the capture goes on.",
            parameters=("CaptureId", number),
            answers={200: octets},
            codes=(_E.INVALID_FIELD, _E.NOT_FOUND),
        ),
    ]


def _original() -> list[Operation]:
    done = Answer(schema=ref("ClassicDone"), description="done", headers=_COMMAND_ID, links=_TO_COMMAND)
    made = replace(
        done,
        links={
            **_TO_COMMAND,
            **{
                verb: _link(f"classic{verb.capitalize()}", what)
                for verb, what in (
                    ("configure", "change it"),
                    ("start", "process its packets"),
                    ("stop", "stop that"),
                    ("status", "look at it"),
                    ("delete", "remove it"),
                )
            },
        },
    )
    codes = (*_WRITE, *_KEY)
    return [
        Operation(
            method="post",
            path="/api/interface/create",
            id="classicCreate",
            tag="original",
            summary="Make the interface",
            description="Fields that are not given come from the configuration; no body at all will do.",
            parameters=_CLASSIC_HEADERS,
            body=ref("ClassicCreate"),
            body_required=False,
            answers={200: made},
            codes=(*codes, *_SPEC_CODES, _E.INTERFACE_EXISTS, _E.AWAITING_CONFIRMATION),
        ),
        Operation(
            method="get",
            path="/api/interface/status",
            id="classicStatus",
            tag="original",
            summary="The interface as it is",
            answers={200: Answer(schema=ref("ClassicStatus"), description="the interface, or that there is none")},
            codes=_HOST_READ,
        ),
        Operation(
            method="post",
            path="/api/interface/configure",
            id="classicConfigure",
            tag="original",
            summary="Change address, netmask or MTU",
            description="In place, without bouncing the interface.",
            parameters=_CLASSIC_HEADERS,
            body=ref("ClassicConfigure"),
            body_required=False,
            answers={200: done},
            codes=(*codes, *_SPEC_CODES, _E.NO_INTERFACE, _E.AWAITING_CONFIRMATION),
        ),
        *(
            Operation(
                method="post",
                path=f"/api/interface/{verb}",
                id=f"classic{verb.capitalize()}",
                tag="original",
                summary=summary,
                parameters=_CLASSIC_HEADERS,
                answers={200: done},
                codes=(*codes, *_BODY, _E.NO_INTERFACE, refused, _E.AWAITING_CONFIRMATION),
            )
            for verb, summary, refused in (
                ("start", "Start packet processing", _E.ALREADY_RUNNING),
                ("stop", "Stop packet processing", _E.NOT_RUNNING),
            )
        ),
        Operation(
            method="delete",
            path="/api/interface/delete",
            id="classicDelete",
            tag="original",
            summary="Remove the interface",
            parameters=_CLASSIC_HEADERS,
            answers={200: done},
            codes=(*codes, _E.NO_INTERFACE, _E.AWAITING_CONFIRMATION),
        ),
    ]


# -- the document


def document(examples: Examples) -> dict[str, Any]:
    """The whole document. Pure: the same examples give the same document."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in _operations():
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, examples.get(operation.id, ()))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tunledger",
            "version": __version__,
            "summary": "TUN/TAP interfaces on Linux, with every command in an event log first",
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "where this document came from"}],
        "tags": [{"name": name, "description": about} for name, about in TAGS.items()],
        "paths": paths,
        "components": {"schemas": SCHEMAS, "parameters": PARAMETERS, "headers": HEADERS},
    }


def _operation(operation: Operation, examples: Sequence[Example]) -> dict[str, Any]:
    found: dict[str, Any] = {"operationId": operation.id, "tags": [operation.tag], "summary": operation.summary}
    if operation.description:
        found["description"] = operation.description
    if operation.parameters:
        found["parameters"] = [
            {"$ref": f"#/components/parameters/{each}"} if isinstance(each, str) else each
            for each in operation.parameters
        ]
    if operation.body is not None:
        sent: list[Example] = []
        for example in examples:
            repeated = any(example.get("body") == other["body"] for other in sent)
            if "body" in example and example["status"] < 400 and not repeated:
                sent.append(example)
        content = {"schema": operation.body, **_named(sent, "body")}
        found["requestBody"] = {
            "required": operation.body_required,
            "content": dict.fromkeys(operation.body_types, content),
        }
    found["responses"] = {str(status): response for status, response in sorted(_responses(operation, examples).items())}
    return found


def _responses(operation: Operation, examples: Sequence[Example]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for status, answer in operation.answers.items():
        response: dict[str, Any] = {"description": answer.description}
        if answer.headers:
            response["headers"] = {
                name: {"$ref": f"#/components/headers/{component}"} for name, component in answer.headers.items()
            }
        if answer.schema is not None:
            shown = _named([each for each in examples if each["status"] == status], "answer")
            response["content"] = {
                answer.media_type: {"schema": answer.schema, **shown},
                **{media_type: {"schema": schema} for media_type, schema in answer.also.items()},
            }
        if answer.links:
            response["links"] = dict(answer.links)
        found[status] = response
    for status, codes in _by_status(operation).items():
        failed = _failure(operation, status, codes, [each for each in examples if each["status"] == status])
        if status in found:  # /health has a 503 of its own, and a mistake of ours looks like any other error
            continue
        found[status] = failed
    return found


def _by_status(operation: Operation) -> dict[int, list[ErrorCode]]:
    found: dict[int, list[ErrorCode]] = {}
    v1 = operation.path.startswith("/api/v1/")
    for code in dict.fromkeys((*operation.codes, *_GATE)):
        found.setdefault(int(status_v1(code) if v1 else STATUS[code]), []).append(code)
    return found


def _failure(
    operation: Operation, status: int, codes: Sequence[ErrorCode], examples: Sequence[Example]
) -> dict[str, Any]:
    v1 = operation.path.startswith("/api/v1/")
    response: dict[str, Any] = {
        "description": ", ".join(f"`{code.value}`" for code in codes),
        "content": {
            PROBLEM_TYPE if v1 else "application/json": {
                "schema": ref("Problem" if v1 else "ErrorText"),
                **_named(examples, "answer"),
            }
        },
    }
    if status == STATUS[_E.OVERLOADED]:
        response["headers"] = {"Retry-After": {"$ref": "#/components/headers/RetryAfter"}}
    return response


def _named(examples: Iterable[Example], part: str) -> dict[str, Any]:
    """Examples under names, the way a media type has them; nothing if there are none."""
    found = {_slug(example["summary"]): {"summary": example["summary"], "value": example[part]} for example in examples}
    return {"examples": found} if found else {}


def _slug(summary: str) -> str:
    return "-".join("".join(char if char.isalnum() else " " for char in summary.lower()).split())
