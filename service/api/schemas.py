"""The schemas of the OpenAPI document: what goes over the wire, with the bounds that the code enforces.

Written by hand next to the constants it quotes, because the wire is a promise: it must not change by itself when a
class does. Tests hold real answers against it. Operations and parameters are `service.api.openapi`'s.

String formats of our own say what a pattern cannot: `interface-address`, `ip-host`, `netmask`, `user-name`,
`group-name`, `cursor`, `etags`.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final, get_args

from service.api import bodies
from service.api.captures import BYTES_MAX, BYTES_MIN, PACKETS_MAX, SECONDS_MAX
from service.api.interfaces import POSITION_MAX, STATES
from service.domain import chain as chains
from service.domain import events as ev
from service.domain import spec as specs
from service.domain import steps as st
from service.domain import values
from service.domain.errors import ErrorCode
from service.domain.observed import LinkCounters
from service.domain.spec import InterfaceSpec

Schema = dict[str, Any]

EVENTS: Final = tuple(kind.__name__ for kind in get_args(ev.Event))
INTENTS: Final = tuple(kind.__name__ for kind in get_args(ev.Intent))
STEPS: Final = tuple(kind.__name__ for kind in get_args(st.Step))


def ref(name: str) -> Schema:
    """A reference to one of `SCHEMAS`."""
    return {"$ref": f"#/components/schemas/{name}"}


def text(description: str = "", **more: Any) -> Schema:
    """A string."""
    return {"type": "string", **({"description": description} if description else {}), **more}


def integer(description: str = "", **more: Any) -> Schema:
    """A whole number."""
    return {"type": "integer", **({"description": description} if description else {}), **more}


def flag(description: str, **more: Any) -> Schema:
    """True or false."""
    return {"type": "boolean", "description": description, **more}


def listed(items: Schema, description: str = "", **more: Any) -> Schema:
    """A list."""
    return {"type": "array", "items": items, **({"description": description} if description else {}), **more}


def nullable(schema: Schema) -> Schema:
    """The same, or null."""
    if "$ref" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    if isinstance(schema["type"], list):
        return schema
    found = {**schema, "type": [schema["type"], "null"]}
    if "enum" in found:
        found["enum"] = [*found["enum"], None]
    return found


def record(
    properties: Mapping[str, Schema], *, optional: tuple[str, ...] = (), description: str = "", **more: Any
) -> Schema:
    """An object; every member is always there, but for `optional` ones."""
    return {
        "type": "object",
        **({"description": description} if description else {}),
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
        **more,
    }


def taken(properties: Mapping[str, Schema], *, required: tuple[str, ...] = (), description: str, **more: Any) -> Schema:
    """A body: what is not named is refused."""
    return {
        "type": "object",
        "description": description,
        "properties": dict(properties),
        **({"required": list(required)} if required else {}),
        "additionalProperties": False,
        **more,
    }


STAMP: Final = text("UTC with microseconds", format="date-time", examples=["2026-03-01T09:30:00.000000Z"])
ID: Final = text("a UUIDv7", format="uuid")
ANYTHING: Final[Schema] = {}  # any JSON value
REASON: Final = text("the caller's own words, from the header Tunledger-Reason; empty without")
NAME: Final = text(
    "as `ip link` shows it: printable ASCII without blanks, '/', ':' and '%'",
    pattern="^[!-$&-.0-9;-~]+$",
    minLength=1,
    maxLength=values.NAME_BYTES_MAX,
    **{"not": {"enum": [".", "..", "all", "default"]}},
)
ADDRESS: Final = text(
    "an IPv4 or IPv6 host address with its prefix length; not a network's own address, nor its broadcast",
    format="interface-address",
    examples=["10.0.0.1/24", "2001:db8::1/64"],
)
MTU: Final = integer("bytes", minimum=values.MTU_MIN, maximum=values.MTU_MAX)
_PRINTABLE = r"^[ -~\u00a1-\u00ac\u00ae-\u02ff]*$"  # in short: the code takes every printable character

_PROCESSOR_NAME: Final = "^[a-z][a-z0-9_-]{0,62}$"
_OPTION_NAME: Final = "^[a-z][a-z0-9_]{0,62}$"
_NETWORK: Final = text("a network such as `10.0.0.0/8`, without host bits", format="ip-network")
_PORTS: Final[Schema] = {
    "description": "a port, or a range such as `1024-65535`",
    "anyOf": [integer(minimum=0, maximum=65535), text(format="port-range")],
}
_PROTOCOL: Final[Schema] = {
    "description": "by name or number (IANA)",
    "anyOf": [text(enum=list(chains.PROTOCOLS)), integer(minimum=0, maximum=255)],
}


def _or_nothing(schema: Schema) -> Schema:
    """The same or null, which is what it is by default."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}], "default": None}
    return {**nullable(schema), "default": None}


