"""Every field of the golden packets, checked against values read off the hex by hand."""

from ipaddress import IPv4Address, IPv6Address

import pytest

from service.packet.ethernet import EthernetHeader, VlanTag
from service.packet.ip import (
    FragmentExtension,
    IPv4Header,
    IPv6Header,
    OptionsExtension,
    RoutingExtension,
    SkippedExtension,
)
from service.packet.options import Option, Options, split_ipv4_or_tcp, split_ipv6
from service.packet.parse import Frame, Packet, parse, parse_frame
from service.packet.reason import Malformed, MalformedReason
from service.packet.transport import Echo, IcmpHeader, Icmpv6Header, TcpFlags, TcpHeader, UdpHeader
from tests.packet import golden, malformed

NO_OPTIONS = Options((), intact=True)


def parsed(name: str) -> Packet:
    packet = parse(golden.BY_NAME[name])
    assert isinstance(packet, Packet)
    return packet


def test_ipv4_tcp_with_data_gives_every_field() -> None:
    assert parsed("ipv4_tcp_data") == Packet(
        ip=IPv4Header(
            version=4,
            ihl=5,
            dscp=46,
            ecn=1,
            total_length=45,
            identification=0x1234,
            reserved_flag=False,
            dont_fragment=True,
            more_fragments=False,
            fragment_offset=0,
            ttl=64,
            protocol=6,
            checksum=0x13DC,
            source=IPv4Address("10.0.0.2"),
            destination=IPv4Address("10.0.0.1"),
            options=NO_OPTIONS,
        ),
        protocol=6,
        fragment_offset=0,
        more_fragments=False,
        transport_offset=20,
        transport_length=25,
        transport=TcpHeader(
            source_port=40000,
            destination_port=80,
            sequence=1,
            acknowledgment=2,
            data_offset=5,
            flags=TcpFlags.PSH | TcpFlags.ACK,
            window=512,
            checksum=0x32CC,
            urgent=0,
            options=NO_OPTIONS,
        ),
        payload_offset=40,
        payload_length=5,
    )


def test_tcp_options_are_split() -> None:
    transport = parsed("ipv4_tcp_syn").transport
    assert isinstance(transport, TcpHeader)
    assert transport.flags == TcpFlags.SYN
    assert transport.header_length == 40
    assert transport.options == Options(
        (
            Option(2, bytes.fromhex("05b4")),
            Option(4, b""),
            Option(8, bytes.fromhex("000003e800000000")),
            Option(1, b""),
            Option(3, b"\x07"),
        ),
        intact=True,
    )


def test_ipv4_options_are_split() -> None:
    packet = parsed("ipv4_igmp_router_alert")
    assert isinstance(packet.ip, IPv4Header)
    assert packet.ip.header_length == 24
    assert packet.ip.options == Options((Option(0x94, b"\0\0"),), intact=True)
    assert (packet.protocol, packet.transport, packet.payload_offset, packet.payload_length) == (2, None, 24, 8)


def test_udp_and_icmp_fields() -> None:
    udp = parsed("ipv4_udp")
    assert udp.transport == UdpHeader(40112, 53, 39, 0x7C43)
    assert (udp.payload_offset, udp.payload_length) == (28, 31)
    echo = parsed("ipv4_echo_request")
    assert echo.transport == IcmpHeader(8, 0, 0x00E5, 0x00070001, Echo(7, 1))
    assert (echo.payload_offset, echo.payload_length) == (28, 56)
    assert parsed("ipv4_need_to_fragment").transport == IcmpHeader(3, 4, 0x5A77, 1400, None)
    assert parsed("ipv6_echo_request").transport == Icmpv6Header(128, 0, 0x8E65, 0x00070001, Echo(7, 1))
    assert parsed("ipv6_mld_report").transport == Icmpv6Header(143, 0, 0x6F0E, 1, None)


def test_udp_payload_ends_with_its_length_not_with_the_packet() -> None:
    surplus = next(octets for name, _, octets in malformed.TOLERATED if name == "ipv4_udp_surplus")
    packet = parse(surplus)
    assert isinstance(packet, Packet)
    assert (packet.transport_length, packet.payload_length) == (12, 0)


def test_ipv4_fragments() -> None:
    first, later = parsed("ipv4_first_fragment"), parsed("ipv4_next_fragment")
    assert (first.fragment_offset, first.more_fragments, first.is_fragment) == (0, True, True)
    assert first.transport == UdpHeader(40112, 53, 0x0BA8, 0xABCD)
    assert first.payload_length == 8
    assert (later.fragment_offset, later.more_fragments, later.transport) == (16, True, None)
    assert (later.payload_offset, later.payload_length) == (20, 16)


def test_ipv6_fixed_header_gives_every_field() -> None:
    packet = parsed("ipv6_tcp_syn")
    assert packet.ip == IPv6Header(
        version=6,
        traffic_class=0,
        flow_label=0x12345,
        payload_length=20,
        jumbo_payload_length=None,
        next_header=6,
        hop_limit=64,
        source=IPv6Address("fd00::2"),
        destination=IPv6Address("fd00::1"),
        extensions=(),
    )
    octets = bytearray(golden.BY_NAME["ipv6_tcp_syn"])
    octets[0:2] = b"\x6b\x91"
    marked = parse(octets)
    assert isinstance(marked, Packet)
    assert isinstance(marked.ip, IPv6Header)
    assert (marked.ip.traffic_class, marked.ip.dscp, marked.ip.ecn) == (0xB9, 46, 1)
    assert marked.ip.flow_label == 0x12345


