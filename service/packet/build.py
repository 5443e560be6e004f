"""Packets from values: what is sent by us, and what tests send. Whole, every length and checksum filled in.

The reverse of `parse`, for the few kinds that are needed. Nothing is validated but what would not fit its field
(struct.error, OverflowError); addresses are octets, 4 or 16 of them, MAC addresses 6.
"""

import struct
from typing import Final

from service.packet.checksum import internet_checksum, ones_complement_sum
from service.packet.numbers import ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ICMP, ICMPV6, TCP, UDP

ARP_REQUEST: Final = 1
ARP_REPLY: Final = 2
_ARP_ETHERNET_IPV4: Final = struct.pack("!HHBB", 1, ETHERTYPE_IPV4, 6, 4)  # RFC 826


def ethernet(to: bytes, source: bytes, packet: bytes, ethertype: int | None = None, tags: bytes = b"") -> bytes:
    """A frame. `tags`: VLAN tags as they go on the wire, 4 octets each. Without `ethertype` it is IP's by version."""
    if ethertype is None:
        ethertype = ETHERTYPE_IPV6 if packet[:1] and packet[0] >> 4 == 6 else ETHERTYPE_IPV4
    return b"".join((to, source, tags, ethertype.to_bytes(2, "big"), packet))


def arp(operation: int, sender: tuple[bytes, bytes], target: tuple[bytes, bytes]) -> bytes:
    """An ARP message for IPv4 on Ethernet; each end is its MAC address and its IPv4 address (RFC 826)."""
    return _ARP_ETHERNET_IPV4 + operation.to_bytes(2, "big") + b"".join(sender + target)


def arp_frame(operation: int, sender: tuple[bytes, bytes], target: tuple[bytes, bytes], to: bytes) -> bytes:
    """The same in a frame to `to`."""
    return ethernet(to, sender[0], arp(operation, sender, target), ETHERTYPE_ARP)


def ip(source: bytes, to: bytes, protocol: int, payload: bytes, *, ttl: int = 64, identification: int = 0) -> bytes:
    """An IPv4 packet without options, don't-fragment set, or an IPv6 packet: as long as the addresses are."""
    if len(source) == 16:
        return struct.pack("!IHBB", 6 << 28, len(payload), protocol, ttl) + source + to + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), identification, 0x4000, ttl, protocol, 0) + source + to
    return head[:10] + internet_checksum(head).to_bytes(2, "big") + head[12:] + payload


def udp(source: bytes, source_port: int, to: bytes, to_port: int, payload: bytes, *, ttl: int = 64) -> bytes:
    """An IP packet with a UDP datagram (RFC 768)."""
    upper = struct.pack("!HHHH", source_port, to_port, 8 + len(payload), 0) + payload
    return ip(source, to, UDP, _checked(source, to, UDP, upper, 6), ttl=ttl)


def tcp(
    source: bytes, source_port: int, to: bytes, to_port: int, payload: bytes = b"", *,
    flags: int = 0x10, sequence: int = 0, acknowledgment: int = 0, window: int = 65_535, ttl: int = 64,
) -> bytes:  # fmt: skip
    """An IP packet with a TCP segment without options (RFC 9293, 3.1)."""
    head = struct.pack(
        "!HHIIHHHH", source_port, to_port, sequence, acknowledgment, 5 << 12 | flags, window, 0, 0
    )  # fmt: skip
    return ip(source, to, TCP, _checked(source, to, TCP, head + payload, 16), ttl=ttl)


def echo(source: bytes, to: bytes, identifier: int, sequence: int, data: bytes = b"", *, reply: bool = False) -> bytes:
    """An ICMP or ICMPv6 echo request, or reply, by the length of the addresses (RFC 792; RFC 4443, 4)."""
    body = struct.pack("!HH", identifier, sequence) + data
    if len(source) == 16:
        return icmpv6(source, to, 129 if reply else 128, body)
    message = struct.pack("!BBH", 0 if reply else 8, 0, 0) + body
    return ip(source, to, ICMP, message[:2] + internet_checksum(message).to_bytes(2, "big") + message[4:])


def icmpv6(source: bytes, to: bytes, kind: int, body: bytes, *, hop_limit: int = 64) -> bytes:
    """An IPv6 packet with an ICMPv6 message of type `kind`, code 0 (RFC 4443, 2.1)."""
    message = _checked(source, to, ICMPV6, struct.pack("!BBH", kind, 0, 0) + body, 2)
    return ip(source, to, ICMPV6, message, ttl=hop_limit)


def neighbour_solicitation(source: bytes, source_mac: bytes, target: bytes) -> bytes:
    """To the target's solicited-node address (RFC 4861, 4.3; RFC 4291, 2.7.1)."""
    to = bytes.fromhex("ff0200000000000000000001ff") + target[13:]
    return icmpv6(source, to, 135, bytes(4) + target + b"\x01\x01" + source_mac, hop_limit=255)


def neighbour_advertisement(target: bytes, mac: bytes, to: bytes) -> bytes:
    """Solicited, overriding, not from a router (RFC 4861, 4.4)."""
    return icmpv6(target, to, 136, b"\x60\0\0\0" + target + b"\x02\x01" + mac, hop_limit=255)


def _checked(source: bytes, to: bytes, protocol: int, message: bytes, at: int) -> bytes:
    """The message with its checksum over the pseudo header put in; 0 goes as 65,535, which all receivers take."""
    pseudo = ones_complement_sum(source + to) + protocol + len(message)
    checksum = internet_checksum(message, initial=pseudo) or 0xFFFF
    return message[:at] + checksum.to_bytes(2, "big") + message[at + 2 :]
