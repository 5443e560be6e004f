"""The header in front of packets that offloads are in play for: `struct virtio_net_hdr`, 10 octets.

Its words and their form only; what is done about them is in `segment`. With `IFF_VNET_HDR` a TUN hands one over with
each packet read and wants one with each packet written. A TUN's integers are in the host's order (tun.c,
tun_is_little_endian: a legacy device) unless TUNSETVNETLE says otherwise, which nobody here does.

Sources: linux/virtio_net.h; virtio 1.2, 5.1.6 "Device Operation"; linux/include/linux/virtio_net.h.
"""

import struct
from typing import Final, NamedTuple

VNET_HDR_BYTES: Final = 10

F_NEEDS_CSUM: Final = 1
"""The transport checksum covers the pseudo header only: the sum from `csum_start` on has to be put in."""
F_DATA_VALID: Final = 2
"""The checksum has been verified, whatever stands there."""

GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_UDP: Final = 3
"""UDP to be fragmented by IP (UFO). Linux has not made any since 4.14."""
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
"""UDP to be cut into datagrams (USO), IPv4 or IPv6; Linux 6.2."""
GSO_ECN: Final = 0x80
"""Beside a TCP type: the segment has CWR set."""

_HEADER: Final = struct.Struct("=BBHHHH")


class VnetHeader(NamedTuple):
    """One header, its fields under the kernel's names; lengths and offsets in octets from the packet's first."""

    flags: int = 0
    gso_type: int = GSO_NONE
    hdr_len: int = 0
    """Octets of all headers: a hint, which Linux fills with what lies in its first buffer."""
    gso_size: int = 0
    """Octets of payload that each packet cut from a segment gets, the last one perhaps less."""
    csum_start: int = 0
    csum_offset: int = 0


def parse_vnet(header: bytes | bytearray | memoryview) -> VnetHeader:
    """Read the first 10 octets. Raises struct.error if there are fewer."""
    return VnetHeader._make(_HEADER.unpack_from(header))


def build_vnet(header: VnetHeader) -> bytes:
    """The 10 octets. Raises struct.error for a number that does not fit."""
    return _HEADER.pack(*header)


def untouched(header: bytes | bytearray | memoryview) -> bool:
    """Whether a header leaves nothing to do: no segments, no checksum to finish."""
    return not (header[0] & F_NEEDS_CSUM or header[1])
