"""Packets that lie in one memory at one stride, as a worker reads a batch: views of them, and fields of all at once.

A Python step for each packet costs what a C step for a whole batch does. Here is what takes a batch in one step: what a
field means, and which fields there are, `flowkey` knows; who reads into the memory, `dataplane.blackbox`.

Theory of operation. A memoryview with a step is a field of every packet (`column`), and its octets, side by side, can
be compared with those that are expected in one memcmp. A struct whose padding is the stride takes keys out of all
packets in one call (`fields`). Only the packets' own places are touched: a place is a page or more, so that the header
of a packet that is not there would cost as much as that of one that is. Batches under load mostly have the lengths of
the batch before them: views, sums and expected octets are made when the lengths change, and kept until then. Views of
packets of one length outlast that, because two devices by turns (a transfer and its acknowledgements) change it always.
"""

import struct
import sys
from array import array
from itertools import repeat
from operator import sub
from typing import Any, Final, Literal

_UNIFORM_MAX: Final = 16
"""Lengths of which views are kept."""


class Rows:
    """The places of up to `most` packets. What `hold` was told last is what the rest is about."""

    __slots__ = (
        "_memory",
        "_most",
        "_sizes",
        "_stride",
        "_structs",
        "_uniform",
        "_views",
        "_words",
        "least",
        "lengths",
        "octets",
        "places",
    )

    def __init__(self, memory: memoryview, stride: int, most: int) -> None:
        """Take `memory` (format "B"), whose first packet begins at 0; `stride` is even."""
        self._memory: Final = memory[: stride * most]
        self._stride: Final = stride
        self._most: Final = most
        self.places: Final = [memory[start : start + stride] for start in range(0, stride * most, stride)]
        self._structs: Final[dict[tuple[str, int], struct.Struct]] = {}
        self._views: list[memoryview] = []
        self._uniform: Final[dict[int, list[memoryview]]] = {}
        self._words: dict[int, bytes | None] = {}
        self._sizes: dict[tuple[int, int], array[int]] = {}
        self.lengths: list[int] = []
        """Of the packets."""
        self.least = 0
        """The shortest of them."""
        self.octets = 0
        """Their sum."""

    def hold(self, lengths: list[int]) -> bool:
        """Say how long the packets are that lie in the first places, one at least; return whether that is new."""
        if lengths == self.lengths:
            return False
        self.lengths = lengths
        first, count = lengths[0], len(lengths)
        if lengths.count(first) == count:
            self.least, self.octets = first, first * count
        else:
            self.least, self.octets = min(lengths), sum(lengths)
        self._words = {}
        self._sizes = {}
        self._views = []
        return True

    def forget(self) -> None:
        """The views may be of no use any more: somebody else had them in hand."""
        self._views = []
        self._uniform.clear()

    def views(self) -> list[memoryview]:
        """The packets, in a list of the caller's own."""
        if not self._views:
            self._make_views()
        return self._views[: len(self.lengths)]

    def _make_views(self) -> None:
        lengths, length = self.lengths, self.least
        if not self.uniform:
            self._views = [place[:each] for place, each in zip(self.places, lengths, strict=False)]
            return
        views = self._uniform.get(length)
        if views is None:
            if len(self._uniform) == _UNIFORM_MAX:
                self._uniform.clear()
            views = self._uniform[length] = []
        views += [place[:length] for place in self.places[len(views) : len(lengths)]]
        self._views = views

    @property
    def uniform(self) -> bool:
        """Whether all packets are of one length, `least`."""
        return self.octets == self.least * len(self.lengths)

    def holds(self, packets: list[memoryview]) -> bool:
        """Whether these are the first of the views, one at least, and nobody else had them in hand since."""
        return len(packets) <= len(self.lengths) and same(packets, self._views)

    def sizes(self, count: int, more: int) -> "array[int]":
        """The first so many lengths, each and so many octets more (format "I")."""
        found = self._sizes.get((count, more))
        if found is None:
            if self.uniform:
                found = array("I", [self.least + more]) * count
            else:
                found = array("I", [length + more for length in self.lengths[:count]])
            self._sizes[count, more] = found
        return found

    def words(self, less: int) -> bytes | None:
        """Every length less `less`, as 16-bit words in network order, side by side; None where one does not fit."""
        try:
            return self._words[less]
        except KeyError:
            found = self._words[less] = self._make_words(less)
            return found

    def _make_words(self, less: int) -> bytes | None:
        if self.uniform:
            each = self.least - less
            return each.to_bytes(2, "big") * len(self.lengths) if 0 <= each <= 0xFFFF else None
        if self.least < less or max(self.lengths) - less > 0xFFFF:
            return None
        words = array("H", map(sub, self.lengths, repeat(less)))
        if sys.byteorder == "little":
            words.byteswap()
        return words.tobytes()

    def column(self, at: int, size: Literal[1, 2]) -> memoryview:
        """A field of 1 or 2 octets that begins `at` octets behind the beginning of every packet, of all places."""
        whole = self._memory[at:]
        if size == 1:
            return whole[:: self._stride]
        return whole[: len(whole) // 2 * 2].cast("H")[:: self._stride // 2]

    def fields(self, form: str) -> tuple[Any, ...]:
        """The fields that `form` takes out of a packet, those of all packets in one row; a struct's format."""
        count = len(self.lengths)
        found = self._structs.get((form, count))
        if found is None:
            gap = self._stride - struct.calcsize("!" + form)
            found = self._structs[form, count] = struct.Struct("!" + f"{form}{gap}x" * (count - 1) + form)
        return found.unpack_from(self._memory)


def same(some: list[memoryview], known: list[memoryview]) -> bool:
    """Whether `some` are the very first of `known`, one at least; others of the same octets may pass for them."""
    count = len(some)
    # A list compares what is the same object without looking into it; the ends tell mostly whether it is worth while.
    return 0 < count <= len(known) and some[0] is known[0] and some[-1] is known[count - 1] and some == known[:count]
