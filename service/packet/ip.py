"""IPv4 and IPv6 headers as values, each field under its RFC's name.

Everything up to the transport header: options, extension headers and fragmentation. The transport itself is in
`transport`, putting the two together in `parse`. Written for clarity and on its own, not from `classify`: the
tests hold the two against each other.
"""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final, TypeAlias

from service.packet.classify import MAX_EXTENSIONS, MAX_HOP_BY_HOP_OPTIONS
from service.packet.options import Options, split_ipv4_or_tcp, split_ipv6
from service.packet.reason import Malformed, MalformedReason

IPV4_HEADER_SIZE: Final = 5 * 4
"""Octets of an IPv4 header without options (RFC 791, 3.1)."""

IPV6_HEADER_SIZE: Final = 8 + 2 * 16
"""Octets of the fixed IPv6 header (RFC 8200, 3)."""

MAX_PACKET_SIZE: Final = 2**16 - 1
"""The most octets that a 16-bit length field can say."""

HOP_BY_HOP: Final = 0
ROUTING: Final = 43
FRAGMENT: Final = 44
AUTHENTICATION: Final = 51
NO_NEXT_HEADER: Final = 59
DESTINATION_OPTIONS: Final = 60
MOBILITY: Final = 135
HIP: Final = 139
SHIM6: Final = 140

EXTENSION_PROTOCOLS: Final = frozenset(
    {HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS, MOBILITY, HIP, SHIM6}
)
"""Next-header values that name one more IPv6 header (RFC 8200, 4; RFC 4302; 6275; 7401; 5533)."""

JUMBO_PAYLOAD_OPTION: Final = 0xC2
"""The hop-by-hop option that carries a 32-bit payload length (RFC 2675, 2)."""


@dataclass(frozen=True, slots=True)
class IPv4Header:
    """An IPv4 header (RFC 791, 3.1; DSCP: RFC 2474; ECN: RFC 3168). Lengths and offsets are in octets."""

    version: int
    ihl: int
    """Header length in 32-bit words, as on the wire: 5 to 15."""
    dscp: int
    ecn: int
    total_length: int
    identification: int
    reserved_flag: bool
    """The top flag bit, which must be zero (and is RFC 3514's joke)."""
    dont_fragment: bool
    more_fragments: bool
    fragment_offset: int
    """Octets: eight times the field."""
    ttl: int
    protocol: int
    checksum: int
    source: IPv4Address
    destination: IPv4Address
    options: Options

    @property
    def header_length(self) -> int:
        """Octets of the header with its options."""
        return self.ihl * 4


@dataclass(frozen=True, slots=True)
class OptionsExtension:
    """A hop-by-hop (0) or destination options (60) header (RFC 8200, 4.3, 4.6)."""

    protocol: int
    next_header: int
    offset: int
    length: int
    options: Options


@dataclass(frozen=True, slots=True)
class RoutingExtension:
    """A routing header (RFC 8200, 4.4); the data of its type is not read."""

    next_header: int
    offset: int
    length: int
    routing_type: int
    segments_left: int


@dataclass(frozen=True, slots=True)
class FragmentExtension:
    """A fragment header (RFC 8200, 4.5). Offset 0 without more fragments is an atomic one (RFC 6946)."""

    next_header: int
    offset: int
    length: int
    fragment_offset: int
    """Octets: eight times the field."""
    more_fragments: bool
    identification: int
    fragment_length: int
    """Octets of the packet behind this header."""


@dataclass(frozen=True, slots=True)
class SkippedExtension:
    """An extension header that is stepped over unread: authentication (51), mobility (135), HIP (139) or
    Shim6 (140) (RFC 4302, 6275, 7401, 5533)."""

    protocol: int
    next_header: int
    offset: int
    length: int


Extension: TypeAlias = OptionsExtension | RoutingExtension | FragmentExtension | SkippedExtension
"""An IPv6 extension header: `offset` into the parsed buffer and `length`, both in octets."""


