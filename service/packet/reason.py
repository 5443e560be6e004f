"""Why a packet cannot be read: the one list that `classify`, `parse` and the counters all share.

The values are public: they name counters and appear in the API, so they are never renamed or reused.
No parsing lives here.
"""

from dataclasses import dataclass
from enum import StrEnum


class MalformedReason(StrEnum):
    """Why octets are not a packet. Each member says which rule was broken and whose rule it is."""

    EMPTY = "empty"
    """No octets at all."""

    BAD_VERSION = "bad_version"
    """The version nibble is neither 4 nor 6, or not the one that the Ethertype promised (RFC 894, 2464)."""

    IPV4_HEADER_TRUNCATED = "ipv4_header_truncated"
    """Fewer octets than 20, or than the header length says (RFC 791, 3.1)."""

    IPV4_BAD_HEADER_LENGTH = "ipv4_bad_header_length"
    """IHL below 5 words (RFC 791, 3.1)."""

    IPV4_BAD_TOTAL_LENGTH = "ipv4_bad_total_length"
    """Total length shorter than the header, or longer than what there is (RFC 791, 3.1)."""

    IPV4_BAD_FRAGMENT = "ipv4_bad_fragment"
    """A fragment that would end beyond 65,535 octets: the "ping of death" (RFC 791, 3.1)."""

    IPV6_HEADER_TRUNCATED = "ipv6_header_truncated"
    """Fewer octets than 40 (RFC 8200, 3)."""

    IPV6_BAD_PAYLOAD_LENGTH = "ipv6_bad_payload_length"
    """Payload longer than what there is, or one of the jumbogram errors of RFC 2675, 3."""

    IPV6_EXTENSION_TRUNCATED = "ipv6_extension_truncated"
    """An extension header that ends behind the payload, or before its own fixed part (RFC 8200, 4)."""

    IPV6_TOO_MANY_EXTENSIONS = "ipv6_too_many_extensions"
    """More extension headers than we follow (RFC 8504, 5.3 allows a limit)."""

    IPV6_MISPLACED_HOP_BY_HOP = "ipv6_misplaced_hop_by_hop"
    """A hop-by-hop header anywhere but right behind the IPv6 header (RFC 8200, 4.1)."""

    IPV6_BAD_OPTIONS = "ipv6_bad_options"
    """A hop-by-hop option that overruns its header, or a jumbo option of the wrong size or given twice
    (RFC 8200, 4.2; RFC 2675, 2)."""

    IPV6_TOO_MANY_OPTIONS = "ipv6_too_many_options"
    """More hop-by-hop options, padding included, than we follow (RFC 8504, 5.3 allows a limit)."""

    IPV6_BAD_FRAGMENT = "ipv6_bad_fragment"
    """A fragment that would end beyond 65,535 octets, a non-last one that is no multiple of 8 octets
    (RFC 8200, 4.5), or a fragmented jumbogram (RFC 2675, 3)."""

    TCP_TRUNCATED = "tcp_truncated"
    """Fewer octets than 20; a first fragment counts too (RFC 9293, 3.1; RFC 1858; RFC 7112)."""

    TCP_BAD_DATA_OFFSET = "tcp_bad_data_offset"
    """Data offset below 5 words or behind the segment's end (RFC 9293, 3.1)."""

    UDP_TRUNCATED = "udp_truncated"
    """Fewer octets than 8 (RFC 768)."""

    UDP_BAD_LENGTH = "udp_bad_length"
    """A length below 8, or longer than an unfragmented packet's payload (RFC 768)."""

    ICMP_TRUNCATED = "icmp_truncated"
    """Fewer octets than 8 (RFC 792: every message has them)."""

    ICMPV6_TRUNCATED = "icmpv6_truncated"
    """Fewer octets than 8 (RFC 4443, 2.1 asks for 4; every defined message has 8, and Linux insists)."""

    ETHERNET_TRUNCATED = "ethernet_truncated"
    """Fewer octets than the Ethernet header and its VLAN tags (IEEE 802.3; 802.1Q, 9)."""

    ETHERNET_TOO_MANY_TAGS = "ethernet_too_many_tags"
    """More VLAN tags than we follow."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """Octets that are no packet.

    `detail` gives the figures for a person to read; only `reason` is stable.
    """

    reason: MalformedReason
    detail: str
