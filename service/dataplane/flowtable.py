"""What `inspect` found, in memory that the service reads while the worker goes on: totals, flows, the latest packets.

Words, offsets and both ends, as `layout` has it for the counters. What is counted, and when it is written, is the
processor's business; how it is shown is the API's.

Theory of operation. One memfd for each stage, mapped by its worker and, read-only, by the service:

    header    8 words  fingerprint, rows, packet places, rows in use, rows evicted, packets put into places, packets
                       seen, time of the last write
    totals             for from_kernel, then to_kernel: packets and bytes of every class (`classify.CLASSES`)
                       packets and bytes of every IP protocol, 256 pairs; both directions together from here on
                       packets with each of the TCP flags, 9 words, FIN first
                       packets by size, 18 words: word n counts lengths from 2^(n-1) to 2^n - 1, the last all above
                       packets on the wire: a segment counts as the packets that a card would make of it
    rows     16 words  1 stamp, 5 the flow's key (`flowkey`), then for first-to-second and second-to-first: packets,
                       bytes; first and last seen (ns); TCP flags (second-to-first shifted by 16); packets on the wire
                       in each direction; 1 stamp
    packets  20 words  1 stamp, time (ns), length and direction and octets kept, 16 the first 128 octets, 1 stamp

A word is an unsigned 64-bit integer in native order, 8-byte aligned; for whole words that never run backwards the
reasons are those in `layout`, and as there two words of the totals may be of different moments.

Rows and packets change as a whole, so they carry a stamp at both ends. Stamps count up with every write and never
repeat; 0 is a place never used. The writer writes from the first word to the last, the reader looks at the last
stamp, copies, and looks at the first: if both are the same, no write began before the copy ended, and the one that
wrote the last stamp had ended before it began. Else the row is torn, and is read again. (Stores become visible in
order on x86-64. A machine with weaker order, such as ARM, could in theory show a row of two moments; each word of it
would still be right by itself.)
"""

import struct
from array import array
from dataclasses import dataclass
from typing import Any, Final, Literal
from zlib import crc32

from service.packet.classify import CLASSES
from service.packet.flowkey import FLOW_BYTES, FlowEnds, flow_ends

HEAD_BYTES: Final = 128
"""Octets kept of a packet: enough for every header that `parse` reads but the longest chains."""

SIZE_BINS: Final = 18
"""Lengths by powers of two: 0, 1, 2 to 3, 4 to 7, ... 32,768 to 65,535, and all above."""

TCP_FLAGS: Final[tuple[str, ...]] = ("fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr", "ae")
"""Names of the flags, lowest bit first (RFC 9293, 3.1; RFC 9768)."""

