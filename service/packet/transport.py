"""TCP, UDP, ICMP and ICMPv6 headers as values, each field under its RFC's name.

Knows nothing of the IP header around them but how many octets it leaves, and whether more fragments follow.
Written for clarity and on its own, not from `classify`: the tests hold the two against each other.
"""

from dataclasses import dataclass
from enum import IntFlag
from typing import Final, TypeAlias

from service.packet.options import Options, split_ipv4_or_tcp
from service.packet.reason import Malformed, MalformedReason

TCP_HEADER_SIZE: Final = 5 * 4
UDP_HEADER_SIZE: Final = 4 * 2
ICMP_HEADER_SIZE: Final = 4 + 4
"""Type, code, checksum and the word whose meaning depends on the type (RFC 792; RFC 4443)."""

ICMP_ECHO_REPLY: Final = 0
ICMP_ECHO_REQUEST: Final = 8
ICMPV6_ECHO_REQUEST: Final = 128
ICMPV6_ECHO_REPLY: Final = 129


class TcpFlags(IntFlag):
    """The control bits of a TCP header (RFC 9293, 3.1; AE: RFC 9768)."""

    FIN = 0x001
    SYN = 0x002
    RST = 0x004
    PSH = 0x008
    ACK = 0x010
    URG = 0x020
    ECE = 0x040
    CWR = 0x080
    AE = 0x100


@dataclass(frozen=True, slots=True)
class TcpHeader:
    """A TCP header (RFC 9293, 3.1). The window is as on the wire, before scaling."""

    source_port: int
    destination_port: int
    sequence: int
    acknowledgment: int
    data_offset: int
    """Header length in 32-bit words: 5 to 15."""
    flags: TcpFlags
    window: int
    checksum: int
    urgent: int
    options: Options

    @property
    def header_length(self) -> int:
        """Octets of the header with its options."""
        return self.data_offset * 4


@dataclass(frozen=True, slots=True)
class UdpHeader:
    """A UDP header (RFC 768). `length` is in octets, header included, as on the wire: 0 in a jumbogram."""

    source_port: int
    destination_port: int
    length: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Echo:
    """What an echo request or reply says besides its data (RFC 792; RFC 4443, 4)."""

    identifier: int
    sequence: int


@dataclass(frozen=True, slots=True)
class IcmpHeader:
    """The first 8 octets of an ICMP message (RFC 792)."""

    type: int
    code: int
    checksum: int
    rest: int
    """The second word, whose meaning depends on the type: an MTU, a pointer, a gateway."""
    echo: Echo | None
    """For echo request (8) and reply (0)."""


@dataclass(frozen=True, slots=True)
class Icmpv6Header:
    """The first 8 octets of an ICMPv6 message (RFC 4443, 2.1)."""

    type: int
    code: int
    checksum: int
    rest: int
    """The second word, whose meaning depends on the type: an MTU, a pointer, flags."""
    echo: Echo | None
    """For echo request (128) and reply (129)."""


Transport: TypeAlias = TcpHeader | UdpHeader | IcmpHeader | Icmpv6Header


@dataclass(frozen=True, slots=True)
class TransportLayer:
    """A transport header, its length and that of the payload behind it, in octets."""

    header: Transport
    header_length: int
    payload_length: int


def _word(data: memoryview, at: int, size: int = 2) -> int:
    return int.from_bytes(data[at : at + size], "big")


def parse_tcp(data: memoryview) -> TransportLayer | Malformed:
    """Read a TCP segment that is all of `data`. Never raises. Source: RFC 9293, 3.1."""
    if len(data) < TCP_HEADER_SIZE:
        return Malformed(MalformedReason.TCP_TRUNCATED, f"{len(data)} octets, TCP needs {TCP_HEADER_SIZE}")
    data_offset = data[12] >> 4
    length = data_offset * 4
    if not TCP_HEADER_SIZE <= length <= len(data):
        return Malformed(
            MalformedReason.TCP_BAD_DATA_OFFSET,
            f"header length {length}, expected {TCP_HEADER_SIZE} to {len(data)}",
        )
    header = TcpHeader(
        source_port=_word(data, 0),
        destination_port=_word(data, 2),
        sequence=_word(data, 4, 4),
        acknowledgment=_word(data, 8, 4),
        data_offset=data_offset,
        flags=TcpFlags(_word(data, 12) & 0x1FF),
        window=_word(data, 14),
        checksum=_word(data, 16),
        urgent=_word(data, 18),
        options=split_ipv4_or_tcp(bytes(data[TCP_HEADER_SIZE:length])),
    )
    return TransportLayer(header, length, len(data) - length)


def parse_udp(data: memoryview, *, more_fragments: bool, jumbogram: bool) -> TransportLayer | Malformed:
    """Read a UDP datagram at the start of `data`.

    Its length may be below `data` (RFC 9868 surplus), above it only with `more_fragments`, and 0 only in a
    `jumbogram` (RFC 2675, 4). The payload ends with the UDP length or `data`. Never raises. Source: RFC 768.
    """
    if len(data) < UDP_HEADER_SIZE:
        return Malformed(MalformedReason.UDP_TRUNCATED, f"{len(data)} octets, UDP needs {UDP_HEADER_SIZE}")
    length = _word(data, 4)
    end = len(data) if length == 0 and jumbogram else length
    if end < UDP_HEADER_SIZE:
        return Malformed(MalformedReason.UDP_BAD_LENGTH, f"length {length}, at least {UDP_HEADER_SIZE}")
    if end > len(data) and not more_fragments:
        return Malformed(MalformedReason.UDP_BAD_LENGTH, f"length {length}, at most {len(data)}")
    header = UdpHeader(_word(data, 0), _word(data, 2), length, _word(data, 6))
    return TransportLayer(header, UDP_HEADER_SIZE, min(end, len(data)) - UDP_HEADER_SIZE)


def parse_icmp(data: memoryview) -> TransportLayer | Malformed:
    """Read an ICMP message that is all of `data`. Never raises. Source: RFC 792."""
    if len(data) < ICMP_HEADER_SIZE:
        return Malformed(MalformedReason.ICMP_TRUNCATED, f"{len(data)} octets, ICMP needs {ICMP_HEADER_SIZE}")
    echo = Echo(_word(data, 4), _word(data, 6)) if data[0] in (ICMP_ECHO_REPLY, ICMP_ECHO_REQUEST) else None
    header = IcmpHeader(data[0], data[1], _word(data, 2), _word(data, 4, 4), echo)
    return TransportLayer(header, ICMP_HEADER_SIZE, len(data) - ICMP_HEADER_SIZE)


def parse_icmpv6(data: memoryview) -> TransportLayer | Malformed:
    """Read an ICMPv6 message that is all of `data`. Never raises. Source: RFC 4443, 2.1."""
    if len(data) < ICMP_HEADER_SIZE:
        return Malformed(MalformedReason.ICMPV6_TRUNCATED, f"{len(data)} octets, ICMPv6 needs {ICMP_HEADER_SIZE}")
    is_echo = data[0] in (ICMPV6_ECHO_REQUEST, ICMPV6_ECHO_REPLY)
    echo = Echo(_word(data, 4), _word(data, 6)) if is_echo else None
    header = Icmpv6Header(data[0], data[1], _word(data, 2), _word(data, 4, 4), echo)
    return TransportLayer(header, ICMP_HEADER_SIZE, len(data) - ICMP_HEADER_SIZE)
