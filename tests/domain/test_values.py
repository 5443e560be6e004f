"""Bad input is refused with the field and what was given; good input comes through as it is."""

import ipaddress
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as some

from service.domain import values
from service.domain.errors import ErrorCode, TunledgerError, shown
from service.domain.spec import changes, parse_spec, spec_to_json
from service.domain.values import Address, Mode
from service.store.codec import _decode_value, _encode_value
from tests.domain.builders import addr, spec

LONG = "x" * 100


def refusal(document: object) -> TunledgerError:
    with pytest.raises(TunledgerError) as caught:
        parse_spec(document)  # type: ignore[arg-type]
    assert caught.value.code is ErrorCode.INVALID_FIELD
    assert not caught.value.retry
    return caught.value


# name, value -> what the message has to say about it
BAD_NAMES = [
    ("", '""'),
    ("a234567890123456", '"a234567890123456"'),  # 16 bytes
    (".", '"."'),
    ("..", '".."'),
    ("a/b", '"a/b"'),
    ("a:b", '"a:b"'),
    ("tun%d", '"tun%d"'),
    ("a b", '"a b"'),
    ("a\tb", r'"a\tb"'),
    ("a\nb", r'"a\nb"'),
    ("a\x00b", r'"a\x00b"'),
    ("a\x7fb", r'"a\x7fb"'),
    ("tün0", '"tün0"'),
    ("tun\u0660", '"tun\u0660"'),
    ("all", '"all"'),
    ("default", '"default"'),
    (None, "null"),
    (True, "true"),
    (7, "7"),
    (["tun0"], '["tun0"]'),
]


@pytest.mark.parametrize(("given", "shown_as"), BAD_NAMES, ids=repr)
def test_bad_name_is_refused_with_the_name(given: object, shown_as: str) -> None:
    error = refusal({"name": given})
    assert error.field == "name"
    assert str(error).startswith(f"name: {shown_as} is ")


@pytest.mark.parametrize("given", ["a", "a23456789012345", "-", "...", "eth0.100", "tun-0_x@y", "0", '"', "\\"])
def test_names_that_the_kernel_takes_are_taken(given: str) -> None:
    assert values.parse_name(given) == given


BAD_ADDRESSES = [
    ("10.0.0", "is not an IPv4 or IPv6 address"),
    ("10.0.0.256", "is not an IPv4 or IPv6 address"),
    ("010.0.0.1", "is not an IPv4 or IPv6 address"),
    ("10.0.0.1 ", "is not an IPv4 or IPv6 address"),
    ("", "is not an IPv4 or IPv6 address"),
    ("localhost", "is not an IPv4 or IPv6 address"),
    ("0.0.0.0", "is the unspecified address"),
    ("::", "is the unspecified address"),
    ("224.0.0.1", "is a multicast address"),
    ("ff02::1", "is a multicast address"),
    ("127.0.0.1", "is a loopback address"),
    ("127.255.255.255", "is a loopback address"),
    ("::1", "is a loopback address"),
    ("255.255.255.255", "is the limited broadcast address"),
    ("::ffff:10.0.0.1", "is IPv4-mapped"),
    ("fe80::1%eth0", "has a zone"),
    ("10.0.0.1/24", "has a prefix length"),
]


@pytest.mark.parametrize(("given", "reason"), BAD_ADDRESSES)
def test_bad_address_is_refused_with_the_reason(given: str, reason: str) -> None:
    with pytest.raises(TunledgerError) as caught:
        values.parse_ip(given)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_FIELD, "address")
    assert str(caught.value).startswith(f'address: "{given}" {reason}')
    if "/" not in given:
        error = refusal({"name": "tun0", "addresses": ["10.0.0.1/24", f"{given}/24"]})
        assert error.field == "addresses.1"
        assert str(error).startswith("addresses.1: ")
        assert reason in str(error)


