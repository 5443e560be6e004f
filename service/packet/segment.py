"""What a network card would do with a packet that offloads handed over: cut segments, finish checksums. In software.

For TCP and UDP over IPv4 and IPv6, as the kernel itself does it where a device cannot (net/ipv4/tcp_offload.c,
tcp_gso_segment; net/ipv4/udp_offload.c, __udp_gso_segment; net/ipv4/af_inet.c, inet_gso_segment;
net/ipv6/ip6_offload.c). Octets in, octets out: no device, no queue, nothing is counted.

Where the headers end is read from the packet itself, never from `hdr_len`, which is a hint. A header that does not fit
its packet is refused with `CannotCut`, whatever it says; nothing else is raised.
"""

import struct
from typing import Final, Literal, NamedTuple

from service.packet.checksum import ones_complement_sum
from service.packet.vnet import (
    F_NEEDS_CSUM,
    GSO_ECN,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    VnetHeader,
    parse_vnet,
)

SEGMENTS_MAX: Final = 2_048
"""Packets cut from one segment: 64 KiB at TCP's smallest MSS in Linux (48, TCP_MIN_SND_MSS) are 1,366. Cutting that
many takes some 5 ms."""

_TCP: Final = 6
_UDP: Final = 17
_FIN_PSH: Final = 0x09
_CWR: Final = 0x80
_SKIPPED: Final = frozenset({0, 43, 60})  # hop-by-hop, routing, destination options, as ipv6_gso_pull_exthdrs does
_EXTENSIONS_MAX: Final = 8


class CannotCut(ValueError):  # noqa: N818 - a refusal by its packet's name, not a fault of ours
    """The virtio_net_hdr does not fit its packet; the packet has to be dropped."""


class _Layers(NamedTuple):
    version: int
    network: int
    """Where the IP header starts."""
    transport: int
    protocol: int


def finish(packet: memoryview | bytearray, header: bytes | memoryview, mode: Literal["tun", "tap"]) -> None:
    """Put in the checksum that `header` says is missing, in place; `header` itself is left as it is.

    As skb_checksum_help (net/core/dev.c): the sum runs to the end of the packet, and a 0 becomes 65,535.

    Raises:
        CannotCut: the checksum would lie outside the packet, or in front of an IP header's end.
    """
    vnet = parse_vnet(header)
    if vnet.flags & F_NEEDS_CSUM:
        _finish(packet, vnet, mode)


def _finish(packet: memoryview | bytearray, vnet: VnetHeader, mode: Literal["tun", "tap"]) -> None:
    start = vnet.csum_start
    at = start + vnet.csum_offset
    if start < (20 if mode == "tun" else 34) or at + 2 > len(packet):
        raise CannotCut(f"checksum at {start} + {vnet.csum_offset} of {len(packet)} octets")
    checksum = ones_complement_sum(packet, start) ^ 0xFFFF or 0xFFFF
    packet[at] = checksum >> 8
    packet[at + 1] = checksum & 0xFF


def cut(
    packet: bytes | bytearray | memoryview, header: bytes | memoryview, mode: Literal["tun", "tap"]
) -> list[bytearray]:
    """The packets that `packet` stands for, whole, in order, each with its checksums and a buffer of its own.

    A packet that is no segment comes back alone, its checksum finished. Every packet gets a copy of all headers, with
    its own lengths, sequence number (TCP) and identification (IPv4, one more each). FIN and PSH go into the last one
    only, CWR into the first.

    Raises:
        CannotCut: the header does not fit the packet: another protocol, a fragment, `gso_size` 0, lengths that are not
            those of the packet, a checksum outside of it, more than `SEGMENTS_MAX` packets.
    """
    vnet = parse_vnet(header)
    if vnet.gso_type == GSO_NONE:
        whole = bytearray(packet)
        if vnet.flags & F_NEEDS_CSUM:
            _finish(whole, vnet, mode)
        return [whole]
    data = memoryview(packet)
    layers = _layers(data, mode)
    kind = vnet.gso_type & ~GSO_ECN
    if kind == GSO_UDP_L4:
        wanted = layers.version, _UDP
    else:
        wanted = {GSO_TCPV4: (4, _TCP), GSO_TCPV6: (6, _TCP)}.get(kind, (0, 0))
    if (layers.version, layers.protocol) != wanted:
        raise CannotCut(f"gso_type {vnet.gso_type}, but IPv{layers.version} with protocol {layers.protocol}")
    transport = layers.transport
    room = len(data) - transport
    if layers.protocol == _TCP:
        size = (data[transport + 12] & 0xF0) >> 2 if room >= 20 else 20
        check_at = 16
        if not 20 <= size <= room:
            raise CannotCut(f"TCP header of {size} octets in {room}")
    else:
        size = 8
        check_at = 6
        if room < size:
            raise CannotCut(f"UDP header in {room} octets")
    if vnet.flags & F_NEEDS_CSUM and (vnet.csum_start, vnet.csum_offset) != (transport, check_at):
        raise CannotCut(f"checksum at {vnet.csum_start} + {vnet.csum_offset}, not {transport} + {check_at}")
    payload = room - size
    mss = vnet.gso_size
    if mss == 0:
        raise CannotCut("gso_size 0")
    if payload > mss * SEGMENTS_MAX:
        raise CannotCut(f"{payload} octets by {mss} are more than {SEGMENTS_MAX} packets")
    if transport - layers.network + size + min(mss, payload) > 0xFFFF:
        raise CannotCut(f"packets with {mss} octets of payload are longer than 65,535")
    partial = vnet.flags & F_NEEDS_CSUM != 0
    return _cut(data, layers, size, mss, partial=partial)


