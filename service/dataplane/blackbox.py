"""What survives a worker: the packets it had read, and where it was in them.

One memfd for each worker, mapped by it and, to be read, by the supervisor. The worker writes a few words for each batch
and stage; after its death the supervisor reads which stage had which packet. Who is to blame is decided here, what to
do about it elsewhere (`crashes`).

    0     words    turn, busy, serial, area + 1, count, index
    64    u32      the lengths of the packets in the buffers
    512   text     what Python said: two octets of length, UTF-8
    2048  packet   the packet at fault, if it is none of the buffers': length and first octets
    4096  rows     `BATCH_MAX` of `STRIDE` octets: a packet begins where its row does, what was read in front of it
                   (virtio_net_hdr) ends there, at the end of the row before

A packet begins at the same place whether its device has headers or not: so one set of views does for all devices.

`turn` and `busy` also tell a worker that is stuck from one that has nothing to do.
"""

import ctypes
import fcntl
import mmap
import os
import struct
from array import array
from dataclasses import dataclass
from typing import Final

from service.dataplane.contract import BATCH_MAX
from service.packet.rows import Rows, same

TURN: Final = 0
BUSY: Final = 1
SERIAL: Final = 2
AREA: Final = 3
COUNT: Final = 4
INDEX: Final = 5
_WORDS: Final = 8

_LENGTHS_AT: Final = 64
_TEXT_AT: Final = 512
_TEXT_MAX: Final = 1024
_PACKET_AT: Final = 2048
_ROWS_AT: Final = 4096
HEADER_BYTES: Final = 10
"""struct virtio_net_hdr (linux/virtio_net.h), as TUNSETVNETHDRSZ is left."""

SHOWN_MAX: Final = 256
"""Octets of a packet that are told."""

STRIDE: Final = 65_536 + 22 + 10 + 8 + 64 - 40
"""A largest packet, an Ethernet header and two VLAN tags, a virtio_net_hdr; then an odd number of cache lines, 1,025,
so that the packets' headers do not all fall into one set of the cache."""

_SHORT: Final = struct.Struct("<H")
_LONG: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Remains:
    """Where a worker was when it ended: which attach, which stage's area, which packet.

    `packet` is the first `SHOWN_MAX` octets, of `packet_bytes`; empty where it had none in hand.
    """

    serial: int
    area: int
    error: str
    packet: bytes
    packet_bytes: int


def create() -> int:
    """Return a memfd of the right size, which nobody can change any more; the caller closes it. Raises OSError."""
    fd = os.memfd_create("tunledger-packets", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, _ROWS_AT + BATCH_MAX * STRIDE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


class BlackBox:
    """The worker's end.

    Attributes:
        words: see above; the packet loop writes them in place.
        rows: the packets.
        buffers: what is read into by devices without headers, and `framed` by those with.
    """

    def __init__(self, fd: int) -> None:
        """Map the memory behind `fd`, which may be closed afterwards. Raises OSError."""
        whole = memoryview(mmap.mmap(fd, _ROWS_AT + BATCH_MAX * STRIDE))
        self.words: Final = whole[: 8 * _WORDS].cast("Q")
        self.rows: Final = Rows(whole[_ROWS_AT:], STRIDE, BATCH_MAX)
        starts = [_ROWS_AT + number * STRIDE for number in range(BATCH_MAX)]
        room = STRIDE - HEADER_BYTES  # the end of a row is the next one's header
        self.buffers: Final = [whole[start : start + room] for start in starts]
        self.framed: Final = [whole[start - HEADER_BYTES : start + room] for start in starts]
        self._before: Final = [whole[start - HEADER_BYTES : start] for start in starts]
        self._headers: list[memoryview] = []
        memory = ctypes.addressof(ctypes.c_char.from_buffer(whole))
        self._addresses: Final = array("Q", [memory + start for start in starts])
        self._framed_addresses: Final = array("Q", [memory + start - HEADER_BYTES for start in starts])
        self.noted = False
        """Whether an end has been written down."""
        self._lengths: Final = whole[_LENGTHS_AT : _LENGTHS_AT + 4 * BATCH_MAX].cast("I")
        self._text: Final = whole[_TEXT_AT:_PACKET_AT]
        self._packet: Final = whole[_PACKET_AT : _PACKET_AT + 4 + SHOWN_MAX]

    def packets(self, lengths: list[int]) -> list[memoryview]:
        """The packets in the first rows, whose lengths these are, one at least; the lengths are written down."""
        if self.rows.hold(lengths):
            self._lengths[: len(lengths)] = array("I", lengths)
        return self.rows.views()

    def headers(self, count: int) -> list[memoryview]:
        """What `framed` has in front of each of the first `count` packets, in a list of the caller's own."""
        known = self._headers
        known += map(memoryview, self._before[len(known) : count])
        return known[:count]

    def addresses(self, *, framed: bool) -> "array[int]":
        """Where `buffers`, or `framed`, begin in this process's memory."""
        return self._framed_addresses if framed else self._addresses

    def holds(self, packets: list[memoryview], headers: list[memoryview] | None, *, framed: bool) -> bool:
        """Whether these are the first of `packets`, in the rows still, and their headers (if `framed`) of `headers`."""
        if not self.rows.holds(packets):
            return False
        return not framed or (headers is not None and same(headers, self._headers))

    def forget(self) -> None:
        """The views may be of no use any more: somebody else had them in hand."""
        self.rows.forget()
        self._headers = []

    def note(self, error: BaseException, packet: memoryview | None) -> None:
        """Write down what Python said, and about which packet; the first time counts."""
        if self.noted:
            return
        self.noted = True
        said = f"{type(error).__name__}: {error}".encode(errors="replace")[:_TEXT_MAX]
        _SHORT.pack_into(self._text, 0, len(said))
        self._text[2 : 2 + len(said)] = said
        shown = b"" if packet is None else bytes(packet[:SHOWN_MAX])
        self._packet[4 : 4 + len(shown)] = shown
        _LONG.pack_into(self._packet, 0, 0 if packet is None else len(packet))
        self.words[COUNT] = 0


class Recovered:
    """The supervisor's end, read-only. The mapping goes away with the last reference to this object."""

    def __init__(self, fd: int) -> None:
        """Map the memory behind `fd`, which may be closed afterwards. Raises OSError."""
        self._whole: Final = memoryview(mmap.mmap(fd, _ROWS_AT + BATCH_MAX * STRIDE, prot=mmap.PROT_READ))
        self._words: Final = self._whole[: 8 * _WORDS].cast("Q")

    def turn(self) -> int | None:
        """Which turn of its loop the worker is in; None while it waits for something to do."""
        turn, busy = self._words[TURN], self._words[BUSY]
        return turn if busy else None

    def read(self) -> Remains | None:
        """What a worker that is dead had in hand; None if that was no stage's doing."""
        _, _, serial, area, count, index, _, _ = self._words.tolist()
        if not area:
            return None
        said = bytes(self._whole[_TEXT_AT + 2 :][: min(_TEXT_MAX, _SHORT.unpack_from(self._whole, _TEXT_AT)[0])])
        if count and index < BATCH_MAX:
            (length,) = _LONG.unpack_from(self._whole, _LENGTHS_AT + 4 * index)
            start = _ROWS_AT + index * STRIDE
        else:
            (length,) = _LONG.unpack_from(self._whole, _PACKET_AT)
            start = _PACKET_AT + 4
        packet = bytes(self._whole[start : start + min(length, SHOWN_MAX)])
        return Remains(serial, area - 1, said.decode(errors="replace"), packet, length)
