"""One device in a worker: its packets in and out, counted, and through its chain.

The hot path. What is asked of the worker, and which devices there are, is `worker`'s; what a stage is, `stages`'.

Theory of operation. A batch is read into the black box's buffers, which all devices share: it is through the chain
before the next device has its turn. Writes never wait: what the kernel does not take is counted and gone. A packet is
written by one stage's call at a time, and runs through the target's to_kernel stages first; those may send again, which
is followed `NESTED_MAX` deep and no deeper.
"""

import contextlib
import errno
import fcntl
import select
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from operator import attrgetter, not_
from typing import TYPE_CHECKING, Final

from service.dataplane.blackbox import AREA, COUNT, HEADER_BYTES, INDEX, SERIAL, BlackBox
from service.dataplane.contract import DROP_REASONS, Batch, DropReason, Mode, Packet
from service.dataplane.device_batch import DeviceBatch
from service.dataplane.device_io import DeviceIO
from service.dataplane.layout import DIRECTION_WORDS, DROPS_AT, CounterWriter
from service.dataplane.ring import Ring
from service.dataplane.segments import is_plain, plain
from service.dataplane.stages import Chain, run
from service.dataplane.work import Setup
from service.packet.flowkey import Alike, Entry, Meter

if TYPE_CHECKING:
    from service.dataplane.packet_lines import PacketLines

_TUNSETOFFLOAD: Final = 0x400454D0  # linux/if_tun.h

NESTED_MAX: Final = 8
"""Devices that one packet may be sent through before it is taken to go round."""

_REASON: Final = {reason: index for index, reason in enumerate(DROP_REASONS)}
_CUSTOM: Final = _REASON[DropReason.CUSTOM]
_END_OF_CHAIN: Final = _REASON[DropReason.END_OF_CHAIN]

_KIND_OF: Final = attrgetter("kind")

Drop = Callable[[str, int], None]
Wire = bytes | bytearray | memoryview


class Port:
    """An interface's name as others' output (`contract.Output`): the device behind it comes and goes."""

    __slots__ = ("__weakref__", "device", "name")

    def __init__(self, name: str, device: "Device | None") -> None:
        self.name: str = name
        self.device = device

    @property
    def ready(self) -> bool:
        """See `contract.Output.ready`."""
        return self.device is not None and self.device.up

    def send(self, batch: Batch, indexes: Sequence[int] | None = None) -> int:
        """See `contract.Output.send`."""
        packets, headers = batch.packets, batch.headers
        if indexes is not None:
            packets = [packets[index] for index in indexes]
            headers = None if headers is None else [headers[index] for index in indexes]
        device = self.device
        if device is None:
            batch._drop(DropReason.NO_OUTPUT, len(packets))  # the batch's other half
            return 0
        if device.mode != batch.mode:
            batch._drop(DropReason.MODE, len(packets))
            return 0
        if batch.kind >= 0 and not device.chain.to_kernel:
            return device.emit(packets, headers, batch.kind, batch._drop)
        entries = batch.entries
        if indexes is not None and entries is not None:
            entries = [entries[index] for index in indexes]
        return device.send(packets, headers, entries, batch._drop)


class Ports:
    """The outputs of a worker's devices by name, as long as somebody holds them."""

    def __init__(self, box: BlackBox, ring: Ring | None) -> None:
        """`box` is what the worker reads into, with `ring` if there is one."""
        self.ring: Final = ring
        self.meters: Final[Mapping[Mode, Meter]] = {
            "tun": Meter("tun", rows=box.rows),
            "tap": Meter("tap", rows=box.rows),
        }
        self._ports: weakref.WeakValueDictionary[str, Port] = weakref.WeakValueDictionary()
        self._devices: dict[str, Device] = {}

    def port(self, name: str) -> Port:
        """The output of that name, its device there or not."""
        found = self._ports.get(name)
        if found is None:
            found = self._ports[name] = Port(name, self._devices.get(name))
        return found

    def add(self, device: "Device") -> None:
        """From now on this is the device of its name."""
        self._devices[device.name] = device
        port = self._ports.get(device.name)
        if port is not None:
            port.device = device

    def remove(self, device: "Device") -> None:
        """It is no longer there."""
        if self._devices.get(device.name) is device:
            del self._devices[device.name]
            port = self._ports.get(device.name)
            if port is not None:
                port.device = None

    def look(self) -> None:
        """See whether those that were down are up again."""
        for port in list(self._ports.values()):
            if port.device is not None and not port.device.up:
                port.device.look()


