"""Numbers that packets say what they carry by, as IANA and IEEE assigned them."""

from typing import Final

ETHERTYPE_IPV4: Final = 0x0800
ETHERTYPE_ARP: Final = 0x0806
ETHERTYPE_VLAN: Final = 0x8100
ETHERTYPE_IPV6: Final = 0x86DD
ETHERTYPE_SERVICE_VLAN: Final = 0x88A8

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
ICMPV6: Final = 58
"""Of IP: protocol, or next header."""
