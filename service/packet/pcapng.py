"""Packets as a pcapng capture: the octets of its blocks, and the packets back out of a stream of ours.

Pure: octets and values only; files, pipes and rotation are the capture processor's. Written for a worker's loop: a
batch becomes one piece of memory, joined once. What packets of equal length have around them is built once for all
batches, but for the time; and a batch of equal packets is joined with what is between two of them, so that Python does
nothing for each.

Layout of a file, little-endian, each block's length at both its ends:

    section header         1.0, length unknown, who wrote it
    interface description  link type RAW (101) of a tun or ETHERNET (1) of a tap, the interface's name, nanoseconds
    enhanced packet ...    with its direction (epb_flags)
    interface statistics   received and dropped, where the capture ended in an orderly way

Direction is the host's, as tcpdump sees it: what a worker reads (`from_kernel`) is outbound, what it writes
(`to_kernel`) is inbound. Packets of one batch were read at one time and carry the same one.

Sources: draft-ietf-opsawg-pcapng, sections 3 and 4; the link types of tcpdump.org/linktypes.html.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

LINKTYPE_ETHERNET: Final = 1
LINKTYPE_RAW: Final = 101

INBOUND: Final = 1
"""epb_flags, bits 0 and 1: the host gets it."""
OUTBOUND: Final = 2
"""epb_flags, bits 0 and 1: the host sends it."""

PACKET_OVERHEAD: Final = 44
"""Octets of an enhanced packet block around its packet, without padding: 28 before it, 16 behind."""

_SECTION, _INTERFACE, _STATISTICS, _PACKET = 0x0A0D0D0A, 1, 5, 6
_BYTE_ORDER: Final = 0x1A2B3C4D
_OPT_END: Final = bytes(4)
_BLOCK_MAX: Final = 1 << 20  # of ours the longest has a packet of 256 KiB
_HEAD: Final = struct.Struct("<IIIIIII")
_BEFORE_TIME: Final = struct.Struct("<III")
_TIME: Final = struct.Struct("<II")
_BEHIND_TIME: Final = struct.Struct("<II")
_TAIL: Final = struct.Struct("<HHIHHI")
_LENGTHS_KEPT: Final = 4096  # those up to an MTU of 1,500, both ways; 450 octets each with what Python needs


def section(application: str) -> bytes:
    """Return a section header block, with who wrote it (shb_userappl, 4)."""
    body = struct.pack("<IHHq", _BYTE_ORDER, 1, 0, -1)
    return _block(_SECTION, body + _option(4, application.encode()) + _OPT_END)


def interface(name: str, mode: Literal["tun", "tap"], snaplen: int) -> bytes:
    """Return an interface description block: if_name (2) and if_tsresol (9), which is 10^-9 s."""
    link = LINKTYPE_RAW if mode == "tun" else LINKTYPE_ETHERNET
    options = _option(2, name.encode()) + _option(9, b"\x09") + _OPT_END
    return _block(_INTERFACE, struct.pack("<HHI", link, 0, snaplen) + options)


def packets(
    batch: Sequence[bytes | bytearray | memoryview], *, time_ns: int, flags: Literal[1, 2], snaplen: int
) -> bytes | memoryview:
    """Return enhanced packet blocks for packets that were read at one time; their octets are copied.

    `time_ns` is since the epoch. Of each packet the first `snaplen` octets are kept, and its whole length is told.
    """
    sizes = list(map(len, batch))
    if not sizes:
        return b""
    time = _TIME.pack(time_ns >> 32 & 0xFFFFFFFF, time_ns & 0xFFFFFFFF)
    size = sizes[0]
    if sizes.count(size) == len(sizes):
        before, behind, tail = _around(size, flags, snaplen)
        head = before + time + behind
        kept = batch if size <= snaplen else [packet[:snaplen] for packet in batch]
        # Between two packets is the end of the one and the head of the next, also at both ends: cut off again.
        joined = (tail + head).join([b"", *kept, b""])
        return memoryview(joined)[len(tail) : -len(head)]
    heads: dict[int, bytes] = {}
    tails: dict[int, bytes] = {}
    for size in set(sizes):
        before, behind, tails[size] = _around(size, flags, snaplen)
        heads[size] = before + time + behind
    parts: list[bytes | bytearray | memoryview] = [b""] * (3 * len(sizes))
    parts[::3] = map(heads.__getitem__, sizes)
    parts[1::3] = batch if max(sizes) <= snaplen else [packet[:snaplen] for packet in batch]
    parts[2::3] = map(tails.__getitem__, sizes)
    return b"".join(parts)


@lru_cache(_LENGTHS_KEPT)
def _around(size: int, flags: int, snaplen: int) -> tuple[bytes, bytes, bytes]:
    """What a packet of `size` octets has before its time, between that and itself, and behind itself."""
    kept = min(size, snaplen)
    padding = -kept & 3
    total = PACKET_OVERHEAD + kept + padding
    # Padding, epb_flags (2), the end of options, and the length again.
    tail = bytes(padding) + _TAIL.pack(2, 4, flags, 0, 0, total)
    return _BEFORE_TIME.pack(_PACKET, total, 0), _BEHIND_TIME.pack(kept, size), tail


def statistics(*, time_ns: int, received: int, dropped: int) -> bytes:
    """Return an interface statistics block: isb_ifrecv (4) and isb_ifdrop (5)."""
    body = struct.pack("<III", 0, time_ns >> 32 & 0xFFFFFFFF, time_ns & 0xFFFFFFFF)
    options = _option(4, struct.pack("<Q", received)) + _option(5, struct.pack("<Q", dropped)) + _OPT_END
    return _block(_STATISTICS, body + options)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) & 3)


def _block(kind: int, body: bytes) -> bytes:
    total = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + total + body + total


# -- back


class PcapngError(Exception):
    """The octets are no capture that this module wrote."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A packet of a capture: when it was read, nanoseconds since the epoch; how long it was; what was kept of it."""

    time_ns: int
    inbound: bool
    length: int
    packet: bytes