@dataclass(frozen=True, slots=True)
class IPv6Header:
    """An IPv6 header with its extension headers (RFC 8200, 3 and 4; DSCP and ECN: RFC 2474, 3168)."""

    version: int
    traffic_class: int
    flow_label: int
    payload_length: int
    """Octets, as on the wire: 0 for a jumbogram."""
    jumbo_payload_length: int | None
    """Octets, from the jumbo payload option (RFC 2675); None without one."""
    next_header: int
    """What follows the fixed header: an extension or the transport."""
    hop_limit: int
    source: IPv6Address
    destination: IPv6Address
    extensions: tuple[Extension, ...]

    @property
    def dscp(self) -> int:
        """The upper six bits of the traffic class."""
        return self.traffic_class >> 2

    @property
    def ecn(self) -> int:
        """The lower two bits of the traffic class."""
        return self.traffic_class & 0b11


@dataclass(frozen=True, slots=True)
class IPLayer:
    """An IP header and where what it carries lies: `offset` into the buffer, `length` in octets, no padding."""

    header: IPv4Header | IPv6Header
    protocol: int
    """What is carried: for IPv6 the next header of the last extension."""
    offset: int
    length: int
    fragment_offset: int
    more_fragments: bool


def parse_ip(data: memoryview) -> IPLayer | Malformed:
    """Read the IPv4 or IPv6 headers at the start of `data`, which ends where the captured octets end.

    Offsets in the result count from the start of `data`. Never raises. Sources: RFC 791, RFC 8200.
    """
    if not data:
        return Malformed(MalformedReason.EMPTY, "0 octets")
    match data[0] >> 4:
        case 4:
            return _parse_ipv4(data)
        case 6:
            return _parse_ipv6(data)
        case version:
            return Malformed(MalformedReason.BAD_VERSION, f"version {version}, expected 4 or 6")


def _word(data: memoryview, at: int, size: int = 2) -> int:
    return int.from_bytes(data[at : at + size], "big")


def _parse_ipv4(data: memoryview) -> IPLayer | Malformed:
    if len(data) < IPV4_HEADER_SIZE:
        return Malformed(MalformedReason.IPV4_HEADER_TRUNCATED, f"{len(data)} octets, IPv4 needs {IPV4_HEADER_SIZE}")
    ihl = data[0] & 0x0F
    header_length = ihl * 4
    if header_length < IPV4_HEADER_SIZE:
        return Malformed(MalformedReason.IPV4_BAD_HEADER_LENGTH, f"header length {ihl} words, at least 5")
    if header_length > len(data):
        return Malformed(MalformedReason.IPV4_HEADER_TRUNCATED, f"{len(data)} octets, header length {header_length}")
    total_length = _word(data, 2)
    if not header_length <= total_length <= len(data):
        return Malformed(
            MalformedReason.IPV4_BAD_TOTAL_LENGTH,
            f"total length {total_length}, expected {header_length} to {len(data)}",
        )
    flags = _word(data, 6)
    header = IPv4Header(
        version=4,
        ihl=ihl,
        dscp=data[1] >> 2,
        ecn=data[1] & 0b11,
        total_length=total_length,
        identification=_word(data, 4),
        reserved_flag=bool(flags & 0x8000),
        dont_fragment=bool(flags & 0x4000),
        more_fragments=bool(flags & 0x2000),
        fragment_offset=(flags & 0x1FFF) * 8,
        ttl=data[8],
        protocol=data[9],
        checksum=_word(data, 10),
        source=IPv4Address(_word(data, 12, 4)),
        destination=IPv4Address(_word(data, 16, 4)),
        options=split_ipv4_or_tcp(bytes(data[IPV4_HEADER_SIZE:header_length])),
    )
    # The header comes back with the reassembled packet, so it counts towards the limit.
    reassembled = header.fragment_offset + total_length
    if reassembled > MAX_PACKET_SIZE:
        return Malformed(MalformedReason.IPV4_BAD_FRAGMENT, f"ends at octet {reassembled}, at most {MAX_PACKET_SIZE}")
    return IPLayer(
        header=header,
        protocol=header.protocol,
        offset=header_length,
        length=total_length - header_length,
        fragment_offset=header.fragment_offset,
        more_fragments=header.more_fragments,
    )


