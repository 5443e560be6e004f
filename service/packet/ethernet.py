"""The Ethernet header of a TAP's frames, with its VLAN tags.

Nothing of what the frame carries: `parse.parse_frame` hands that on by the Ethertype.
"""

from dataclasses import dataclass
from typing import Final

from service.packet.classify import MAX_VLAN_TAGS
from service.packet.numbers import ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN
from service.packet.reason import Malformed, MalformedReason

ETHERNET_HEADER_SIZE: Final = 6 + 6 + 2
VLAN_TAG_SIZE: Final = 2 + 2

SMALLEST_ETHERTYPE: Final = 0x0600
"""Below, the field is the length of an IEEE 802.2 frame (IEEE 802.3, 3.2.6)."""


@dataclass(frozen=True, slots=True)
class VlanTag:
    """One tag of IEEE 802.1Q, 9.6: `protocol` is 0x8100 (customer) or 0x88A8 (service, 802.1ad)."""

    protocol: int
    priority: int
    drop_eligible: bool
    vlan: int


@dataclass(frozen=True, slots=True)
class EthernetHeader:
    """An Ethernet header without preamble (IEEE 802.3, 3.2; 802.1Q, 9). Addresses are 6 octets each."""

    destination: bytes
    source: bytes
    tags: tuple[VlanTag, ...]
    """Outermost first."""
    ethertype: int
    """Behind all tags; below `SMALLEST_ETHERTYPE` it is a length in octets."""
    header_length: int
    """Octets with all tags: where the payload starts."""


def parse_ethernet(data: memoryview) -> EthernetHeader | Malformed:
    """Read the Ethernet header at the start of `data`. Never raises. Source: IEEE 802.3, 3.2; 802.1Q, 9."""
    if not data:
        return Malformed(MalformedReason.EMPTY, "0 octets")
    if len(data) < ETHERNET_HEADER_SIZE:
        return Malformed(
            MalformedReason.ETHERNET_TRUNCATED, f"{len(data)} octets, Ethernet needs {ETHERNET_HEADER_SIZE}"
        )
    tags: list[VlanTag] = []
    at = ETHERNET_HEADER_SIZE
    ethertype = int.from_bytes(data[at - 2 : at], "big")
    while ethertype in (ETHERTYPE_VLAN, ETHERTYPE_SERVICE_VLAN):
        if len(tags) == MAX_VLAN_TAGS:
            return Malformed(MalformedReason.ETHERNET_TOO_MANY_TAGS, f"more than {MAX_VLAN_TAGS} VLAN tags")
        if len(data) < at + VLAN_TAG_SIZE:
            return Malformed(
                MalformedReason.ETHERNET_TRUNCATED, f"{len(data)} octets, VLAN tag ends at {at + VLAN_TAG_SIZE}"
            )
        control = int.from_bytes(data[at : at + 2], "big")
        tags.append(VlanTag(ethertype, control >> 13, bool(control & 0x1000), control & 0x0FFF))
        at += VLAN_TAG_SIZE
        ethertype = int.from_bytes(data[at - 2 : at], "big")
    return EthernetHeader(bytes(data[0:6]), bytes(data[6:12]), tuple(tags), ethertype, at)
