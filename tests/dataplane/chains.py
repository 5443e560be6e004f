"""A context and outputs to try processors with, without a worker, a device or root."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from service.dataplane.contract import NO_OFFLOAD, Batch, Direction, Mode, Processor


@dataclass
class FakeOutput:
    """Keeps copies of what it was sent; while not `ready` it takes nothing."""

    name: str
    ready: bool = True
    sent: list[bytes] = field(default_factory=list)

    def send(self, batch: Batch, indexes: Sequence[int] | None = None) -> int:
        if not self.ready:
            return 0
        found = [bytes(batch.packets[at]) for at in (range(len(batch.packets)) if indexes is None else indexes)]
        self.sent += found
        return len(found)


class FakeContext:
    """What a stage is given; counts and outputs are kept for the test to look at."""

    def __init__(self, mode: Mode = "tun", mtu: int = 1500) -> None:
        self.interface = f"{mode}0"
        self.mode: Mode = mode
        self.mtu = mtu
        self.outputs: dict[str, FakeOutput] = {}
        self.counted: Counter[str] = Counter()
        self.files: list[int] = []

    def output(self, name: str) -> FakeOutput:
        return self.outputs.setdefault(name, FakeOutput(name))

    def count(self, figure: str, increment: int = 1) -> None:
        self.counted[figure] += increment

    def give_memory(self, size_bytes: int) -> None:
        self.files = [os.memfd_create("stage")]
        os.ftruncate(self.files[0], size_bytes)

    def close(self) -> None:
        for fd in self.files:
            os.close(fd)


class FakeBatch(Batch):
    """A batch that keeps what was answered and dropped. Its packets lie in one buffer, with margins between them."""

    __slots__ = ("_buffer", "_edges", "answered", "dropped", "taken")

    def __init__(
        self, packets: Sequence[bytes], mode: Mode = "tun", direction: Direction = "from_kernel", time_ns: int = 1,
        headers: Sequence[bytes] | None = None,
    ) -> None:  # fmt: skip
        margin = b"\xa5" * 16
        self._buffer = bytearray(margin + b"".join(packet + margin for packet in packets))
        self._edges: list[tuple[int, int]] = []
        at = 0
        self.packets = []
        for packet in packets:
            self._edges.append((at, at + 16))
            self.packets.append(memoryview(self._buffer)[at + 16 : at + 16 + len(packet)])
            at += 16 + len(packet)
        self._edges.append((at, at + 16))
        self.interface = f"{mode}0"
        self.mode = mode
        self.direction = direction
        self.headers = None if headers is None else [memoryview(bytearray(header)) for header in headers]
        self.time_ns = time_ns
        self.at = 0
        self.answered: list[bytes] = []
        self.dropped: Counter[str] = Counter()
        self.taken = True
        self._drop = self._count
        self._answer = self._keep_answer

    def _count(self, reason: str, count: int) -> None:
        self.dropped[reason] += count

    def _keep_answer(self, packet: bytes | bytearray | memoryview) -> bool:
        self.answered.append(bytes(packet))
        return self.taken

    def untouched_outside(self) -> bool:
        return all(self._buffer[start:end] == b"\xa5" * 16 for start, end in self._edges)

    def left(self) -> list[bytes]:
        return [bytes(packet) for packet in self.packets]


def plain_headers(count: int) -> list[bytes]:
    return [bytes(NO_OFFLOAD)] * count


def run(stage: Processor, packets: Sequence[bytes], **arguments: Any) -> FakeBatch:
    batch = FakeBatch(packets, **arguments)
    stage.process(batch)
    assert batch.untouched_outside()
    return batch
