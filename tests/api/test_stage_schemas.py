"""What the document says of a chain's stages is what the parser takes: neither can change without the other."""

from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from service.api.captures import LIMITS, settings_of
from service.api.schemas import CAPTURE_SETTINGS, SCHEMAS, STAGE
from service.domain.chain import _REQUIRED, _RULE, BUILT_IN, parse_chain
from service.domain.errors import TunledgerError

LEAST: dict[str, dict[str, Any]] = {
    "inspect": {},
    "filter": {},
    "capture": {},
    "reply": {"networks": ["10.0.0.0/8"]},
    "forward": {"to": "tun1"},
    "balance": {"to": [{"to": "tun1"}]},
}
JUDGE = jsonschema_rs.Draft202012Validator({**STAGE, "components": {"schemas": SCHEMAS}})


def schema_of(processor: str) -> dict[str, Any]:
    found: dict[str, Any] = SCHEMAS[f"Stage{processor.capitalize()}"]
    return found


def taken(stage: Any) -> bool:
    try:
        parse_chain([stage], "chain")
    except TunledgerError:
        return False
    return True


@pytest.mark.parametrize("processor", BUILT_IN)
def test_every_option_and_its_default_are_documented(processor: str) -> None:
    schema = schema_of(processor)
    options = {key: value for key, value in schema["properties"].items() if key not in {"processor", "on_crash"}}
    assert list(options) == list(BUILT_IN[processor])
    required = {key for key, (_, default) in BUILT_IN[processor].items() if default is _REQUIRED}
    assert set(schema["required"]) == required | {"processor"}
    for key, (_, default) in BUILT_IN[processor].items():
        if default is not _REQUIRED:
            assert options[key]["default"] == default, key


def test_every_part_of_a_rule_is_documented() -> None:
    rule = schema_of("filter")["properties"]["rules"]["items"]
    assert list(rule["properties"]) == list(_RULE)
    for key, (_, default) in _RULE.items():
        assert key in rule["required"] if default is _REQUIRED else rule["properties"][key]["default"] == default


@pytest.mark.parametrize("processor", BUILT_IN)
def test_a_filled_stage_fits_its_schema(processor: str) -> None:
    (stage,) = parse_chain([{"processor": processor, **LEAST[processor]}], "chain")
    assert [f"{e.instance_path} {e.message}" for e in JUDGE.iter_errors(stage)] == []


def bounds(schema: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    for key, each in schema.get("properties", {}).items():
        for part in (each, *each.get("anyOf", ())):
            if "integer" in str(part.get("type")) or "maxItems" in part:
                yield (*path, key), part


NUMBERS = [
    (processor, path[-1], part)
    for processor in BUILT_IN
    for path, part in bounds(schema_of(processor))
    if "minimum" in part
]
LISTS = [
    (processor, path[-1], part)
    for processor in BUILT_IN
    for path, part in bounds(schema_of(processor))
    if "maxItems" in part
]


@pytest.mark.parametrize(("processor", "key", "part"), NUMBERS, ids=lambda part: str(part)[:20])
def test_bounds_of_numbers_are_those_of_the_parser(processor: str, key: str, part: dict[str, Any]) -> None:
    base = {"processor": processor, **LEAST[processor]}
    for value, fits in (
        (part["minimum"], True),
        (part["maximum"], True),
        (part["minimum"] - 1, False),
        (part["maximum"] + 1, False),
        ("1", False),
        (True, False),
    ):
        assert taken({**base, key: value}) is JUDGE.is_valid({**base, key: value}) is fits, (key, value)


@pytest.mark.parametrize(("processor", "key", "part"), LISTS, ids=lambda part: str(part)[:20])
def test_bounds_of_lists_are_those_of_the_parser(processor: str, key: str, part: dict[str, Any]) -> None:
    items: dict[str, Any] = {
        "rules": {"action": "drop"},
        "networks": "10.0.0.0/8",
        "answers": "arp",
    }
    base = {"processor": processor, **LEAST[processor]}
    for count, fits in ((part["maxItems"], True), (part["maxItems"] + 1, False), (0, part.get("minItems", 0) == 0)):
        value = [items.get(key, {"to": f"tun{number}"}) for number in range(count)]
        assert taken({**base, key: value}) is JUDGE.is_valid({**base, key: value}) is fits, (key, count)


@pytest.mark.parametrize(
    ("stage", "fits"),
    [
        ({"processor": "mine"}, True),
        ({"processor": "mine", "a": [{"b": [1, None]}], "c_1": True, "on_crash": "bypass"}, True),
        ({"processor": "mine", "a": {"b": {"c": {"d": {"e": {}}}}}}, True),
        ({"processor": "mine", "a": {"b": {"c": {"d": {"e": {"f": 1}}}}}}, False),
        ({"processor": "mine", "a": 1.5}, False),
        ({"processor": "mine", "A": 1}, False),
        ({"processor": "mine", "a": {"B": 1}}, False),
        ({"processor": "mine", "a": 2**53}, False),
        ({"processor": "Mine"}, False),
        ({"processor": ""}, False),
        ({"processor": "inspect", "x": 1}, False),
        ({"processor": "inspect", "on_crash": "stop"}, False),
        ({"processor": "forward"}, False),
        ({"processor": "filter", "rules": [{"action": "drop", "port": 65536}]}, False),
        ({"processor": "filter", "rules": [{"action": "drop", "protocol": "udp", "port": "1-5"}]}, True),
        ({"processor": "capture", "size_bytes": None, "files": 2}, False),
        ({"processor": "capture", "size_bytes": None, "files": 1}, True),
        ({"processor": "capture", "size_bytes": None, "interval_s": 5}, True),
        ({"processor": "capture", "size_bytes": None}, False),
    ],
    ids=str,
)
def test_the_document_and_the_parser_agree(stage: dict[str, Any], fits: bool) -> None:
    assert taken(stage) is JUDGE.is_valid(stage) is fits


def test_what_a_capture_that_is_asked_for_takes_is_documented() -> None:
    assert list(CAPTURE_SETTINGS) == [*BUILT_IN["capture"], *LIMITS]
    judge = jsonschema_rs.Draft202012Validator({**SCHEMAS["CaptureSettings"], "components": {"schemas": SCHEMAS}})
    for key in LIMITS:
        part = CAPTURE_SETTINGS[key]
        for value in (part["minimum"], part["maximum"], None, part["minimum"] - 1, part["maximum"] + 1, "1"):
            try:
                settings_of({key: value})
                found = True
            except TunledgerError:
                found = False
            assert found is judge.is_valid({key: value}), (key, value)
    assert settings_of({}).to_json() == {key: part["default"] for key, part in CAPTURE_SETTINGS.items()}
