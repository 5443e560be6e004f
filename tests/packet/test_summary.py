"""Lines that the golden packets do not give. Those are in `golden`, next to their octets."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.packet.ip import IPv4Header
from service.packet.options import split_ipv4_or_tcp
from service.packet.parse import Packet, parse
from service.packet.reason import Malformed, MalformedReason
from service.packet.summary import summary
from service.packet.transport import IcmpHeader, Icmpv6Header, TcpFlags, TcpHeader
from tests.packet import golden


def parsed(name: str) -> Packet:
    packet = parse(golden.BY_NAME[name])
    assert isinstance(packet, Packet)
    return packet


def tcp_line(flags: TcpFlags, options: str = "", sequence: int = 1, length: int = 0) -> str:
    """Return what `summary` says behind the addresses of a segment with these fields."""
    packet = parsed("ipv4_tcp_data")
    assert isinstance(packet.transport, TcpHeader)
    transport = replace(
        packet.transport, flags=flags, sequence=sequence, options=split_ipv4_or_tcp(bytes.fromhex(options))
    )
    return summary(replace(packet, transport=transport, payload_length=length)).split(": ", 1)[1]


def test_malformed_gives_reason_and_detail() -> None:
    assert summary(parse(b"")) == "malformed empty: 0 octets"
    assert summary(parse(golden.BY_NAME["ipv4_udp"][:10])) == (
        "malformed ipv4_header_truncated: 10 octets, IPv4 needs 20"
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (TcpFlags(0), "Flags [none], win 512, length 0"),
        (TcpFlags.SYN | TcpFlags.ACK, "Flags [S.], seq 1, ack 2, win 512, length 0"),
        (TcpFlags.FIN | TcpFlags.ACK, "Flags [F.], seq 1, ack 2, win 512, length 0"),
        (TcpFlags.RST, "Flags [R], seq 1, win 512, length 0"),
        (TcpFlags.ACK, "Flags [.], ack 2, win 512, length 0"),
        (TcpFlags.URG | TcpFlags.ACK, "Flags [.U], ack 2, win 512, urg 0, length 0"),
        (TcpFlags.SYN | TcpFlags.ECE | TcpFlags.CWR, "Flags [SEW], seq 1, win 512, length 0"),
        (TcpFlags.ACK | TcpFlags.AE, "Flags [.e], ack 2, win 512, length 0"),
    ],
)
def test_tcp_flags_read_as_in_tcpdump(flags: TcpFlags, expected: str) -> None:
    assert tcp_line(flags) == expected


def test_tcp_sequence_wraps() -> None:
    line = tcp_line(TcpFlags.PSH | TcpFlags.ACK, sequence=2**32 - 2, length=5)
    assert line == "Flags [P.], seq 4294967294:3, ack 2, win 512, length 5"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("0101 050a 00000001 00000002", "nop,nop,sack 1 {1:2}"),
        ("fd04 abcd", "unknown-253 0xabcd"),
        ("02ff 0000", "bad opt"),
        ("0103 0200", "nop,unknown-3 0x"),
        ("0203 0100", "unknown-2 0x01"),
    ],
)
def test_tcp_options_read_as_in_tcpdump(options: str, expected: str) -> None:
    assert f"options [{expected}]" in tcp_line(TcpFlags.ACK, options)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (IcmpHeader(3, 3, 0, 0, None), "ICMP port unreachable, length 64"),
        (IcmpHeader(3, 15, 0, 0, None), "ICMP unreachable, code 15, length 64"),
        (IcmpHeader(11, 0, 0, 0, None), "ICMP time exceeded in-transit, length 64"),
        (IcmpHeader(42, 0, 0, 0, None), "ICMP type 42, length 64"),
        (Icmpv6Header(2, 0, 0, 1280, None), "ICMP6, packet too big, mtu 1280, length 64"),
        (Icmpv6Header(1, 4, 0, 0, None), "ICMP6, destination unreachable, port unreachable, length 64"),
        (Icmpv6Header(135, 0, 0, 0, None), "ICMP6, neighbor solicitation, length 64"),
        (Icmpv6Header(200, 1, 0, 0, None), "ICMP6, type 200, code 1, length 64"),
    ],
)
def test_icmp_messages_are_named(header: IcmpHeader | Icmpv6Header, expected: str) -> None:
    line = summary(replace(parsed("ipv4_echo_request"), transport=header))
    assert line == f"IP 10.0.0.2 > 10.0.0.1: {expected}"


def test_ipv4_protocol_59_is_only_a_number() -> None:
    packet = replace(parsed("ipv4_igmp_router_alert"), protocol=59)
    assert isinstance(packet.ip, IPv4Header)
    assert summary(packet) == "IP 10.0.0.2 > 224.0.0.251: ip-proto-59, length 8"


@given(st.text() | st.sampled_from(("\x1b[2J", "a\nb", "\u202egnp", "\ud800")))
def test_no_control_character_gets_out(detail: str) -> None:
    line = summary(Malformed(MalformedReason.EMPTY, detail))
    assert line.isprintable()
    assert line.startswith("malformed empty: ")
