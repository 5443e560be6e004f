"""What schemathesis cannot read in the document: values of our own string formats, and rules between places.

Loaded by schemathesis in its own process (`hooks` in schemathesis.toml), never by our tests.
"""

import base64
import datetime
import ipaddress
import itertools
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis.core.parameters import ParameterLocation
from schemathesis.generation.meta import TestPhase

_NAMES = st.from_regex(r"[a-z][a-z0-9]{0,9}", fullmatch=True, alphabet=st.characters(codec="ascii"))

# Neither all ones nor all zeros under any mask from /1 to /30: no network's own address, and no broadcast.
_V4 = st.builds(
    lambda second, third, last: f"10.{second}.{third}.{last}",
    st.integers(0, 255),
    st.integers(0, 255),
    st.sampled_from([85, 170]),
)
_V6 = st.integers(0x2001_0DB8 << 96, (0x2001_0DB9 << 96) - 1).map(lambda number: str(ipaddress.IPv6Address(number)))


schemathesis.openapi.format(
    "interface-address",
    st.one_of(
        st.builds("{}/{}".format, _V4, st.integers(9, 32)),
        st.builds("{}/{}".format, _V6, st.integers(33, 128)),
    ),
)
schemathesis.openapi.format("ip-host", st.one_of(_V4, _V6))
schemathesis.openapi.format("netmask", st.integers(9, 32).map(str))  # goes with both families
schemathesis.openapi.format("user-name", st.just("root"))
schemathesis.openapi.format("group-name", st.just("root"))
schemathesis.openapi.format(
    "ip-network",
    st.one_of(
        st.integers(0, 2**16 - 1).map(lambda number: f"10.{number >> 8}.{number & 255}.0/24"),
        st.integers(0, 2**32 - 1).map(lambda number: f"{ipaddress.IPv6Address(0x2001_0DB8 << 96 | number << 64)}/64"),
    ),
)
schemathesis.openapi.format(
    "port-range",
    st.tuples(st.integers(0, 65535), st.integers(0, 65535)).map(lambda ports: "{}-{}".format(*sorted(ports))),
)
schemathesis.openapi.format(
    "cursor", _NAMES.map(lambda name: base64.urlsafe_b64encode(name.encode()).decode().rstrip("="))
)


_TIMES = st.datetimes(datetime.datetime(2026, 1, 1), datetime.datetime(2026, 12, 31)).map(  # noqa: DTZ001  # as UTC
    lambda moment: f"{moment.isoformat()}Z"
)
schemathesis.openapi.format("moment", _TIMES)
schemathesis.openapi.format("place", st.one_of(_TIMES, st.integers(0, 2).map(str)))  # a log has two events at once
schemathesis.openapi.format("events-cursor", st.integers(0, 10_000).map(str))
schemathesis.openapi.format("counters-from", st.one_of(st.integers(2, 90).map("-{}m".format), st.just("-1d")))
schemathesis.openapi.format("counters-to", st.integers(0, 119).map("-{}s".format))
schemathesis.openapi.format("counters-step", st.sampled_from(["30", "45s", "1m", "6h", "1d"]))
schemathesis.openapi.format("etags", st.sampled_from(["*", '"0192f0c0-5c1b-7d2e-8f3a-4b5c6d7e8f90.3"']))

_numbers = itertools.count(1)


def _whole(value: Any) -> Any:
    """1400 for 1400.0, which JSON Schema takes for an integer and tunledger does not: 1400.5 is near."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case dict():
            return {key: _distinct(_whole(each)) if key == "addresses" else _whole(each) for key, each in value.items()}
        case list():
            return [_whole(each) for each in value]
        case _:
            return value


def _distinct(addresses: Any) -> Any:
    """Each address once, whatever its prefix: the document has that in words only."""
    if not isinstance(addresses, list) or not all(isinstance(each, str) for each in addresses):
        return addresses
    return list({each.partition("/")[0]: each for each in addresses}.values())


def _sound(case: Any, location: ParameterLocation) -> bool:
    """Whether a part of the request was made to be valid; one made to be invalid is left as it is."""
    part = case.meta.components.get(location)
    return part is None or part.mode.is_positive


def _meet(case: Any, name: str) -> None:
    """Have the request be about this interface."""
    if case.path_parameters and case.path.startswith("/api/v1/interfaces/") and _sound(case, ParameterLocation.PATH):
        case.path_parameters["name"] = name
    if isinstance(case.body, dict) and "name" in case.body and _sound(case, ParameterLocation.BODY):
        case.body["name"] = name


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Have more requests reach what they are for; none of this makes a valid request invalid, or the other way round.

    Most go without If-Match and If-None-Match, and are about a few interfaces, or few would find one. A key is for
    one request only, and the name in the body of PUT is the one in the path.
    """
    if case.meta is None:
        return case
    number = next(_numbers)
    if case.headers and _sound(case, ParameterLocation.HEADER):
        if "Idempotency-Key" in case.headers:
            case.headers["Idempotency-Key"] = f"key-{number}"
        if number % 4:
            case.headers.pop("If-Match", None)
            case.headers.pop("If-None-Match", None)
    if case.meta.phase.name in {TestPhase.FUZZING, TestPhase.COVERAGE} and number % 3:
        _meet(case, f"lab{number % 5}")
    if case.query and case.query.get("format") == "ndjson" and _sound(case, ParameterLocation.QUERY):
        case.query.pop("limit", None)  # ndjson has no pages
        case.query.pop("cursor", None)
    if isinstance(case.body, dict) and _sound(case, ParameterLocation.BODY):
        case.body = _together(_whole(case.body), case)
    return case


def _together(body: dict[str, Any], case: Any) -> dict[str, Any]:
    """The rules between fields that the document has in words only."""
    if case.operation.method.upper() == "PUT" and isinstance(body.get("name"), str):
        body["name"] = case.path_parameters["name"]
    if ":" in str(body.get("address")):  # the original API's
        body["netmask"] = body.get("netmask") or "64"
        body["mtu"] = max(body.get("mtu") or 1280, 1280)
    return body