def _parse_ipv6(data: memoryview) -> IPLayer | Malformed:
    if len(data) < IPV6_HEADER_SIZE:
        return Malformed(MalformedReason.IPV6_HEADER_TRUNCATED, f"{len(data)} octets, IPv6 needs {IPV6_HEADER_SIZE}")
    there = len(data) - IPV6_HEADER_SIZE
    payload_length = _word(data, 4)
    if payload_length > there:
        return Malformed(MalformedReason.IPV6_BAD_PAYLOAD_LENGTH, f"payload length {payload_length}, at most {there}")
    next_header = data[6]
    jumbo: int | None = None
    extensions: list[Extension] = []
    if next_header == HOP_BY_HOP:
        # Only this header can say how long a jumbogram is, so it is read before the end is known.
        first = _parse_hop_by_hop(data[: IPV6_HEADER_SIZE + (payload_length or there)])
        if isinstance(first, Malformed):
            return first
        jumbo = _jumbo_payload_length(first.options)
        wrong = _payload_lengths_error(payload_length, jumbo, there)
        if wrong is not None:
            return wrong
        extensions.append(first)
    payload = data[: IPV6_HEADER_SIZE + (payload_length if jumbo is None else jumbo)]
    chain = _parse_extensions(payload, next_header, extensions, jumbogram=jumbo is not None)
    if isinstance(chain, Malformed):
        return chain
    last = extensions[-1] if extensions else None
    upper = IPV6_HEADER_SIZE + sum(extension.length for extension in extensions)
    fragments = [extension for extension in extensions if isinstance(extension, FragmentExtension)]
    header = IPv6Header(
        version=6,
        traffic_class=_word(data, 0) >> 4 & 0xFF,
        flow_label=_word(data, 1, 3) & 0xFFFFF,
        payload_length=payload_length,
        jumbo_payload_length=jumbo,
        next_header=next_header,
        hop_limit=data[7],
        source=IPv6Address(_word(data, 8, 16)),
        destination=IPv6Address(_word(data, 24, 16)),
        extensions=tuple(extensions),
    )
    return IPLayer(
        header=header,
        protocol=next_header if last is None else last.next_header,
        offset=upper,
        length=len(payload) - upper,
        fragment_offset=fragments[-1].fragment_offset if fragments else 0,
        more_fragments=any(fragment.more_fragments for fragment in fragments),
    )


def _parse_hop_by_hop(data: memoryview) -> OptionsExtension | Malformed:
    at = IPV6_HEADER_SIZE
    size = _extension_size(data, HOP_BY_HOP, at)
    if isinstance(size, Malformed):
        return size
    options = split_ipv6(bytes(data[at + 2 : at + size]))
    followed = options.items[:MAX_HOP_BY_HOP_OPTIONS]
    jumbos = [option for option in followed if option.type == JUMBO_PAYLOAD_OPTION]
    if any(len(option.data) != 4 for option in jumbos):
        return Malformed(MalformedReason.IPV6_BAD_OPTIONS, "a jumbo payload option without its 4 octets")
    if len(jumbos) > 1:
        return Malformed(MalformedReason.IPV6_BAD_OPTIONS, f"{len(jumbos)} jumbo payload options, at most 1")
    given = len(options.items) + (not options.intact)
    if given > MAX_HOP_BY_HOP_OPTIONS:
        return Malformed(
            MalformedReason.IPV6_TOO_MANY_OPTIONS, f"{given} hop-by-hop options, at most {MAX_HOP_BY_HOP_OPTIONS}"
        )
    if not options.intact:
        return Malformed(MalformedReason.IPV6_BAD_OPTIONS, f"an option overruns the {size} octets of its header")
    return OptionsExtension(HOP_BY_HOP, data[at], at, size, options)


def _jumbo_payload_length(options: Options) -> int | None:
    for option in options.items:
        if option.type == JUMBO_PAYLOAD_OPTION:
            return int.from_bytes(option.data, "big")
    return None


def _payload_lengths_error(payload_length: int, jumbo: int | None, there: int) -> Malformed | None:
    """Apply the three errors of RFC 2675, 3, and the captured length."""
    if jumbo is None:
        if payload_length:
            return None
        detail = "payload length 0 and a hop-by-hop header without a jumbo payload option"
    elif payload_length:
        detail = f"payload length {payload_length} and a jumbo payload option"
    elif jumbo <= MAX_PACKET_SIZE:
        detail = f"jumbo payload length {jumbo}, at least {MAX_PACKET_SIZE + 1}"
    elif jumbo > there:
        detail = f"jumbo payload length {jumbo}, at most {there}"
    else:
        return None
    return Malformed(MalformedReason.IPV6_BAD_PAYLOAD_LENGTH, detail)


