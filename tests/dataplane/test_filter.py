"""Rules against a slow reading of them, and the bucket by hand."""

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.dataplane.processors.filter import Filter
from service.packet import build
from service.packet.flowkey import flow_ends, look_at
from tests.dataplane.chains import FakeContext, run
from tests.packet import golden, strategies

HOST, PEER = bytes([10, 0, 0, 1]), bytes([192, 0, 2, 7])
HOST6, PEER6 = ipaddress.ip_address("2001:db8::1").packed, ipaddress.ip_address("fd00::7").packed
DNS = build.udp(HOST, 4000, PEER, 53, b"?")
ANSWER = build.udp(PEER, 53, HOST, 4000, b"!")
WEB = build.tcp(HOST, 4001, PEER, 443)
PING = build.echo(HOST, PEER, 53, 1)
WEB6 = build.tcp(HOST6, 4001, PEER6, 443)
PART = DNS[:6] + b"\x20\x00" + DNS[8:]
ALL = [DNS, ANSWER, WEB, PING, WEB6, PART, b"", b"\x45"]


def left(rule: dict[str, Any], packets: list[bytes] = ALL, direction: str = "from_kernel") -> list[bytes]:
    stage = Filter({"rules": [{"action": "drop", **rule}], "default": "pass"}, FakeContext())
    first = run(stage, packets, direction=direction).left()
    assert run(stage, packets, direction=direction).left() == first, "the second time from memory"
    return first


@pytest.mark.parametrize(
    ("rule", "dropped"),
    [
        ({}, ALL),
        ({"protocol": "udp"}, [DNS, ANSWER, PART]),
        ({"protocol": "tcp"}, [WEB, WEB6]),
        ({"protocol": 1}, [PING]),
        ({"port": "53"}, [DNS, ANSWER]),
        ({"port": 53}, [DNS, ANSWER]),
        ({"port": "0-65535"}, [DNS, ANSWER, WEB, WEB6]),
        ({"source_port": "53"}, [ANSWER]),
        ({"destination_port": "50-500"}, [DNS, WEB, WEB6]),
        ({"network": "192.0.2.0/24"}, [DNS, ANSWER, WEB, PING, PART]),
        ({"source": "10.0.0.0/8"}, [DNS, WEB, PING, PART]),
        ({"destination": "10.0.0.1/32", "protocol": "udp"}, [ANSWER]),
        ({"network": "fd00::/8"}, [WEB6]),
        ({"network": "0.0.0.0/0"}, [DNS, ANSWER, WEB, PING, PART]),
        ({"network": "::/0"}, [WEB6]),
        ({"direction": "to_kernel"}, []),
        ({"direction": "from_kernel", "protocol": "tcp"}, [WEB, WEB6]),
    ],
)
def test_a_rule_drops_where_all_that_it_names_matches(rule: dict[str, Any], dropped: list[bytes]) -> None:
    assert left(rule) == [packet for packet in ALL if packet not in dropped]


def test_the_first_matching_rule_decides_and_default_without_one() -> None:
    rules = [{"action": "pass", "port": "53"}, {"action": "drop", "protocol": "udp"}]
    assert run(Filter({"rules": rules, "default": "pass"}, FakeContext()), [DNS, PART, WEB]).left() == [DNS, WEB]
    batch = run(Filter({"rules": rules, "default": "drop"}, FakeContext()), [DNS, PART, WEB, b""])
    assert batch.left() == [DNS]
    assert batch.dropped == {"filtered": 3}


