"""Octets that are no packet, at least one for every reason there is; edges of each rule come in pairs.

Like `golden`, hex only: no code of the room under test builds them.
"""

from typing import Final, NamedTuple

from service.packet.reason import MalformedReason as R
from tests.packet.golden import FD_2_TO_1, MACS


class Broken(NamedTuple):
    """A malformed packet, and why."""

    name: str
    reason: R
    octets: bytes


def _ipv4(total: int, protocol: int, rest: str, *, first: str = "45", fragment: str = "0000") -> bytes:
    header = f"{first}00 {total:04x} 1234 {fragment} 40 {protocol:02x} 0000 0a000002 0a000001"
    return bytes.fromhex(header + rest)


def _ipv6(payload: int, next_header: int, rest: str) -> bytes:
    return bytes.fromhex(f"60000000 {payload:04x} {next_header:02x} 40 {FD_2_TO_1} {rest}")


def _frame(rest: str) -> bytes:
    return bytes.fromhex(MACS + rest)


PAD_ONLY = "01 04 00000000"
NEXT_DESTINATION = f"3c00 {PAD_ONLY}"

PACKETS: Final = (
    Broken("nothing", R.EMPTY, b""),
    Broken("version_0", R.BAD_VERSION, bytes(40)),
    Broken("version_5", R.BAD_VERSION, b"\x55" + bytes(40)),
    Broken("ipv4_one_octet", R.IPV4_HEADER_TRUNCATED, b"\x45"),
    Broken("ipv4_19_octets", R.IPV4_HEADER_TRUNCATED, _ipv4(20, 50, "")[:19]),
    Broken("ipv4_options_cut", R.IPV4_HEADER_TRUNCATED, _ipv4(24, 50, "010101", first="46")),
    Broken("ipv4_ihl_4", R.IPV4_BAD_HEADER_LENGTH, _ipv4(20, 50, "", first="44")),
    Broken("ipv4_total_beyond_end", R.IPV4_BAD_TOTAL_LENGTH, _ipv4(21, 50, "")),
    Broken("ipv4_total_below_header", R.IPV4_BAD_TOTAL_LENGTH, _ipv4(19, 50, "")),
    Broken("ipv4_total_zero", R.IPV4_BAD_TOTAL_LENGTH, _ipv4(0, 6, "")),
    Broken("ipv4_ping_of_death", R.IPV4_BAD_FRAGMENT, _ipv4(36, 1, "00" * 16, fragment="1fff")),
    Broken("ipv4_fragment_one_octet_over", R.IPV4_BAD_FRAGMENT, _ipv4(24, 1, "00" * 4, fragment="1ffd")),
    Broken("ipv6_39_octets", R.IPV6_HEADER_TRUNCATED, _ipv6(0, 59, "")[:39]),
    Broken("ipv6_payload_beyond_end", R.IPV6_BAD_PAYLOAD_LENGTH, _ipv6(9, 59, "00" * 8)),
    Broken("ipv6_zero_without_jumbo", R.IPV6_BAD_PAYLOAD_LENGTH, _ipv6(0, 0, f"3b00 {PAD_ONLY}")),
    Broken("ipv6_jumbo_and_payload", R.IPV6_BAD_PAYLOAD_LENGTH, _ipv6(8, 0, "3b00 c204 00010000")),
    Broken("ipv6_jumbo_too_small", R.IPV6_BAD_PAYLOAD_LENGTH, _ipv6(0, 0, "3b00 c204 0000ffff" + "00" * 65527)),
    Broken("ipv6_jumbo_zero", R.IPV6_BAD_PAYLOAD_LENGTH, _ipv6(0, 0, "3b00 c204 00000000")),
    Broken("ipv6_jumbo_beyond_end", R.IPV6_BAD_PAYLOAD_LENGTH, _ipv6(0, 0, "3b00 c204 00010000" + "00" * 65527)),
    Broken("ipv6_no_extension", R.IPV6_EXTENSION_TRUNCATED, _ipv6(0, 60, "")),
    Broken("ipv6_no_hop_by_hop", R.IPV6_EXTENSION_TRUNCATED, _ipv6(0, 0, "")),
    Broken("ipv6_hop_by_hop_beyond_end", R.IPV6_EXTENSION_TRUNCATED, _ipv6(8, 0, f"3b01 {PAD_ONLY}")),
    Broken("ipv6_extension_7_octets", R.IPV6_EXTENSION_TRUNCATED, _ipv6(7, 60, "3b000104000000")),
    Broken("ipv6_extension_beyond_payload", R.IPV6_EXTENSION_TRUNCATED, _ipv6(8, 60, "3b01" + "00" * 14)),
    Broken("ipv6_fragment_header_cut", R.IPV6_EXTENSION_TRUNCATED, _ipv6(7, 44, "00" * 7)),
    Broken("ipv6_ah_beyond_payload", R.IPV6_EXTENSION_TRUNCATED, _ipv6(8, 51, "3b01" + "00" * 6)),
    Broken("ipv6_ah_below_fixed_part", R.IPV6_EXTENSION_TRUNCATED, _ipv6(8, 51, "3b00" + "00" * 6)),
    Broken("ipv6_nine_extensions", R.IPV6_TOO_MANY_EXTENSIONS, _ipv6(72, 60, NEXT_DESTINATION * 9)),
    Broken(
        "ipv6_nine_with_hop_by_hop", R.IPV6_TOO_MANY_EXTENSIONS, _ipv6(72, 0, NEXT_DESTINATION * 8 + "3b00" + PAD_ONLY)
    ),
    Broken("ipv6_late_hop_by_hop", R.IPV6_MISPLACED_HOP_BY_HOP, _ipv6(16, 60, f"0000 {PAD_ONLY} 3b00 {PAD_ONLY}")),
    Broken("ipv6_two_hop_by_hop", R.IPV6_MISPLACED_HOP_BY_HOP, _ipv6(16, 0, f"0000 {PAD_ONLY} 3b00 {PAD_ONLY}")),
    Broken("ipv6_option_overruns", R.IPV6_BAD_OPTIONS, _ipv6(8, 0, "3b00 01 05 00000000")),
    Broken("ipv6_option_without_length", R.IPV6_BAD_OPTIONS, _ipv6(8, 0, "3b00 01 03 000000 05")),
    Broken("ipv6_jumbo_of_3", R.IPV6_BAD_OPTIONS, _ipv6(0, 0, "3b00 c203 000000 00")),
    Broken("ipv6_jumbo_twice", R.IPV6_BAD_OPTIONS, _ipv6(0, 0, "3b01 c204 00010000 c204 00010000 0100")),
    Broken(
        "ipv6_jumbo_twice_then_many",
        R.IPV6_BAD_OPTIONS,
        _ipv6(0, 0, "3b05 c204 00000000 c204 00000000" + "00" * 34),
    ),
    Broken("ipv6_33_options", R.IPV6_TOO_MANY_OPTIONS, _ipv6(40, 0, "3b04" + "00" * 30 + "0104" + "00" * 4 + "0000")),
    Broken("ipv6_option_33_overruns", R.IPV6_TOO_MANY_OPTIONS, _ipv6(40, 0, "3b04" + "00" * 32 + "01ff00000000")),
    Broken("ipv6_fragment_not_of_8", R.IPV6_BAD_FRAGMENT, _ipv6(17, 44, "3b000011 00000000" + "00" * 9)),
    Broken("ipv6_fragment_beyond", R.IPV6_BAD_FRAGMENT, _ipv6(16, 44, "3b00fff8 00000000" + "00" * 8)),
    Broken(
        "ipv6_fragment_beyond_by_extension",
        R.IPV6_BAD_FRAGMENT,
        _ipv6(23, 60, f"2c00 {PAD_ONLY} 3b00fff8 00000000" + "00" * 7),
    ),
    Broken(
        "ipv6_jumbo_fragment",
        R.IPV6_BAD_FRAGMENT,
        _ipv6(0, 0, "2c00 c204 00010000 3b000000 00000000" + "00" * 65520),
    ),
    Broken("ipv4_tcp_19_octets", R.TCP_TRUNCATED, _ipv4(39, 6, "00" * 12 + "50" + "00" * 7)),
    Broken("ipv6_tcp_19_octets", R.TCP_TRUNCATED, _ipv6(19, 6, "00" * 12 + "50" + "00" * 7)),
    Broken("ipv4_tcp_tiny_fragment", R.TCP_TRUNCATED, _ipv4(28, 6, "00" * 8, fragment="2000")),
    Broken("ipv4_tcp_offset_4", R.TCP_BAD_DATA_OFFSET, _ipv4(40, 6, "00" * 12 + "40" + "00" * 7)),
    Broken("ipv6_tcp_offset_4", R.TCP_BAD_DATA_OFFSET, _ipv6(20, 6, "00" * 12 + "40" + "00" * 7)),
    Broken("ipv4_tcp_offset_beyond", R.TCP_BAD_DATA_OFFSET, _ipv4(40, 6, "00" * 12 + "60" + "00" * 11)),
    Broken("ipv6_tcp_offset_beyond", R.TCP_BAD_DATA_OFFSET, _ipv6(20, 6, "00" * 12 + "60" + "00" * 11)),
    Broken("ipv4_udp_7_octets", R.UDP_TRUNCATED, _ipv4(27, 17, "0001 0002 0008 0000")),
    Broken("ipv6_udp_7_octets", R.UDP_TRUNCATED, _ipv6(7, 17, "0001 0002 0008 0000")),
    Broken("ipv4_udp_length_7", R.UDP_BAD_LENGTH, _ipv4(28, 17, "0001 0002 0007 0000")),
    Broken("ipv4_udp_length_0", R.UDP_BAD_LENGTH, _ipv4(28, 17, "0001 0002 0000 0000")),
    Broken("ipv4_udp_length_beyond", R.UDP_BAD_LENGTH, _ipv4(28, 17, "0001 0002 0009 0000 00")),
    Broken("ipv4_udp_first_fragment_length_7", R.UDP_BAD_LENGTH, _ipv4(28, 17, "0001 0002 0007 0000", fragment="2000")),
    Broken("ipv6_udp_length_0", R.UDP_BAD_LENGTH, _ipv6(8, 17, "0001 0002 0000 0000")),
    Broken("ipv6_udp_length_beyond", R.UDP_BAD_LENGTH, _ipv6(8, 17, "0001 0002 0009 0000 00")),
    Broken("ipv4_icmp_7_octets", R.ICMP_TRUNCATED, _ipv4(27, 1, "00" * 8)),
    Broken("ipv6_icmpv6_7_octets", R.ICMPV6_TRUNCATED, _ipv6(7, 58, "00" * 8)),
)

