"""What is done with the packets of an interface: its chain of processors, in JSON form, and the rules of each.

A stage is kept as the JSON object that its user wrote, with every default filled in: so the log can be read without
ours, and equal stages compare equal. How a stage does its work lives in `service.dataplane`; nothing in here knows a
packet. Options of processors that are not ours are theirs to judge; here they only have to be JSON that a payload of
the log can hold.
"""

import ipaddress
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from service.domain.errors import ErrorCode, TunledgerError, close_to, first_close, invalid, shown_key, unknown
from service.domain.errors import shown as shown_json
from service.domain.values import parse_bool, parse_int, parse_mac, parse_name

Stage = dict[str, Any]
Chain = tuple[Stage, ...]
Option = Callable[[Any, str], Any]

STAGES_MAX = 16
RULES_MAX = 256
NETWORKS_MAX = 64
TARGETS_MAX = 64
WEIGHT_MAX = 1000
FLOWS_MAX = 1 << 16
PACKETS_KEPT_MAX = 1024
SNAPLEN_MAX = 262_144  # what tcpdump takes by default
CAPTURE_FILES_MAX = 1000
OPTIONS_CHARS_MAX = 8192
OPTIONS_DEPTH_MAX = 6
INTEGER_MAX = 2**53 - 1  # RFC 8785: beyond, JSON's numbers are not exact

ON_CRASH = ("restart", "bypass")
DIRECTIONS = ("from_kernel", "to_kernel", "both")
PROTOCOLS = ("icmp", "icmpv6", "tcp", "udp")
ANSWERS = ("icmp", "icmpv6", "arp", "ndp")

_PROCESSOR = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_KEY = re.compile(r"[a-z][a-z0-9_]{0,62}")
_PORTS = re.compile(r"([0-9]{1,5})(-([0-9]{1,5}))?")
_REQUIRED: Final = object()


def parse_chain(value: object, field: str) -> Chain:
    """A chain from its JSON form, every default filled in.

    Raises:
        TunledgerError: invalid_field, naming the stage's place: "processing.chain.1.to".
    """
    if not isinstance(value, list):
        raise invalid(field, value, 'is not a list of stages such as [{"processor": "inspect"}]')
    if len(value) > STAGES_MAX:
        raise invalid(field, len(value), f"stages are too many; at most {STAGES_MAX}")
    return tuple(_stage(stage, f"{field}.{index}") for index, stage in enumerate(value))


def targets(chain: Chain) -> frozenset[str]:
    """The names of the interfaces that a chain sends packets to."""
    return frozenset(name for _path, name in target_fields(chain))


def target_fields(chain: Chain) -> list[tuple[str, str]]:
    """The same, each with its place in the chain: ("1.to", "tun1"), ("2.to.0.to", "tun2")."""
    found: list[tuple[str, str]] = []
    for place, stage in enumerate(chain):
        match stage["processor"]:
            case "forward":
                found.append((f"{place}.to", stage["to"]))
            case "balance":
                found += [(f"{place}.to.{index}.to", target["to"]) for index, target in enumerate(stage["to"])]
    return found


def shown(stages: Sequence[Mapping[str, Any]]) -> str:
    """A chain for people: "inspect > reply:networks=10.0.0.0/24", options that are as by default left out."""
    return " > ".join(map(_shown_stage, stages)) or "none"


def is_chain(value: object) -> bool:
    """Whether a JSON value is a chain with at least one stage."""
    return isinstance(value, list) and bool(value) and all(isinstance(s, Mapping) and "processor" in s for s in value)


def _shown_stage(stage: Mapping[str, Any]) -> str:
    defaults = {key: default for key, (_parse, default) in BUILT_IN.get(stage["processor"], {}).items()}
    defaults |= {"processor": stage["processor"], "on_crash": ON_CRASH[0]}
    told = [f"{key}={_shown_option(value)}" for key, value in stage.items() if defaults.get(key, _REQUIRED) != value]
    return f"{stage['processor']}:{','.join(told)}" if told else str(stage["processor"])


def _shown_option(value: object) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "+".join(value)
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def custom(chain: Chain) -> frozenset[str]:
    """The processors in a chain that are not ours."""
    return frozenset(stage["processor"] for stage in chain) - BUILT_IN.keys()


