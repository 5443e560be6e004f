"""A whole packet or frame as one value, put together from `ethernet`, `ip` and `transport`.

For processors that need fields, for the API and for people; a worker's counting uses `classify`, which costs a
thirtieth. The two agree for every string of octets: `class_name(parse(data)) == CLASSES[classify(data, n)]`.
No header's format lives here.
"""

from dataclasses import dataclass
from typing import TypeAlias, assert_never

from service.packet.ethernet import EthernetHeader, parse_ethernet
from service.packet.ip import IPLayer, IPv4Header, IPv6Header, parse_ip
from service.packet.numbers import ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ICMP, ICMPV6, TCP, UDP
from service.packet.reason import Malformed, MalformedReason
from service.packet.transport import (
    IcmpHeader,
    Icmpv6Header,
    TcpHeader,
    Transport,
    TransportLayer,
    UdpHeader,
    parse_icmp,
    parse_icmpv6,
    parse_tcp,
    parse_udp,
)

Octets: TypeAlias = bytes | bytearray | memoryview
"""What packets are read from; a memoryview has the format "B" and is contiguous."""


@dataclass(frozen=True, slots=True)
class Packet:
    """An IP packet. Offsets count from the start of the buffer that was parsed; no octet of it is kept.

    Headers and options are copies and stay valid; the offsets mean nothing once the buffer is reused.
    """

    ip: IPv4Header | IPv6Header
    protocol: int
    """What IP carries: for IPv6 the next header behind the extensions."""
    fragment_offset: int
    """Octets; above 0 there is no transport header to read."""
    more_fragments: bool
    transport_offset: int
    transport_length: int
    """Octets that IP carries, transport header included, padding not."""
    transport: Transport | None
    """None for a non-first fragment and for protocols that are not read."""
    payload_offset: int
    payload_length: int
    """Octets behind the transport header, or all that IP carries without one."""

    @property
    def is_fragment(self) -> bool:
        """Whether this is only a part, the first one included."""
        return self.more_fragments or self.fragment_offset > 0


@dataclass(frozen=True, slots=True)
class Frame:
    """An Ethernet frame. Offsets count from the start of the buffer that was parsed."""

    ethernet: EthernetHeader
    packet: Packet | None
    """None for everything but IPv4 and IPv6."""
    payload_offset: int
    payload_length: int
    """Octets behind the Ethernet header, padding included."""


def parse(data: Octets, length: int | None = None, offset: int = 0) -> Packet | Malformed:
    """Read the IP packet in `data[offset:offset + length]`, to the end of `data` if `length` is None.

    Never raises, whatever the octets; checksums are not verified (see `checksum`). What is malformed and what
    is let pass is said in `classify`, which agrees. Sources: RFC 791, 8200, 2675, 9293, 768, 792, 4443.
    """
    end = len(data) if length is None else min(offset + length, len(data))
    view = memoryview(data)[offset:end]
    layer = parse_ip(view)
    if isinstance(layer, Malformed):
        return layer
    upper = _parse_transport(view[layer.offset : layer.offset + layer.length], layer)
    if isinstance(upper, Malformed):
        return upper
    start = offset + layer.offset
    return Packet(
        ip=layer.header,
        protocol=layer.protocol,
        fragment_offset=layer.fragment_offset,
        more_fragments=layer.more_fragments,
        transport_offset=start,
        transport_length=layer.length,
        transport=None if upper is None else upper.header,
        payload_offset=start if upper is None else start + upper.header_length,
        payload_length=layer.length if upper is None else upper.payload_length,
    )


def _parse_transport(data: memoryview, layer: IPLayer) -> TransportLayer | Malformed | None:
    if layer.fragment_offset:
        return None
    is_ipv6 = isinstance(layer.header, IPv6Header)
    if layer.protocol == TCP:
        return parse_tcp(data)
    if layer.protocol == UDP:
        jumbogram = isinstance(layer.header, IPv6Header) and layer.header.jumbo_payload_length is not None
        return parse_udp(data, more_fragments=layer.more_fragments, jumbogram=jumbogram)
    # Each ICMP belongs to one version of IP; in the other it is a number like any other.
    if layer.protocol == ICMP and not is_ipv6:
        return parse_icmp(data)
    if layer.protocol == ICMPV6 and is_ipv6:
        return parse_icmpv6(data)
    return None


def parse_frame(data: Octets, length: int | None = None, offset: int = 0) -> Frame | Malformed:
    """Read the Ethernet frame in `data[offset:offset + length]`, to the end of `data` if `length` is None.

    Never raises. A malformed IP packet makes the frame malformed, as for `classify_frame`. Sources: IEEE
    802.3, 3.2; 802.1Q, 9; RFC 894; RFC 2464.
    """
    end = len(data) if length is None else min(offset + length, len(data))
    ethernet = parse_ethernet(memoryview(data)[offset:end])
    if isinstance(ethernet, Malformed):
        return ethernet
    start = offset + ethernet.header_length
    packet: Packet | None = None
    if ethernet.ethertype in (ETHERTYPE_IPV4, ETHERTYPE_IPV6):
        expected = 4 if ethernet.ethertype == ETHERTYPE_IPV4 else 6
        if start < end and data[start] >> 4 != expected:
            return Malformed(
                MalformedReason.BAD_VERSION,
                f"version {data[start] >> 4}, Ethertype 0x{ethernet.ethertype:04x} needs {expected}",
            )
        inner = parse(data, end - start, start)
        if isinstance(inner, Malformed):
            return inner
        packet = inner
    return Frame(ethernet, packet, start, end - start)


def class_name(packet: Packet | Frame | Malformed) -> str:
    """Return the name in `classify.CLASSES` for what was parsed."""
    match packet:
        case Malformed():
            return f"malformed.{packet.reason}"
        case Frame():
            if packet.packet is not None:
                return class_name(packet.packet)
            return "arp" if packet.ethernet.ethertype == ETHERTYPE_ARP else "ethernet.other"
        case Packet():
            family = f"ipv{packet.ip.version}"
            return f"{family}.fragment" if packet.fragment_offset else f"{family}.{_transport_name(packet.transport)}"
        case _ as unreachable:
            assert_never(unreachable)


def _transport_name(transport: Transport | None) -> str:
    match transport:
        case None:
            return "other"
        case TcpHeader():
            return "tcp"
        case UdpHeader():
            return "udp"
        case IcmpHeader():
            return "icmp"
        case Icmpv6Header():
            return "icmpv6"
        case _ as unreachable:
            assert_never(unreachable)
