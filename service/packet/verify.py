"""Whether the checksums of a packet are right.

On parsed headers; the arithmetic is `checksum`'s. Nothing here decides what to do about a wrong one.

With `IFF_VNET_HDR` the kernel may hand over a packet whose transport checksum is not finished yet
(`VIRTIO_NET_HDR_F_NEEDS_CSUM`): it holds the pseudo-header's sum only and verifies as BAD. Ask the vnet header
first.
"""

from enum import StrEnum
from typing import assert_never

from service.packet.checksum import ones_complement_sum
from service.packet.ip import IPv4Header, IPv6Header, RoutingExtension
from service.packet.parse import Packet
from service.packet.transport import IcmpHeader, Icmpv6Header, TcpHeader, UdpHeader


class ChecksumState(StrEnum):
    """What verifying a checksum found."""

    GOOD = "good"
    BAD = "bad"
    ABSENT = "absent"
    """UDP with checksum 0: the sender made none (RFC 768; for IPv6 only in tunnels, RFC 6935)."""
    UNKNOWN = "unknown"
    """Not to be told from this packet: a fragment, a protocol we do not read, or an IPv6 source route whose
    final destination, which the pseudo header needs (RFC 8200, 8.1), lies ahead."""


def pseudo_header_sum(ip: IPv4Header | IPv6Header, protocol: int, length: int) -> int:
    """Return the sum of the pseudo header, to be the `initial` of a transport checksum.

    `protocol` is the transport's number, `length` its header and payload in octets. For IPv6 the destination
    must be the final one. Sources: RFC 9293, 3.1 and RFC 768 (IPv4), RFC 8200, 8.1 (IPv6).
    """
    return ones_complement_sum(ip.source.packed + ip.destination.packed, initial=protocol + length)


def verify_ipv4_header(data: bytes | bytearray | memoryview, offset: int = 0) -> bool:
    """Return whether the IPv4 header at `data[offset]` has the right checksum (RFC 791, 3.1).

    False also if there is no whole IPv4 header. Never raises for a non-negative `offset`.
    """
    if len(data) - offset < 20 or data[offset] >> 4 != 4:
        return False
    length = (data[offset] & 0x0F) * 4
    if length < 20 or len(data) - offset < length:
        return False
    return ones_complement_sum(data, offset, length) == 0xFFFF


def verify_transport(data: bytes | bytearray | memoryview, packet: Packet) -> ChecksumState:
    """Verify the checksum of the TCP, UDP, ICMP or ICMPv6 message in `packet`.

    `data` is the buffer that `packet` was parsed from, still holding the same octets. Sources: RFC 9293, 768,
    792, 4443; for UDP the checksum covers the UDP length, not the surplus behind it.
    """
    if packet.transport is None or packet.is_fragment:
        return ChecksumState.UNKNOWN
    length = packet.transport_length
    match packet.transport:
        case IcmpHeader():
            return _verdict(ones_complement_sum(data, packet.transport_offset, length))
        case TcpHeader() | Icmpv6Header():
            pass
        case UdpHeader() as udp:
            if udp.checksum == 0:
                return ChecksumState.ABSENT
            length = udp.length or length
        case _ as unreachable:
            assert_never(unreachable)
    if isinstance(packet.ip, IPv6Header) and any(
        isinstance(extension, RoutingExtension) and extension.segments_left > 0 for extension in packet.ip.extensions
    ):
        return ChecksumState.UNKNOWN
    pseudo = pseudo_header_sum(packet.ip, packet.protocol, length)
    return _verdict(ones_complement_sum(data, packet.transport_offset, length, pseudo))


def _verdict(total: int) -> ChecksumState:
    return ChecksumState.GOOD if total == 0xFFFF else ChecksumState.BAD
