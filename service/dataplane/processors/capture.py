"""The processor `capture`: packets as pcapng into files that the service opens, or live into a pipe.

It opens, names and deletes nothing: descriptors come with the stage (`context.files`) and by `take_file`. What the
octets mean is `packet.pcapng`'s.

Theory of operation. One write(2) for each batch. Two kinds of output:

- a file (the default). Once it has `size_bytes`, or is `interval_s` old, the processor asks for the next one (figure
  `files_wanted`, `context.poke`) and goes on in this one until `take_file` brings it: no packet waits for the service.
  Each file is a capture of its own, with headers and, at its end, statistics.
- a pipe or socket (option `live`) that must not block. What it does not take is dropped and counted. A block that was
  written in part is finished before anything else, so that the stream never breaks; at most one batch waits so.

An error of a write other than EAGAIN ends the capture: the full disk, the reader who went away. It is told with figure
`stopped`, an errno, and everything from then on counts as dropped. The packets go on in any case.

Segments are captured as the kernel handed them over, like tcpdump does on a host with offloads: up to 64 KiB long, and
with checksums that a network card would have finished.
"""

import errno
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Protocol

from service.dataplane.contract import BOTH, Batch, Context, Direction, Processor
from service.packet import pcapng

APPLICATION: Final = "tunledger"
_FOREVER: Final = 1 << 62


class _Place(Context, Protocol):
    """What a stage of ours may do besides."""

    def poke(self) -> None:
        """Have the service look at the stage's figures soon."""
        ...


class Capture(Processor):
    """See the module. Options: `snaplen`, `size_bytes`, `interval_s`; `files` is the service's.

    A tap may have more: `live` writes to a pipe; with `max_packets` or `max_bytes` it ends by itself and says so with
    figure `finished`.
    """

    directions: ClassVar[frozenset[Direction]] = BOTH
    takes_segments: ClassVar[bool] = True
    wants_files: ClassVar[bool] = True
    figures: ClassVar[tuple[str, ...]] = ("packets", "bytes", "dropped", "files", "files_wanted", "stopped", "finished")

    context: _Place

    def __init__(self, options: Mapping[str, Any], context: _Place) -> None:
        super().__init__(options, context)
        self._snaplen: int = options["snaplen"]
        self._live: bool = options.get("live", False)
        size, interval = options.get("size_bytes"), options.get("interval_s")
        self._size_max: int = _FOREVER if size is None or self._live else size
        self._interval_ns: int = _FOREVER if interval is None or self._live else interval * 1_000_000_000
        self._fd = -1
        self._rest = b""
        self._stopped = False
        self._asked = False
        self._written = 0  # octets of this file
        self._received = self._dropped = 0  # packets of this file
        self._end_ns = _FOREVER
        self._now_ns = 0
        most, most_bytes = options.get("max_packets"), options.get("max_bytes")
        self._packets_left: int = _FOREVER if most is None else most
        self._bytes_left: int = _FOREVER if most_bytes is None else most_bytes
        if context.files:
            self._fd = context.files[0]
            self._begin()
        else:
            self._stop(errno.EBADF)

    def process(self, batch: Batch) -> None:
        """Write the packets of `batch`; all of them go on."""
        packets = batch.packets
        count = len(packets)
        if not count:
            return
        if self._packets_left < count or self._bytes_left <= 0:
            if self._packets_left <= 0 or self._bytes_left <= 0:
                return
            count = self._packets_left
            packets = packets[:count]
        self._received += count
        if self._stopped or (self._rest and not self._flush()):
            self._drop(count)
            return
        self._now_ns = time_ns = batch.time_ns
        octets = pcapng.packets(
            packets,
            time_ns=time_ns,
            flags=pcapng.OUTBOUND if batch.direction == "from_kernel" else pcapng.INBOUND,
            snaplen=self._snaplen,
        )
        if not self._write(octets):
            self._drop(count)
            return
        self.context.count("packets", count)
        self._packets_left -= count
        if self._packets_left <= 0 or self._bytes_left <= 0:
            self._reach_limit()
            return
        if self._end_ns == _FOREVER:
            self._end_ns = time_ns + self._interval_ns
        if (self._written >= self._size_max or time_ns >= self._end_ns) and not self._asked:
            self._ask()

    def tick(self, now_ns: int) -> None:
        """Finish what waits, and end a file whose time is over."""
        self._now_ns = now_ns
        if self._rest and not self._stopped:
            self._flush()
        if now_ns >= self._end_ns and not self._asked and not self._stopped:
            self._ask()

    def take_file(self, fd: int) -> None:
        """Go on in another file. It takes over the place of the one before, whose descriptor this closes."""
        if self._fd < 0:
            os.close(fd)
            return
        if not self._stopped:
            self._finish()
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)
        self._stopped = self._asked = False
        self._rest = b""
        self._written = self._received = self._dropped = 0
        self._end_ns = _FOREVER
        self._begin()

    def close(self) -> None:
        """Write the statistics."""
        if not self._stopped and (not self._rest or self._flush()):
            self._finish()

    def _begin(self) -> None:
        head = pcapng.section(APPLICATION) + pcapng.interface(self.context.interface, self.context.mode, self._snaplen)
        if self._write(head):
            self.context.count("files")

    def _finish(self) -> None:
        self._write(pcapng.statistics(time_ns=self._now_ns, received=self._received, dropped=self._dropped))

    def _ask(self) -> None:
        self._asked = True
        self.context.count("files_wanted")
        self.context.poke()

    def _reach_limit(self) -> None:
        self._asked = True  # no more files
        self.context.count("finished")
        self.context.poke()

    def _drop(self, count: int) -> None:
        self._dropped += count
        self.context.count("dropped", count)

    def _write(self, octets: bytes | memoryview) -> bool:
        """Write all of it, or as much as goes at once and keep the rest; False if nothing of it went."""
        try:
            taken = os.write(self._fd, octets)
            while taken < len(octets) and not self._live:
                taken += os.write(self._fd, memoryview(octets)[taken:])
        except BlockingIOError:
            return False
        except OSError as error:
            self._stop(error.errno or errno.EIO)
            return False
        if taken < len(octets):
            self._rest = bytes(octets[taken:])
        self._written += len(octets)
        self._bytes_left -= len(octets)
        self.context.count("bytes", len(octets))
        return True

    def _flush(self) -> bool:
        """Write what is left of a block that was begun; True if nothing is left."""
        try:
            taken = os.write(self._fd, self._rest)
        except BlockingIOError:
            return False
        except OSError as error:
            self._stop(error.errno or errno.EIO)
            return False
        self._rest = self._rest[taken:]
        return not self._rest

    def _stop(self, error: int) -> None:
        self._stopped = True
        self.context.count("stopped", error)
        self.context.poke()
