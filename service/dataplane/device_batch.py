"""A batch as a device makes it: it knows which buffer each packet came in, and can be made plain for a stage.

Its entries are looked up when somebody asks for them: who only sends packets on, or captures them, does not.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from service.dataplane.blackbox import INDEX, BlackBox
from service.dataplane.contract import Batch, Direction, Mode, Packet
from service.dataplane.segments import is_plain, nothing_left, plain
from service.packet.flowkey import Alike, Entry, Meter


class Source(Protocol):
    """What a device is to its batches."""

    @property
    def name(self) -> str:
        """The interface."""
        ...

    @property
    def mode(self) -> Mode:
        """Which packets it has."""
        ...

    @property
    def box(self) -> BlackBox:
        """Where to say which packet is in hand."""
        ...

    def drop(self, reason: str, count: int) -> None:
        """Count packets that end here."""
        ...

    def answer(self, packets: list[Packet], kinds: list[int] | int | None = None) -> int:
        """Write packets back, of these classes (each, or all of one) if they are known."""
        ...


class DeviceBatch(Batch):
    """A batch that knows which buffer each packet came in, so that a crash can be told with the packet."""

    __slots__ = ("_alike", "_box", "_entries", "_meter", "_places", "_source")

    def __init__(
        self,
        source: "Source",
        direction: Direction,
        packets: list[Packet],
        headers: list[Packet] | None,
        looked: list[Entry] | Alike | None,
        meter: Meter,
    ) -> None:
        """`looked` is what the packets were found to be: each, or all that `meter` has in its rows; None for not."""
        self.interface = source.name
        self.mode = source.mode
        self.direction = direction
        self.packets = packets
        self.headers = headers
        if isinstance(looked, Alike):
            self._alike: Alike | None = looked
            self._entries: list[Entry] | None = None
        else:
            self._alike = None
            self._entries = looked
        self._meter = meter
        self.time_ns = time.time_ns()
        self.at = 0
        self._drop = source.drop
        self._answer = source.answer
        self._source = source
        self._box = source.box.words
        self._places: list[int] | None = None

    def __iter__(self) -> Iterator[Packet]:
        """The packets one by one, the black box knowing which."""
        box, places = self._box, self._places
        for at, packet in enumerate(self.packets):
            self.at = at
            box[INDEX] = at if places is None else places[at]
            yield packet

    @property
    def entries(self) -> list[Entry] | None:
        """See `Batch.entries`."""
        entries = self._entries
        if entries is None and self._alike is not None:
            entries = self._entries = self._meter.look_alike(self._alike, self.packets, self._places)
        return entries

    @entries.setter
    def entries(self, entries: list[Entry] | None) -> None:
        """What was known of all at once is so no longer."""
        self._entries = entries
        self._alike = None

    @property
    def kind(self) -> int:
        """See `Batch.kind`."""
        return -1 if self._alike is None else self._alike.kind

    def take(self, indexes: Sequence[int]) -> None:
        """See `Batch.take`."""
        if not indexes:
            self.packets = []
            self.headers = None if self.headers is None else []
            self.entries = None if self._entries is None and self._alike is None else []
            return
        places = self._places
        self._places = list(indexes) if places is None else [places[index] for index in indexes]
        packets, headers, entries = self.packets, self.headers, self._entries
        self.packets = [packets[index] for index in indexes]
        if headers is not None:
            self.headers = [headers[index] for index in indexes]
        if entries is not None:
            self._entries = [entries[index] for index in indexes]

    def answer_looked(self, packets: list[Packet], kinds: list[int] | int) -> int:
        """See `Batch.answer_looked`."""
        return self._source.answer(packets, kinds)

    def make_plain(self) -> None:
        """For a stage that takes no segments: cut them, and finish checksums."""
        headers = self.headers
        if headers is None or is_plain(headers):
            return
        self.packets, origins = plain(self.packets, headers, self.mode, self._drop)
        self.headers = nothing_left(len(origins))
        self.entries = None
        places = self._places
        self._places = origins if places is None else [places[origin] for origin in origins]
