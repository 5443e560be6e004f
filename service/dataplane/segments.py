"""Segments and unfinished checksums made into plain packets, for stages and devices that do not take them.

How one packet is cut is `packet.segment`'s business; here it is whole batches, which mostly need nothing.
"""

from collections.abc import Callable
from typing import Final

from service.dataplane.contract import NO_OFFLOAD, DropReason, Mode, Packet
from service.packet.segment import CannotCut, cut, finish
from service.packet.vnet import F_NEEDS_CSUM

_NO_SEGMENT: Final = 0


def is_plain(headers: list[Packet]) -> bool:
    """Whether nothing is left to do for any of these."""
    return not any(header[1] or header[0] & F_NEEDS_CSUM for header in headers)


def plain(
    packets: list[Packet], headers: list[Packet], mode: Mode, drop: Callable[[str, int], None]
) -> tuple[list[Packet], list[int]]:
    """Return the packets that these stand for, and of which each is; those that make no sense are dropped.

    Checksums are finished in place, and the header then says so: a packet may be sent to several devices, and what is
    finished must not be finished again. What is cut is in buffers of its own.
    """
    found: list[Packet] = []
    origins: list[int] = []
    for index, (packet, header) in enumerate(zip(packets, headers, strict=True)):
        try:
            if header[1] != _NO_SEGMENT:
                pieces = cut(packet, header, mode)
                found.extend(map(memoryview, pieces))
                origins.extend([index] * len(pieces))
                continue
            if header[0] & F_NEEDS_CSUM:
                if header.readonly:  # a processor's own: what cannot be said in it must not be done to its packet
                    packet = memoryview(bytearray(packet))  # noqa: PLW2901
                    finish(packet, header, mode)
                else:
                    finish(packet, header, mode)
                    header[0] &= ~F_NEEDS_CSUM
        except CannotCut:
            drop(DropReason.TOO_BIG, 1)
        else:
            found.append(packet)
            origins.append(index)
    return found, origins


def nothing_left(count: int) -> list[Packet]:
    """Headers that say so, each to be released as whoever has it likes."""
    return [memoryview(NO_OFFLOAD) for _ in range(count)]