@pytest.mark.parametrize("given", [None, True, 1, 1.5, ["10.0.0.1"], {"a": 1}])
def test_address_that_is_no_string_is_refused(given: object) -> None:
    with pytest.raises(TunledgerError, match=rf"^address: {re.escape(shown(given))} is not a string"):
        values.parse_ip(given)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("10.0.0.255/24", "is the broadcast address of its network"),
        ("10.0.0.3/30", "is the broadcast address of its network"),
        ("10.0.0.0/24", "is the network itself, not a host in it; try 10.0.0.1"),
        ("10.0.0.1", "is not an address with a prefix length"),
        ("10.0.0.1/24/24", "is not an address with a prefix length"),
        ("10.0.0.1/", "has no prefix length after the '/'"),
        ("10.0.0.1/-1", "has no prefix length after the '/'"),
        ("10.0.0.1/255.255.255.0", "has no prefix length after the '/'"),
        ("10.0.0.1/33", "is too long a prefix for IPv4; at most 32"),
        ("2001:db8::1/129", "is too long a prefix for IPv6; at most 128"),
        ("10.0.0.1/0", "would put every address of the world on this link"),
        (7, "is not an address with a prefix length"),
    ],
)
def test_bad_cidr_is_refused_with_the_reason(given: object, reason: str) -> None:
    error = refusal({"name": "tun0", "addresses": [given]})
    assert error.field == "addresses.0"
    assert reason in str(error)


@pytest.mark.parametrize("given", ["10.0.0.0/31", "10.0.0.1/31", "10.0.0.255/32", "2001:db8::/64", "fe80::1/64"])
def test_point_to_point_and_ipv6_have_no_broadcast(given: str) -> None:
    assert str(addr(given)) == given


@pytest.mark.parametrize(
    ("netmask", "ip", "reason"),
    [
        ("255.0.255.0", "10.0.0.1", "is not contiguous"),
        ("0.255.255.255", "10.0.0.1", "is not contiguous"),
        ("255.255.255.1", "10.0.0.1", "is not contiguous"),
        ("ffff::1", "2001:db8::1", "is not contiguous"),
        ("ffff:ffff::", "10.0.0.1", "does not go with the IPv4 address 10.0.0.1"),
        ("255.255.255.0", "2001:db8::1", "does not go with the IPv6 address 2001:db8::1"),
        ("0.0.0.0", "10.0.0.1", "would put every address of the world"),
        ("33", "10.0.0.1", "is too long a prefix"),
        ("/24", "10.0.0.1", "is not a netmask"),
        ("", "10.0.0.1", "is not a netmask"),
        ("٢٤", "10.0.0.1", "is not a netmask"),
        (24, "10.0.0.1", "is not a string"),
        (True, "10.0.0.1", "is not a string"),
        (None, "10.0.0.1", "is not a string"),
    ],
)
def test_bad_netmask_is_refused_with_the_reason(netmask: object, ip: str, reason: str) -> None:
    with pytest.raises(TunledgerError) as caught:
        values.parse_prefixlen(netmask, ipaddress.ip_address(ip))
    assert caught.value.field == "netmask"
    assert str(caught.value).startswith(f"netmask: {shown(netmask)} {reason}")


@given(some.integers(1, 32))
def test_every_contiguous_netmask_is_its_length(length: int) -> None:
    net = ipaddress.ip_network(f"0.0.0.0/{length}")
    ip = ipaddress.ip_address("10.0.0.1")
    assert values.parse_prefixlen(str(net.netmask), ip) == values.parse_prefixlen(str(length), ip) == length


@given(some.integers(0, 2**32 - 1))
def test_only_contiguous_netmasks_are_taken(mask: int) -> None:
    text = str(ipaddress.IPv4Address(mask))
    try:
        length = values.parse_prefixlen(text, ipaddress.ip_address("10.0.0.1"))
    except TunledgerError:
        assert "01" in f"{mask:032b}" or mask == 0
    else:
        assert int(ipaddress.ip_network(f"0.0.0.0/{length}").netmask) == mask


