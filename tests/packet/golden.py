"""Packets built by hand, one for each thing a header can say, with the class and the line they must give.

Octets only, written as hex by header, so that a reader can follow them with the RFC open. No code of the room
under test may build them.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Golden:
    """A valid packet: where its layout is defined, its class, its line, its octets."""

    name: str
    source: str
    class_name: str
    line: str
    octets: bytes


def _golden(name: str, source: str, class_name: str, line: str, *headers: str) -> Golden:
    return Golden(name, source, class_name, line, bytes.fromhex("".join(headers)))


DNS = "000101000001000000000000 076578616d706c65036f726700 0001 0001 0000"
ECHO_DATA = bytes(range(56)).hex()
FD_2_TO_1 = "fd000000000000000000000000000002 fd000000000000000000000000000001"

PACKETS: Final = (
    _golden(
        "ipv4_udp",
        "RFC 791, RFC 768",
        "ipv4.udp",
        "IP 10.0.0.2.40112 > 10.0.0.1.53: UDP, length 31",
        "4500003b 12344000 4011147c 0a000002 0a000001",
        "9cb00035 00277c43",
        DNS,
    ),
    _golden(
        "ipv4_tcp_syn",
        "RFC 791, RFC 9293, RFC 7323 (timestamps, window scale), RFC 2018 (SACK)",
        "ipv4.tcp",
        "IP 10.0.0.2.40000 > 10.0.0.1.80: Flags [S], seq 1, win 64240, "
        "options [mss 1460,sackOK,TS val 1000 ecr 0,nop,wscale 7], length 0",
        "4500003c 12344000 40061486 0a000002 0a000001",
        "9c400050 00000001 00000000 a002faf0 98930000",
        "020405b4 0402 080a000003e800000000 01 030307",
    ),
    _golden(
        "ipv4_tcp_data",
        "RFC 791, RFC 9293, RFC 2474 (DSCP), RFC 3168 (ECN)",
        "ipv4.tcp",
        "IP 10.0.0.2.40000 > 10.0.0.1.80: Flags [P.], seq 1:6, ack 2, win 512, length 5",
        "45b9002d 12344000 400613dc 0a000002 0a000001",
        "9c400050 00000001 00000002 50180200 32cc0000 474554202f",
    ),
    _golden(
        "ipv4_echo_request",
        "RFC 791, RFC 792",
        "ipv4.icmp",
        "IP 10.0.0.2 > 10.0.0.1: ICMP echo request, id 7, seq 1, length 64",
        "45000054 12344000 40011473 0a000002 0a000001",
        "0800 00e5 0007 0001",
        ECHO_DATA,
    ),
    _golden(
        "ipv4_need_to_fragment",
        "RFC 792, RFC 1191",
        "ipv4.icmp",
        "IP 10.0.0.2 > 10.0.0.1: ICMP unreachable - need to frag (mtu 1400), length 36",
        "45000038 12344000 4001148f 0a000002 0a000001",
        "0304 5a77 0000 0578",
        "4500001c 12344000 4011149b 0a000002 0a000001 9cb00035 00270000",
    ),
    _golden(
        "ipv4_first_fragment",
        "RFC 791, 3.2: the UDP length is that of the whole datagram",
        "ipv4.udp",
        "IP 10.0.0.2.40112 > 10.0.0.1.53: frag (0|16) UDP, length 2976",
        "45000024 12342000 40113493 0a000002 0a000001",
        "9cb00035 0ba8abcd 0000000000000000",
    ),
    _golden(
        "ipv4_next_fragment",
        "RFC 791, 3.2: fragment offset 2, in units of 8 octets",
        "ipv4.fragment",
        "IP 10.0.0.2 > 10.0.0.1: frag (16|16) ip-proto-17, length 16",
        "45000024 12342002 40113491 0a000002 0a000001",
        "000102030405060708090a0b0c0d0e0f",
    ),
    _golden(
        "ipv4_igmp_router_alert",
        "RFC 2113 (router alert option), RFC 2236 (IGMP)",
        "ipv4.other",
        "IP 10.0.0.2 > 224.0.0.251: ip-proto-2, length 8",
        "46000020 12340000 4002e8a6 0a000002 e00000fb 94040000",
        "16000904 e00000fb",
    ),
    _golden(
        "ipv6_tcp_syn",
        "RFC 8200, 3 (flow label: RFC 6437)",
        "ipv6.tcp",
        "IP6 fd00::2.40000 > fd00::1.80: Flags [S], seq 1, win 64240, length 0",
        "60012345 0014 06 40",
        FD_2_TO_1,
        "9c400050 00000001 00000000 5002faf0 1e5c0000",
    ),
    _golden(
        "ipv6_udp",
        "RFC 8200, 3, RFC 768",
        "ipv6.udp",
        "IP6 fd00::2.40112 > fd00::1.53: UDP, length 31",
        "60000000 0027 11 40",
        FD_2_TO_1,
        "9cb00035 00279641",
        DNS,
    ),
    _golden(
        "ipv6_echo_request",
        "RFC 4443, 4.1",
        "ipv6.icmpv6",
        "IP6 fd00::2 > fd00::1: ICMP6, echo request, id 7, seq 1, length 64",
        "60000000 0040 3a 40",
        FD_2_TO_1,
        "8000 8e65 0007 0001",
        ECHO_DATA,
    ),
    _golden(
        "ipv6_mld_report",
        "RFC 3810, 5.2, RFC 2711 (router alert option)",
        "ipv6.icmpv6",
        "IP6 fe80::2 > ff02::16: ICMP6, multicast listener report v2, length 28",
        "60000000 0024 00 01",
        "fe800000000000000000000000000002 ff020000000000000000000000000016",
        "3a00 05020000 0100",
        "8f00 6f0e 0000 0001 04000000 ff0200000000000000000000000000fb",
    ),
    _golden(
        "ipv6_first_fragment",
        "RFC 8200, 4.5: the UDP length is that of the whole datagram",
        "ipv6.udp",
        "IP6 fd00::2.40112 > fd00::1.53: frag (0|16) UDP, length 2976",
        "60000000 0018 2c 40",
        FD_2_TO_1,
        "11000001 deadbeef",
        "9cb00035 0ba8abcd 0000000000000000",
    ),
    _golden(
        "ipv6_last_fragment",
        "RFC 8200, 4.5: offset 16, no more to come, so any length",
        "ipv6.fragment",
        "IP6 fd00::2 > fd00::1: frag (16|5) ip-proto-17, length 5",
        "60000000 000d 2c 40",
        FD_2_TO_1,
        "11000010 deadbeef",
        "0001020304",
    ),
    _golden(
        "ipv6_all_extensions",
        "RFC 8200, 4.1: hop-by-hop, destination, routing, atomic fragment (RFC 6946), authentication (RFC 4302)",
        "ipv6.tcp",
        "IP6 fd00::2.40000 > fd00::1.80: Flags [S], seq 1, win 64240, length 0",
        "60000000 004c 00 40",
        FD_2_TO_1,
        "3c00 010400000000",
        "2b00 010400000000",
        "2c00 0400 00000000",
        "3300 0000 00000007",
        "0604 0000 00000100 00000001 111122223333444455550000",
        "9c400050 00000001 00000000 5002faf0 1e5c0000",
    ),
    _golden(
        "ipv6_skipped_extensions",
        "RFC 6275, 6.1 (mobility), RFC 7401, 5.1 (HIP), RFC 5533, 5.1 (Shim6), RFC 8200, 4.7 (59)",
        "ipv6.other",
        "IP6 fd00::2 > fd00::1: no next header, length 0",
        "60000000 0018 87 40",
        FD_2_TO_1,
        "8b00000000000000",
        "8c00000000000000",
        "3b00000000000000",
    ),
    _golden(
        "ipv6_esp",
        "RFC 4303: opaque",
        "ipv6.other",
        "IP6 fd00::2 > fd00::1: ip-proto-50, length 24",
        "60000000 0018 32 40",
        FD_2_TO_1,
        "00000001 00000001 00000000000000000000000000000000",
    ),
)

BY_NAME: Final = {golden.name: golden.octets for golden in PACKETS}

MACS = "020000000001 020000000002"

FRAMES: Final = (
    _golden(
        "arp",
        "RFC 826",
        "arp",
        "02:00:00:00:00:02 > 02:00:00:00:00:01: ARP, length 28",
        MACS,
        "0806 0001 0800 06 04 0001 020000000002 0a000002 000000000000 0a000001",
    ),
    _golden(
        "lldp",
        "IEEE 802.1AB: an Ethertype that is not read",
        "ethernet.other",
        "02:00:00:00:00:02 > 02:00:00:00:00:01: ethertype 0x88cc, length 2",
        MACS,
        "88cc 0000",
    ),
    _golden(
        "llc",
        "IEEE 802.3, 3.2.6: a length, not a type",
        "ethernet.other",
        "02:00:00:00:00:02 > 02:00:00:00:00:01: 802.3, length 3",
        MACS,
        "0003 424203",
    ),
    _golden(
        "ipv4_padded",
        "RFC 894: padding behind the IP packet up to 46 octets",
        "ipv4.udp",
        "02:00:00:00:00:02 > 02:00:00:00:00:01: IP 10.0.0.2.1 > 10.0.0.1.2: UDP, length 0",
        MACS,
        "0800",
        "4500001c 12344000 4011149b 0a000002 0a000001 00010002 00080000",
        "00" * 18,
    ),
    _golden(
        "ipv6_in_two_vlans",
        "IEEE 802.1ad: service tag 100 outside, customer tag 7 inside",
        "ipv6.other",
        "02:00:00:00:00:02 > 02:00:00:00:00:01, vlan 100, p 6, vlan 7, p 0: "
        "IP6 fd00::2 > fd00::1: no next header, length 0",
        MACS,
        "88a8 d064 8100 0007 86dd",
        "60000000 0000 3b 40",
        FD_2_TO_1,
    ),
)
