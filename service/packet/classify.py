"""The hot path: which class of packet this is, as a small number to count with.

A worker calls this once for every packet, so it is written for speed: it reads single octets in place, builds
no objects, copies nothing and, whatever the octets are, raises nothing. It reads only what the class depends
on. Fields, checksums and text belong to `parse`, `checksum` and `summary`; nothing here may allocate for
them. `parse` is written separately and slowly on purpose: the tests hold the two against each other.

What is deliberately accepted:

- Octets behind the end that the IP header gives (Ethernet padding, a reused buffer).
- Any size. With `IFF_VNET_HDR` the kernel hands over TCP and UDP segments of up to 64 KiB, and with BIG TCP
  an IPv6 jumbogram; nothing here knows an MTU. IPv4 BIG TCP (total length 0) is refused: a TUN never sends
  it unless someone raises `gso_ipv4_max_size` above 65,536.
- A UDP length shorter than the IP payload: the rest is RFC 9868's surplus area. Linux leaves the length of
  the whole super-packet in the UDP header of a GSO packet, so GSO needs no exception. A length of 0 is
  malformed but in a jumbogram, where RFC 2675, 4 defines it.
- Wrong checksums, and TCP, IPv4 and destination options that make no sense: the host's stack judges those.
- A first fragment (offset 0) has an upper header and is classed by it; only its UDP length may exceed it.
"""

from typing import Final

from service.packet.reason import MalformedReason

_PACKET_CLASSES: Final = (
    "ipv4.tcp",
    "ipv4.udp",
    "ipv4.icmp",
    "ipv4.fragment",
    "ipv4.other",
    "ipv6.tcp",
    "ipv6.udp",
    "ipv6.icmpv6",
    "ipv6.fragment",
    "ipv6.other",
    "arp",
    "ethernet.other",
)

CLASSES: Final[tuple[str, ...]] = (*_PACKET_CLASSES, *(f"malformed.{reason}" for reason in MalformedReason))
"""Every class, in the order of the index that `classify` returns. Names are stable, indexes are not."""

FIRST_MALFORMED: Final[int] = len(_PACKET_CLASSES)
"""Indexes from here on are malformed ones."""

MAX_EXTENSIONS: Final[int] = 8
"""IPv6 extension headers that are followed: RFC 8200, 4.1 lists seven places, Mobility is the eighth."""

MAX_HOP_BY_HOP_OPTIONS: Final[int] = 32
"""Hop-by-hop options, padding included, that are followed: Linux takes 8 with up to 7 octets of padding each,
honest senders two or three. Without a bound, 2,046 octets of Pad1 would cost 100 us a packet."""

MAX_VLAN_TAGS: Final[int] = 4
"""VLAN tags that are followed. 802.1ad stacks two; some networks three."""

_IPV4_TCP: Final = CLASSES.index("ipv4.tcp")
_IPV4_UDP: Final = CLASSES.index("ipv4.udp")
_IPV4_ICMP: Final = CLASSES.index("ipv4.icmp")
_IPV4_FRAGMENT: Final = CLASSES.index("ipv4.fragment")
_IPV4_OTHER: Final = CLASSES.index("ipv4.other")
_IPV6_TCP: Final = CLASSES.index("ipv6.tcp")
_IPV6_UDP: Final = CLASSES.index("ipv6.udp")
_IPV6_ICMPV6: Final = CLASSES.index("ipv6.icmpv6")
_IPV6_FRAGMENT: Final = CLASSES.index("ipv6.fragment")
_IPV6_OTHER: Final = CLASSES.index("ipv6.other")
_ARP: Final = CLASSES.index("arp")
_ETHERNET_OTHER: Final = CLASSES.index("ethernet.other")


def _malformed(reason: MalformedReason) -> int:
    return CLASSES.index(f"malformed.{reason}")


