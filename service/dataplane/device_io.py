"""A device's reads and writes: a batch at once where there is a ring, one by one where there is none, or little to do.

Packets are read into the black box's rows, and may be written from there again. Writes never wait. Nothing here counts
packets, or knows why one is written; that is `device`'s.

Theory of operation. A ring pays where several packets wait: to ask for some that are not there costs as well. So the
batch before tells how many to ask for, and after a small one it is asked one by one until there is no more. What is
written by a ring has to lie in the rows, as it does unless a stage has put something else in its place. Nor does it
pay to read large packets with one: a call is little beside the copy then, and the kernel's side of a ring is more.
"""

import errno
import io
import os
import select
from collections.abc import Iterator
from itertools import repeat, takewhile
from typing import Final

from service.dataplane.blackbox import HEADER_BYTES, BlackBox
from service.dataplane.contract import BATCH_MAX, NO_OFFLOAD, Packet
from service.dataplane.ring import NOT_TAKEN, Reads, Ring

RING_MIN: Final = 24
"""Packets from which on a ring costs less than a call for each, where a call is not cheap. Where it is, little is lost:
reads of 16, 32, 64 took 6.4, 10.0, 16.7 us by a ring, 5.7, 10.4, 18.7 us one by one."""

MORE: Final = 8
"""Packets that are asked for beyond as many as came last. One that is not there costs as much as one that is."""

BATCH_BYTES: Final = 512 * 1024
"""With large segments a batch that is sent on ends about here: what is read has to be in the cache still when it is
written, and half of a core's 1 MiB is room for 8 segments of 60 kB. What a batch costs is some 20 us."""

BATCH_BYTES_READ: Final = 2 * BATCH_BYTES
"""And one of which some came out at the end of the chain: mostly only the headers have to be in the cache, as for
`inspect`. Twice as many cost more again."""

LARGE: Final = 4096
"""Octets of a batch's packets on average, above which the next batch is read one by one."""

BATCH_MIN: Final = 4

_FOR_ALL: Final = frozenset({errno.EIO, errno.EBADFD, errno.ENODEV, errno.EPIPE, errno.ECONNRESET})
"""Where one packet was refused for these, so would be the next: down, or gone (drivers/net/tun.c, tun_get_user)."""

_NOTHING: Final = frozenset({-errno.EAGAIN, NOT_TAKEN})