_RULE: Final = taken(
    {
        "action": text(enum=["pass", "drop"]),
        "direction": text(enum=list(chains.DIRECTIONS), default="both"),
        "network": _or_nothing({**_NETWORK, "description": "either end is in it"}),
        "source": _or_nothing(_NETWORK),
        "destination": _or_nothing(_NETWORK),
        "protocol": _or_nothing(_PROTOCOL),
        "port": _or_nothing({**_PORTS, "description": "either end's: a port, or a range such as `1024-65535`"}),
        "source_port": _or_nothing(_PORTS),
        "destination_port": _or_nothing(_PORTS),
        "rate_pps": _or_nothing(
            integer("it matches only what is beyond so many packets a second", minimum=1, maximum=10_000_000)
        ),
    },
    required=("action",),
    description="matches where all that it names does; the first that matches decides",
)

CAPTURE_OPTIONS: Final[Mapping[str, Schema]] = {
    "snaplen": integer(
        "octets kept of each packet", minimum=16, maximum=chains.SNAPLEN_MAX, default=chains.SNAPLEN_MAX
    ),
    "size_bytes": {
        **_or_nothing(integer("after so many octets the next file is begun", minimum=4096, maximum=1 << 40)),
        "default": 64 << 20,
    },
    "interval_s": _or_nothing(
        integer("after so many seconds the next file is begun", minimum=1, maximum=366 * 24 * 3600)
    ),
    "files": integer("so many are kept, the latest", minimum=1, maximum=chains.CAPTURE_FILES_MAX, default=4),
}
# Many files need something to begin a new one at (service.domain.chain).
_FILES_NEED: Final[Schema] = {
    "if": {"properties": {"size_bytes": {"type": "null"}}, "required": ["size_bytes"]},
    "then": {
        "anyOf": [
            {"properties": {"files": {"const": 1}}, "required": ["files"]},
            {"properties": {"interval_s": {"type": "integer"}}, "required": ["interval_s"]},
        ]
    },
}

_PROCESSORS: Final[Mapping[str, tuple[str, Mapping[str, Schema], tuple[str, ...]]]] = {
    "inspect": (
        "counts by protocol, and keeps flows and the latest packets",
        {
            "flows": integer("kept at once; the oldest go", minimum=16, maximum=chains.FLOWS_MAX, default=4096),
            "packets": integer("kept, the latest", minimum=0, maximum=chains.PACKETS_KEPT_MAX, default=64),
        },
        (),
    ),
    "filter": (
        "passes or drops",
        {
            "rules": listed(_RULE, "in order", maxItems=chains.RULES_MAX, default=[]),
            "default": text("where no rule matches", enum=["pass", "drop"], default="pass"),
        },
        (),
    ),
    "capture": ("writes packets into files, as pcapng", CAPTURE_OPTIONS, ()),
    "reply": (
        "answers for every address of its networks",
        {
            "networks": listed(_NETWORK, minItems=1, maxItems=chains.NETWORKS_MAX),
            "answers": listed(
                text(enum=list(chains.ANSWERS)),
                "what it answers",
                minItems=1,
                maxItems=len(chains.ANSWERS),
                default=list(chains.ANSWERS),
            ),
            "mac": _or_nothing(
                text(
                    "the hardware address it answers with, of a tap",
                    pattern="^[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}$",
                    **{"not": {"const": "00:00:00:00:00:00"}},
                )
            ),
        },
        ("networks",),
    ),
    "forward": ("sends to another interface of ours", {"to": NAME}, ("to",)),
    "balance": (
        "spreads flows over interfaces of ours",
        {
            "to": listed(
                taken(
                    {"to": NAME, "weight": integer(minimum=1, maximum=chains.WEIGHT_MAX, default=1)},
                    required=("to",),
                    description="an interface and its share",
                ),
                "each interface once",
                minItems=1,
                maxItems=chains.TARGETS_MAX,
            ),
            "symmetric": flag("both directions of a flow go the same way", default=True),
        },
        ("to",),
    ),
}
assert tuple(_PROCESSORS) == tuple(chains.BUILT_IN)

_ON_CRASH: Final = text(
    "what becomes of the stage after a crash: it is started again, or left out",
    enum=list(chains.ON_CRASH),
    default=chains.ON_CRASH[0],
)


def _stage(processor: str, about: str, options: Mapping[str, Schema], required: tuple[str, ...]) -> Schema:
    more = {"allOf": [_FILES_NEED]} if processor == "capture" else {}
    return taken(
        {"processor": {"const": processor}, "on_crash": _ON_CRASH, **options},
        required=("processor", *required),
        description=about,
        **more,
    )


def _option(depth: int) -> Schema:
    """A value among the options of a processor that is not ours, with so many levels in it."""
    scalars: list[Schema] = [
        {"type": ["null", "boolean", "string"]},
        {"type": "integer", "minimum": -chains.INTEGER_MAX, "maximum": chains.INTEGER_MAX},
    ]
    inner: Schema = ref(f"ProcessorOption{depth - 1}") if depth > 1 else {"not": {}}
    return {
        "description": "whole numbers, strings, true, false, null, lists and objects",
        "anyOf": [
            *scalars,
            {"type": "array", "items": inner},
            {"type": "object", "propertyNames": {"pattern": _OPTION_NAME}, "additionalProperties": inner},
        ],
    }