def test_a_rate_drops_what_is_beyond_it() -> None:
    stage = Filter(
        {"rules": [{"action": "drop", "protocol": "udp", "rate_pps": 100}], "default": "pass"}, FakeContext()
    )
    batch = run(stage, [DNS] * 15 + [WEB] * 20, time_ns=10**9)
    assert batch.left() == [DNS] * 10 + [WEB] * 20
    assert batch.dropped == {"rate": 5}
    passed = 0
    for now in range(10**9, 3 * 10**9, 10**8 // 3):
        passed += len(run(stage, [DNS] * 50, time_ns=now).left())
    assert 190 <= passed <= 201
    assert run(stage, [DNS], time_ns=0).left() == [], "a clock that was set back gives nothing"
    assert len(run(stage, [DNS] * 50, time_ns=10**12).left()) == 10


def test_what_takes_a_token_goes_on_to_the_next_rule() -> None:
    rules = [{"action": "drop", "rate_pps": 10}, {"action": "drop", "port": "53"}, {"action": "pass"}]
    batch = run(Filter({"rules": rules, "default": "drop"}, FakeContext()), [DNS, WEB, WEB], time_ns=10**9)
    assert batch.dropped == {"filtered": 1, "rate": 2}
    within = [{"action": "pass", "rate_pps": 10}]  # passes only what is too much
    assert run(Filter({"rules": within, "default": "drop"}, FakeContext()), [DNS, WEB], time_ns=10**9).left() == [WEB]


ports = st.none() | st.sampled_from(("53", "1-1023", "0-65535", "443", "4000-5000"))
networks = st.none() | st.sampled_from(
    ("0.0.0.0/0", "10.0.0.0/8", "192.168.0.0/16", "::/0", "fe80::/10", "2001:db8::/32")
)
rule_options = st.fixed_dictionaries(
    {
        "action": st.sampled_from(("pass", "drop")),
        "direction": st.sampled_from(("from_kernel", "to_kernel", "both")),
        "network": networks, "source": networks, "destination": networks,
        "protocol": st.none() | st.sampled_from(("icmp", "icmpv6", "tcp", "udp", 50)),
        "port": ports, "source_port": ports, "destination_port": ports, "rate_pps": st.none(),
    }
)  # fmt: skip


def slowly(packet: bytes, direction: str, rules: list[dict[str, Any]], default: str) -> str:
    entry = look_at(packet, "tun")
    for rule in rules:
        if rule["direction"] not in ("both", direction):
            continue
        wanted = {key: value for key, value in rule.items() if key not in ("action", "direction") and value is not None}
        if entry.flow is None:
            if not wanted:
                return str(rule["action"])
            continue
        ends = flow_ends(entry.flow)
        both = [(ends.first, ends.first_port), (ends.second, ends.second_port)]
        source, to = reversed(both) if entry.swapped else both
        checks = []
        for key, value in wanted.items():
            among = {"source": [source], "destination": [to]}.get(key.removesuffix("_port"), [source, to])
            if key == "protocol":
                number = {"icmp": 1, "icmpv6": 58, "tcp": 6, "udp": 17}.get(value, value)
                checks.append(ends.protocol == number)
            elif key.endswith("port"):
                low, _, high = value.partition("-")
                hit = any(port and int(low) <= port <= int(high or low) for _, port in among)
                checks.append(ends.protocol in (6, 17) and hit)
            else:
                checks.append(any(ipaddress.ip_address(a) in ipaddress.ip_network(value) for a, _ in among))
        if all(checks):
            return str(rule["action"])
    return default


@given(
    st.lists(rule_options, max_size=5), st.sampled_from(("pass", "drop")),
    st.lists(st.sampled_from([packet.octets for packet in golden.PACKETS]) | strategies.octets, max_size=8),
    st.sampled_from(("from_kernel", "to_kernel")),
)  # fmt: skip
def test_rules_do_what_a_slow_reading_of_them_says(
    rules: list[dict[str, Any]], default: str, packets: list[bytes], direction: str
) -> None:
    stage = Filter({"rules": rules, "default": default}, FakeContext())
    wanted = [packet for packet in packets if slowly(packet, direction, rules, default) == "pass"]
    assert run(stage, packets, direction=direction).left() == wanted
    assert run(stage, packets, direction=direction).left() == wanted