_EMPTY: Final = _malformed(MalformedReason.EMPTY)
_BAD_VERSION: Final = _malformed(MalformedReason.BAD_VERSION)
_IPV4_HEADER_TRUNCATED: Final = _malformed(MalformedReason.IPV4_HEADER_TRUNCATED)
_IPV4_BAD_HEADER_LENGTH: Final = _malformed(MalformedReason.IPV4_BAD_HEADER_LENGTH)
_IPV4_BAD_TOTAL_LENGTH: Final = _malformed(MalformedReason.IPV4_BAD_TOTAL_LENGTH)
_IPV4_BAD_FRAGMENT: Final = _malformed(MalformedReason.IPV4_BAD_FRAGMENT)
_IPV6_HEADER_TRUNCATED: Final = _malformed(MalformedReason.IPV6_HEADER_TRUNCATED)
_IPV6_BAD_PAYLOAD_LENGTH: Final = _malformed(MalformedReason.IPV6_BAD_PAYLOAD_LENGTH)
_IPV6_EXTENSION_TRUNCATED: Final = _malformed(MalformedReason.IPV6_EXTENSION_TRUNCATED)
_IPV6_TOO_MANY_EXTENSIONS: Final = _malformed(MalformedReason.IPV6_TOO_MANY_EXTENSIONS)
_IPV6_MISPLACED_HOP_BY_HOP: Final = _malformed(MalformedReason.IPV6_MISPLACED_HOP_BY_HOP)
_IPV6_BAD_OPTIONS: Final = _malformed(MalformedReason.IPV6_BAD_OPTIONS)
_IPV6_TOO_MANY_OPTIONS: Final = _malformed(MalformedReason.IPV6_TOO_MANY_OPTIONS)
_IPV6_BAD_FRAGMENT: Final = _malformed(MalformedReason.IPV6_BAD_FRAGMENT)
_TCP_TRUNCATED: Final = _malformed(MalformedReason.TCP_TRUNCATED)
_TCP_BAD_DATA_OFFSET: Final = _malformed(MalformedReason.TCP_BAD_DATA_OFFSET)
_UDP_TRUNCATED: Final = _malformed(MalformedReason.UDP_TRUNCATED)
_UDP_BAD_LENGTH: Final = _malformed(MalformedReason.UDP_BAD_LENGTH)
_ICMP_TRUNCATED: Final = _malformed(MalformedReason.ICMP_TRUNCATED)
_ICMPV6_TRUNCATED: Final = _malformed(MalformedReason.ICMPV6_TRUNCATED)
_ETHERNET_TRUNCATED: Final = _malformed(MalformedReason.ETHERNET_TRUNCATED)
_ETHERNET_TOO_MANY_TAGS: Final = _malformed(MalformedReason.ETHERNET_TOO_MANY_TAGS)

# IPv6 headers that name a next one (IANA, "IPv6 Extension Header Types"). ESP (50) hides what follows it and
# 253 and 254 are for experiments: both are "other".
_EXTENSIONS: Final = frozenset({0, 43, 44, 51, 60, 135, 139, 140})


def classify(data: bytes | bytearray | memoryview, length: int, offset: int = 0) -> int:
    """Return the index into `CLASSES` of the IP packet in `data[offset:offset + length]`.

    `length` is in octets, counted from `offset`; the buffer may be larger and is only read. The caller
    promises that `offset + length` is inside it and that a memoryview has the format "B". Under that promise
    nothing raises, whatever the octets.

    Sources: RFC 791, 8200, 2675 (jumbograms), 9293, 768, 792, 4443.
    """
    if length <= 0:
        return _EMPTY
    first = data[offset]
    version = first >> 4
    if version != 4:
        return _classify_ipv6(data, length, offset) if version == 6 else _BAD_VERSION
    if length < 20:
        return _IPV4_HEADER_TRUNCATED
    header = (first & 0x0F) << 2
    if header != 20:
        if header < 20:
            return _IPV4_BAD_HEADER_LENGTH
        if header > length:
            return _IPV4_HEADER_TRUNCATED
    total = data[offset + 2] << 8 | data[offset + 3]
    if total > length or total < header:
        return _IPV4_BAD_TOTAL_LENGTH
    flags = data[offset + 6]
    if flags & 0x1F or data[offset + 7]:
        start = ((flags & 0x1F) << 8 | data[offset + 7]) << 3
        return _IPV4_BAD_FRAGMENT if start + total > 0xFFFF else _IPV4_FRAGMENT
    protocol = data[offset + 9]
    room = total - header
    if protocol == 6:
        if room < 20:
            return _TCP_TRUNCATED
        data_offset = (data[offset + header + 12] & 0xF0) >> 2
        if data_offset < 20 or data_offset > room:
            return _TCP_BAD_DATA_OFFSET
        return _IPV4_TCP
    if protocol == 17:
        if room < 8:
            return _UDP_TRUNCATED
        upper = offset + header
        size = data[upper + 4] << 8 | data[upper + 5]
        if size < 8 or (size > room and not flags & 0x20):
            return _UDP_BAD_LENGTH
        return _IPV4_UDP
    if protocol == 1:
        return _IPV4_ICMP if room >= 8 else _ICMP_TRUNCATED
    return _IPV4_OTHER


