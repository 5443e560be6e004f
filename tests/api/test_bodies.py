"""Bodies to commands: strict, and each refusal names its field and what would do."""

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api import bodies
from service.domain import commands as cmd
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.values import Address, InterfaceName, Mtu
from tests.api.running import DEFAULTS

TUN0 = InterfaceName("tun0")
NO_OBJECT = [b"[]", b'["name"]', b'"tun0"', b"7", b"1.5", b"true", b"null", b"  []  "]
NO_JSON = [
    b"{",
    b"}",
    b"{]",
    b"{'mtu': 1400}",
    b"{mtu: 1400}",
    b'{"mtu": 1400,}',
    b'{"mtu": 1400}{"mtu": 1400}',
    b'{"mtu": 1400} trailing',
    b'{"mtu": 01400}',
    b'{"mtu": +1400}',
    b'{"mtu": 0x578}',
    b'{"mtu": NaN}',
    b'{"mtu": Infinity}',
    b'{"mtu": 1400 // a comment\n}',
    b'{"name": "tun\n0"}',
    b'{"name": "\\ud800"}',
    b'{"name": "\xff"}',
    b"\xef\xbb\xbf{}",
    b"\x00",
    b"name=tun0&mtu=1400",
    b"<xml/>",
    b"--boundary\r\n",
    "{}".encode("utf-16"),
    b'{"mtu":' + b"[" * 30000 + b"]" * 30000 + b"}",
    b"[" * 65000,
    b'{"mtu":' + b"1" * 60000 + b"}",
    b'{"mtu": 1e999}',
]


def _refusal(body: bytes) -> TunledgerError:
    with pytest.raises(TunledgerError) as refusal:
        bodies.document(body)
    return refusal.value


@pytest.mark.parametrize("body", NO_JSON, ids=lambda body: repr(body[:24]))
def test_what_is_no_json_is_refused(body: bytes) -> None:
    refusal = _refusal(body)
    assert refusal.code is ErrorCode.INVALID_JSON
    assert refusal.message.startswith("body: not JSON: ")
    assert len(refusal.message) < 200


@pytest.mark.parametrize("body", NO_OBJECT)
def test_json_that_is_no_object_is_refused(body: bytes) -> None:
    refusal = _refusal(body)
    assert refusal.code is ErrorCode.INVALID_JSON
    assert refusal.message.endswith('where an object such as {"mtu": 1400} belongs')


@pytest.mark.parametrize("body", [b"", b" ", b"\r\n\t ", b"{}", b" {} \n"])
def test_an_empty_body_is_an_object_without_fields(body: bytes) -> None:
    assert bodies.document(body) == {}


def test_a_field_that_is_null_is_one_that_is_not_given() -> None:
    assert bodies.document(b'{"mtu": null, "name": "tun1"}') == {"name": "tun1"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"mtu": 1400, "mtu": 1500}', "mtu"),
        (b'{"mtu": 1400, "mtu": 1400}', "mtu"),
        (b'{"mtu": null, "mtu": 1400}', "mtu"),
        (b'{"name": "a", "\\u006eame": "b"}', "name"),
        (b'{"x": {"y": 1, "y": 2}}', "y"),
    ],
)
def test_a_field_given_twice_is_refused(body: bytes, field: str) -> None:
    """One of the two was meant, and nobody knows which."""
    refusal = _refusal(body)
    assert refusal.code is ErrorCode.INVALID_FIELD
    assert refusal.message == f'"{field}": given twice; give it once'
    assert refusal.field == field


@given(st.binary(max_size=200))
def test_any_bytes_at_all_are_an_object_or_a_refusal(body: bytes) -> None:
    try:
        assert isinstance(bodies.document(body), dict)
    except TunledgerError as refusal:
        assert refusal.code in {ErrorCode.INVALID_JSON, ErrorCode.INVALID_FIELD}  # noqa: PT017  # it need not refuse


def test_create_takes_what_is_not_given_from_the_configuration() -> None:
    command = bodies.create({}, DEFAULTS)
    assert command.spec.name == "tun0"
    assert command.spec.addresses == (Address(ipaddress.IPv4Address("10.0.0.1"), 24),)
    assert command.spec.mtu == 1500
    assert command.spec.up
    assert not command.spec.processing.running
    assert not command.allow_overlap


@pytest.mark.parametrize(
    ("body", "address", "mtu"),
    [
        ({"name": "tun0", "address": "10.9.0.1", "netmask": "255.255.0.0", "mtu": 1400}, "10.9.0.1/16", 1400),
        ({"netmask": "30"}, "10.0.0.1/30", 1500),
        ({"address": "10.0.0.0", "netmask": "31"}, "10.0.0.0/31", 1500),
        ({"address": "10.0.0.1", "netmask": "255.255.255.255"}, "10.0.0.1/32", 1500),
        ({"address": "2001:db8::1", "netmask": "64"}, "2001:db8::1/64", 1500),
        ({"address": "2001:DB8::1", "netmask": "ffff:ffff::", "mtu": 1280}, "2001:db8::1/32", 1280),
        ({"mtu": 68}, "10.0.0.1/24", 68),
        ({"mtu": 65535}, "10.0.0.1/24", 65535),
    ],
)
def test_create_understands(body: dict[str, Any], address: str, mtu: int) -> None:
    spec = bodies.create(body, DEFAULTS).spec
    assert [str(a) for a in spec.addresses] == [address]
    assert spec.mtu == mtu