class Reader:
    """Takes a capture of ours apart as it comes, in pieces of any size. Keeps at most one unfinished block."""

    def __init__(self) -> None:
        self._rest = b""
        self.received = 0
        self.dropped = 0

    def feed(self, octets: bytes) -> Iterator[Captured]:
        """Return the packets that are complete now. To be iterated to its end. Raises PcapngError."""
        rest = self._rest + octets if self._rest else octets
        at = 0
        while len(rest) - at >= 12:
            kind, total = struct.unpack_from("<II", rest, at)
            if not 12 <= total <= _BLOCK_MAX or total & 3:
                raise PcapngError(f"a block of {total} octets")
            if len(rest) - at < total:
                break
            if kind == _PACKET:
                yield self._packet(rest, at, total)
            elif kind == _STATISTICS and total == 52:
                self.received, self.dropped = struct.unpack_from("<4xQ4xQ", rest, at + 20)
            at += total
        self._rest = rest[at:]

    @staticmethod
    def _packet(octets: bytes, at: int, total: int) -> Captured:
        if total < PACKET_OVERHEAD:
            raise PcapngError(f"a packet's block of {total} octets")
        _, _, _, high, low, kept, length = _HEAD.unpack_from(octets, at)
        end = at + 28 + kept
        if kept > total - PACKET_OVERHEAD:
            raise PcapngError(f"{kept} octets of packet in a block of {total}")
        (flags,) = struct.unpack_from("<I", octets, end + (-kept & 3) + 4)
        return Captured(high << 32 | low, flags & 3 == INBOUND, length, octets[at + 28 : end])


def whole(octets: bytes | memoryview) -> int:
    """Return how many octets from the start of a capture are whole blocks: where one that was cut off is to end."""
    at = 0
    while len(octets) - at >= 12:
        (total,) = struct.unpack_from("<I", octets, at + 4)
        if total < 12 or total & 3 or total > len(octets) - at:
            break
        at += total
    return at