def _classify_ipv6(data: bytes | bytearray | memoryview, length: int, offset: int) -> int:
    if length < 40:
        return _IPV6_HEADER_TRUNCATED
    payload = data[offset + 4] << 8 | data[offset + 5]
    if payload > length - 40:
        return _IPV6_BAD_PAYLOAD_LENGTH
    protocol = data[offset + 6]
    upper = offset + 40
    more_fragments = 0
    if protocol in _EXTENSIONS:
        start = upper
        extensions = 0
        if protocol == 0:
            jumbo = _jumbo_payload(data, upper, payload or length - 40)
            if jumbo < 0:
                return -jumbo
            if jumbo:
                if payload or jumbo <= 0xFFFF or jumbo > length - 40:
                    return _IPV6_BAD_PAYLOAD_LENGTH
                payload = jumbo
            elif not payload:
                return _IPV6_BAD_PAYLOAD_LENGTH
            protocol = data[upper]
            upper += (data[upper + 1] + 1) << 3
            extensions = 1
        end = start + payload
        while protocol in _EXTENSIONS:
            if protocol == 0:
                return _IPV6_MISPLACED_HOP_BY_HOP
            if extensions == MAX_EXTENSIONS:
                return _IPV6_TOO_MANY_EXTENSIONS
            extensions += 1
            room = end - upper
            if room < 8:
                return _IPV6_EXTENSION_TRUNCATED
            size = 8
            if protocol == 44:
                fragment = data[upper + 2] << 8 | data[upper + 3]
                if (
                    payload > 0xFFFF
                    or (fragment & 1 and room & 7)
                    or (upper - start) + (fragment & 0xFFF8) + (room - 8) > 0xFFFF
                ):
                    return _IPV6_BAD_FRAGMENT
                if fragment & 0xFFF8:
                    return _IPV6_FRAGMENT
                more_fragments |= fragment & 1
            elif protocol == 51:
                size = (data[upper + 1] + 2) << 2
                if size < 12:
                    return _IPV6_EXTENSION_TRUNCATED
            else:
                size = (data[upper + 1] + 1) << 3
            if size > room:
                return _IPV6_EXTENSION_TRUNCATED
            protocol = data[upper]
            upper += size
        room = end - upper
    else:
        room = payload
    if protocol == 6:
        if room < 20:
            return _TCP_TRUNCATED
        data_offset = (data[upper + 12] & 0xF0) >> 2
        if data_offset < 20 or data_offset > room:
            return _TCP_BAD_DATA_OFFSET
        return _IPV6_TCP
    if protocol == 17:
        if room < 8:
            return _UDP_TRUNCATED
        size = data[upper + 4] << 8 | data[upper + 5]
        if size < 8:
            return _IPV6_UDP if size == 0 and payload > 0xFFFF else _UDP_BAD_LENGTH
        return _UDP_BAD_LENGTH if size > room and not more_fragments else _IPV6_UDP
    if protocol == 58:
        return _IPV6_ICMPV6 if room >= 8 else _ICMPV6_TRUNCATED
    return _IPV6_OTHER


def _jumbo_payload(data: bytes | bytearray | memoryview, at: int, room: int) -> int:
    """Walk the hop-by-hop header at `at`: its jumbo payload length, 0 without one, -class if malformed.

    A jumbo option that says 0 is as wrong as one that says 1, and 1 is what it returns.
    """
    if room < 8:
        return -_IPV6_EXTENSION_TRUNCATED
    size = (data[at + 1] + 1) << 3
    if size > room:
        return -_IPV6_EXTENSION_TRUNCATED
    end = at + size
    at += 2
    jumbo = 0
    options = 0
    while at < end:
        if options == MAX_HOP_BY_HOP_OPTIONS:
            return -_IPV6_TOO_MANY_OPTIONS
        options += 1
        option = data[at]
        if option == 0:
            at += 1
            continue
        if at + 2 > end or at + 2 + data[at + 1] > end:
            return -_IPV6_BAD_OPTIONS
        if option == 0xC2:
            if data[at + 1] != 4 or jumbo:
                return -_IPV6_BAD_OPTIONS
            jumbo = data[at + 2] << 24 | data[at + 3] << 16 | data[at + 4] << 8 | data[at + 5] or 1
        at += 2 + data[at + 1]
    return jumbo


def classify_frame(data: bytes | bytearray | memoryview, length: int, offset: int = 0) -> int:
    """Return the index into `CLASSES` of the Ethernet frame in `data[offset:offset + length]` (TAP).

    Without preamble and frame check sequence, as a TAP gives it. VLAN tags (0x8100, 0x88A8) are skipped. IP
    inside is classed as `classify` does; its version must be the one the Ethertype names. Same promises.

    Sources: IEEE 802.3, 3.2; 802.1Q, 9; RFC 894; RFC 2464; RFC 826.
    """
    if length <= 0:
        return _EMPTY
    if length < 14:
        return _ETHERNET_TRUNCATED
    kind = data[offset + 12] << 8 | data[offset + 13]
    header = 14
    if kind == 0x8100 or kind == 0x88A8:
        tags = 0
        while kind in (0x8100, 0x88A8):
            if tags == MAX_VLAN_TAGS:
                return _ETHERNET_TOO_MANY_TAGS
            tags += 1
            if length < header + 4:
                return _ETHERNET_TRUNCATED
            kind = data[offset + header + 2] << 8 | data[offset + header + 3]
            header += 4
    if kind == 0x0800:
        version = 4
    elif kind == 0x86DD:
        version = 6
    else:
        return _ARP if kind == 0x0806 else _ETHERNET_OTHER
    if length > header and data[offset + header] >> 4 != version:
        return _BAD_VERSION
    return classify(data, length - header, offset + header)