def test_ipv6_extensions_are_listed_in_order() -> None:
    packet = parsed("ipv6_all_extensions")
    assert isinstance(packet.ip, IPv6Header)
    pad = Options((Option(1, bytes(4)),), intact=True)
    assert packet.ip.extensions == (
        OptionsExtension(0, 60, 40, 8, pad),
        OptionsExtension(60, 43, 48, 8, pad),
        RoutingExtension(44, 56, 8, routing_type=4, segments_left=0),
        FragmentExtension(51, 64, 8, 0, more_fragments=False, identification=7, fragment_length=44),
        SkippedExtension(51, 6, 72, 24),
    )
    assert (packet.protocol, packet.transport_offset, packet.transport_length) == (6, 96, 20)
    assert not packet.is_fragment
    skipped = parsed("ipv6_skipped_extensions")
    assert isinstance(skipped.ip, IPv6Header)
    assert [extension.next_header for extension in skipped.ip.extensions] == [139, 140, 59]


def test_ipv6_fragment_says_where_it_belongs() -> None:
    packet = parsed("ipv6_last_fragment")
    assert isinstance(packet.ip, IPv6Header)
    assert packet.ip.extensions == (
        FragmentExtension(17, 40, 8, 16, more_fragments=False, identification=0xDEADBEEF, fragment_length=5),
    )
    assert (packet.protocol, packet.transport, packet.payload_offset, packet.payload_length) == (17, None, 48, 5)


def test_jumbogram_takes_its_length_from_the_option() -> None:
    octets = next(octets for name, _, octets in malformed.TOLERATED if name == "ipv6_jumbo_udp")
    packet = parse(octets)
    assert isinstance(packet, Packet)
    assert isinstance(packet.ip, IPv6Header)
    assert (packet.ip.payload_length, packet.ip.jumbo_payload_length) == (0, 65536)
    assert packet.transport == UdpHeader(1, 2, 0, 0)
    assert packet.payload_length == 65536 - 8 - 8


def test_offsets_count_from_the_start_of_the_buffer() -> None:
    octets = golden.BY_NAME["ipv4_udp"]
    packet = parse(b"\0" * 10 + octets + b"\0" * 10, len(octets), 10)
    assert isinstance(packet, Packet)
    assert (packet.transport_offset, packet.payload_offset) == (30, 38)


def test_length_beyond_the_buffer_reads_as_truncated() -> None:
    packet = parse(golden.BY_NAME["ipv4_udp"][:30], 59)
    assert isinstance(packet, Malformed)
    assert packet.reason is MalformedReason.IPV4_BAD_TOTAL_LENGTH
    frame = parse_frame(bytes.fromhex(golden.MACS + "0800"), 60)
    assert isinstance(frame, Malformed)
    assert frame.reason is MalformedReason.EMPTY


def test_malformed_detail_names_both_values() -> None:
    packet = parse(golden.BY_NAME["ipv4_udp"][:58])
    expected = Malformed(MalformedReason.IPV4_BAD_TOTAL_LENGTH, "total length 59, expected 20 to 58")
    assert packet == expected


def test_parsed_packet_keeps_no_hold_on_the_buffer() -> None:
    """A bytearray that something still looks into cannot be resized: parse must leave no view behind."""
    buffer = bytearray(golden.BY_NAME["ipv6_all_extensions"])
    packet = parse(buffer)
    buffer.clear()
    assert isinstance(packet, Packet)


def test_frame_with_two_tags() -> None:
    octets = next(frame.octets for frame in golden.FRAMES if frame.name == "ipv6_in_two_vlans")
    frame = parse_frame(octets)
    assert isinstance(frame, Frame)
    assert frame.ethernet == EthernetHeader(
        destination=bytes.fromhex("020000000001"),
        source=bytes.fromhex("020000000002"),
        tags=(
            VlanTag(0x88A8, 6, drop_eligible=True, vlan=100),
            VlanTag(0x8100, 0, drop_eligible=False, vlan=7),
        ),
        ethertype=0x86DD,
        header_length=22,
    )
    assert (frame.payload_offset, frame.payload_length) == (22, 40)
    assert frame.packet is not None
    assert frame.packet.payload_offset == 62


@pytest.mark.parametrize(
    ("text", "items", "intact"),
    [
        ("", (), True),
        ("01 00 ff", (Option(1, b""),), True),
        ("0204 05b4", (Option(2, b"\x05\xb4"),), True),
        ("02", (), False),
        ("01 02 01", (Option(1, b""),), False),
        ("02 00", (), False),
        ("02 05 0000", (), False),
    ],
)
def test_ipv4_and_tcp_options_stop_at_nonsense(text: str, items: tuple[Option, ...], *, intact: bool) -> None:
    assert split_ipv4_or_tcp(bytes.fromhex(text)) == Options(items, intact)


@pytest.mark.parametrize(
    ("text", "items", "intact"),
    [
        ("00 00", (Option(0, b""), Option(0, b"")), True),
        ("01 00", (Option(1, b""),), True),
        ("05 02 0000 01", (Option(5, b"\0\0"),), False),
        ("05 03 0000", (), False),
    ],
)
def test_ipv6_options_stop_at_nonsense(text: str, items: tuple[Option, ...], *, intact: bool) -> None:
    assert split_ipv6(bytes.fromhex(text)) == Options(items, intact)
