"""`inspect`: counts what goes by and lets all of it pass. Totals, flows, sizes, TCP flags, the latest packets.

What it found is in the stage's memory (`flowtable`), where the service reads it; nothing is decoded or shown here.

Theory of operation. A packet costs one addition, made in C for a whole batch: to what the window has so far for its
length and its `Entry`, which stands for flow, direction, class and TCP flags at once. At the end of a window
(`WINDOW_NS`, or a tick, or too many packets) the sums are folded into rows and totals, and what changed is written to
the memory. So the service sees everything at most a second late, and 20 times a second under load; when a flow was
first and last seen is as exact as a window is long.

Of the packets themselves all are kept while few come: the first `packets` in each window. Of what comes beyond only
the last two of each batch are, until the window ends: so the latest is always there, and under load the rest are
samples. Their numbers say where some are missing. Those are in the worker's own memory until then: of a worker that
crashes, the last window's are lost, but for the first.
"""

import mmap
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from struct import Struct
from typing import Any, ClassVar, Final

from service.dataplane.contract import BOTH, Batch, Context, Direction, Processor
from service.dataplane.flowtable import (
    CLASS_WORDS,
    FLAGS_AT,
    HEAD_BYTES,
    PROTOCOLS_AT,
    SIZE_BINS,
    SIZES_AT,
    WIRE_AT,
    FlowTableWriter,
    table_bytes,
)
from service.packet.flowkey import Entry, Meter
from service.packet.vnet import VNET_HDR_BYTES

WINDOW_NS: Final = 50_000_000
WINDOW_PACKETS: Final = 1 << 16
"""Packets summed before a window ends early; it bounds the entries, and how long folding them takes."""

try:
    from collections import _count_elements  # type: ignore[attr-defined]  # Counter.update's loop, in C
except ImportError:  # another Python's Counter may go without it

    def _count_elements(mapping: dict[Any, int], iterable: Iterable[Any]) -> None:
        for element in iterable:
            mapping[element] = mapping.get(element, 0) + 1


_GSO: Final = Struct("=4xHH").unpack_from
"""gso_size and csum_start of a virtio_net_hdr."""