STAGES: Final[dict[str, Schema]] = {
    **{f"Stage{name.capitalize()}": _stage(name, *parts) for name, parts in _PROCESSORS.items()},
    "StageCustom": {
        "type": "object",
        "description": "a processor of an installed package (entry point `tunledger.processors`), which judges its "
        f"options by itself; at most {chains.OPTIONS_CHARS_MAX} characters of them",
        "properties": {
            "processor": {**text(pattern=_PROCESSOR_NAME), "not": {"enum": list(chains.BUILT_IN)}},
            "on_crash": _ON_CRASH,
        },
        "required": ["processor"],
        "propertyNames": {"pattern": _OPTION_NAME},
        "additionalProperties": ref(f"ProcessorOption{chains.OPTIONS_DEPTH_MAX - 1}"),
    },
    **{f"ProcessorOption{depth}": _option(depth) for depth in range(1, chains.OPTIONS_DEPTH_MAX)},
}
STAGE: Final[Schema] = {
    "description": "what is done with packets; by `processor`",
    "oneOf": [ref(f"Stage{name.capitalize()}") for name in (*_PROCESSORS, "custom")],
}

_SPEC: Final[Mapping[str, Schema]] = {
    "name": NAME,
    "mode": text("`tun` carries IP packets, `tap` Ethernet frames", enum=["tun", "tap"], default="tun"),
    "addresses": listed(
        ADDRESS, "the first is the primary one", maxItems=specs.ADDRESSES_MAX, uniqueItems=True, default=[]
    ),
    "mtu": {**MTU, "default": 1500},
    "up": flag("the admin state", default=True),
    "txqueuelen": integer(
        "packets the kernel queues before it drops",
        minimum=0,
        maximum=values.TXQUEUELEN_MAX,
        default=specs.TXQUEUELEN_DEFAULT,
    ),
    "owner": nullable(integer("the uid that may open the device besides root", minimum=0, maximum=specs.UID_MAX)),
    "group": nullable(integer("the gid that may open the device besides root", minimum=0, maximum=specs.UID_MAX)),
    "multi_queue": flag("several descriptors at once", default=False),
    "mac": nullable(
        text(
            "the hardware address of a tap; null for the kernel's choice",
            pattern="^[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}$",
            **{"not": {"const": "00:00:00:00:00:00"}},
        )
    ),
    "netns": nullable(
        text(
            "the network namespace it lives in, by its name under /run/netns; null for the service's own",
            pattern=rf"^[A-Za-z0-9_.+@-]{{1,{values.NETNS_CHARS_MAX}}}$",
            **{"not": {"enum": [".", ".."]}},
        )
    ),
    "processing": taken(
        {
            "running": flag("whether our workers read the device", default=False),
            "chain": listed(STAGE, "what is done with its packets, in order", maxItems=chains.STAGES_MAX, default=[]),
            "offloads": text(
                "`auto` takes what the kernel has (segments of up to 64 KiB), `off` keeps packets as on a wire",
                enum=["auto", "off"],
                default="auto",
            ),
        },
        description="packet processing",
    ),
    "drift": {
        "type": "string",
        "enum": ["repair", "report"],
        "description": "what is done when others change the interface: put it right again, or only tell of it",
        "default": "repair",
    },
    "description": text("a line for people", maxLength=values.DESCRIPTION_CHARS_MAX, pattern=_PRINTABLE, default=""),
    "labels": {
        "type": "object",
        "description": "for people and their tools",
        "maxProperties": values.LABELS_MAX,
        "propertyNames": {"pattern": "^[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?$"},
        "additionalProperties": text(maxLength=63, pattern=_PRINTABLE),
        "default": {},
    },
}
assert tuple(_SPEC) == InterfaceSpec.__struct_fields__


def _account(field: str, kind: str) -> Schema:
    """Owner and group are taken by name, too."""
    by_number = {key: value for key, value in _SPEC[field].items() if key != "type"}
    description = by_number.pop("description")
    return {
        "description": f"{description}, or the {kind}'s name",
        "anyOf": [{"type": "integer", **by_number}, text(format=f"{kind}-name"), {"type": "null"}],
    }


_WRITTEN: Final[Mapping[str, Schema]] = {
    **_SPEC,
    "owner": _account("owner", "user"),
    "group": _account("group", "group"),
}


def _or_null(schema: Schema) -> Schema:
    return schema if "anyOf" in schema else nullable(schema)


# The rules between fields (service.domain.spec.check), as far as JSON Schema can say them.
_TOGETHER: Final = [
    {
        "if": {
            "properties": {"addresses": {"type": "array", "contains": {"type": "string", "pattern": ":"}}},
            "required": ["addresses"],
        },
        "then": {"properties": {"mtu": {"minimum": values.IPV6_MTU_MIN}}},
    },
    {
        "if": {"properties": {"mode": {"const": "tap"}}, "required": ["mode"]},
        "then": {"properties": {"mtu": {"maximum": values.TAP_MTU_MAX}}},
        "else": {"properties": {"mac": {"type": "null"}}},
    },
]