BAD_NAMES: list[object] = [
    "",
    ".",
    "..",
    "a" * 16,
    "a/b",
    "a:b",
    "a%d",
    "a b",
    " tun0",
    "tun0\n",
    "t\u00fcn0",
    "\u0442un0",
    "a\x00",
]
BAD_NAMES += [7, True, [], {}, 1.5]
BAD_ADDRESSES: list[object] = [
    "",
    "10.0.0",
    "10.0.0.256",
    "10.0.0.1/24",
    "010.0.0.1",
    "0x0a.0.0.1",
    "ten",
    " 10.0.0.1",
    "0.0.0.0",
    "255.255.255.255",
    "224.0.0.1",
    "127.0.0.1",
    "10.0.0.255",
    "10.0.0.0",
    "::",
    "::1",
    "ff02::1",
    "::ffff:10.0.0.1",
    "fe80::1%eth0",
    167772161,
    True,
    ["10.0.0.1"],
    {"ip": "10.0.0.1"},
]
BAD_NETMASKS: list[object] = [
    "",
    "255.0.255.0",
    "0.0.0.255",
    "255.255.255",
    "0",
    "0.0.0.0",
    "33",
    "-1",
    "24.0",
    "/24",
    "ffff::",
    "x",
]
BAD_NETMASKS += [24, True, [], {}]
BAD_SWITCHES: list[object] = [0, 1, "true", "", [], {}]
BAD_MTUS: list[object] = [67, 65536, 0, -1, 10**30, True, False, "1400", "", 1400.0, 1400.5, [], {}, [1400]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("name", value) for value in BAD_NAMES),
        *(("address", value) for value in BAD_ADDRESSES),
        *(("netmask", value) for value in BAD_NETMASKS),
        *(("mtu", value) for value in BAD_MTUS),
        *(("allow_overlap", value) for value in BAD_SWITCHES),
    ],
    ids=repr,
)
def test_create_refuses_a_bad_value_and_names_its_field(field: str, value: object) -> None:
    with pytest.raises(TunledgerError, match=f"^{field}: ") as refusal:
        bodies.create({field: value}, DEFAULTS)
    assert refusal.value.code is ErrorCode.INVALID_FIELD
    assert refusal.value.field == field
    assert len(refusal.value.message) < 250


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"address": "2001:db8::1"}, "netmask"),  # the configured netmask is for IPv4
        ({"address": "2001:db8::1", "netmask": "255.255.255.0"}, "netmask"),
        ({"address": "2001:db8::1", "netmask": "129"}, "netmask"),
        ({"address": "2001:db8::1", "netmask": "64", "mtu": 1279}, "mtu"),
        ({"address": "10.0.3.255", "netmask": "255.255.252.0"}, "address"),
        ({"address": "10.0.0.4", "netmask": "30"}, "address"),
    ],
)
def test_create_refuses_what_does_not_go_together(body: dict[str, Any], field: str) -> None:
    with pytest.raises(TunledgerError, match=f"^{field}: ") as refusal:
        bodies.create(body, DEFAULTS)
    assert refusal.value.field == field


@pytest.mark.parametrize("key", ["mode", "Name", "MTU", "", "name ", "addresses", "__class__"])
def test_a_misspelt_field_does_not_pass_in_silence(key: str) -> None:
    for refuse in (
        lambda body: bodies.create(body, DEFAULTS),
        lambda body: bodies.configure(body, TUN0),
        bodies.nothing,
    ):
        with pytest.raises(TunledgerError, match="unknown field") as refusal:
            refuse({key: 1})
        assert refusal.value.code is ErrorCode.INVALID_FIELD
        assert refusal.value.field == key


def test_configure_leaves_alone_what_is_not_given() -> None:
    assert bodies.configure({}, TUN0) == cmd.ConfigureInterface(TUN0)
    assert bodies.configure({"mtu": 1400}, TUN0) == cmd.ConfigureInterface(TUN0, mtu=Mtu(1400))
    assert bodies.configure({"address": "10.0.0.2"}, TUN0).ip == ipaddress.IPv4Address("10.0.0.2")
    assert bodies.configure({"netmask": "255.255.0.0"}, TUN0).netmask == "255.255.0.0"
    assert bodies.configure({"allow_overlap": True}, TUN0).allow_overlap


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "tun1"),
        ("address", "10.0.0.1/24"),
        ("address", 7),
        ("netmask", 24),
        ("netmask", True),
        ("mtu", "1400"),
        ("mtu", True),
        ("mtu", 67),
        ("allow_overlap", 1),
    ],
)
def test_configure_refuses_a_bad_value_and_names_its_field(field: str, value: object) -> None:
    with pytest.raises(TunledgerError, match=f"^{field}: ") as refusal:
        bodies.configure({field: value}, TUN0)
    assert refusal.value.code is ErrorCode.INVALID_FIELD
    assert refusal.value.field == field


def test_a_batch_with_a_command_that_is_none_names_what_was_given_and_what_is_close() -> None:
    with pytest.raises(TunledgerError) as refused:
        bodies.batch({"commands": [{"crate": {"name": "tun0"}}]}, allow_overlap=False, recreate=False)
    assert refused.value.field == "commands.0"
    assert refused.value.message == (
        'commands.0: {"crate": {"name": "tun0"}} is not an object with one of: create, change, start, stop, delete; '
        "did you mean create?"
    )


def test_a_field_of_processing_in_the_wrong_place_is_told_where_it_belongs() -> None:
    with pytest.raises(TunledgerError, match=r"offloads: unknown field; did you mean processing\.offloads"):
        bodies.spec({"name": "tun0", "offloads": "off"})
