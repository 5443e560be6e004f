"""A processor that drops packets which are about to expire, and counts the DNS queries among the others.

Written against `service.dataplane.contract` alone, as an example of the whole contract: options and their check, a
class of its own reason, figures, reading in place, both directions, frames with VLAN tags.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from service.dataplane.contract import BOTH, Batch, Context, Direction, Processor

DNS_PORT = 53


class Dying(Processor):
    """Options: `least`, the time to live (IPv6: hop limit) that a packet must have; 2 by default."""

    directions: ClassVar[frozenset[Direction]] = BOTH
    takes_segments: ClassVar[bool] = True  # every packet of a segment has its headers: one look is enough
    figures: ClassVar[tuple[str, ...]] = ("expired", "dns_queries")

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        """Raises ValueError, which the user gets to read, for options that will not do."""
        super().__init__(options, context)
        least = options.get("least", 2)
        if not isinstance(least, int) or not 1 <= least <= 255:
            raise ValueError(f"least: {least!r} is not a number from 1 to 255")
        unknown = sorted(options.keys() - {"least"})
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: unknown; known here: least")
        self._least: int = least

    def process(self, batch: Batch) -> None:
        """Count, and keep those that live."""
        living: list[int] = []
        queries = 0
        least = self._least
        # Iterating over the batch, not over batch.packets, lets a crash name the packet it happened at.
        for index, packet in enumerate(batch):
            at = 0 if batch.mode == "tun" else _ip_at(packet)
            lives, query = _look(packet, at, least)
            queries += query
            if lives:
                living.append(index)
        # Shared memory is written once a batch, not once a packet.
        if queries:
            self.context.count("dns_queries", queries)
        if len(living) < len(batch):
            self.context.count("expired", len(batch) - len(living))
            batch.keep(living, "expired")  # not one of ours: counted as "custom"


def _look(packet: memoryview, at: int, least: int) -> tuple[bool, bool]:
    """Whether a packet lives, and whether it is a query to a DNS server. What is no IP packet lives.

    A chain sees whatever the host, or anybody on a TAP, sends: every octet is read only after asking whether it is
    there.
    """
    room = len(packet) - at
    if room >= 20 and packet[at] >> 4 == 4:
        upper = at + (packet[at] & 0x0F) * 4
        first = not (packet[at + 6] & 0x1F or packet[at + 7])
        hops, protocol = packet[at + 8], packet[at + 9]
    elif room >= 40 and packet[at] >> 4 == 6:
        upper, first = at + 40, True
        hops, protocol = packet[at + 7], packet[at + 6]
    else:
        return True, False
    if hops < least:
        return False, False
    is_udp = protocol == 17 and first and len(packet) >= upper + 8
    return True, is_udp and packet[upper + 2] << 8 | packet[upper + 3] == DNS_PORT


def _ip_at(frame: memoryview) -> int:
    """Where the IP header of an Ethernet frame starts, behind its VLAN tags; its end if there is none."""
    at = 14
    while len(frame) >= at and frame[at - 2] << 8 | frame[at - 1] in (0x8100, 0x88A8):
        at += 4
    if len(frame) >= at and frame[at - 2] << 8 | frame[at - 1] in (0x0800, 0x86DD):
        return at
    return len(frame)