_WORD: Final = 8
_HEADER_WORDS: Final = 8
CLASS_WORDS: Final = 2 * len(CLASSES)
PROTOCOLS_AT: Final = 2 * CLASS_WORDS
FLAGS_AT: Final = PROTOCOLS_AT + 2 * 256
SIZES_AT: Final = FLAGS_AT + len(TCP_FLAGS)
WIRE_AT: Final = SIZES_AT + SIZE_BINS
_TOTAL_WORDS: Final[int] = -(-(WIRE_AT + 1) // 8) * 8
"""The totals' words, from their first; see above."""

_ROW: Final = struct.Struct(f"=Q{FLOW_BYTES}s10Q")
_HEAD: Final = struct.Struct(f"=QQIHH{HEAD_BYTES}sQ")
_FINGERPRINT: Final[int] = crc32(repr((1, CLASSES, _TOTAL_WORDS, _ROW.format, _HEAD.format)).encode())
_TRIES: Final = 8


def table_bytes(flows: int, packets: int) -> int:
    """Octets of memory for that many rows and packets."""
    return (_HEADER_WORDS + _TOTAL_WORDS) * _WORD + flows * _ROW.size + packets * _HEAD.size


@dataclass(frozen=True, slots=True)
class FlowRow:
    """A flow. `there` is from its first end to its second, `back` the other way; times are ns since the epoch."""

    ends: FlowEnds
    packets_there: int
    bytes_there: int
    packets_back: int
    bytes_back: int
    first_seen_ns: int
    last_seen_ns: int
    tcp_flags_there: int
    tcp_flags_back: int
    wire_packets_there: int
    """As packets, but a segment (TSO, USO) counts as what a card would make of it."""
    wire_packets_back: int

    @property
    def packets(self) -> int:
        """Both directions."""
        return self.packets_there + self.packets_back

    @property
    def bytes(self) -> int:
        """Both directions."""
        return self.bytes_there + self.bytes_back


@dataclass(frozen=True, slots=True)
class PacketHead:
    """One of the latest packets: `length` octets long, of which `data` are the first."""

    number: int
    """Counts up; a gap says that packets between two were not kept."""
    time_ns: int
    direction: Literal["from_kernel", "to_kernel"]
    length: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Totals:
    """All that was seen since the stage was made. Pairs are packets and bytes; what was never seen is left out."""

    from_kernel: dict[str, tuple[int, int]]
    """By class name."""
    to_kernel: dict[str, tuple[int, int]]
    protocols: dict[int, tuple[int, int]]
    """By IP protocol number."""
    tcp_flags: dict[str, int]
    """Packets that had the flag."""
    sizes: dict[int, int]
    """Packets by length: the key is the longest length in octets that is counted there, a power of two less 1; those
    longer than 65,535 are under 131,071."""
    packets: int
    wire_packets: int
    """As packets, but a segment (TSO, USO) counts as what a card would make of it."""
    flows: int
    flows_max: int
    flows_evicted: int
    updated_ns: int
    """When the worker last wrote, 0 for never."""


class FlowTableWriter:
    """The worker's end. It writes where it is told; which row is whose is known by the caller."""

    def __init__(self, memory: memoryview, flows: int, packets: int) -> None:
        """Take `memory` (writable, format "B") and clear it. Raises ValueError if it is too small."""
        if len(memory) < table_bytes(flows, packets):
            raise ValueError(f"{len(memory)} octets of memory, {table_bytes(flows, packets)} are needed")
        if memory[0:_WORD] != bytes(_WORD):  # another stage's; fresh memory costs nothing until it is touched
            memory[:] = bytes(len(memory))
        self._memory: Final = memory
        self._words: Final = memory[: len(memory) // _WORD * _WORD].cast("Q")
        self._rows_at: Final = (_HEADER_WORDS + _TOTAL_WORDS) * _WORD
        self._heads_at: Final = self._rows_at + flows * _ROW.size
        self._packets: Final = packets
        self._stamp = 0
        self._kept = 0
        self.totals: Final = array("Q", bytes(_TOTAL_WORDS * _WORD))
        """The totals to be, in the order above: added to by the caller, seen by the service after `publish`."""
        self._words[1] = flows
        self._words[2] = packets
        self._words[0] = _FINGERPRINT

    def publish(self, rows: int, evicted: int, seen: int, now_ns: int) -> None:
        """Show the totals, and how full the table is."""
        self._words[_HEADER_WORDS : _HEADER_WORDS + _TOTAL_WORDS] = memoryview(self.totals)
        words = self._words
        words[3] = rows
        words[4] = evicted
        words[6] = seen
        words[7] = now_ns

    def write_row(self, row: int, flow: bytes, figures: list[int]) -> None:
        """Write a row: nine figures in the order above."""
        self._stamp = stamp = self._stamp + 1
        _ROW.pack_into(self._memory, self._rows_at + row * _ROW.size, stamp, flow, *figures, stamp)

    def write_head(self, number: int, time_ns: int, to_kernel: bool, length: int, head: bytes) -> None:
        """Keep the beginning of a packet, in the place of the oldest one. `number` is above all before."""
        at = self._heads_at + self._kept % self._packets * _HEAD.size
        kept = len(head) | (0x8000 if to_kernel else 0)
        _HEAD.pack_into(self._memory, at, number, time_ns, length, kept, 0, head, number)
        self._kept += 1
        self._words[5] = self._kept

    def release(self) -> None:
        """Let go of the memory."""
        self._words.release()
        self._memory.release()


class FlowTableReader:
    """The service's end."""

    def __init__(self, memory: memoryview) -> None:
        """Read `memory` (format "B"), which stays the caller's. Raises ValueError if other code than ours made it."""
        self._memory: Final = memory
        self._words: Final = memory[: len(memory) // _WORD * _WORD].cast("Q")
        if self._words[0] not in (0, _FINGERPRINT):
            raise ValueError("the flow table's layout is another one: the worker runs other code than the service")
        self._rows_at: Final = (_HEADER_WORDS + _TOTAL_WORDS) * _WORD

    def totals(self) -> Totals:
        """The totals as they are now; up to a fraction of a second behind the packets."""
        words = self._words[_HEADER_WORDS : _HEADER_WORDS + _TOTAL_WORDS].tolist()
        sizes = words[SIZES_AT : SIZES_AT + SIZE_BINS]
        return Totals(
            from_kernel=_pairs(words[:CLASS_WORDS]),
            to_kernel=_pairs(words[CLASS_WORDS : 2 * CLASS_WORDS]),
            protocols={
                number: (words[PROTOCOLS_AT + 2 * number], words[PROTOCOLS_AT + 2 * number + 1])
                for number in range(256)
                if words[PROTOCOLS_AT + 2 * number]
            },
            tcp_flags={name: words[FLAGS_AT + bit] for bit, name in enumerate(TCP_FLAGS) if words[FLAGS_AT + bit]},
            sizes={(1 << power) - 1: packets for power, packets in enumerate(sizes) if packets},
            packets=self._words[6],
            wire_packets=words[WIRE_AT],
            flows=self._words[3],
            flows_max=self._words[1],
            flows_evicted=self._words[4],
            updated_ns=self._words[7],
        )

    def rows(self) -> list[FlowRow]:
        """All flows, in no order. A row that is being written again and again is left out."""
        found = []
        for number in range(min(self._words[3], self._words[1])):
            fields = self._copy(_ROW, self._rows_at + number * _ROW.size)
            if fields is not None:
                found.append(_flow_row(fields))
        return found

    def top(self, count: int, by: Literal["bytes", "packets"] = "bytes") -> list[FlowRow]:
        """The flows with most bytes or packets in both directions, most first."""
        key = (lambda row: row.bytes) if by == "bytes" else (lambda row: row.packets)
        return sorted(self.rows(), key=key, reverse=True)[:count]

    def packets(self) -> list[PacketHead]:
        """The latest packets, oldest first."""
        places = self._words[2]
        start = self._rows_at + self._words[1] * _ROW.size
        found = []
        for place in range(min(self._words[5], places)):
            fields = self._copy(_HEAD, start + place * _HEAD.size)
            if fields is not None:
                number, time_ns, length, kept, _, data, _ = fields
                direction: Literal["from_kernel", "to_kernel"] = "to_kernel" if kept & 0x8000 else "from_kernel"
                found.append(PacketHead(number, time_ns, direction, length, data[: kept & 0xFF]))
        return sorted(found, key=lambda head: head.number)

    def release(self) -> None:
        """Let go of the memory; the reader is of no use afterwards."""
        self._words.release()

    def _copy(self, form: struct.Struct, at: int) -> tuple[Any, ...] | None:
        """The fields of a row or packet that is whole, None if there is none."""
        first = at // _WORD
        last = first + form.size // _WORD - 1
        words = self._words
        for _ in range(_TRIES):
            stamp = words[last]
            fields = form.unpack_from(self._memory, at)
            if words[first] == stamp:
                return fields if stamp else None
        return None


def _pairs(words: list[int]) -> dict[str, tuple[int, int]]:
    pairs = zip(CLASSES, words[::2], words[1::2], strict=True)
    return {name: (packets, octets) for name, packets, octets in pairs if packets or octets}


def _flow_row(fields: tuple[Any, ...]) -> FlowRow:
    _, flow, there, bytes_there, back, bytes_back, first, last, flags, wire_there, wire_back, _ = fields
    return FlowRow(
        flow_ends(flow), there, bytes_there, back, bytes_back, first, last,
        flags & 0xFFFF, flags >> 16, wire_there, wire_back,
    )  # fmt: skip