class Inspect(Processor):
    """Options: `flows`, rows of the table, the least recently seen one making room; `packets`, how many are kept."""

    directions: ClassVar[frozenset[Direction]] = BOTH
    takes_segments: ClassVar[bool] = True
    figures: ClassVar[tuple[str, ...]] = ("flows_evicted",)

    @classmethod
    def memory_bytes(cls, options: Mapping[str, Any]) -> int:
        """Octets of shared memory that a stage with these options needs."""
        return table_bytes(options.get("flows", 4096), options.get("packets", 64))

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        """Map the stage's memory, `context.files[0]`. Raises ValueError without one, or if it is too small."""
        super().__init__(options, context)
        self._flows: Final[int] = options.get("flows", 4096)
        self._keep: Final[int] = options.get("packets", 64)
        if not context.files:
            raise ValueError("inspect needs memory to write to")
        self._mapped: Final = mmap.mmap(context.files[0], 0)
        self._table: Final = FlowTableWriter(memoryview(self._mapped), self._flows, self._keep)
        self._meter: Final = Meter(context.mode)
        # Of the window, of each direction: packets by length and entry, where all of a batch had one length; else by
        # entry and length; and the packets on the wire that segments stand for, beyond one each.
        self._equal: Final[tuple[dict[int, dict[Entry, int]], ...]] = ({}, {})
        self._mixed: Final[tuple[dict[tuple[Entry, int], int], ...]] = ({}, {})
        self._beyond: Final[tuple[dict[Entry, int], ...]] = ({}, {})
        self._began_ns = 0  # when the first of the window came; 0 while there is none
        self._folded = 0
        self._window_ends = 0
        self._last_ns = 0
        self._may_keep = self._keep
        self._waiting: Final[deque[tuple[int, int, bool, int, bytes]]] = deque(maxlen=self._keep)
        """What is kept of the packets beyond those that may be, as `FlowTableWriter.write_head` takes it."""
        # Of all time: flow -> [row, the nine figures of a row], least recently seen first.
        self._rows: Final[OrderedDict[bytes, list[int]]] = OrderedDict()
        self._seen = 0
        self._evicted = 0

    def process(self, batch: Batch) -> None:
        """Sum up; nothing is taken out of the batch."""
        packets = batch.packets
        if not packets:
            return
        now_ns = batch.time_ns
        over = now_ns >= self._window_ends
        if over:  # what came before a pause is not seen again after it
            self._fold(now_ns)
        self._last_ns = now_ns
        to_kernel = batch.direction == "to_kernel"
        entries: list[Entry] | None = getattr(batch, "entries", None)
        if entries is None:
            entries = self._meter.look(packets)
        if over:
            self._may_keep = self._keep
        if self._keep:
            self._keep_heads(packets, now_ns, to_kernel)
        self._seen += len(packets)
        lengths = list(map(len, packets))
        length = lengths[0]
        if lengths.count(length) == len(lengths):
            _count_elements(self._equal[to_kernel].setdefault(length, {}), entries)
        else:
            _count_elements(self._mixed[to_kernel], zip(entries, lengths, strict=True))
        if not self._began_ns:
            self._began_ns = now_ns
        if batch.headers is not None:
            self._count_segments(batch.headers, entries, lengths, self._beyond[to_kernel])
        if over or self._seen - self._folded > WINDOW_PACKETS:
            self._fold(now_ns)

    def tick(self, now_ns: int) -> None:
        """End the window: what came before a pause is shown."""
        self._fold(now_ns)

    def close(self) -> None:
        """Write what is left, and let go of the memory."""
        self._fold(self._last_ns)
        self._table.release()
        self._mapped.close()

    def _keep_heads(self, packets: list[memoryview], now_ns: int, to_kernel: bool) -> None:
        number = self._seen
        may = self._may_keep
        if may:
            for packet in packets[:may]:
                number += 1
                self._table.write_head(number, now_ns, to_kernel, len(packet), packet[:HEAD_BYTES].tobytes())
            self._may_keep = max(0, may - len(packets))
            return
        number += len(packets)  # the last two
        add = self._waiting.append
        if len(packets) > 1:
            last = packets[-2]
            add((number - 1, now_ns, to_kernel, len(last), last[:HEAD_BYTES].tobytes()))
        last = packets[-1]
        add((number, now_ns, to_kernel, len(last), last[:HEAD_BYTES].tobytes()))

    @staticmethod
    def _count_segments(
        headers: list[memoryview], entries: list[Entry], lengths: list[int], beyond: dict[Entry, int]
    ) -> None:
        said = b"".join(headers)
        one = said[:VNET_HDR_BYTES]
        count = len(headers)
        times = 1
        if said == one * count:
            if not one[1]:
                return
            if entries.count(entries[0]) == count == lengths.count(lengths[0]):  # one sender's segments, as mostly
                headers, times = headers[:1], count
        for header, entry, length in zip(headers, entries, lengths, strict=False):
            if header[1]:
                size, start = _GSO(header)
                payload = length - start - (entry.least or 8)
                if size and payload > size:
                    beyond[entry] = beyond.get(entry, 0) + (payload - 1) // size * times

    def _window(self, side: int) -> dict[Entry, list[int]]:
        """Of one direction: entry -> [packets, bytes, packets on the wire beyond them]; the sizes go to the totals."""
        sums: dict[Entry, list[int]] = {}
        totals = self._table.totals
        packets_of = [
            (entry, length, packets) for length, equal in self._equal[side].items() for entry, packets in equal.items()
        ]
        packets_of += [(entry, length, packets) for (entry, length), packets in self._mixed[side].items()]
        beyond = self._beyond[side]
        for entry, length, packets in packets_of:
            found = sums.get(entry)
            if found is None:
                sums[entry] = [packets, packets * length, beyond.get(entry, 0)]
            else:
                found[0] += packets
                found[1] += packets * length
            totals[SIZES_AT + min(length.bit_length(), SIZE_BINS - 1)] += packets
        self._equal[side].clear()
        self._mixed[side].clear()
        beyond.clear()
        return sums

    def _fold(self, now_ns: int) -> None:
        """Put the window's sums into rows and totals, and show them."""
        self._window_ends = now_ns + WINDOW_NS
        if not self._began_ns:
            return
        first_ns, last_ns, self._began_ns, self._folded = self._began_ns, self._last_ns, 0, self._seen
        totals = self._table.totals
        evicted = self._evicted
        changed: dict[bytes, list[int]] = {}
        for side in (0, 1):
            for entry, (packets, octets, more) in self._window(side).items():
                at = side * CLASS_WORDS + 2 * entry.kind
                totals[at] += packets
                totals[at + 1] += octets
                totals[WIRE_AT] += packets + more
                flow = entry.flow
                if flow is None:
                    continue
                at = PROTOCOLS_AT + 2 * entry.protocol
                totals[at] += packets
                totals[at + 1] += octets
                flags = entry.tcp_flags
                while flags:
                    totals[FLAGS_AT + (flags & -flags).bit_length() - 1] += packets
                    flags &= flags - 1
                row = self._row(flow, first_ns, changed)
                changed[flow] = row
                if first_ns < row[5]:
                    row[5] = first_ns
                if entry.swapped:
                    row[3] += packets
                    row[4] += octets
                    row[7] |= entry.tcp_flags << 16
                    row[9] += packets + more
                else:
                    row[1] += packets
                    row[2] += octets
                    row[7] |= entry.tcp_flags
                    row[8] += packets + more
                if last_ns > row[6]:
                    row[6] = last_ns
        for head in self._waiting:
            self._table.write_head(*head)
        self._waiting.clear()
        for flow, row in changed.items():
            self._table.write_row(row[0], flow, row[1:])
        self._table.publish(len(self._rows), self._evicted, self._seen, now_ns)
        if self._evicted != evicted:
            self.context.count("flows_evicted", self._evicted - evicted)

    def _row(self, flow: bytes, first_ns: int, changed: dict[bytes, list[int]]) -> list[int]:
        """The row of a flow, a new one if need be, as the most recently seen."""
        rows = self._rows
        row = rows.get(flow)
        if row is not None:
            rows.move_to_end(flow)
            return row
        place = len(rows)
        if place == self._flows:
            gone, oldest = rows.popitem(last=False)
            changed.pop(gone, None)
            place = oldest[0]
            self._evicted += 1
        rows[flow] = row = [place, 0, 0, 0, 0, first_ns, 0, 0, 0, 0]
        return row
