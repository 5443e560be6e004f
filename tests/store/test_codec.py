"""Events to bytes and back. rfc8785 is the judge of what canonical JSON is; the files in golden/ are never edited."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import rfc8785
from hypothesis import given, settings

from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.values import Address
from service.store import codec
from tests.store.log import NODE, NOW
from tests.store.samples import SAMPLES
from tests.store.strategies import events

GOLDEN = Path(__file__).parent / "golden"


def _plain(body: ev.Event) -> Any:
    def address(value: object) -> str:
        assert isinstance(value, Address)
        return str(value)

    return msgspec.to_builtins(body, enc_hook=address)


@settings(deadline=None, max_examples=150)
@given(events())
def test_payload_is_canonical_json_whatever_the_event_holds(body: ev.Event) -> None:
    _name, _version, payload = codec.encode(body)
    assert payload.encode() == rfc8785.dumps(_plain(body))


@settings(deadline=None, max_examples=150)
@given(events())
def test_an_event_comes_back_as_it_was(body: ev.Event) -> None:
    assert codec.decode(*codec.encode(body)) == body


@settings(deadline=None)
@given(events())
def test_payload_is_one_line(body: ev.Event) -> None:
    assert "\n" not in codec.encode(body)[2]


def test_every_type_is_registered_under_its_own_name() -> None:
    assert {name: kind.__name__ for name, (_version, kind) in codec.TYPES.items()} == {n: n for n in codec.TYPES}
    assert set(codec.TYPES) == {kind.__name__ for kind in ev.Event.__args__}


def test_every_past_version_of_every_type_has_a_golden_payload() -> None:
    wanted = {f"{name}.v{v}.json" for name, (newest, _kind) in codec.TYPES.items() for v in range(1, newest + 1)}
    assert {path.name for path in GOLDEN.iterdir()} == wanted


def test_every_version_but_the_newest_has_an_upcaster() -> None:
    wanted = {(name, v) for name, (newest, _kind) in codec.TYPES.items() for v in range(1, newest)}
    assert set(codec.UPCASTERS) == wanted


@pytest.mark.parametrize("path", sorted(GOLDEN.iterdir()), ids=lambda path: path.stem)
def test_golden_payload_decodes_for_ever(path: Path) -> None:
    name, version, _ = path.name.split(".")
    payload = path.read_bytes().decode()
    assert payload.encode() == rfc8785.dumps(json.loads(payload)), "a golden payload is canonical to the last byte"
    body = codec.decode(name, int(version[1:]), payload)
    assert type(body) is codec.TYPES[name][1]
    if int(version[1:]) == codec.TYPES[name][0]:
        assert body == SAMPLES[name]
        assert codec.encode(body) == (name, codec.TYPES[name][0], payload)


def test_an_old_payload_is_upcast_through_every_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(old: str, new: str) -> Any:
        return lambda payload: {(new if key == old else key): value for key, value in payload.items()}

    monkeypatch.setattr(codec, "TYPES", {"ServiceStopped": (3, ev.ServiceStopped)})
    monkeypatch.setattr(
        codec, "UPCASTERS", {("ServiceStopped", 1): rename("a", "b"), ("ServiceStopped", 2): rename("b", "reason")}
    )
    body = codec.decode("ServiceStopped", 1, '{"a":"SIGTERM","interfaces":"keep","pid":7}')
    assert body == ev.ServiceStopped(pid=7, reason="SIGTERM", interfaces="keep")


@pytest.mark.parametrize(
    ("name", "version", "payload", "words"),
    [
        ("InterfaceTeleported", 1, "{}", "InterfaceTeleported version 1 is of a newer tunledger"),
        ("ServiceStopped", 2, '{"pid":1,"reason":"","interfaces":""}', "ServiceStopped version 2 is of a newer"),
        ("ServiceStopped", 1, "", "ServiceStopped payload of version 1 does not read"),
        ("ServiceStopped", 1, "[]", "does not read"),
        ("ServiceStopped", 1, '{"pid":1,"reason":""}', "interfaces"),
        ("ServiceStopped", 1, '{"pid":"1","reason":"","interfaces":""}', "pid"),
        ("ServiceStopped", 1, '{"pid":1,"reason":"","interfaces":"', "does not read"),
        ("InterfaceRetired", 1, '{"interface_id":"i","name":"n","request":{}}', "via"),
        (
            "InterfaceDeclared",
            1,
            '{"interface_id":"i","name":"n","request":{"via":"v"},"spec":{"name":"n","addresses":["10.0.0.1/x"]}}',
            "does not read",
        ),
        (
            "InterfaceDeclared",
            1,
            '{"interface_id":"i","name":"n","request":{"via":"v"},"spec":{"name":"n","addresses":[7]}}',
            "does not read",
        ),
    ],
)
def test_a_payload_that_cannot_be_read_is_log_corrupt(name: str, version: int, payload: str, words: str) -> None:
    with pytest.raises(TunledgerError, match=words) as refusal:
        codec.decode(name, version, payload)
    assert refusal.value.code is ErrorCode.LOG_CORRUPT


@pytest.mark.parametrize("version", [0, -1])
def test_a_version_before_the_first_is_log_corrupt(version: int) -> None:
    with pytest.raises(TunledgerError) as refusal:
        codec.decode("ServiceStopped", version, '{"pid":1,"reason":"","interfaces":""}')
    assert refusal.value.code is ErrorCode.LOG_CORRUPT


def test_the_chain_hash_is_what_it_was_in_the_first_release() -> None:
    """A changed formula would make every log written so far unsound."""
    payload = (GOLDEN / "InterfaceDeclared.v1.json").read_text()
    first: Any = ("event-1", "interface/x", 1, "InterfaceDeclared", 1, "uid:0", "command-1", NODE, NOW, payload)
    second: Any = ("event-2", "node/x", 2, "ServiceStopped", 1, "system", None, NODE, NOW, "{}")
    assert [codec.chain_hash(codec.GENESIS, 1, *first), codec.chain_hash("ab" * 32, 2, *second)] == [
        "47ca9475e39932c71a7984f021641a9096b0219568a252c1a97a8045f60cd3e6",
        "d5d825cb0da44be5fd59717313eb45f76e63040b4574dfa195ca49fbc1a0dee2",
    ]