def _stage(value: object, field: str) -> Stage:
    if not isinstance(value, dict):
        raise invalid(field, value, 'is not an object such as {"processor": "inspect"}')
    if "processor" not in value:
        ours = ", ".join(BUILT_IN)
        close = first_close(value, ["processor"])
        where = f"{field}.processor"
        text = f"{where}: missing in {shown_json(value)}; it names one, ours are {ours}{close}"
        raise TunledgerError(ErrorCode.INVALID_FIELD, text, field=where)
    processor = value["processor"]
    if not isinstance(processor, str) or not _PROCESSOR.fullmatch(processor):
        wanted = f"is not the name of a processor; ours are {', '.join(BUILT_IN)}{close_to(processor, BUILT_IN)}"
        raise invalid(f"{field}.processor", processor, wanted)
    head = {
        "processor": processor,
        "on_crash": _one_of(*ON_CRASH)(value.get("on_crash", ON_CRASH[0]), f"{field}.on_crash"),
    }
    given = {key: option for key, option in value.items() if key not in head}
    options = BUILT_IN.get(processor)
    stage = head | (_foreign(given, field) if options is None else _filled(given, options, field))
    if processor == "capture" and stage["interval_s"] is None and stage["size_bytes"] is None and stage["files"] > 1:
        raise invalid(f"{field}.files", stage["files"], "files need size_bytes or interval_s to begin a new one at")
    return stage


def _filled(given: Mapping[str, Any], options: Mapping[str, tuple[Option, Any]], field: str) -> dict[str, Any]:
    """The options by their parsers, with the defaults of those that are not given."""
    for key in given:
        if key not in options:
            raise unknown(f"{field}.", key, options)
    found = {}
    for key, (parse, default) in options.items():
        if key in given:
            found[key] = parse(given[key], f"{field}.{key}")
        elif default is _REQUIRED:
            where = f"{field}.{key}"
            given_here = f"given here: {', '.join(map(shown_key, given)) or 'nothing'}"
            raise TunledgerError(ErrorCode.INVALID_FIELD, f"{where}: missing; it is needed; {given_here}", field=where)
        else:
            found[key] = default
    return found


def _foreign(given: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Options that another package's processor will judge: only what fits into the log."""
    if len(str(given)) > OPTIONS_CHARS_MAX:
        raise invalid(field, len(str(given)), f"characters of options are too many; at most {OPTIONS_CHARS_MAX}")
    _check_json(given, field, OPTIONS_DEPTH_MAX)
    return dict(given)


def _check_json(value: object, field: str, depth: int) -> None:
    if depth == 0:
        raise invalid(field, value, f"is nested deeper than {OPTIONS_DEPTH_MAX} levels")
    match value:
        case None | bool() | str():
            pass
        case int():
            parse_int(value, field, -INTEGER_MAX, INTEGER_MAX)
        case list():
            for index, item in enumerate(value):
                _check_json(item, f"{field}.{index}", depth - 1)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str) or not _KEY.fullmatch(key):
                    raise invalid(field, key, "is not an option's name: a-z, 0-9 and '_', a letter first")
                _check_json(item, f"{field}.{key}", depth - 1)
        case _:
            raise invalid(field, value, "cannot be kept: whole numbers, strings, true, false, null, lists, objects")


def _int(low: int, high: int) -> Option:
    return lambda value, field: parse_int(value, field, low, high)


def _or_none(parse: Option) -> Option:
    return lambda value, field: None if value is None else parse(value, field)


def _one_of(*choices: str) -> Option:
    def parse(value: Any, field: str) -> str:
        if value not in choices:
            raise invalid(field, value, f"is none of {', '.join(choices)}{close_to(value, choices)}")
        return str(value)

    return parse


def _list_of(parse: Option, what: str, most: int, least: int = 0) -> Option:
    def parse_list(value: Any, field: str) -> list[Any]:
        if not isinstance(value, list):
            raise invalid(field, value, f"is not a list of {what}")
        if len(value) < least:
            raise invalid(field, value, f"is empty; expected 1 to {most} of {what}")
        if len(value) > most:
            raise invalid(field, len(value), f"are too many; at most {most} of {what}")
        return [parse(item, f"{field}.{index}") for index, item in enumerate(value)]

    return parse_list