class DeviceIO:
    """What a device reads and writes with. Closing `file` closes the fd.

    Attributes:
        vnet_hdr: whether there is a virtio_net_hdr in front of each packet.
    """

    def __init__(self, fd: int, box: BlackBox, ring: Ring | None, *, vnet_hdr: bool) -> None:
        """Take over `fd`, which does not block; `ring` if there is one."""
        self.fd: Final = fd
        self.file: Final = io.FileIO(fd, "r+b")
        self.vnet_hdr: Final = vnet_hdr
        self._box: Final = box
        self._ring = ring
        self._whole: Final = box.framed if vnet_hdr else box.buffers
        self._buffers = self._whole  # what the next batch is read into
        self._reads: Reads | None = None
        self._came = 0  # packets in the last batch
        self._large = False  # whether they were above `LARGE`

    # -- in

    def read(self, events: int) -> tuple[list[int], int]:
        """Read up to a batch into the rows of the black box: how long the packets are, and the errno that the device
        is lost with, or 0.

        EBADFD: deleted (drivers/net/tun.c, tun_chr_read_iter). EFAULT: while it was being deleted.
        """
        asked, error = len(self._buffers), 0
        lengths: list[int] = []
        if self._came >= RING_MIN and not self._large and self._ring is not None:
            asked = min(asked, self._came + MORE)
            lengths, error = self._read_at_once(self._ring, asked)
        if not lengths and not error:
            read = self.file.readinto
            try:
                # readinto is one read(2), and says None instead of raising when there is nothing to read.
                lengths.extend(takewhile(bool, map(read, self._buffers)))
            except OSError as failure:
                error = failure.errno or errno.EIO
        if not error and len(lengths) < asked and events & (select.EPOLLERR | select.EPOLLHUP):
            error = self._ended()
        self._came = len(lengths)
        if self.vnet_hdr:
            lengths = [max(0, length - HEADER_BYTES) for length in lengths]
        return lengths, error

    def _read_at_once(self, ring: Ring, count: int) -> tuple[list[int], int]:
        if self._reads is None:
            self._reads = ring.reads(self.fd, self._box.addresses(framed=self.vnet_hdr), len(self._whole[0]))
        found = ring.read(self._reads, count)
        if min(found) > 0:
            return found, 0
        # Nothing was there for some. Others may have come for those behind them: they move up.
        found = ring.placed(found)
        error = next((-length for length in found if length < 0 and length not in _NOTHING), 0)
        if error == errno.EOPNOTSUPP:  # not to be read without waiting, by a ring
            self._ring, error = None, 0
        came = next(index for index, length in enumerate(found) if length <= 0)
        if max(found[came:]) <= 0:
            return found[:came], error
        lengths: list[int] = []
        for index, length in enumerate(found):
            if length > 0:
                if index > len(lengths):
                    self._whole[len(lengths)][:length] = self._whole[index][:length]
                lengths.append(length)
        return lengths, error

    def _ended(self) -> int:
        """Why it says that it has an end, if everything is read."""
        try:
            length = self.file.readinto(self._whole[-1])
        except OSError as failure:
            return failure.errno or errno.EIO
        if length is None:
            return errno.ENODEV  # being unregistered (tun.c, tun_chr_poll)
        return errno.EPIPE if length == 0 else 0  # the end of a socket; a TUN has none

    def fit(self, octets: int, count: int, *, sent: bool) -> None:
        """Have the next batch end where it should, if it is like this one: so large, and sent on or only looked at."""
        self._large = octets > LARGE * count
        wanted = BATCH_BYTES if sent else BATCH_BYTES_READ
        most = len(self._buffers)
        if octets > wanted and most > BATCH_MIN:
            self._buffers = self._whole[: most // 2]
        elif most < BATCH_MAX and count == most and octets <= wanted // 2:
            self._buffers = self._whole[: most * 2]

    # -- out

    def write(self, packets: list[Packet], headers: list[Packet] | None) -> list[int]:
        """Write packets, one at least, each with its header if the device has them: what each came to, octets or a
        negative errno. After one that says that the device is down or gone, the others may not be tried.
        """
        ring = self._ring
        if ring is not None and len(packets) >= RING_MIN and self._box.holds(packets, headers, framed=self.vnet_hdr):
            addresses = self._box.addresses(framed=self.vnet_hdr)
            more = HEADER_BYTES if self.vnet_hdr else 0
            found = ring.write(self.fd, addresses[: len(packets)], self._box.rows.sizes(len(packets), more))
            if min(found) < 0:
                found = ring.placed(found)
            if found[0] == -errno.EOPNOTSUPP:
                self._ring = None
            elif found[-1] != NOT_TAKEN:
                return found
            else:
                taken = found.index(NOT_TAKEN)
                rest = None if headers is None else headers[taken:]
                return found[:taken] + self._write_one_by_one(packets[taken:], rest)
        return self._write_one_by_one(packets, headers)

    def _write_one_by_one(self, packets: list[Packet], headers: list[Packet] | None) -> list[int]:
        done: list[int | None] = []
        while len(done) < len(packets):
            try:
                done.extend(self._written(packets, headers, len(done)))
            except OSError as failure:
                error = failure.errno or errno.EIO
                done.extend([-error] * (len(packets) - len(done) if error in _FOR_ALL else 1))
        return [-errno.EAGAIN if octets is None else octets for octets in done]

    def _written(self, packets: list[Packet], headers: list[Packet] | None, first: int) -> Iterator[int | None]:
        """Write packets, from the one at `first` on, as the octets that each took are asked for; None for a full one.

        Raises OSError.
        """
        if first:
            packets = packets[first:]
            headers = headers[first:] if headers else None
        if not self.vnet_hdr:
            return map(self.file.write, packets)
        parts = zip(headers or repeat(NO_OFFLOAD), packets, strict=False)
        return map(os.writev, repeat(self.fd), parts)