COUNTERS: Final = record(
    {
        "kernel": {
            **record({name: integer(minimum=0) for name in sorted(LinkCounters.__slots__)}),
            "description": "rx and tx as the kernel counts them: its tx is what a reader of the device gets",
        },
        "worker": {
            "type": "object",
            "description": "by direction and packet class, such as `from_kernel.ipv4.tcp.packets`",
            "additionalProperties": integer(minimum=0),
        },
    },
    description="lifetime totals, as of the last sample; they never go down. `kernel` is empty before the first one",
)
COUNTERS["properties"]["kernel"].pop("required")

_OBSERVED: Final = record(
    {
        "name": text("as it is now, if somebody renamed it"),
        "mode": nullable(text(enum=["tun", "tap"])),
        "addresses": listed(text()),
        "mtu": integer(),
        "up": flag("the admin state"),
        "txqueuelen": integer(),
        "owner": nullable(integer()),
        "group": nullable(integer()),
        "multi_queue": flag("several descriptors at once"),
        "mac": nullable(text()),
        "netns": nullable(text("the network namespace it is in; null for the service's own")),
        "processing": record(
            {
                "running": flag("whether a worker reads it"),
                "chain": listed(STAGE, "what that worker was told to do"),
                "offloads": nullable(text("as that worker was told; null without one", enum=["auto", "off"])),
            }
        ),
    },
    description="what the kernel says; null while there is no link",
)

_STATUS: Final = record(
    {
        "state": text(
            "`pending`: a command is under way; `applied`: host and log agree; `degraded`: they do not, and `reason` "
            "says why",
            enum=list(STATES),
        ),
        "reason": nullable(text("why it is degraded")),
        "since": nullable({**STAMP, "description": "since when it is degraded, if a repair failed"}),
        "attempts": integer("repairs that failed", minimum=0),
        "retry_in_s": nullable({"type": "number", "description": "seconds until the next repair", "minimum": 0}),
        "command_id": nullable({**ID, "description": "the command under way"}),
        "generation": integer("what the command under way will make it", minimum=0),
        "observed_generation": integer("what host and log agreed on last", minimum=0),
        "awaiting_confirmation": nullable(
            record(
                {"command_id": ID, "confirm_by": STAMP},
                optional=("command_id",),
                description="a change that is taken back unless it is confirmed in time",
            )
        ),
        "declared_at": STAMP,
        "ifindex": nullable(integer(minimum=1)),
        "operstate": nullable(text("RFC 2863, as `ip link` shows it")),
        "carrier": nullable(flag("whether somebody holds the device open")),
        "observed": nullable(_OBSERVED),
        "counters": {"anyOf": [ref("Counters"), {"type": "object", "maxProperties": 0}]},
        "notes": listed(
            text(),
            "what to know of the spec though it stands, as that its chain names an undeclared interface",
        ),
    },
    optional=("notes",),
)

_CHANGE: Final = record(
    {"path": text("dotted; empty for the interface as a whole"), "old": ANYTHING, "new": ANYTHING},
    description="null stands for absent",
)
_DIFFERENCE: Final = record({"path": text("dotted"), "desired": ANYTHING, "observed": ANYTHING})
_STEP: Final = record(
    {"step": text(enum=list(STEPS)), "ip": text("the `ip` command it stands for")},
    description="a step of a plan; its parts are further members",
    additionalProperties=True,
)
_PLAN: Final = record(
    {
        "name": NAME,
        "differences": listed(ref("Difference")),
        "commands": listed(text(), "the steps as lines to read"),
        "steps": listed(ref("Step")),
        "reason": nullable(text("why there are no steps, if nothing can be done")),
    },
    description="what differs on one interface, and what would be done",
)

_OUTCOME: Final[Mapping[str, Schema]] = {
    "outcome": text(enum=["pending", "applied", "failed"]),
    "took_us": nullable(integer("microseconds from the intent's recording", minimum=0)),
    "by": nullable(text("who brought it to its outcome", enum=["command", "recovery"])),
    "finished_at": STAMP,
    "message": nullable(text("why it failed")),
    "code": nullable(ref("ErrorCode")),
    "errno": nullable(text("the kernel's name for its refusal", examples=["EBUSY"])),
    "steps": listed(text(), "what was done"),
    "undone": flag("whether all of it was taken back"),
}
_OUTCOME_OPTIONAL: Final = ("finished_at", "steps", "undone")

_COMMAND: Final = record(
    {
        "command_id": ID,
        "state": text(enum=["pending", "applied", "failed", "rejected"]),
        "recorded_at": STAMP,
        "actor": text("who ordered it", examples=["uid:0"]),
        "user": text("their name at that time"),
        "reason": REASON,
        "confirm_by": nullable({**STAMP, "description": "until when it had to be confirmed"}),
        "confirms": nullable({**ID, "description": "the command whose change it confirmed"}),
        "message": nullable(text("why it was rejected")),
        "code": nullable(ref("ErrorCode")),
        "interfaces": listed(
            record(
                {
                    "interface_id": ID,
                    "name": NAME,
                    "intent": text(enum=list(INTENTS)),
                    "changes": listed(ref("Change")),
                    **_OUTCOME,
                },
                optional=_OUTCOME_OPTIONAL,
            )
        ),
    },
    description="what became of a command",
)

