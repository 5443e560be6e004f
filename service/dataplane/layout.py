"""The counters' shared memory: where each figure lives, how the worker writes it and the service reads it.

Words and offsets only. Which device has which slot is the supervisor's business; what is counted is the
worker's.

Theory of operation. Each worker process has one memfd of its own, mapped by it and by the service:

    header   8 words   the layout's fingerprint, the number of slots, the rest unused
    slot 0   8 words   state: 0, or the errno that the device was lost with; the rest unused
             2 words   from_kernel, class 0: packets, bytes
             ...       from_kernel, the other classes
             2 words   to_kernel, class 0: packets, bytes
             ...
             1 word    packets dropped, for each of `contract.DROP_REASONS`
             10 words  area 0: packets into a stage and out of it, then its own figures
             ...       `AREAS` of them
    slot 1   ...

A word is an unsigned 64-bit integer in native order, 8-byte aligned. Slots start on a cache line.

Why the reader never sees a torn or a decreasing value, without a lock:

- One writer. Only the worker that owns the memory writes slots (the service maps it read-only), and a worker
  has one thread.
- Whole words. An aligned 64-bit load or store is one access on every 64-bit machine that Linux runs on, and
  CPython reads and writes an element of a `memoryview` of format "Q" with a memcpy of constant size 8, which
  compilers turn into one such access (Objects/memoryobject.c: UNPACK_SINGLE, PACK_SINGLE). On 32 bits it
  would be two: the supervisor refuses to start there.
- One location never runs backwards: cache coherence gives every reader the stores to one word in the order
  in which they were made, and the writer only ever adds.
- A slot is zeroed by the worker before it acknowledges the attach, and given to another device only after it
  acknowledged the detach or said that the device is lost; the supervisor reads it in between only.

What is not promised is that two words belong together: packets may be one batch ahead of bytes, or behind.
"""

import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Final
from zlib import crc32

from service.dataplane.contract import DROP_REASONS, FIGURES_MAX
from service.packet.classify import CLASSES

WORD_BYTES: Final = 8
_LINE_WORDS: Final = 64 // WORD_BYTES
_HEADER_WORDS: Final = _LINE_WORDS
_STATE_WORDS: Final = _LINE_WORDS
DIRECTION_WORDS: Final[int] = 2 * len(CLASSES)
"""Packets and bytes of every class."""

AREAS: Final = 40
"""Stages that may have figures at once: 16 of a chain, 16 of the one that is about to take its place, 8 taps."""

AREA_WORDS: Final = 2 + FIGURES_MAX
DROPS_AT: Final[int] = 2 * DIRECTION_WORDS
AREAS_AT: Final[int] = DROPS_AT + len(DROP_REASONS)
"""From the word where a slot's from_kernel figures start."""

SLOT_WORDS: Final[int] = -(-(_STATE_WORDS + AREAS_AT + AREAS * AREA_WORDS) // _LINE_WORDS) * _LINE_WORDS

FINGERPRINT: Final[int] = crc32(repr((2, CLASSES, DROP_REASONS, SLOT_WORDS)).encode())
"""Differs when a word would mean something else: a replaced worker may run newer code than the service."""


class LayoutError(Exception):
    """The memory was made by other code than this."""


@dataclass(frozen=True, slots=True)
class SlotFigures:
    """What a slot holds: class name to (packets, bytes), drop reason to packets; those without a packet left out."""

    from_kernel: dict[str, tuple[int, int]]
    to_kernel: dict[str, tuple[int, int]]
    drops: dict[str, int]


def create(slots: int) -> int:
    """Return a memfd with room for `slots` devices, all zero; the caller closes it.

    It cannot change its size any more, so that a worker gone wild cannot make the service's reads end in
    SIGBUS. Pages cost memory once touched. Raises OSError. Source: memfd_create(2), fcntl(2) F_ADD_SEALS.
    """
    fd = os.memfd_create("tunledger-counters", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, (_HEADER_WORDS + slots * SLOT_WORDS) * WORD_BYTES)
        with mmap.mmap(fd, 0) as memory, memoryview(memory).cast("Q") as words:
            words[0] = FINGERPRINT
            words[1] = slots
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


class CounterWriter:
    """The worker's end. `words` is public because the packet loop adds to it in place."""

    def __init__(self, fd: int) -> None:
        """Map the memory behind `fd`, which may be closed afterwards. Raises LayoutError, OSError."""
        self.words: Final = memoryview(mmap.mmap(fd, 0)).cast("Q")
        if self.words[0] != FINGERPRINT:
            raise LayoutError("the counters' layout is another one: the service runs other code than this worker")
        self.slots: Final = self.words[1]

    def clear(self, slot: int) -> int:
        """Zero a slot; return the word where its from_kernel figures start.

        There, `2 * class` is the packets of a class and the word behind it the bytes.
        """
        start = _slot_start(slot)
        self.words[start : start + SLOT_WORDS] = memoryview(bytes(SLOT_WORDS * WORD_BYTES)).cast("Q")
        return start + _STATE_WORDS

    def clear_area(self, start: int, area: int) -> int:
        """Zero an area of the slot whose figures start at `start`; return its first word."""
        at = start + AREAS_AT + area * AREA_WORDS
        self.words[at : at + AREA_WORDS] = memoryview(bytes(AREA_WORDS * WORD_BYTES)).cast("Q")
        return at

    def mark_lost(self, slot: int, error: int) -> None:
        """Say that the device in `slot` is gone, and why: an errno above 0. The figures are final by now."""
        self.words[_slot_start(slot)] = error


class CounterReader:
    """The service's end, read-only. The mapping goes away with the last reference to this object."""

    def __init__(self, fd: int) -> None:
        """Map the memory behind `fd`, which may be closed afterwards. Raises OSError."""
        self._words: Final = memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ)).cast("Q")

    def lost(self, slot: int) -> int:
        """Return the errno that the device in `slot` was lost with, 0 if it was not."""
        return self._words[_slot_start(slot)]

    def read(self, slot: int) -> SlotFigures:
        """Return the figures of `slot` as they are now."""
        start = _slot_start(slot) + _STATE_WORDS
        words = self._words[start : start + AREAS_AT].tolist()
        drops = {reason: count for reason, count in zip(DROP_REASONS, words[DROPS_AT:], strict=True) if count}
        return SlotFigures(_by_class(words[:DIRECTION_WORDS]), _by_class(words[DIRECTION_WORDS:DROPS_AT]), drops)

    def read_area(self, slot: int, area: int) -> list[int]:
        """Return packets into the stage with this area, packets out of it, and its figures in their order."""
        at = _slot_start(slot) + _STATE_WORDS + AREAS_AT + area * AREA_WORDS
        return self._words[at : at + AREA_WORDS].tolist()


def _slot_start(slot: int) -> int:
    return _HEADER_WORDS + slot * SLOT_WORDS


def _by_class(words: list[int]) -> dict[str, tuple[int, int]]:
    pairs = zip(CLASSES, words[::2], words[1::2], strict=True)
    return {name: (packets, octets) for name, packets, octets in pairs if packets or octets}
