"""A context, outputs and batches to try a processor with: no worker, no device, no root. Public, as `contract` is.

For the tests of processors, other packages' too; nothing of it runs in the service. What a worker promises in
`contract` holds here as far as it can be seen without a device: packets lie in one writable buffer, and `run` says so
if a processor wrote beside them.

    from service.dataplane.fake import FakeContext, run

    context = FakeContext()
    batch = run(MyProcessor({"option": 1}, context), [packet, other])
    assert batch.left() == [packet]
    assert context.counted == {"seen": 2}
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from service.dataplane.contract import Batch, Direction, Mode, Processor
from service.packet.flowkey import ROWS_MIN, Entry, Meter
from service.packet.rows import Rows

_HEAD_BYTES: Final = 128
"""Octets of a packet that say what it is, and more."""

_MARGIN: Final = b"\xa5" * 16


@dataclass
class FakeOutput:
    """An interface that keeps copies of what it is sent; while not `ready` it takes nothing."""

    name: str
    ready: bool = True
    sent: list[bytes] = field(default_factory=list)

    def send(self, batch: Batch, indexes: Sequence[int] | None = None) -> int:
        """See `contract.Output.send`; what is not taken is not counted here."""
        if not self.ready:
            return 0
        found = [bytes(batch.packets[at]) for at in (range(len(batch.packets)) if indexes is None else indexes)]
        self.sent += found
        return len(found)


class FakeContext:
    """What a stage is given. `outputs` and `counted` are for the test to look at."""

    def __init__(self, mode: Mode = "tun", mtu: int = 1500) -> None:
        self.interface = f"{mode}0"
        self.mode: Mode = mode
        self.mtu = mtu
        self.outputs: dict[str, FakeOutput] = {}
        self.counted: Counter[str] = Counter()
        self.pokes = 0
        self.files: list[int] = []

    def output(self, name: str) -> FakeOutput:
        """See `contract.Context.output`."""
        return self.outputs.setdefault(name, FakeOutput(name))

    def count(self, figure: str, increment: int = 1) -> None:
        """See `contract.Context.count`; any name will do here."""
        self.counted[figure] += increment

    def poke(self) -> None:
        """See `contract.Context.poke`."""
        self.pokes += 1

    def give_memory(self, size_bytes: int) -> None:
        """Give the stage memory as `files[0]`, as one with `memory_bytes` gets it; `close` takes it back."""
        self.files = [os.memfd_create("stage")]
        os.ftruncate(self.files[0], size_bytes)

    def close(self) -> None:
        """Close the files."""
        for fd in self.files:
            os.close(fd)


class FakeBatch(Batch):
    """A batch that keeps what was answered and dropped, its packets side by side with margins between them."""

    __slots__ = ("_buffer", "_edges", "_entries", "_kind", "answered", "dropped", "takes_answers")

    def __init__(
        self, packets: Sequence[bytes], mode: Mode = "tun", direction: Direction = "from_kernel", time_ns: int = 1,
        headers: Sequence[bytes] | None = None,
    ) -> None:  # fmt: skip
        """`headers`: each packet's virtio_net_hdr, None for a device without."""
        self._buffer = bytearray(_MARGIN + b"".join(packet + _MARGIN for packet in packets))
        self._edges: list[tuple[int, int]] = []
        self.packets = []
        at = 0
        for packet in packets:
            self._edges.append((at, at + len(_MARGIN)))
            at += len(_MARGIN)
            self.packets.append(memoryview(self._buffer)[at : at + len(packet)])
            at += len(packet)
        self._edges.append((at, at + len(_MARGIN)))
        self.interface = f"{mode}0"
        self.mode = mode
        self.direction = direction
        self.headers = None if headers is None else [memoryview(bytearray(header)) for header in headers]
        self.time_ns = time_ns
        self.at = 0
        self.entries = None
        self.answered: list[bytes] = []
        self.dropped: Counter[str] = Counter()
        self.takes_answers = True
        """Whether the kernel takes what is answered; set it to False to see what happens then."""
        self._drop = self._count
        self._answer = self._keep_answer

    @property
    def entries(self) -> list[Entry] | None:
        """See `contract.Batch.entries`; None before `look`."""
        return self._entries

    @entries.setter
    def entries(self, entries: list[Entry] | None) -> None:
        """What was known of all at once is so no longer."""
        self._entries = entries
        self._kind = -1

    def take(self, indexes: Sequence[int]) -> None:
        """See `contract.Batch.take`."""
        kind = self._kind if indexes else -1
        super().take(indexes)
        self._kind = kind

    @property
    def kind(self) -> int:
        """See `contract.Batch.kind`; -1 before `look`."""
        return self._kind

    def look(self) -> None:
        """Have `entries` and `kind`, as a worker that has counted the packets; without, a processor has to look."""
        entries = Meter(self.mode).look(self.packets)
        self.entries = entries
        if len({entry.kind for entry in entries}) == 1:
            self._kind = self._kind_at_once()

    def _kind_at_once(self) -> int:
        many = self.packets * ROWS_MIN  # so few would not be looked at at once
        rows = Rows(memoryview(bytearray(_HEAD_BYTES * len(many))), _HEAD_BYTES, len(many))
        for place, packet in zip(rows.places, many, strict=True):
            head = packet[:_HEAD_BYTES]
            place[: len(head)] = head
        rows.hold(list(map(len, many)))
        alike = Meter(self.mode, rows=rows).alike()
        return -1 if alike is None else alike.kind

    def left(self) -> list[bytes]:
        """Copies of the packets that go on to the next stage."""
        return [bytes(packet) for packet in self.packets]

    def is_whole(self) -> bool:
        """Whether nothing was written beside the packets."""
        return all(self._buffer[start:end] == _MARGIN for start, end in self._edges)

    def _count(self, reason: str, count: int) -> None:
        self.dropped[reason] += count

    def _keep_answer(self, packets: list[memoryview]) -> int:
        self.answered += map(bytes, packets)
        return len(packets) if self.takes_answers else 0


def run(stage: Processor, packets: Sequence[bytes], **arguments: Any) -> FakeBatch:
    """Hand packets through a stage, in a batch made with `arguments`. Raises AssertionError if it wrote beside them."""
    batch = FakeBatch(packets, **arguments)
    stage.process(batch)
    assert batch.is_whole(), "written beside the packets"
    return batch