_HISTORY_ENTRY: Final = record(
    {
        "position": integer("in the log", minimum=1, maximum=POSITION_MAX),
        "recorded_at": STAMP,
        "actor": text("who: `uid:0`, or `system` for what the service does by itself"),
        "user": text("their name at that time"),
        "command_id": nullable(ID),
        "event": text(enum=list(EVENTS)),
        "name": nullable(text("the interface's")),
        "interface_id": nullable(ID),
        "what": text("in a few words"),
        "origin": nullable(text(enum=["client", "repair", "recovery"])),
        "outcome": nullable(text(enum=["pending", "applied", "failed", "rejected", "repaired", "contested"])),
        "message": nullable(text("the kernel's words, or why it was rejected")),
        "took_us": nullable(integer("microseconds", minimum=0)),
        "changes": listed(ref("Change")),
        "reason": REASON,
        "peer": text("from where", examples=["127.0.0.1:40112"]),
        "via": text("the API it came by", enum=["classic", "v1", "system"]),
        "by": nullable(text(enum=["command", "recovery"])),
        "finished_at": STAMP,
        "code": nullable(ref("ErrorCode")),
        "errno": nullable(text("the kernel's name for its refusal")),
        "steps": listed(text(), "what was done"),
        "undone": flag("whether all of a failed command was taken back"),
    },
    optional=("peer", "via", "by", "finished_at", "code", "errno", "steps", "undone"),
    description="a change with its outcome, or an observation",
)

_NAMED: Final = taken({"name": NAME}, required=("name",), description="the interface")
_SUMMARY: Final = {
    name: listed(text(), what)
    for name, what in (
        ("recreated", "were gone, and made again"),
        ("repaired", "differed, and were mended"),
        ("adopted", "were as desired"),
        ("orphans_removed", "carried our mark, and nothing declares them"),
        ("finished", "had a command left without an outcome"),
        ("processing_resumed", "are read again"),
        ("failed", "could not be mended; tried again later"),
    )
}

_PROBLEM: Final = record(
    {
        "type": text("`urn:tunledger:error:` and the code", format="uri"),
        "title": text("the code in words"),
        "status": integer(minimum=400, maximum=599),
        "detail": text("what was found and what would do"),
        "code": ref("ErrorCode"),
        "retry": flag("whether the same request may succeed later without the caller changing anything"),
        "pointer": text("JSON pointer (RFC 6901) of the offending field; or the parameter's or header's name"),
        "errno": text("the kernel's name for its refusal", examples=["EBUSY"]),
        "command_id": {**ID, "description": "with an Idempotency-Key: the command that was refused or failed"},
    },
    optional=("pointer", "errno", "command_id"),
    description="problem details (RFC 9457)",
)


def _classic_body(description: str, extra: Mapping[str, Schema]) -> Schema:
    return taken(
        {
            **extra,
            "address": nullable(text("an IPv4 or IPv6 host address", format="ip-host")),
            "netmask": nullable(text('"255.255.255.0" or "24"; "64" or "ffff:ffff:ffff:ffff::"', format="netmask")),
            "mtu": nullable(MTU),
            "allow_overlap": nullable(flag("let the subnet cover one that the host uses already", default=False)),
        },
        description=f"{description}. A null is a field that is not given. An IPv6 address needs a netmask with it, and "
        f"an mtu of at least {values.IPV6_MTU_MIN}",
    )


_CLASSIC_STATUS: Final = record(
    {
        "name": NAME,
        "address": nullable(text("the primary address, without its prefix length")),
        "netmask": nullable(text("dotted for IPv4, a prefix length for IPv6")),
        "mtu": integer(),
        "up": flag("the admin state"),
        "active": flag("whether host and log agree"),
        "running": flag("whether packets are processed"),
        "index": integer("the ifindex; 0 while there is no link", minimum=0),
        "flags": text("as Go's net.Flags prints them", examples=["up|pointtopoint|multicast"]),
        "hardware_addr": text("empty for a tun"),
        **{name: integer(minimum=0) for name in LinkCounters.__slots__},
        "mode": text(enum=["tun", "tap"]),
        "operstate": text(),
        "id": ID,
        "state": text(enum=list(STATES)),
        "reason": text("why it is degraded; empty if it is not"),
    }
)

_PLACE: Final[Mapping[str, Schema]] = {
    "position": integer(minimum=0, maximum=POSITION_MAX),
    "hash": nullable(text("of the event there; null before the first one")),
    "recorded_at": nullable({**STAMP, "description": "when the event there was recorded"}),
}

_DESIRED: Final = record(
    {
        "id": ID,
        "generation": integer(minimum=0),
        "spec": nullable(ref("SpecRead")),
        "pending": nullable({**ID, "description": "the command that was under way"}),
        "status": record(
            {
                "state": text("`unknown` where the log cannot be read", enum=[*STATES, "unknown"]),
                "reason": nullable(text("why it was degraded")),
                "since": nullable(STAMP),
                "awaiting_confirmation": nullable(record({"command_id": ID, "confirm_by": STAMP})),
            },
            description="as far as the log tells",
        ),
    }
)