def _object_of(options: Mapping[str, tuple[Option, Any]], such: str) -> Option:
    def parse(value: Any, field: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise invalid(field, value, f"is not an object such as {such}")
        return _filled(value, options, field)

    return parse


def _network(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise invalid(field, value, 'is not a network such as "10.0.0.0/8"')
    try:
        found = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise invalid(field, value, 'is not a network such as "10.0.0.0/8" or "2001:db8::/32"') from None
    try:
        return str(ipaddress.ip_network(value))
    except ValueError:
        raise invalid(field, value, f'has bits behind its prefix; expected "{found}"') from None


def _ports(value: Any, field: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    found = _PORTS.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise invalid(field, value, 'is not a port or a range such as "53" or "1024-65535"')
    low, high = int(found[1]), int(found[3] or found[1])
    if not low <= high <= 65535:
        raise invalid(field, value, "is out of range; expected 0 to 65535, the lower one first")
    return str(low) if low == high else f"{low}-{high}"


def _protocol(value: Any, field: str) -> str | int:
    if isinstance(value, str):
        return str(_one_of(*PROTOCOLS)(value, field))
    return parse_int(value, field, 0, 255)


def _balanced(value: Any, field: str) -> list[dict[str, Any]]:
    target = {"to": (parse_name, _REQUIRED), "weight": (_int(1, WEIGHT_MAX), 1)}
    such = '{"to": "tun1", "weight": 1}'
    found: list[dict[str, Any]] = _list_of(_object_of(target, such), f"outputs such as {such}", TARGETS_MAX, 1)(
        value, field
    )
    if len({target["to"] for target in found}) != len(found):
        raise invalid(field, ", ".join(target["to"] for target in found), "has the same interface twice")
    return found


_A_RULE: Final = '{"action": "drop", "port": 25}'
_RULE: Final[Mapping[str, tuple[Option, Any]]] = {
    "action": (_one_of("pass", "drop"), _REQUIRED),
    "direction": (_one_of(*DIRECTIONS), "both"),
    "network": (_or_none(_network), None),
    "source": (_or_none(_network), None),
    "destination": (_or_none(_network), None),
    "protocol": (_or_none(_protocol), None),
    "port": (_or_none(_ports), None),
    "source_port": (_or_none(_ports), None),
    "destination_port": (_or_none(_ports), None),
    "rate_pps": (_or_none(_int(1, 10_000_000)), None),
}

BUILT_IN: Final[Mapping[str, Mapping[str, tuple[Option, Any]]]] = {
    "inspect": {
        "flows": (_int(16, FLOWS_MAX), 4096),
        "packets": (_int(0, PACKETS_KEPT_MAX), 64),
    },
    "filter": {
        "rules": (_list_of(_object_of(_RULE, _A_RULE), f"rules such as {_A_RULE}", RULES_MAX), []),
        "default": (_one_of("pass", "drop"), "pass"),
    },
    "capture": {
        "snaplen": (_int(16, SNAPLEN_MAX), SNAPLEN_MAX),
        "size_bytes": (_or_none(_int(4096, 1 << 40)), 64 << 20),
        "interval_s": (_or_none(_int(1, 366 * 24 * 3600)), None),
        "files": (_int(1, CAPTURE_FILES_MAX), 4),
    },
    "reply": {
        "networks": (_list_of(_network, 'networks such as "10.0.0.0/8"', NETWORKS_MAX, 1), _REQUIRED),
        "answers": (_list_of(_one_of(*ANSWERS), ", ".join(ANSWERS), len(ANSWERS), 1), list(ANSWERS)),
        "mac": (_or_none(parse_mac), None),
    },
    "forward": {
        "to": (parse_name, _REQUIRED),
    },
    "balance": {
        "to": (_balanced, _REQUIRED),
        "symmetric": (parse_bool, True),
    },
}
"""Our processors: each option's parser and default. A rule matches where all that it names does; `network`
and `port` are either end; `rate_pps` makes a rule match only what is beyond that many packets a second. `files` is how
many a capture keeps."""