FRAMES: Final = (
    Broken("frame_of_nothing", R.EMPTY, b""),
    Broken("frame_13_octets", R.ETHERNET_TRUNCATED, _frame("08")),
    Broken("frame_tag_cut", R.ETHERNET_TRUNCATED, _frame("8100 000108")),
    Broken("frame_five_tags", R.ETHERNET_TOO_MANY_TAGS, _frame("8100 0001" * 5 + "0800")),
    Broken("frame_ipv6_as_ipv4", R.BAD_VERSION, _frame("0800") + _ipv6(0, 59, "")),
    Broken("frame_ipv4_as_ipv6", R.BAD_VERSION, _frame("86dd") + _ipv4(20, 50, "")),
    Broken("frame_without_ip", R.EMPTY, _frame("0800")),
    Broken("frame_ipv4_cut", R.IPV4_HEADER_TRUNCATED, _frame("0800") + _ipv4(20, 50, "")[:19]),
)

# Right behind the edges above: each must be let pass.
TOLERATED: Final = (
    ("ipv4_fragment_to_the_last_octet", "ipv4.fragment", _ipv4(23, 1, "00" * 3, fragment="1ffd")),
    ("ipv4_padding", "ipv4.other", _ipv4(20, 50, "ff" * 26)),
    ("ipv4_bad_option", "ipv4.other", _ipv4(24, 50, "07ff0000", first="46")),
    ("ipv4_udp_surplus", "ipv4.udp", _ipv4(32, 17, "0001 0002 0008 0000 ffffffff")),
    ("ipv4_icmpv6", "ipv4.other", _ipv4(20, 58, "")),
    ("ipv4_evil_bit", "ipv4.other", _ipv4(20, 50, "", fragment="8000")),
    ("ipv6_icmp", "ipv6.other", _ipv6(0, 1, "")),
    ("ipv6_padding", "ipv6.other", _ipv6(0, 59, "ff" * 6)),
    ("ipv6_eight_extensions", "ipv6.other", _ipv6(64, 60, NEXT_DESTINATION * 7 + f"3b00 {PAD_ONLY}")),
    ("ipv6_32_options", "ipv6.other", _ipv6(40, 0, "3b04" + "00" * 31 + "0105" + "00" * 5)),
    ("ipv6_bad_destination_option", "ipv6.other", _ipv6(8, 60, "3b00 01ff 00000000")),
    ("ipv6_fragment_to_the_last_octet", "ipv6.fragment", _ipv6(15, 44, "3b00fff8 00000000" + "00" * 7)),
    ("ipv6_jumbo_udp", "ipv6.udp", _ipv6(0, 0, "1100 c204 00010000 0001 0002 0000 0000" + "00" * 65520)),
    ("ipv6_jumbo_tcp", "ipv6.tcp", _ipv6(0, 0, "0600 c204 00010000" + "00" * 12 + "50" + "00" * 65515)),
)