_EVENT: Final = record(
    {
        "position": integer("without gaps", minimum=1, maximum=POSITION_MAX),
        "event_id": ID,
        "stream": text("`interface/ID`, `name/NAME` or `node/NODE`"),
        "version": integer("in its stream", minimum=1),
        "type": text(enum=list(EVENTS)),
        "schema_version": integer("of the payload", minimum=1),
        "actor": text("who ordered it, or `system`"),
        "command_id": nullable(ID),
        "node": text("whose log it is in"),
        "recorded_at": STAMP,
        "hash": text("covers the event and the hash before it", pattern="^[0-9a-f]{64}$"),
        "payload": {"type": "object", "description": "by type: docs/log.md has them all", "additionalProperties": True},
    }
)

_TOTALS: Final = record(
    {name: {"type": "object", "additionalProperties": integer(minimum=0)} for name in ("kernel", "worker")},
    description="lifetime totals; they never go down. The worker's are by direction, and by direction and class",
)
_RATES: Final = record(
    {name: {"type": "object", "additionalProperties": {"type": "number"}} for name in ("kernel", "worker")},
    description="packets or bytes a second; the worker's by direction",
)
_SECONDS: Final[Schema] = {"type": "number", "minimum": 0}

CAPTURE_SETTINGS: Final[Mapping[str, Schema]] = {
    **CAPTURE_OPTIONS,
    "max_packets": _or_nothing(integer("it ends after so many", minimum=1, maximum=PACKETS_MAX)),
    "max_bytes": _or_nothing(integer("it ends after so many octets written", minimum=BYTES_MIN, maximum=BYTES_MAX)),
    "max_seconds": _or_nothing(integer("it ends after so long", minimum=1, maximum=SECONDS_MAX)),
}

_CAPTURE: Final = record(
    {
        "id": ID,
        "name": text("the interface's"),
        "state": text(enum=["running", "stopped"]),
        "reason": nullable(
            text(
                "why it is over",
                enum=[
                    *("asked", "finished", "interface_gone", "worker_exit", "disk_full", "write_failed"),
                    *("moved", "refused", "shutdown", "crash", "client_gone"),
                ],
            )
        ),
        "stage": nullable(integer("its place in the interface's chain, if it is a part of that", minimum=0)),
        "started_at": STAMP,
        "stopped_at": nullable(STAMP),
        "settings": record(CAPTURE_SETTINGS),
        "packets": integer("written", minimum=0),
        "bytes": integer("written, in all files", minimum=0),
        "dropped": integer("packets that could not be written", minimum=0),
        "files": listed(
            record({"number": integer("counts from 0", minimum=0), "size_bytes": integer(minimum=0)}),
            "those that are kept",
        ),
    },
    description="a capture, under way or over",
)

_FLOW_END: Final = record({"address": text(), "port": nullable(integer(minimum=0, maximum=65535))})
_AMOUNT: Final = record({"packets": integer(minimum=0), "bytes": integer(minimum=0)})
_FLOW: Final = record(
    {
        "protocol": text(examples=["tcp", "udp", "icmp"]),
        "first": {
            **_FLOW_END,
            "description": "of two ports the one with the higher: the client, most likely; of the same ports, or where "
            "there are none, the lower address, unless only the other sends. It does not say who began",
        },
        "second": _FLOW_END,
        "sent": {**_AMOUNT, "description": "by the first"},
        "returned": {**_AMOUNT, "description": "by the second"},
        "first_seen": STAMP,
        "last_seen": STAMP,
        "tcp_flags": nullable(text("all that were seen, as tcpdump writes them", examples=["FSP."])),
    }
)
_PACKET: Final = record(
    {
        "at": {**STAMP, "description": "when a worker read it"},
        "direction": text("as the host sees it: `out` is what it sends", enum=["in", "out"]),
        "length": integer("octets", minimum=0),
        "class": text("as counters have it", examples=["ipv4.tcp"]),
        "line": text("in words, as `tcpdump -n` has it, without the Ethernet header"),
        "source": nullable(text("the IP address")),
        "destination": nullable(text("the IP address")),
        "source_port": nullable(integer(minimum=0, maximum=65535)),
        "destination_port": nullable(integer(minimum=0, maximum=65535)),
        "ethernet": nullable(
            record(
                {"source": text(), "destination": text(), "type": text(examples=["0x0800"]), "vlans": listed(integer())}
            )
        ),
    },
    description="a packet, decoded",
)
_PROCESSING: Final = record(
    {
        "name": NAME,
        "running": flag("whether a worker reads the device"),
        "reason": nullable(text("why none does although one should; null if one does, or none should")),
        "chain": listed(STAGE, "what the worker was told to do"),
        "offloads": record(
            {
                "setting": nullable(text("`null` while no worker reads the device", enum=["auto", "off"])),
                "active": flag("whether packets come with a virtio_net_hdr, which offloads need"),
            }
        ),
        "stages": listed(
            record(
                {
                    "processor": text(),
                    "bypassed": flag("left out after a crash"),
                    "packets_in": integer(minimum=0),
                    "packets_out": integer("those that went on to the next stage", minimum=0),
                    "figures": {
                        "type": "object",
                        "description": "the processor's own",
                        "additionalProperties": integer(minimum=0),
                    },
                }
            ),
            "in the order of the chain; both directions together",
        ),
        "drops": {
            "type": "object",
            "description": "packets dropped since a worker has the device, by reason",
            "additionalProperties": integer(minimum=0),
        },
    },
    description="how an interface's chain is doing",
)