class Device:
    """An attached device. Closing `file` closes the fd."""

    def __init__(
        self,
        fd: int,
        slot: int,
        serial: int,
        setup: Setup,
        *,
        counters: CounterWriter,
        box: BlackBox,
        ports: Ports,
        lines: "PacketLines | None",
        poke: Callable[[], None],
    ) -> None:
        """Take over `fd` and zero its figures. `poke` has the service look at the worker."""
        self.fd: Final = fd
        self._io: Final = DeviceIO(fd, box, ports.ring, vnet_hdr=setup.vnet_hdr)
        self.file: Final = self._io.file
        self.slot: Final = slot
        self.serial: Final = serial
        self.name: Final = setup.name
        self.mode: Final[Mode] = setup.mode
        self.vnet_hdr: Final = setup.vnet_hdr
        self.box: Final = box
        self.output: Final = ports.port
        self.poke: Final = poke
        self._lines: Final = lines
        self.chain = Chain()
        self.up = True
        """Whether it took the last packet that was written to it, or has come up since."""
        self._meter: Final = ports.meters[setup.mode]
        self._counters: Final = counters
        self._start: Final = counters.clear(slot)
        self._words: Final = counters.words
        self._drops_at: Final = self._start + DROPS_AT
        self._nested = 0

    def close(self) -> None:
        """Close the descriptor. What offloads were asked for are taken back first: the device would keep them, and hand
        segments to a next reader that does not expect any.
        """
        if self.vnet_hdr:
            with contextlib.suppress(OSError):  # it is gone, or no TUN
                fcntl.ioctl(self.fd, _TUNSETOFFLOAD, 0)
        self.file.close()

    def clear_area(self, area: int) -> int:
        """Zero the figures of a stage that is about to begin; return its first word."""
        return self._counters.clear_area(self._start, area)

    # -- in

    def drain(self, events: int) -> int:
        """Read up to a batch, count it, and hand it through the chain. Return the errno that it is lost with, or 0.

        Raises what a processor raises.
        """
        lengths, error = self._io.read(events)
        if lengths:
            left = self._hand_through(lengths)
            if self.vnet_hdr:
                self._io.fit(self.box.rows.octets, len(lengths), sent=not left)
        return error

    def _hand_through(self, lengths: list[int]) -> int:
        """Return how many packets came out at the end of the chain."""
        box = self.box
        count = len(lengths)
        headers: list[Packet] | None = None
        packets = box.packets(lengths)
        if self.vnet_hdr:
            headers = box.headers(count)
        looked: list[Entry] | Alike
        alike = self._meter.alike()
        if alike is None:
            looked = self._meter.look(packets)
            self._add(self._start, list(map(_KIND_OF, looked)), lengths)
        else:
            self._add_alike(self._start, alike.kind, count, box.rows.octets)
            # A stage of another package may write into packets that go on: look before it does.
            looked = self._meter.look_alike(alike, packets) if self.chain.foreign else alike
        if self._lines is not None:
            for packet in packets:
                self._lines.packet(self.name, self.mode, packet, len(packet))
        chain = self.chain.from_kernel
        if not chain:
            self._words[self._drops_at + _END_OF_CHAIN] += count
            return count
        box_words = box.words
        box_words[SERIAL] = self.serial
        box_words[INDEX] = 0
        box_words[COUNT] = count
        batch = DeviceBatch(self, "from_kernel", packets, headers, looked, self._meter)
        try:
            run(chain, batch, self._words, box_words)
        except BaseException as error:
            box.note(error, batch.packets[batch.at] if batch.at < len(batch.packets) else None)
            raise
        box_words[COUNT] = 0
        if self.chain.foreign:
            box.forget()
        left = len(batch.packets)
        if left:
            self._words[self._drops_at + _END_OF_CHAIN] += left
        return left

    # -- out

    def answer(self, packets: list[Packet], kinds: list[int] | int | None = None) -> int:
        """See `Batch.answer_all` and `answer_looked`."""
        if self.chain.to_kernel:
            return self.send(packets, None, None, self.drop)
        return self.emit(packets, None, kinds, self.drop)

    def drop(self, reason: str, count: int) -> None:
        """Count packets that end here."""
        self._words[self._drops_at + _REASON.get(reason, _CUSTOM)] += count

    def send(self, packets: list[Packet], headers: list[Packet] | None, entries: list[Entry] | None, drop: Drop) -> int:
        """Write packets into the device, through the to_kernel stages; return how many it took.

        What the kernel refuses is counted by `drop`, what a stage drops at this device. Raises what a processor
        raises.
        """
        if self.chain.to_kernel:
            if self._nested == NESTED_MAX:
                drop(DropReason.OUTPUT_REFUSED, len(packets))
                return 0
            if self.chain.foreign:  # what is replaced or released here is another batch's still
                packets = [memoryview(packet) for packet in packets]
                headers = None if headers is None else [memoryview(header) for header in headers]
            batch = DeviceBatch(self, "to_kernel", packets, headers, entries, self._meter)
            self._run_nested(batch)
            packets, headers, entries = batch.packets, batch.headers, batch.entries
        if not packets:
            return 0
        return self.emit(packets, headers, None if entries is None else list(map(_KIND_OF, entries)), drop)

    def _run_nested(self, batch: DeviceBatch) -> None:
        """The to_kernel stages, in the middle of another device's stage."""
        box = self.box.words
        serial, area, count, index = box[SERIAL], box[AREA], box[COUNT], box[INDEX]
        box[SERIAL] = self.serial
        box[COUNT] = 0  # the packets may be no buffers' of ours
        self._nested += 1
        try:
            run(self.chain.to_kernel, batch, self._words, box)
        except BaseException as error:
            self.box.note(error, batch.packets[batch.at] if batch.at < len(batch.packets) else None)
            raise
        self._nested -= 1
        if self.chain.foreign:
            self.box.forget()
        box[SERIAL], box[AREA], box[COUNT], box[INDEX] = serial, area, count, index

    def emit(
        self, packets: list[Packet], headers: list[Packet] | None, kinds: list[int] | int | None, drop: Drop
    ) -> int:
        """Write packets that are through the to_kernel stages, if there are any, and count what was taken; see `send`.

        `kinds` are their classes, or the one that all of them are of, or None if nobody has looked.
        """
        if not packets:
            return 0
        if headers is not None and not self.vnet_hdr and not is_plain(headers):
            packets, _ = plain(packets, headers, self.mode, drop)
            headers = kinds = None
            if not packets:
                return 0
        done = self._io.write(packets, headers)
        if min(done) >= 0 and isinstance(kinds, int):
            self.up = True
            more = HEADER_BYTES * len(done) if self.vnet_hdr else 0
            self._add_alike(self._start + DIRECTION_WORDS, kinds, len(done), sum(done) - more)
            return len(done)
        if min(done) < 0:
            refused = [octets < 0 for octets in done]
            for error, count in Counter(compress(done, refused)).items():
                drop(self._why(-error), count)
            taken = list(map(not_, refused))
            packets = list(compress(packets, taken))
            if isinstance(kinds, list):
                kinds = list(compress(kinds, taken))
        if packets:
            self.up = True
            start = self._start + DIRECTION_WORDS
            if isinstance(kinds, int):
                self._add_alike(start, kinds, len(packets), sum(map(len, packets)))
            else:
                self._add(start, kinds or list(map(_KIND_OF, self._meter.look(packets))), list(map(len, packets)))
        return len(packets)

    def _why(self, error: int) -> str:
        """The reason that a write that failed is counted with (drivers/net/tun.c, tun_get_user)."""
        match error:
            case errno.EIO:
                self.up = False
                return DropReason.OUTPUT_DOWN
            case errno.EBADFD | errno.ENODEV | errno.EPIPE | errno.ECONNRESET:
                self.up = False
                return DropReason.NO_OUTPUT
            case errno.EAGAIN | errno.ENOBUFS | errno.ENOMEM:
                return DropReason.OUTPUT_FULL
            case _:
                return DropReason.OUTPUT_REFUSED

    def look(self) -> None:
        """See whether it is up: a TUN that is down is never writable (tun.c, tun_sock_writeable)."""
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        self.up = any(events & select.POLLOUT for _, events in poll.poll(0))

    def _add_alike(self, start: int, kind: int, count: int, octets: int) -> None:
        at = start + 2 * kind
        words = self._words
        words[at] += count
        words[at + 1] += octets

    def _add(self, start: int, kinds: list[int], lengths: list[int]) -> None:
        """Count packets by class; mostly they are all of one."""
        if kinds.count(kinds[0]) == len(kinds):
            self._add_alike(start, kinds[0], len(kinds), sum(lengths))
            return
        words = self._words
        for kind in set(kinds):
            at = start + 2 * kind
            words[at] += kinds.count(kind)
            words[at + 1] += sum(compress(lengths, map(kind.__eq__, kinds)))