def _extension_size(data: memoryview, protocol: int, at: int) -> int | Malformed:
    """Return the octets of the extension header at `at`; `data` ends with the payload."""
    room = len(data) - at
    if room < 8:
        return Malformed(
            MalformedReason.IPV6_EXTENSION_TRUNCATED, f"{room} octets for extension header {protocol}, at least 8"
        )
    if protocol == FRAGMENT:
        size = 8  # no length: its octet is reserved (RFC 8200, 4.5)
    elif protocol == AUTHENTICATION:
        size = (data[at + 1] + 2) * 4  # words of 4 octets, less two (RFC 4302, 2.2)
        if size < 12:
            return Malformed(
                MalformedReason.IPV6_EXTENSION_TRUNCATED, f"authentication header of {size} octets, at least 12"
            )
    else:
        size = (data[at + 1] + 1) * 8  # words of 8 octets, less one (RFC 6564, 4)
    if size > room:
        return Malformed(
            MalformedReason.IPV6_EXTENSION_TRUNCATED,
            f"{room} octets for extension header {protocol} of {size}",
        )
    return size


def _parse_extensions(
    data: memoryview, next_header: int, extensions: list[Extension], *, jumbogram: bool
) -> Malformed | None:
    """Append the extension headers behind those in `extensions`; stop behind a non-first fragment header."""
    at = IPV6_HEADER_SIZE
    if extensions:
        at += extensions[0].length
        next_header = extensions[0].next_header
    while next_header in EXTENSION_PROTOCOLS:
        if next_header == HOP_BY_HOP:
            return Malformed(
                MalformedReason.IPV6_MISPLACED_HOP_BY_HOP, f"hop-by-hop header as extension {len(extensions) + 1}"
            )
        if len(extensions) == MAX_EXTENSIONS:
            return Malformed(MalformedReason.IPV6_TOO_MANY_EXTENSIONS, f"more than {MAX_EXTENSIONS} extension headers")
        extension: Extension | Malformed
        if next_header == FRAGMENT:
            extension = _parse_fragment(data, at, jumbogram=jumbogram)
        else:
            extension = _parse_extension(data, next_header, at)
        if isinstance(extension, Malformed):
            return extension
        extensions.append(extension)
        if isinstance(extension, FragmentExtension) and extension.fragment_offset:
            return None
        next_header = extension.next_header
        at += extension.length
    return None


def _parse_extension(data: memoryview, protocol: int, at: int) -> Extension | Malformed:
    size = _extension_size(data, protocol, at)
    if isinstance(size, Malformed):
        return size
    if protocol == DESTINATION_OPTIONS:
        return OptionsExtension(protocol, data[at], at, size, split_ipv6(bytes(data[at + 2 : at + size])))
    if protocol == ROUTING:
        return RoutingExtension(data[at], at, size, routing_type=data[at + 2], segments_left=data[at + 3])
    return SkippedExtension(protocol, data[at], at, size)


def _parse_fragment(data: memoryview, at: int, *, jumbogram: bool) -> FragmentExtension | Malformed:
    size = _extension_size(data, FRAGMENT, at)
    if isinstance(size, Malformed):
        return size
    field = _word(data, at + 2)
    header = FragmentExtension(
        next_header=data[at],
        offset=at,
        length=size,
        fragment_offset=field & 0xFFF8,
        more_fragments=bool(field & 1),
        identification=_word(data, at + 4, 4),
        fragment_length=len(data) - at - size,
    )
    # What RFC 8200, 4.5 gives as the reassembled payload length: the extensions in front stay, this one goes.
    reassembled = (at - IPV6_HEADER_SIZE) + header.fragment_offset + header.fragment_length
    if jumbogram:
        detail = "a fragment header in a jumbogram"
    elif header.more_fragments and header.fragment_length % 8:
        detail = f"{header.fragment_length} octets and more to come, expected a multiple of 8"
    elif reassembled > MAX_PACKET_SIZE:
        detail = f"payload ends at octet {reassembled}, at most {MAX_PACKET_SIZE}"
    else:
        return header
    return Malformed(MalformedReason.IPV6_BAD_FRAGMENT, detail)