SCHEMAS: Final[dict[str, Schema]] = {
    **STAGES,
    "CaptureSettings": taken(
        CAPTURE_SETTINGS,
        description="what to capture, and how much; what is not given has its default. A null is none, or no limit",
        allOf=[_FILES_NEED],
    ),
    "Capture": _CAPTURE,
    "CaptureList": record({"captures": listed(ref("Capture"), "the latest last")}),
    "CaptureDeleted": record({"id": ID, "deleted": {"const": True}}),
    "Flow": _FLOW,
    "Flows": record(
        {
            "name": NAME,
            "flows": listed(ref("Flow"), "those with the most bytes"),
            "known": integer("how many the table has", minimum=0),
            "protocols": {"type": "object", "description": "all there was, by class", "additionalProperties": _AMOUNT},
        }
    ),
    "PacketLine": _PACKET,
    "Packets": record({"name": NAME, "packets": listed(ref("PacketLine"), "the newest last")}),
    "Processing": _PROCESSING,
    "InterfaceSpec": taken(
        {name: schema if name == "name" else _or_null(schema) for name, schema in _WRITTEN.items()},
        required=("name",),
        description="what is desired of an interface; fields that are not given take their defaults. "
        "At the top a null is a field that is not given",
        allOf=_TOGETHER,
    ),
    "InterfaceReplacement": taken(
        {name: _or_null(schema) for name, schema in _WRITTEN.items()},
        description="a whole spec; the name is the path's, and may be repeated",
        allOf=_TOGETHER,
    ),
    "InterfacePatch": taken(
        {
            **{name: _or_null(schema) for name, schema in _WRITTEN.items() if name != "name"},
            "processing": nullable(
                {
                    **_SPEC["processing"],
                    "properties": {
                        name: nullable(schema) for name, schema in _SPEC["processing"]["properties"].items()
                    },
                }
            ),
            "labels": nullable(
                {**_SPEC["labels"], "additionalProperties": nullable(_SPEC["labels"]["additionalProperties"])}
            ),
        },
        description="a JSON merge patch (RFC 7396) on the spec: what is given changes, null goes back to the default. "
        "The name may be repeated, but never changes",
    ),
    "SpecRead": record(_SPEC, description="the spec as it is read: every field, owner and group as numbers"),
    "Interface": record(
        {
            "id": {**ID, "description": "of this incarnation; a name may have many, one after the other"},
            "spec": ref("SpecRead"),
            "status": ref("InterfaceStatus"),
            "generation": integer("grows by one with every applied change", minimum=0),
        },
        description="what is desired of an interface, and what is known of it",
    ),
    "InterfaceStatus": _STATUS,
    "InterfaceList": record(
        {
            "interfaces": listed(ref("Interface"), "in the order of their names"),
            "next": nullable(text("the cursor of the next page; null on the last one")),
        }
    ),
    "Deleted": record({"command_id": ID, "id": ID, "name": NAME, "deleted": {"const": True}}, optional=("command_id",)),
    "Accepted": record(
        {"command_id": ID, "state": {"const": "pending"}, "location": text("where to ask", format="uri-reference")},
        description="the command is in the log; its outcome follows",
    ),
    "Preview": record(
        {
            "dry_run": {"const": True},
            "plan": listed(ref("Plan")),
            "events": listed(ref("EventPreview"), "what would be written to the log"),
        },
        description="the answer to a dry run: nothing of it has happened",
    ),
    "EventPreview": record(
        {
            "type": text("as the log names it"),
            "schema_version": integer(minimum=1),
            "payload": {"type": "object", "additionalProperties": True},
        }
    ),
    "Plan": _PLAN,
    "Step": _STEP,
    "Difference": _DIFFERENCE,
    "Change": _CHANGE,
    "Command": _COMMAND,
    "Confirmed": record({"command_id": ID, "confirms": ID, "confirmed": {"const": True}}),
    "HistoryEntry": _HISTORY_ENTRY,
    "History": record(
        {
            "history": listed(ref("HistoryEntry"), "newest first"),
            "next": nullable(integer("give it as `before` for the next page; null on the last one", minimum=1)),
        }
    ),
    "Batch": taken(
        {
            "commands": listed(
                {
                    "description": "exactly one of these",
                    "oneOf": [
                        taken({"create": ref("InterfaceSpec")}, required=("create",), description="create"),
                        taken(
                            {
                                "change": taken(
                                    {"name": NAME, "patch": ref("InterfacePatch")},
                                    required=("name", "patch"),
                                    description="which, and what",
                                )
                            },
                            required=("change",),
                            description="change",
                        ),
                        *(
                            taken({verb: _NAMED}, required=(verb,), description=verb)
                            for verb in ("start", "stop", "delete")
                        ),
                    ],
                },
                "one command for each interface",
                minItems=1,
                maxItems=bodies.BATCH_MAX,
            )
        },
        required=("commands",),
        description="all applied or none, in one transaction and one kernel batch",
    ),
    "BatchAnswer": record(
        {
            "command_id": ID,
            "interfaces": listed({"anyOf": [ref("Interface"), ref("Deleted")]}, "in the order of the commands"),
        }
    ),
    "Reconciled": record(
        {"dry_run": {"const": False}, **_SUMMARY}, description="the names of the interfaces, by what was done"
    ),
    "ReconcilePreview": record({"dry_run": {"const": True}, "plan": listed(ref("Plan"))}),
    "Drift": record({"drift": listed(ref("Plan"), "empty if host and log agree")}),
    "Counters": COUNTERS,
    "AllCounters": record(
        {
            "counters": {
                "type": "object",
                "description": "by name",
                "additionalProperties": {
                    **COUNTERS,
                    "properties": {"id": ID, **COUNTERS["properties"]},
                    "required": ["id", *COUNTERS["required"]],
                },
            }
        }
    ),
    "Totals": _TOTALS,
    "Rates": _RATES,
    "CounterPoint": record(
        {
            "at": {**STAMP, "description": "the end of the step"},
            "sampled_at": {**STAMP, "description": "the last sample in it"},
            "totals": ref("Totals"),
            "rates": {**nullable(ref("Rates")), "description": "null where nothing was observed"},
            "observed_s": {**_SECONDS, "description": "what `rates` were measured over"},
            "gap": flag("whether nothing was known for a part of the step; gaps stay gaps"),
            "gap_s": _SECONDS,
        }
    ),
    "InterfaceCounters": record(
        {
            "id": ID,
            "name": NAME,
            "sampled_at": nullable(STAMP),
            "totals": {"anyOf": [ref("Totals")]},
            "rates": nullable(ref("Rates")),
            "rates_over_s": {**_SECONDS, "description": "the last minute, as far as it was observed"},
            "from": STAMP,
            "to": STAMP,
            "step_s": nullable(integer("null: every sample", minimum=1)),
            "points": listed(ref("CounterPoint"), "oldest first"),
        },
        optional=("from", "to", "step_s", "points"),
        description="totals and present rates; with `from`, `to` or `step` also points over time",
    ),
    "Event": _EVENT,
    "EventPage": record(
        {"events": listed(ref("Event")), "next": nullable(text("the cursor of the next page; null on the last one"))}
    ),
    "DesiredInterface": _DESIRED,
    "StateAt": record(
        {
            **_PLACE,
            "interfaces": {
                "type": "object",
                "description": "by name",
                "additionalProperties": ref("DesiredInterface"),
            },
        }
    ),
    "Diff": record(
        {
            "from": record(_PLACE),
            "to": record(_PLACE),
            "interfaces": listed(
                record(
                    {
                        "name": NAME,
                        "id": ID,
                        "change": text(enum=["added", "removed", "changed"]),
                        "changes": listed(ref("Change")),
                    }
                )
            ),
        }
    ),
    "LogHead": record(
        {
            "node": text("whose log it is"),
            "position": integer(minimum=0),
            "hash": text("keep it elsewhere: a later log must still have it"),
        }
    ),
    "Verification": record(
        {
            "sound": flag("whether all of the chain verifies, and it has the head that was given"),
            "events": integer(minimum=0),
            "interfaces": integer(minimum=0),
            "position": integer(minimum=0),
            "hash": text(),
            "problems": listed(text()),
            "took_us": integer(minimum=0),
        }
    ),
    "ErrorCode": text("stable; docs/errors.md says what to do about each", enum=[code.value for code in ErrorCode]),
    "Problem": _PROBLEM,
    "ErrorText": record({"error": text("what was found and what would do")}, description="the original API's errors"),
    "Health": record(
        {
            "status": text(enum=["healthy", "unhealthy"]),
            "service": {"const": "tunledger"},
            "version": text(),
            "node": text("whose log this is"),
            "interfaces": integer(minimum=0),
            "degraded": integer(minimum=0),
            "log_position": integer(minimum=0),
            "audit": record(
                {
                    "checked": integer("up to this position", minimum=0),
                    "target": integer("up to here", minimum=0),
                    "whole": flag("whether all of the log has been checked since the start"),
                },
                description="how far the log has been checked in the background",
            ),
            "error": text("the reasons in one line"),
            "reasons": listed(text()),
        },
        optional=("audit", "error", "reasons"),
    ),
    "ClassicCreate": _classic_body("what `create` makes; the configuration has the defaults", {"name": nullable(NAME)}),
    "ClassicConfigure": _classic_body("what changes in place", {}),
    "ClassicDone": record({"status": {"const": "success"}, "message": text()}),
    "ClassicStatus": {
        "anyOf": [_CLASSIC_STATUS, record({"status": {"const": "no_interface"}, "message": text()})],
        "description": "the interface, flat; or that there is none",
    },
}


def step_parts() -> dict[str, tuple[str, ...]]:
    """The further members of each step, for the document's description."""
    return {kind.__name__: tuple(field.name for field in fields(kind)) for kind in get_args(st.Step)}