@pytest.mark.parametrize("given", [67, 0, -1, 65536, 2**64])
def test_mtu_out_of_bounds_is_refused_with_the_bounds(given: int) -> None:
    assert str(refusal({"name": "tun0", "mtu": given})) == f"mtu: {given} is out of range; expected 68 to 65535"


@pytest.mark.parametrize("given", [True, False, "1500", 1500.0, None, [1500]])
@pytest.mark.parametrize("field", ["mtu", "txqueuelen"])
def test_what_is_no_number_is_not_made_one(field: str, given: object) -> None:
    error = refusal({"name": "tun0", field: given})
    assert error.field == field
    assert str(error).startswith(f"{field}: {shown(given)} is not a whole number")


@pytest.mark.parametrize("given", [0, 1, "true", "yes", None, []])
@pytest.mark.parametrize("field", ["up", "multi_queue"])
def test_what_is_no_boolean_is_not_made_one(field: str, given: object) -> None:
    assert str(refusal({"name": "tun0", field: given})) == f"{field}: {shown(given)} is not true or false"


@pytest.mark.parametrize(
    ("document", "field", "reason"),
    [
        ({"mtu": 1279, "addresses": ["2001:db8::1/64"]}, "mtu", "1279 is under 1280, the least IPv6 works with"),
        ({"mtu": 65522, "mode": "tap"}, "mtu", "65522 is over 65521, the most a tap takes"),
        ({"addresses": ["10.0.0.1/24", "10.0.0.1/16"]}, "addresses", "has the same address twice"),
        ({"addresses": [f"10.0.{n}.1/24" for n in range(65)]}, "addresses", "65 addresses"),
        ({"addresses": "10.0.0.1/24"}, "addresses", "is not a list of addresses"),
        ({"mac": "02:00:00:00:00:01"}, "mac", "does not go with mode tun"),
        ({"mode": "tap", "mac": "03:00:00:00:00:01"}, "mac", "is a group address"),
        ({"mode": "tap", "mac": "00:00:00:00:00:00"}, "mac", "is all zeros"),
        ({"mode": "tap", "mac": "02-00-00-00-00-01"}, "mac", "is not a hardware address"),
        ({"mode": "TUN"}, "mode", '"TUN" is not "tun" or "tap"'),
        ({"mode": ["tun"]}, "mode", 'is not "tun" or "tap"'),
        ({"mode": {}}, "mode", 'is not "tun" or "tap"'),
        ({"owner": "root"}, "owner", '"root" is not a whole number'),
        ({"owner": 2**32 - 1}, "owner", "is out of range; expected 0 to 4294967294"),
        ({"group": -1}, "group", "-1 is out of range"),
        ({"txqueuelen": 1_000_001}, "txqueuelen", "is out of range"),
        ({"processing": True}, "processing", "true is not an object"),
        ({"processing": {"runing": True}}, "processing.runing", "unknown field; known here: running"),
        ({"processing": {"running": 1}}, "processing.running", "1 is not true or false"),
        ({"adress": "10.0.0.1"}, "adress", "unknown field; known here: name, mode, addresses"),
        ({"labels": {"Big": "x"}}, "labels", '"Big" is not a label key'),
        ({"labels": {"a": 1}}, "labels.a", "1 is not a string"),
        ({"labels": {str(n): "" for n in range(33)}}, "labels", "33 labels"),
        ({"labels": []}, "labels", "is not an object of strings"),
        ({"description": "two\nlines"}, "description", r'"two\nlines" is not a line'),
        ({"description": "x" * 257}, "description", "is not a line of at most 256"),
    ],
    ids=str,
)
def test_bad_spec_names_the_field_and_the_reason(document: dict[str, object], field: str, reason: str) -> None:
    error = refusal({"name": "tun0", **document})
    assert error.field == field
    assert str(error).startswith(f"{field}: ")
    assert reason in str(error)