def _layers(data: memoryview, mode: Literal["tun", "tap"]) -> _Layers:
    """Find the headers. The lengths in them must be those of the packet."""
    at = 0
    length = len(data)
    if mode == "tap":
        at = 14
        while at <= length and data[at - 2] << 8 | data[at - 1] in (0x8100, 0x88A8):
            at += 4
        if at > length or data[at - 2] << 8 | data[at - 1] not in (0x0800, 0x86DD):
            raise CannotCut("an Ethernet frame without IP")
    room = length - at
    version = data[at] >> 4 if room else 0
    if version == 4 and room >= 20:
        size = (data[at] & 0x0F) << 2
        # With IPv4 BIG TCP the total length is 0 (Documentation: ip-sysctl, gso_ipv4_max_size).
        if not 20 <= size <= room or data[at + 2] << 8 | data[at + 3] not in (room, 0):
            raise CannotCut("an IPv4 header whose lengths are not the packet's")
        if data[at + 6] & 0x3F or data[at + 7]:
            raise CannotCut("a fragment")
        return _Layers(4, at, at + size, data[at + 9])
    if version == 6 and room >= 40:
        if data[at + 4] << 8 | data[at + 5] != room - 40:
            raise CannotCut("an IPv6 header whose length is not the packet's")
        protocol = data[at + 6]
        upper = at + 40
        for _ in range(_EXTENSIONS_MAX):
            if protocol not in _SKIPPED:
                break
            if upper + 8 > length:
                raise CannotCut("an IPv6 extension header beyond the end")
            protocol = data[upper]
            upper += (data[upper + 1] + 1) << 3
        if upper > length:
            raise CannotCut("an IPv6 extension header beyond the end")
        return _Layers(6, at, upper, protocol)
    raise CannotCut("no IP header")


def _cut(data: memoryview, layers: _Layers, size: int, mss: int, *, partial: bool) -> list[bytearray]:
    version, network, transport, protocol = layers
    end = transport + size
    head = bytearray(data[:end])
    tcp = protocol == _TCP
    check_at = transport + (16 if tcp else 6)
    # Sums of what is the same in all packets, the varying fields being 0 in them. The kernel's partial checksum is
    # the pseudo header's sum with the segment's length; it knows the final destination of a source route, too.
    whole = len(data) - transport
    if partial:
        pseudo = (head[check_at] << 8 | head[check_at + 1]) + (0xFFFF - whole % 0xFFFF)
    elif version == 4:
        pseudo = ones_complement_sum(data, network + 12, 8) + protocol
    else:
        pseudo = ones_complement_sum(data, network + 8, 32) + protocol
    head[check_at : check_at + 2] = bytes(2)
    sequence = flags = identification = network_sum = 0
    if tcp:
        (sequence,) = struct.unpack_from("!I", head, transport + 4)
        flags = head[transport + 13]
        head[transport + 4 : transport + 8] = bytes(4)
        head[transport + 13] = 0
    else:
        head[transport + 4 : transport + 6] = bytes(2)
    base = ones_complement_sum(head, transport, size, pseudo)
    if version == 4:
        (identification,) = struct.unpack_from("!H", head, network + 4)
        head[network + 2 : network + 6] = bytes(4)
        head[network + 10 : network + 12] = bytes(2)
        network_sum = ones_complement_sum(head, network, transport - network)
    found: list[bytearray] = []
    first = True
    at = end
    last = len(data)
    while True:
        upto = min(at + mss, last)
        part = bytearray(head)
        body = data[at:upto]
        part += body
        carried = upto - at + size
        total = base + carried + (int.from_bytes(body, "big") << (8 if carried - size & 1 else 0))
        if tcp:
            now = flags
            if upto < last:
                now &= ~_FIN_PSH
            if not first:
                now &= ~_CWR
            struct.pack_into("!I", part, transport + 4, sequence)
            part[transport + 13] = now
            total += (sequence >> 16) + (sequence & 0xFFFF) + now
            sequence = (sequence + mss) & 0xFFFFFFFF
            checksum = (total % 0xFFFF or 0xFFFF) ^ 0xFFFF
        else:
            struct.pack_into("!H", part, transport + 4, carried)
            checksum = (total + carried) % 0xFFFF ^ 0xFFFF  # 0 stays 65,535: in UDP 0 means none (RFC 768)
        struct.pack_into("!H", part, check_at, checksum)
        if version == 4:
            length = transport - network + carried
            ip_checksum = (network_sum + length + identification) % 0xFFFF ^ 0xFFFF
            struct.pack_into("!HH", part, network + 2, length, identification)
            struct.pack_into("!H", part, network + 10, ip_checksum)
            identification = (identification + 1) & 0xFFFF
        else:
            struct.pack_into("!H", part, network + 4, transport - network - 40 + carried)
        found.append(part)
        at = upto
        first = False
        if at >= last:
            return found