def test_a_spec_needs_a_name_and_nothing_else() -> None:
    assert str(refusal({"mtu": 1500})) == 'name: missing; expected one such as "tun0"'
    minimal = parse_spec({"name": "tun0"})
    assert (minimal.mode, minimal.mtu, minimal.up, minimal.addresses) == (Mode.TUN, 1500, True, ())


def test_long_values_are_cut_in_messages() -> None:
    assert shown(LONG) == '"' + "x" * 60 + "..."
    assert len(str(refusal({"name": LONG}))) < 200


@pytest.mark.parametrize("mtu", [68, 1280, 65535])
def test_mtu_bounds_belong_to_it(mtu: int) -> None:
    assert spec(mtu=mtu).mtu == mtu


ADDRESSES = some.builds(
    lambda ip, length: f"{ip}/{length}", some.ip_addresses(v=4), some.integers(1, 32)
) | some.builds(lambda ip, length: f"{ip}/{length}", some.ip_addresses(v=6), some.integers(1, 128))


@given(ADDRESSES)
def test_every_address_is_taken_as_it_is_or_refused(text: str) -> None:
    found: tuple[object, object]
    try:
        address = values.parse_cidr(text, "address")
    except TunledgerError as refused:
        found = (refused.code, refused.field)
    else:
        check_taken(address, text)
        return
    assert found == (ErrorCode.INVALID_FIELD, "address")


def check_taken(address: Address, text: str) -> None:
    assert str(address) == text
    assert address.ip in address.network
    assert (address.ip.is_loopback, address.ip.is_multicast, address.ip.is_unspecified) == (False, False, False)


JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=20),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = some.sampled_from(["mode", "addresses", "mtu", "up", "txqueuelen", "owner", "mac", "processing", "labels", "x"])


@given(some.dictionaries(KEYS, JSON), JSON)
def test_any_json_at_all_is_a_spec_or_an_invalid_field(document: dict[str, object], called: object) -> None:
    try:
        parsed = parse_spec({"name": called, **document})
    except TunledgerError as refused:
        found = (refused.code, bool(refused.field), refused.retry)
    else:
        assert parse_spec(spec_to_json(parsed)) == parsed
        return
    assert found == (ErrorCode.INVALID_FIELD, True, False)


def test_spec_goes_through_json_unchanged_with_every_field() -> None:
    full = spec(
        mode="tap",
        addresses=["10.0.0.1/24", "2001:db8::1/64"],
        mtu=1400,
        up=False,
        txqueuelen=0,
        owner=0,
        group=7,
        multi_queue=True,
        mac="02:00:00:00:00:AB",
        processing={"running": True},
        description="lab",
        labels={"b": "2", "a": "1"},
    )
    document = spec_to_json(full)
    assert parse_spec(document) == full
    assert set(document) == set(full.__struct_fields__)
    assert (document["mac"], list(document["labels"])) == ("02:00:00:00:00:ab", ["a", "b"])
    payload = msgspec.json.encode(full, enc_hook=_encode_value)
    assert msgspec.json.decode(payload, type=type(full), dec_hook=_decode_value) == full
    assert msgspec.json.decode(payload) == document


def test_changes_are_dotted_paths_with_both_values() -> None:
    old, new = spec_to_json(spec(mtu=1500)), spec_to_json(spec(mtu=1400, processing={"running": True}))
    assert changes(old, new) == [
        {"path": "mtu", "old": 1500, "new": 1400},
        {"path": "processing.running", "old": False, "new": True},
    ]
    assert changes(old, old) == []
    assert {"path": "name", "old": None, "new": "tun0"} in changes(None, new)


def test_addresses_do_not_change_and_compare_by_value() -> None:
    one = addr("10.0.0.1/24")
    with pytest.raises(AttributeError):
        one.prefixlen = 8
    assert one == Address(ipaddress.ip_address("10.0.0.1"), 24)
    assert {one: 1}[addr("10.0.0.1/24")] == 1
    assert one != addr("10.0.0.1/16")
    assert one != "10.0.0.1/24"
